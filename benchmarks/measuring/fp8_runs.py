"""Trainings that FP8 is judged by: ordinary runs, each in its folder, where it goes on if it was stopped."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf.schema import Config
from infra.distributed import World
from infra.fp8.recipe import RECIPES
from infra.metrics import read_records
from infra.optim import Bucket, sync_weights
from launch.fit import alone_in, fit, resume
from launch.trainer import Trainer

LAST = 50  # steps whose mean loss is compared
NUDGED = "bf16_nudged"

# V3's proportions at about 23 million parameters; `debug` has 3.6. `wide` is `debug` at a width of eight tiles.
MODELS = {
    "debug": ["model=debug"],
    "23M": [
        "model=debug",
        "model.hidden_size=384",
        "model.intermediate_size=1024",
        "model.moe_intermediate_size=160",
        "model.num_hidden_layers=6",
        "model.num_attention_heads=8",
        "model.num_key_value_heads=8",
        "model.q_lora_rank=192",
        "model.kv_lora_rank=128",
    ],
    "wide": ["model=debug", "model.hidden_size=1024", "model.num_hidden_layers=3"],
}
BATCH, LENGTH = 8, 64


class Run(NamedTuple):
    """recipe: one of FP8's, `bf16`, `fp32`, or `bf16_nudged` (see `nudge`). outlier: log2 of s (see `plant`)."""

    model: str
    seed: int
    steps: int
    recipe: str
    outlier: int = 0

    @property
    def name(self) -> str:
        return f"{self.model}-{self.recipe}-{self.seed}" + (f"-outlier_{self.outlier}" if self.outlier else "")

    @property
    def bf16(self) -> Run:
        return self._replace(recipe="bf16", outlier=0)


def config_of(run: Run, data: Path, runs: Path, batch: int) -> Config:
    is_fp8 = run.recipe in RECIPES
    name = run.recipe.removesuffix("_nudged")
    words = [
        *MODELS[run.model],
        *(["precision=fp8", f"precision.recipe={name}"] if is_fp8 else [f"precision={name}"]),
        f"data.path={data}",
        f"data.sequence_length={LENGTH}",
        f"run.dir={runs / run.name}",
        f"train.steps={run.steps}",
        f"train.seed={run.seed}",
        f"train.global_batch_size={batch}",
        f"train.microbatch_size={batch}",
        "train.eval_samples=256",
        # Small steps, and routing biases that move slowly, as in V3: at 4e-4 two BF16 runs that differ by a rounding
        # are 0.4 % apart after 400 steps, so that nothing smaller could be told from it.
        "optim.lr.peak=1e-4",
        "train.bias_update_speed=0.001",
        "train.log_every=50",
        "checkpoint.every=100",
        "checkpoint.keep=1",
    ]
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_object(compose("pretrain", overrides=words))  # type: ignore[return-value]


def make(run: Run, data: Path, runs: Path, world: World, batch: int = BATCH) -> None:
    """Trains to the end, from wherever it stopped; does nothing where that is reached."""
    if is_finished(run, runs):
        return
    print(f"== {run.name}", flush=True)
    config = config_of(run, data, runs, batch)
    trainer = Trainer(config, world)
    with alone_in(Path(config.run.dir), world):
        resume(trainer)
        if run.recipe == NUDGED and trainer.step == 0:
            nudge(trainer)
        plant(trainer, run.outlier)
        fit(trainer)


def nudge(trainer: Trainer) -> None:
    """Moves every weight up or down by 2^-9 of itself: as far as rounding it to BF16 moves it at most."""
    generator = torch.Generator().manual_seed(0)
    for bucket in trainer.replica.buckets:
        signs = torch.randint(0, 2, bucket.master.shape, generator=generator) * 2 - 1
        bucket.master.data.mul_(1 + 2.0**-9 * signs)
    sync_weights(trainer.replica.buckets)


CHANNEL = 0
GAINS = ("input_layernorm.weight", "post_attention_layernorm.weight")
READERS = (
    *("q_a_proj.weight", "kv_a_proj_with_mqa.weight"),
    *("gate_proj.weight", "up_proj.weight", "mlp.gate.weight", "experts.gate_up_proj"),
)


def plant(trainer: Trainer, outlier: int) -> None:
    """Makes one channel of every layer's two norms s = 2^outlier times as large, without changing the function.

    The gain of the channel is multiplied by s, and the columns of all matrices that read it are divided by s. The
    trainer goes on in the coordinates without s, and the gradients it gets are mapped back into them. As s is a power
    of two, every product in FP32 and BF16 keeps its mantissa: such a run is the same to the bit for every s.
    """
    if not outlier:
        return
    run, buckets = trainer._run, trainer.replica.buckets
    factors = [_factors(bucket, 2.0**outlier) for bucket in buckets]

    def planted(*args: object, **words: object) -> dict[str, float]:
        for bucket, factor in zip(buckets, factors, strict=True):
            bucket.weight.mul_(factor)
        weights = run(*args, **words)  # type: ignore[arg-type]
        for bucket, factor in zip(buckets, factors, strict=True):
            bucket.weight.div_(factor)
            bucket.grad.mul_(factor)
        return weights

    trainer._run = planted  # type: ignore[method-assign]


def _factors(bucket: Bucket, s: float) -> torch.Tensor:
    flat = torch.ones_like(bucket.weight)
    for name, view in bucket.views(flat).items():
        if name.endswith(GAINS):
            view[CHANNEL] = s
        elif name.endswith(READERS):
            view[..., CHANNEL] = 1 / s
    return flat


def checkpoint_of(run: Run, runs: Path) -> Path:
    return runs / run.name / "checkpoints" / f"step_{run.steps}"


def is_finished(run: Run, runs: Path) -> bool:
    return len(read_records(runs / run.name)) == run.steps and checkpoint_of(run, runs).exists()


class Comparison(NamedTuple):
    """One run against the BF16 run of the same seed. off: of the mean loss of the last steps, relative; off_held_out:
    of the loss on held-out text. deviation: root mean square of the relative difference of single steps, over all."""

    run: Run
    loss: float
    bf16: float
    off: float
    off_held_out: float
    deviation: float


def compare(run: Run, runs: Path) -> Comparison:
    ours, theirs = read_records(runs / run.name), read_records(runs / run.bf16.name)
    loss, bf16 = (statistics.fmean(r["lm_loss"] for r in each[-LAST:]) for each in (ours, theirs))
    single = [a["lm_loss"] / b["lm_loss"] - 1 for a, b in zip(ours, theirs, strict=True)]
    held_out = ours[-1]["eval_loss"] / theirs[-1]["eval_loss"] - 1
    deviation = statistics.fmean(x * x for x in single) ** 0.5
    return Comparison(run, loss, bf16, loss / bf16 - 1, held_out, deviation)


def drift(run: Run, runs: Path) -> list[float]:
    """Per cent by which the mean loss of the last 50 steps is above BF16's, from step 50 on."""
    ours, theirs = ([r["lm_loss"] for r in read_records(runs / each.name)] for each in (run, run.bf16))
    ends = range(LAST, run.steps + 1)
    return [100 * (sum(ours[e - LAST : e]) / sum(theirs[e - LAST : e]) - 1) for e in ends]
