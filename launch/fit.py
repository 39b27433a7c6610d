"""A run in its folder: resume, train, evaluate, checkpoint, and say at the end where everything lies.

run.dir/config.yaml      the resolved configuration, with the git revision and the overrides of the command line
run.dir/metrics.jsonl    one record a step                                                  (infra/metrics.py)
run.dir/tensorboard/
run.dir/trace/           the last step of a pipeline, measured over simulated              (launch/trace.py)
run.dir/checkpoints/     step_<n>                                                           (infra/checkpoint.py)
"""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.schema import Config
from infra import checkpoint
from infra.distributed import World, any_rank, largest
from infra.metrics import Metrics
from infra.prepare import prepare_default
from infra.token_file import read_tokenizer
from launch.files import save
from launch.trainer import Trainer

DEFAULT_DATA = Path("data/python_stdlib")


def with_data(config: Config, world: World) -> Config:
    """The config with its data in place: where none is named, the default data set, made on first use by rank 0."""
    if config.data.path:
        return config
    error: Exception | None = None
    if world.is_main:
        try:
            prepare_default(DEFAULT_DATA, config.data.held_out)
        except Exception as failure:
            error = failure
    if any_rank(error is not None):
        raise error or ValueError(f"rank 0 could not prepare the default data set in {DEFAULT_DATA}")
    return replace(config, data=replace(config.data, path=str(DEFAULT_DATA)))


def open_run_folder(config: Config, settings: DictConfig, overrides: list[str]) -> None:
    """Writes config.yaml, headed by what made it, and the data's tokenizer, so that the run is whole by itself."""
    folder = Path(config.run.dir)
    head = f"# revision: {_revision()}\n# overrides: {' '.join(overrides)}\n"
    try:
        save(folder / "config.yaml", head + OmegaConf.to_yaml(settings, resolve=True))
        save(folder / "tokenizer.json", read_tokenizer(config.data.path).to_json())
    except OSError as error:
        raise ValueError(f"run.dir={folder} cannot be written ({error.strerror}): choose another folder") from None


def _revision() -> str:
    """Of this repository, as git describes it."""
    words = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # a machine without git trains too
        found = ""
    return found or "unknown"


def fit(trainer: Trainer) -> None:
    """Trains to the last step, or to a SIGTERM; either way the last whole step is saved. Collective."""
    config, world = trainer.config, trainer.world
    folder = Path(config.run.dir)
    checkpoints = folder / "checkpoints"
    due = config.checkpoint.every
    last_saved = trainer.step
    with _metrics(trainer, folder) if world.is_main else nullcontext() as metrics:
        while trainer.step < config.train.steps and not trainer.asked_to_stop():
            record, histograms = trainer.train_step()
            is_last = trainer.step == config.train.steps
            if is_last or (config.train.eval_every and trainer.step % config.train.eval_every == 0):
                record |= trainer.evaluate()
            if metrics:
                metrics.write(record, histograms)
            if due and trainer.step % due == 0 and not is_last:
                trainer.save(checkpoints)
                last_saved = trainer.step
        if trainer.step > last_saved:
            trainer.save(checkpoints)
        if config.run.trace and config.parallel.pp > 1 and trainer.executor and trainer.mesh.at.dp == 0:
            from launch.trace import write_trace

            write_trace(folder / "trace", trainer.executor, trainer.mesh.pp, trainer.clock_offset)
        if metrics:
            metrics.finish(_places(trainer, checkpoints))


def resume(trainer: Trainer) -> None:
    """Continues from the newest whole checkpoint of the run folder, if there is one. Collective.

    Rank 0 looks and reads every byte. Raises ValueError where there are checkpoints and the config wants none of them,
    or all are damaged.
    """
    config = trainer.config
    checkpoints = Path(config.run.dir) / "checkpoints"
    step = -1
    if trainer.world.is_main and (existing := checkpoint.folders(checkpoints)):
        if not config.checkpoint.resume:
            raise ValueError(
                f"run.dir={config.run.dir} holds {len(existing)} checkpoints of an earlier run: "
                "choose another run.dir, or checkpoint.resume=true to go on with that one"
            )
        newest = checkpoint.newest(checkpoints)
        if newest is None:
            raise ValueError(f"all {len(existing)} checkpoints in {checkpoints} are damaged: choose another run.dir")
        step = checkpoint.step_of(newest)
    step = int(largest(step))
    if step >= 0:
        trainer.load(checkpoints / f"step_{step}")


def _metrics(trainer: Trainer, folder: Path) -> Metrics:
    train = trainer.config.train
    return Metrics(folder, train.steps, done=trainer.step, log_every=train.log_every)


def _places(trainer: Trainer, checkpoints: Path) -> dict[str, Any]:
    places: dict[str, Any] = {"config": checkpoints.parent / "config.yaml"}
    newest = checkpoints / f"step_{trainer.step}"
    timeline = checkpoints.parent / "trace" / "timeline.html"
    if timeline.exists():
        places["timeline"] = timeline
    if newest.exists():
        places["checkpoint"] = newest
        places["sample"] = f"python launch/generate.py checkpoint={newest}"
    return places
