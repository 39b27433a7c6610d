"""Small training runs for tests: a few documents, a tiny model, any layout, on forked ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it, for 2 s: once here rather than on every forked rank

from conf.schema import Config, OptimConfig, TrainConfig
from infra.data import DataConfig
from infra.distributed import World
from infra.lr import LRConfig
from infra.precision import PrecisionConfig
from infra.prepare import PrepareConfig, prepare
from launch.fit import fit, resume
from launch.trainer import Trainer
from parallel.config import ParallelConfig
from parallel.straggler import PHASES
from tests.parallel.layouts import tiny

# What of a record depends on the clock, and so differs from run to run.
TIMES = {
    *("step_time", "tokens_per_second", "peak_memory_gb", "bubble", "pipeline_wait"),
    *(f"comm_{part}_{kind}" for part in ("time", "exposed") for kind in ("dispatch", "combine", "gradient")),
    *("straggler_rank", "straggler_wait", *(f"straggler_wait_{phase}" for phase in PHASES)),
}


def small_data(folder: Path) -> Path:
    """A hundred short documents, prepared with the byte tokenizer."""
    source = folder / "source"
    source.mkdir()
    for i in range(100):
        (source / f"{i}.txt").write_text(f"document {i}: " + " ".join(str(i * k % 97) for k in range(20)))
    prepare(PrepareConfig(source=str(source / "*.txt"), out=str(folder / "data"), held_out=0.1, workers=1), quiet=True)
    return folder / "data"


def config(data: Path, *, precision: str = "fp64", steps: int = 20, model=None, train=None, **parallel) -> Config:
    return Config(
        model=model or tiny(vocab_size=320, initializer_range=0.1),
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(precision),
        data=DataConfig(path=str(data), sequence_length=24),
        train=TrainConfig(**({"steps": steps, "global_batch_size": 8, "eval_samples": 8} | (train or {}))),
        optim=OptimConfig(lr=LRConfig(peak=1e-2, warmup_steps=2)),
    )


def train(rank: int, world_size: int, config: Config, steps: int) -> list[dict]:
    """The records of `steps` steps, and of an evaluation at the end; run it through `run_ranks`."""
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    records = [trainer.train_step()[0] for _ in range(steps)]
    return [*records, trainer.evaluate()]


def run_fit(rank: int, world_size: int, config: Config, faults: Callable[[Trainer], None] | None = None) -> None:
    """What launch/pretrain.py does with a config; `faults` arranges for something to go wrong."""
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    resume(trainer)
    if faults:
        faults(trainer)
    fit(trainer)


def in_folder(config: Config, folder: Path, every: int = 0) -> Config:
    """The run in `folder`, with a checkpoint `every` so many steps, of which three stay."""
    checkpoint = replace(config.checkpoint, every=every, keep=3)
    return replace(config, run=replace(config.run, dir=str(folder), trace=False), checkpoint=checkpoint)
