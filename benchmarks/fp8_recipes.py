"""What the choices of V3's FP8 recipe are worth: tiles where there are outliers, promotion where sums are long.

    python benchmarks/fp8_recipes.py [--data data/python_stdlib] [--runs runs/fp8_recipes] [--report FILE.md]

Outliers. A large model has a few channels that are many times as large as the others; one that was trained for minutes
has none. They are planted without changing the function (`plant`): s times the gain of one channel of every layer's
norms, and 1 / s times the columns that read it. Under each recipe, for s from 1 to 2^20: the distance in norm of one
batch's gradient from FP32's, the loss of that batch relative to FP32's, and short trainings. BF16 is the control: it
must be the same for every s.

Sums. The tensor core's 14 bits, cut towards zero, with and without promotion to FP32 every 128 products, against
float64: for random operands, with signs (V3's report, section 3.5.2, says nearly 2 % at most for K = 4096) and without,
and for the weight gradients of a model in training, whose sums are over tokens. All operands are E4M3 values already,
so casts play no part.

Runs and figures are kept under `--runs`; started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from conf.schema import register
from infra import distributed
from infra.distributed import World
from infra.fp8.gemm import ReferenceGemm, limited_sum
from infra.fp8.quantize import Quantized, dequantize
from launch.trainer import Trainer
from measuring.fp8_runs import LAST, LENGTH, Run, checkpoint_of, compare, config_of, is_finished, make, plant

OUTLIERS = (0, 4, 8, 10, 12, 13, 14, 15, 16, 17, 18, 20)  # log2 of s
RECIPES = ("bf16", "deepseek_v3", "block_gradients", "tensor_scales")
SUMS = {"14 bits": (14, None), "14 bits, promoted every 128": (14, 128), "FP32": (24, None)}
CASTS = "casts to E4M3, summed exactly"
TRAIN_BATCH, GRADIENT_BATCH = 8, 32
BASE = Run("wide", 0, 150, "bf16")
RUNS = [
    BASE,
    *(BASE._replace(recipe=r, outlier=s) for s in (16, 0) for r in ("deepseek_v3", "tensor_scales")),
]
Rows = list[dict[str, Any]]


def gradient(run: Run, data: Path, runs: Path, world: World, batch: int) -> tuple[float, Tensor]:
    """The loss and the gradient of one batch at the weights with which the BF16 run ended."""
    trainer = Trainer(config_of(run, data, runs, batch), world)
    trainer.load(checkpoint_of(run.bf16, runs))
    plant(trainer, run.outlier)
    weights = trainer._run(trainer.train_data, 0, batch, share=0.0, training=True)
    losses, _ = trainer._gather(weights, batch)
    return losses["lm_loss"], torch.cat([bucket.grad.double() for bucket in trainer.replica.buckets])


def outliers(data: Path, runs: Path, world: World) -> Rows:
    """One row an s and recipe: how far the gradient and the loss of one batch are from FP32's."""

    def measure(run: Run) -> tuple[float, Tensor]:
        return gradient(run, data, runs, world, GRADIENT_BATCH)

    exact_loss, exact = measure(BASE._replace(recipe="fp32"))
    rows = []
    for outlier in track(OUTLIERS, description="outliers"):
        for recipe in RECIPES:
            loss, grad = measure(BASE._replace(recipe=recipe, outlier=outlier))
            distance = ((grad - exact).norm() / exact.norm()).item()
            rows.append({"outlier": outlier, "recipe": recipe, "gradient": distance, "loss": loss / exact_loss - 1})
    return rows


def error_of(result: Tensor, exact: Tensor) -> dict[str, float]:
    """In norm, and the largest over the root mean square of what is exact."""
    error = result.double() - exact
    largest = (error.abs().max() / exact.square().mean().sqrt()).item()
    return {"largest": largest, "norm": (error.norm() / exact.norm()).item()}


def sum_errors(a_MK: Tensor, b_NK: Tensor) -> Rows:
    """Of a b^T, under each kind of sum."""
    exact = a_MK.double() @ b_NK.double().t()
    return [{"sum": name, **error_of(limited_sum(a_MK, b_NK, *how), exact)} for name, how in SUMS.items()]


def random_sums() -> Rows:
    """Random operands; as many rows as there is time for where K is long. Beside the sums, what the casts do."""
    rows = []
    for K in (2**n for n in track(range(7, 18), description="random sums")):
        generator = torch.Generator().manual_seed(0)
        normal = [torch.randn(min(1024, 2**22 // K), K, generator=generator) for _ in range(2)]
        for operands, (x, y) in (("normal", normal), ("normal, without signs", [x.abs() for x in normal])):
            a, b = (each.to(torch.float8_e4m3fn).float() for each in (x, y))
            given, exact = (left.double() @ right.double().t() for left, right in ((x, y), (a, b)))
            casts = {"sum": CASTS, **error_of(exact, given)}
            rows += [{"operands": operands, "K": K, **row} for row in (*sum_errors(a, b), casts)]
    return rows


def weight_gradient_sums(data: Path, runs: Path, world: World) -> Rows:
    """The operands of every dense weight gradient of one batch: medians over the layers."""
    rows, plain = [], ReferenceGemm.dense
    for batch in track((2, 8, 32, 128), description="sums of weight gradients"):
        found: list[Rows] = []

        def dense(
            self: ReferenceGemm, a: Quantized, b: Quantized, dtype: torch.dtype, found: list[Rows] = found
        ) -> Tensor:
            if dtype == torch.float32:  # of the three products, the one that sums over tokens
                found.append(sum_errors(dequantize(a), dequantize(b)))
            return plain(self, a, b, dtype)

        with mock.patch.object(ReferenceGemm, "dense", dense):
            gradient(BASE._replace(recipe="deepseek_v3"), data, runs, world, batch)
        for of_layers in zip(*found, strict=True):
            middle = {key: statistics.median(row[key] for row in of_layers) for key in ("largest", "norm")}
            rows.append({"operands": "weight gradients", "K": batch * LENGTH, "sum": of_layers[0]["sum"], **middle})
    return rows


def kept(file: Path, measure: Callable[[], Rows]) -> Rows:
    """What `measure` gives, from the file where it has been measured before."""
    if not file.exists():
        beside = file.with_suffix(".partial")
        beside.write_text(json.dumps(measure()))
        beside.replace(file)
    return json.loads(file.read_text())


def shown(distance: float) -> str:
    return f"{distance:.2%}" if distance < 10 else f"{distance:.0e} times"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)), ""]


