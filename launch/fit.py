"""A run in its folder: resume, train, evaluate, checkpoint, and say at the end where everything lies.

run.dir/config.yaml      the resolved configuration, with the git revision and the overrides of the command line
run.dir/metrics.jsonl    one record a step                                                  (infra/metrics.py)
run.dir/tensorboard/
run.dir/incidents.jsonl  skipped steps, spikes, restarts, damage                            (infra/incidents.py)
run.dir/trace/           the last step of a pipeline, measured over simulated              (launch/trace.py)
run.dir/checkpoints/     step_<n>                                                           (infra/checkpoint.py)
run.dir/lock             who is at work here                                                (infra/run_lock.py)
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.schema import Config
from infra import checkpoint, incidents
from infra.distributed import World, any_rank
from infra.metrics import Metrics, read_records
from infra.prepare import prepare_default
from infra.run_lock import locked
from infra.token_file import read_tokenizer
from infra.wording import counted
from launch.checked_mesh import checked_mesh
from launch.files import save
from launch.hang import watchdog
from launch.rollback import left_out, roll_back
from launch.trainer import Trainer
from launch.waits import Waits
from parallel.config import shown_layout

DEFAULT_DATA = Path("data/python_stdlib")


def with_data(config: Config, world: World) -> Config:
    """The config with its data in place: where none is named, the default data set, made on first use by rank 0."""
    if config.data.path:
        return config
    checked_mesh(config, world.size)  # so that what cannot run is refused before seconds of work
    error: Exception | None = None
    if world.is_main:
        try:
            prepare_default(DEFAULT_DATA, config.data.held_out)
        except Exception as failure:
            error = failure
    if any_rank(error is not None):
        raise error or ValueError(f"rank 0 could not prepare the default data set in {DEFAULT_DATA}")
    return replace(config, data=replace(config.data, path=str(DEFAULT_DATA)))


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Keeps other runs out of `folder`. Raises ValueError on all ranks where one is at work there. Collective."""
    with ExitStack() as stack:
        error: ValueError | None = None
        if world.is_main:
            try:
                stack.enter_context(locked(folder))
            except ValueError as failure:
                error = failure
        if any_rank(error is not None):
            raise error or ValueError(f"rank 0 could not lock run.dir={folder}")
        yield


def open_run_folder(config: Config, overrides: list[str]) -> None:
    """Writes config.yaml, headed by what made it, and the data's tokenizer, so that the run is whole by itself."""
    folder = Path(config.run.dir)
    head = f"# revision: {_revision()}\n# overrides: {' '.join(overrides)}\n"
    try:
        save(folder / "config.yaml", head + OmegaConf.to_yaml(OmegaConf.structured(config)))
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
    if trainer.step >= config.train.steps:
        if world.is_main:
            print(f"{folder} is at step {trainer.step} already: nothing to do for train.steps={config.train.steps}")
        return
    if due and config.checkpoint.asynchronous:
        trainer.reserve_copies()
    last_saved = trainer.step
    waits = Waits()
    with _metrics(trainer, folder) if world.is_main else nullcontext() as metrics, watchdog(trainer) as watch:
        limit = config.train.max_skipped_steps
        while (
            trainer.step < config.train.steps and trainer.skipped_in_a_row < limit and not trainer.asked_to_stop(watch)
        ):
            watch.doing("a step")
            record, histograms = trainer.train_step()
            if trainer.skipped_in_a_row:
                _note_skipped_step(trainer, record, metrics)
            if trainer.losses.has_spiked:
                watch.doing("a rollback", on_disk=True)
                if roll_back(trainer, record["lm_loss"]):
                    last_saved = trainer.step
                    if metrics:
                        metrics.go_back(trainer.step)
                        metrics.say(incidents.read(folder)[-1]["why"])
                    continue
            is_last = trainer.step == config.train.steps
            if is_last or (config.train.eval_every and trainer.step % config.train.eval_every == 0):
                watch.doing("an evaluation")
                record |= trainer.evaluate()
            if metrics:
                metrics.write(record, histograms)
                if why := waits.add(record):
                    incidents.note(folder, "slow_rank", trainer.step, why, rank=record["straggler_rank"])
                    metrics.say(why)
            if due and trainer.step % due == 0 and not is_last:
                watch.doing("a checkpoint", on_disk=True)
                trainer.save(checkpoints, wait=not config.checkpoint.asynchronous)
                last_saved = trainer.step
        watch.doing("the end", on_disk=True)
        if trainer.step > last_saved:
            trainer.save(checkpoints)
        trainer.saver.wait()
        if trainer.skipped_in_a_row == limit:
            raise RuntimeError(
                f"the last train.max_skipped_steps={limit} steps, to step {trainer.step}, had "
                "a loss or gradient that is not finite: nothing is learnt any more; try a lower optim.lr.peak"
            )
        if config.run.trace and config.parallel.pp > 1 and trainer.executor and trainer.mesh.at.dp == 0:
            from launch.trace import write_trace

            write_trace(folder / "trace", trainer.executor, trainer.mesh.pp, trainer.clock_offset)
        if metrics:
            metrics.finish(_places(trainer, checkpoints, waits))


