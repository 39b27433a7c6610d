"""FP8 training against BF16 on the same data: how far the loss is off, and how far two BF16 runs are from each other.

    python benchmarks/fp8_training.py [--data data/python_stdlib] [--runs runs/fp8_training] [--report FILE.md]

Every run is an ordinary one of the trainer, in a folder of its own under `--runs`. Started again, finished runs are
left alone and a broken one goes on from its checkpoint; `--only WORD` makes only the runs whose name has the word.

- `deepseek_v3` against `bf16`: the same seed, so the same weights and the same batches. V3's report (section 3.3) puts
  the relative difference of the loss below 0.25 %. Compared is the mean of the last 50 steps.
- `bf16_nudged` against `bf16` is the control: BF16 both, with first weights that differ by as much as a rounding to
  BF16. A router turns roundings into other experts, so two such runs part; what lies between them is what no
  comparison of two single runs can tell from nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from conf.schema import register
from infra import distributed
from measuring.fp8_runs import BATCH, LAST, LENGTH, NUDGED, Run, compare, drift, is_finished, make

PUBLISHED = 0.0025
RUNS = [
    *(Run("debug", seed, 500, recipe) for seed in (0, 1, 2) for recipe in ("bf16", NUDGED, "deepseek_v3")),
    *(Run("23M", 0, 300, recipe) for recipe in ("bf16", NUDGED, "deepseek_v3")),
]


def report(done: Sequence[Run], runs: Path, file: Path) -> None:
    """The table to `file`, the curves to a picture beside it."""
    picture = file.with_suffix(".png")
    lines = [
        "# FP8 training against BF16",
        "",
        f"`python benchmarks/fp8_training.py --report ...`, {os.cpu_count()} cores of a CPU ({platform.machine()}), "
        f"torch {torch.__version__}, {datetime.date.today()}. FP8 is the `reference` back end; nothing ran on a GPU. "
        f"{BATCH} sequences of {LENGTH} bytes of Python a step, the same batches and first weights within a seed; loss "
        f"is the next-token loss, the mean of the last {LAST} steps.",
        "",
        "| model | run | seed | steps | loss | BF16's | difference | on held-out text | single steps, rms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in (compare(run, runs) for run in done):
        lines.append(
            f"| {c.run.model} | {c.run.recipe} | {c.run.seed} | {c.run.steps} | {c.loss:.4f} | {c.bf16:.4f} | "
            f"{c.off:+.3%} | {c.off_held_out:+.3%} | {c.deviation:.3%} |"
        )
    lines += ["", f"![loss relative to BF16's, step by step]({picture.name})", ""]
    beside = file.with_suffix(".partial")
    beside.write_text("\n".join(lines))
    beside.replace(file)
    plot(done, runs, picture)


def plot(done: Sequence[Run], runs: Path, picture: Path) -> None:
    """One panel a model: the loss of each run over BF16's, smoothed over `LAST` steps."""
    models = list(dict.fromkeys(run.model for run in done))
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for run in (run for run in done if run.model == model):
            style = {"color": f"C{run.seed}", "linestyle": "--" if run.recipe == NUDGED else "-"}
            axes.plot(range(LAST, run.steps + 1), drift(run, runs), label=f"{run.recipe}, seed {run.seed}", **style)
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
    parser.add_argument("--report", type=Path, help="write the table to this file, and a plot beside it")
    args = parser.parse_args()
    register()
    world = distributed.start()
    for run in RUNS:
        if args.only in run.name:
            make(run, args.data, args.runs, world)
    distributed.stop()
    if args.report:
        done = [run for run in RUNS if run.recipe != "bf16" and is_finished(run, args.runs)]
        report(done, args.runs, args.report)


if __name__ == "__main__":
    main()