def report(by_outlier: Rows, sums: Rows, runs: Path, file: Path) -> None:
    """The tables to `file`, a picture beside it."""
    picture = file.with_suffix(".png")
    lines = [
        "# What tiles and promotion are worth",
        "",
        f"`python benchmarks/fp8_recipes.py --report ...`, {os.cpu_count()} cores of a CPU ({platform.machine()}), "
        f"torch {torch.__version__}, {datetime.date.today()}. `reference` back end. `wide`: `debug` with hidden size "
        f"1024, eight tiles, and three layers; trained in BF16 for {BASE.steps} steps of {TRAIN_BATCH} sequences of "
        f"{LENGTH} bytes. One channel of every layer's two norms is s times as large, the columns that read it "
        "1 / s; the function is the same.",
        "",
        f"Distance in norm of the gradient of {GRADIENT_BATCH} sequences from FP32's, and in brackets the loss "
        "relative to FP32's:",
    ]
    rows = []
    for outlier in OUTLIERS:
        of = {row["recipe"]: row for row in by_outlier if row["outlier"] == outlier}
        cells = [f"{shown(of[recipe]['gradient'])} ({of[recipe]['loss']:+.3%})" for recipe in RECIPES]
        rows.append([f"2^{outlier}", *cells])
    lines += table(["s", *RECIPES], rows)
    done = [compare(run, runs) for run in RUNS if run != BASE and is_finished(run, runs)]
    lines += [f"Trainings of {BASE.steps} steps: the mean loss of the last {LAST} against BF16's."]
    lines += table(
        ["recipe", "s", "loss", "BF16's", "difference", "on held-out text"],
        [
            f"{c.run.recipe}|2^{c.run.outlier}|{c.loss:.4f}|{c.bf16:.4f}|{c.off:+.2%}|{c.off_held_out:+.2%}".split("|")
            for c in done
        ],
    )
    lines += ["Sums of K products: error in norm, and the largest over the root mean square of the result."]
    cells = {(r["operands"], r["K"], r["sum"]): f"{r['norm']:.3%}, {r['largest']:.3%}" for r in sums}
    lines += table(
        ["operands", "K", *SUMS, CASTS],
        [
            [operands, str(K), *(cells.get((operands, K, name), "") for name in (*SUMS, CASTS))]
            for operands, K in dict.fromkeys((row["operands"], row["K"]) for row in sums)
        ],
    )
    lines += [f"![gradient against s, sums against K]({picture.name})", ""]
    beside = file.with_suffix(".partial")
    beside.write_text("\n".join(lines))
    beside.replace(file)
    plot(by_outlier, sums, picture)


def plot(by_outlier: Rows, sums: Rows, picture: Path) -> None:
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for recipe, style in zip(RECIPES, ("o-", "o-", "x--", "o-"), strict=True):
        of = [row for row in by_outlier if row["recipe"] == recipe]
        left.plot([row["outlier"] for row in of], [row["gradient"] for row in of], style, label=recipe)
    left.set(xlabel="log2 of s, the outlier's factor", ylabel="gradient's distance from FP32's")
    left.set(yscale="log", ylim=(0.03, 10))
    kinds = dict.fromkeys((row["operands"], row["sum"]) for row in sums if row["sum"] != "FP32")
    colors = {operands: f"C{i}" for i, operands in enumerate(dict.fromkeys(operands for operands, _ in kinds))}
    styles = dict(zip((*SUMS, CASTS), ("-", "--", "", ":"), strict=True))
    for operands, name in kinds:
        of = [row for row in sums if (row["operands"], row["sum"]) == (operands, name)]
        xs, ys = [row["K"] for row in of], [row["norm"] for row in of]
        right.plot(xs, ys, styles[name], color=colors[operands], label=f"{operands}; {name}")
    right.set(xlabel="K, products summed", ylabel="error in norm", xscale="log", yscale="log")
    left.legend(fontsize=7)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # there is no room between the curves
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/python_stdlib"))
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8_recipes"))
    parser.add_argument("--report", type=Path, help="write the tables to this file, and a plot beside it")
    args = parser.parse_args()
    register()
    world = distributed.start()
    args.runs.mkdir(parents=True, exist_ok=True)
    sums = kept(args.runs / "random_sums.json", random_sums)
    make(BASE, args.data, args.runs, world, TRAIN_BATCH)
    by_outlier = kept(args.runs / "outliers.json", lambda: outliers(args.data, args.runs, world))
    sums += kept(args.runs / "weight_gradients.json", lambda: weight_gradient_sums(args.data, args.runs, world))
    for run in RUNS:
        make(run, args.data, args.runs, world, TRAIN_BATCH)
    distributed.stop()
    if args.report:
        report(by_outlier, sums, args.runs, args.report)


if __name__ == "__main__":
    main()