def resume(trainer: Trainer) -> None:
    """Continues from the newest whole checkpoint of the run folder, if there is one. Collective.

    Every byte is read. Raises ValueError where there are checkpoints and the config wants none of them, or all are
    damaged.
    """
    config, folder = trainer.config, Path(trainer.config.run.dir)
    checkpoints = folder / "checkpoints"
    existing: list[Path] = []

    def note_damage(damaged: Path, why: str) -> None:
        incidents.note(folder, "damaged_checkpoint", checkpoint.step_of(damaged), why)

    if trainer.world.is_main:
        checkpoint.restore_replaced(checkpoints)
        for half, at in checkpoint.clear(checkpoints):
            why = f"{half} was half-written, and is removed"
            warnings.warn(why, stacklevel=2)
            incidents.note(folder, "half_written_checkpoint", at, why)
        existing = checkpoint.folders(checkpoints)
        if existing and not config.checkpoint.resume:
            raise ValueError(
                f"run.dir={config.run.dir} holds {counted(len(existing), 'checkpoint')} of an earlier run: "
                "choose another run.dir, or checkpoint.resume=true to go on with that one"
            )
    newest = checkpoint.newest(checkpoints, note_damage)
    if existing:
        if newest is None:
            raise ValueError(
                f"{counted(len(existing), 'checkpoint')} in {checkpoints}, none of them whole: choose another run.dir"
            )
        step = checkpoint.step_of(newest)
        before = read_records(folder)
        lost = max(0, before[-1]["step"] - step) if before else 0
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if step < config.train.steps:
            why = f"from step {step}" + f", repeating {counted(lost, 'step')}" * bool(lost)
            incidents.note(folder, "resumed", step, why, lost=lost, attempt=attempt)
    if newest is not None:
        changed = trainer.load(newest)
        if trainer.world.is_main and trainer.step < config.train.steps:
            print(f"{folder} goes on from step {trainer.step}" + f" with {', '.join(changed)}" * bool(changed))
    trainer.losses.left_out = max(trainer.losses.left_out, left_out(folder), key=len)


def _note_skipped_step(trainer: Trainer, record: Mapping[str, float], metrics: Metrics | None) -> None:
    if metrics:
        why = f"loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}: the step is skipped on all ranks"
        incidents.note(trainer.config.run.dir, "skipped_step", trainer.step, why)
        metrics.say(f"step {trainer.step}: {why}")


def _metrics(trainer: Trainer, folder: Path) -> Metrics:
    train = trainer.config.train
    return Metrics(folder, train.steps, done=trainer.step, log_every=train.log_every)


def _places(trainer: Trainer, checkpoints: Path, waits: Waits) -> dict[str, Any]:
    places: dict[str, Any] = {
        "layout": shown_layout(asdict(trainer.config.parallel)),
        "config": checkpoints.parent / "config.yaml",
    }
    newest = checkpoints / f"step_{trainer.step}"
    timeline = checkpoints.parent / "trace" / "timeline.html"
    if trainer.config.parallel.pp > 1 and timeline.exists():  # else it is of an earlier layout of this run
        places["timeline"] = timeline
    if newest.exists():
        places["checkpoint"] = newest
        places["sample"] = f"python launch/generate.py checkpoint={newest}"
    if whom := waits.summary():
        places["waited for"] = whom
    if incidents.read(checkpoints.parent):
        places["incidents"] = checkpoints.parent / incidents.FILE
    return places
