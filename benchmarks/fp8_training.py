"""FP8 training against BF16 on the same data: how far the loss is off, and what the recipe's choices are worth.

    python benchmarks/fp8_training.py [--data data/python_stdlib] [--runs runs/fp8_training] [--report FILE.md]

Every run is an ordinary one of the trainer, in a folder of its own under `--runs`. Started again, finished runs are
left alone and a broken one goes on from its checkpoint; `--only WORD` makes only the runs whose name has the word.

- `deepseek_v3` against `bf16`: the same seed, so the same weights and the same batches. V3's report (section 3.3) puts
  the relative difference of the loss below 0.25 %. Compared is the mean of the last 50 steps.
- `no_promotion`: the tensor core's 14-bit sums, never promoted to FP32. `tensor_scales`: one scale factor a tensor.
- The gradient of one batch at the weights that the BF16 run ended with, against FP32's: the distance in norm under each
  recipe. It has no noise of training in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.progress import track

from conf.schema import Config, register
from infra import distributed
from infra.distributed import World
from launch.fit import fit, resume
from launch.trainer import Trainer

LAST = 50  # steps whose mean loss is compared
PUBLISHED = 0.0025
GRADIENT_RECIPES = ("deepseek_v3", "hopper", "no_promotion", "block_gradients", "tensor_scales")

# V3's proportions at about 23 million parameters; `debug` has 3.6.
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
}
BATCH, LENGTH = 4, 64
GRADIENT_BATCH, GRADIENT_LENGTH = 32, 128  # 4096 tokens: what wgrad sums over, as in the published figure


class Run(NamedTuple):
    model: str
    seed: int
    steps: int
    recipe: str  # or bf16

    @property
    def name(self) -> str:
        return f"{self.model}-{self.recipe}-{self.seed}"


RUNS = [
    *(Run("debug", seed, 500, recipe) for seed in (0, 1, 2) for recipe in ("bf16", "deepseek_v3")),
    *(Run("23M", 0, 300, recipe) for recipe in ("bf16", "deepseek_v3", "tensor_scales", "no_promotion")),
    *(Run("debug", 0, 500, recipe) for recipe in ("tensor_scales", "no_promotion")),
]


def config_of(run: Run, data: Path, runs: Path, batch: int = BATCH, length: int = LENGTH) -> Config:
    is_fp8 = run.recipe not in ("fp32", "bf16")
    precision = ["precision=fp8", f"precision.recipe={run.recipe}"] if is_fp8 else [f"precision={run.recipe}"]
    words = [
        *MODELS[run.model],
        *precision,
        f"data.path={data}",
        f"data.sequence_length={length}",
        f"run.dir={runs / run.name}",
        f"train.steps={run.steps}",
        f"train.seed={run.seed}",
        f"train.global_batch_size={batch}",
        f"train.microbatch_size={batch}",
        "train.eval_samples=256",
        # Small steps, and routing biases that move slowly, as in V3: with debug's own (3e-3, 0.02) two runs that differ
        # by a rounding are whole per cents apart after 300 steps.
        "optim.lr.peak=4e-4",
        "train.bias_update_speed=0.001",
        "train.log_every=50",
        "checkpoint.every=100",
        "checkpoint.keep=1",
    ]
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_object(compose("pretrain", overrides=words))  # type: ignore[return-value]


def records(run: Run, runs: Path) -> list[dict]:
    """One a step; fewer than `run.steps` where it is not finished."""
    file = runs / run.name / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_finished(run: Run, runs: Path) -> bool:
    return len(records(run, runs)) == run.steps and (runs / run.name / "checkpoints" / f"step_{run.steps}").exists()


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
    ours, theirs = records(run, runs), records(run._replace(recipe="bf16"), runs)
    loss, bf16 = (statistics.fmean(r["lm_loss"] for r in each[-LAST:]) for each in (ours, theirs))
    single = [a["lm_loss"] / b["lm_loss"] - 1 for a, b in zip(ours, theirs, strict=True)]
    held_out = ours[-1]["eval_loss"] / theirs[-1]["eval_loss"] - 1
    deviation = statistics.fmean(x * x for x in single) ** 0.5
    return Comparison(run, loss, bf16, loss / bf16 - 1, held_out, deviation)


def gradient_distances(run: Run, data: Path, runs: Path, world: World) -> list[float]:
    """|g - g_fp32| / |g_fp32| of a batch, in BF16 and under each recipe, at the weights of the BF16 run's end.

    Kept in a file beside the runs."""
    folder = runs / run._replace(recipe="bf16").name / "checkpoints" / f"step_{run.steps}"

    def gradient(recipe: str) -> torch.Tensor:
        config = config_of(run._replace(recipe=recipe), data, runs, GRADIENT_BATCH, GRADIENT_LENGTH)
        trainer = Trainer(config, world)
        trainer.load(folder)
        trainer._run(trainer.train_data, 0, GRADIENT_BATCH, share=0.0, training=True)
        return torch.cat([bucket.grad.double() for bucket in trainer.replica.buckets])

    file = runs / f"gradients-{run.model}.json"
    if not file.exists():
        exact = gradient("fp32")
        recipes = track(("bf16", *GRADIENT_RECIPES), description=f"gradients of {run.model}")
        file.write_text(json.dumps([((gradient(r) - exact).norm() / exact.norm()).item() for r in recipes]))
    return json.loads(file.read_text())


def report(args: argparse.Namespace, world: World) -> None:
    """The tables to `args.report`, the curves to a picture beside it."""
    done = [run for run in RUNS if run.recipe != "bf16" and is_finished(run, args.runs)]
    compared = [compare(run, args.runs) for run in done]
    lines = [
        "# FP8 training against BF16",
        "",
        f"`python benchmarks/fp8_training.py --report ...`, {os.cpu_count()} cores of a CPU ({platform.machine()}), "
        f"torch {torch.__version__}, {datetime.date.today()}. FP8 is the `reference` back end; nothing ran on a GPU. "
        f"{BATCH} sequences of {LENGTH} bytes of Python a step, the same batches and first weights within a seed; loss "
        f"is the next-token loss, the mean of the last {LAST} steps.",
        "",
        "| model | recipe | seed | steps | loss | BF16's | difference | on held-out text | single steps, rms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in compared:
        lines.append(
            f"| {c.run.model} | {c.run.recipe} | {c.run.seed} | {c.run.steps} | {c.loss:.4f} | {c.bf16:.4f} | "
            f"{c.off:+.3%} | {c.off_held_out:+.3%} | {c.deviation:.3%} |"
        )
    lines += ["", "Distance of the gradient of one batch from FP32's, at the weights that a BF16 run ended with:", ""]
    lines += ["| model | " + " | ".join(("bf16", *GRADIENT_RECIPES)) + " |", "|---" * (2 + len(GRADIENT_RECIPES)) + "|"]
    for model in MODELS:
        run = next(run for run in RUNS if run.model == model and run.recipe == "bf16")
        if is_finished(run, args.runs):
            distances = gradient_distances(run, args.data, args.runs, world)
            lines.append(f"| {model} | " + " | ".join(f"{value:.3%}" for value in distances) + " |")
    picture = args.report.with_suffix(".png")
    lines += ["", f"![loss relative to BF16's, step by step]({picture.name})", ""]
    beside = args.report.with_suffix(".partial")
    beside.write_text("\n".join(lines))
    beside.replace(args.report)
    plot(done, args.runs, picture)


def plot(done: Sequence[Run], runs: Path, picture: Path) -> None:
    """One panel a model: the loss of each recipe over BF16's, smoothed over `LAST` steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(MODELS)), MODELS, strict=True):
        for run in (run for run in done if run.model == model):
            ours, theirs = ([r["lm_loss"] for r in records(each, runs)] for each in (run, run._replace(recipe="bf16")))
            ends = range(LAST, run.steps + 1)
            off = [100 * (sum(ours[e - LAST : e]) / sum(theirs[e - LAST : e]) - 1) for e in ends]
            axes.plot(ends, off, label=f"{run.recipe}, seed {run.seed}", linewidth=1.2)
        axes.axhspan(-100 * PUBLISHED, 100 * PUBLISHED, color="0.92", label="within 0.25 % (published)")
        axes.set(title=model, xlabel="step", ylabel=f"loss over BF16's, mean of {LAST} steps, %")
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/python_stdlib"))
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8_training"))
    parser.add_argument("--only", default="", help="make only the runs whose name has this word")
    parser.add_argument("--report", type=Path, help="write the tables to this file, and a plot beside it")
    args = parser.parse_args()
    register()
    world = distributed.start()
    for run in RUNS:
        if args.only in run.name and not is_finished(run, args.runs):
            print(f"== {run.name}", flush=True)
            trainer = Trainer(config_of(run, args.data, args.runs), world)
            resume(trainer)
            fit(trainer)
    if args.report:
        report(args, world)
    distributed.stop()


if __name__ == "__main__":
    main()
