"""What the planner predicts beside what ranks of ours do: step times, and bytes of live tensors.

    python benchmarks/plan_against_runs.py real memory
    sudo .venv/bin/python benchmarks/plan_against_runs.py sleeping
    python benchmarks/plan_against_runs.py report

real:      every legal layout of two ranks, the debug model in BF16 with even routing, a core a rank: the step of the
           training loop beside the planner's, from what launch/calibrate.py measures, in turn in the same processes.
memory:    20 random layouts of up to 8 ranks, the same model: the fullest rank's bytes of live tensors in a step (and
           its parameters, gradients and optimizer states) beside the planner's.
sleeping:  20 random layouts of up to 8 ranks on an emulated cluster with a network card a rank: layers that sleep for
           given times, so that few cores can play many, and rows that really travel. The planner knows the layers as
           they ran on one pipeline rank of that cluster, and the rate of the links.

What was measured is written to --out as soon as it is there, layers and cluster included, and is not measured again:
stop and start at will, or let `--seconds` stop it. What is predicted is computed anew by every report.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from conf.schema import Config, OptimConfig, TrainConfig
from infra.allocator import keep_freed_memory
from infra.data import DataConfig
from infra.distributed import World
from infra.hardware import ClusterConfig
from infra.live_bytes import LiveBytes
from infra.lr import LRConfig
from infra.precision import PrecisionConfig
from infra.prepare import PrepareConfig, prepare
from launch.calibrate import CalibrateConfig, Calibration, LengthConfig
from launch.measure_layers import chain, lane_counted, measure_layer
from launch.trainer import Trainer
from launch.validate import config_of
from measuring.cluster import from_rank, on_cluster
from measuring.ratios import setting
from measuring.sleeping_layers import TOKENS
from measuring.sleeping_step import rate_for, sleeping_cluster, sleeping_model, sleeping_steps
from parallel.config import ParallelConfig
from parallel.plan.layout import Layout, layouts
from parallel.plan.measured import key
from parallel.plan.memory import MemoryModel, RankMemory
from parallel.plan.step import StepModel
from tests.ranks import run_ranks

LENGTH, MICROBATCH, BATCH = 256, 2, 16
RANDOM = 20  # layouts
LAUNCHED = 5  # of them in one launch of the emulated cluster
STEPS, TURNS, WARM_UPS = 2, 4, 3  # steps, and microbatches through the layers, in each turn
WANTED = {"real": 10.0, "memory": 3.0, "sleeping": 10.0}  # per cent
MODEL = config_of("model=debug").model


def training(layout: Layout, data: Path, batch: int) -> Config:
    """The run that a layout asks for."""
    parallel = ParallelConfig(
        layout.pp, layout.ep, layout.ranks_per_node, layout.schedule, layout.dispatcher, force_balance=True,
        overlap=layout.overlap, recompute=layout.recompute, zero_stage=layout.zero_stage,
    )  # fmt: skip
    return Config(
        model=MODEL,
        parallel=parallel,
        precision=PrecisionConfig(layout.precision),
        data=DataConfig(path=str(data), sequence_length=LENGTH),
        train=TrainConfig(steps=100, global_batch_size=batch, microbatch_size=layout.microbatch_size, eval_samples=0),
        optim=OptimConfig(lr=LRConfig(warmup_steps=2)),
    )


def in_turn(rank: int, size: int, config: Config, layout: Layout) -> tuple[list[float], ClusterConfig]:
    """(seconds of steps, what launch/calibrate.py says of messages, the optimizer and layers): steps, then layers, and
    again, so that what slows the machine slows both."""
    keep_freed_memory()  # as whatever starts a run does
    world = World(rank, size, torch.device("cpu"))
    trainer, layers = Trainer(config, world), chain(MODEL, replace(layout, pp=1), LENGTH, world)
    for _ in range(WARM_UPS):
        trainer.train_step()
        layers.seconds(1, 0)
    seconds, rows = [], []
    for _ in range(TURNS):
        seconds += [trainer.train_step()[0]["step_time"] for _ in range(STEPS)]
        rows.append(layers.seconds(STEPS, 1))
    calibrate = CalibrateConfig(MODEL, PrecisionConfig(layout.precision), LengthConfig(LENGTH))
    calibration, tokens = Calibration(calibrate, world), layout.microbatch_size * LENGTH
    calibration.peaks()
    calibration.moves(tokens)
    calibration.messages(tokens)
    calibration.cluster.measured.append({"of": key(MODEL, layout, LENGTH), "seconds": mean(rows)})
    return seconds, calibration.cluster


def mean(rows: list[Any]) -> Any:
    """Of dicts, lists and numbers alike; what is none of these is taken from the first."""
    first = rows[0]
    if isinstance(first, dict):
        return {name: mean([row[name] for row in rows]) for name in first}
    if isinstance(first, list):
        return [mean(list(parts)) for parts in zip(*rows, strict=True)]
    return statistics.fmean(rows) if isinstance(first, float) else first


def held_bytes(rank: int, size: int, config: Config) -> tuple[int, int]:
    """(parameters, gradients and optimizer states; live tensors at the fullest moment of a step, with those)"""
    trainer = Trainer(config, World(rank, size, torch.device("cpu")))
    trainer.train_step()
    live, buckets = LiveBytes(), trainer.replica.buckets
    with lane_counted(live), live.counting():
        trainer.train_step()
    kept = [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]
    kept += [tensor for bucket in buckets for tensor in (bucket.weight, bucket.master, bucket.grad)]
    states = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    return states, states + live.peak


def two_ranks() -> Iterator[Layout]:
    told = {"precision": "bf16", "zero_stage": 0, "microbatch_size": MICROBATCH}
    yield from layouts(MODEL, ClusterConfig(num_ranks=2, ranks_per_node=2), 2, BATCH, told)


def random_layouts() -> list[tuple[Layout, int]]:
    """(layout, batch) of up to 8 ranks, drawn from all legal ones of each size."""
    draw, found = random.Random(2), []
    for world in [2, 4, 8] * RANDOM:
        one = ClusterConfig(num_ranks=world, ranks_per_node=world)
        batch = MICROBATCH * world * draw.choice((2, 4))
        told = {"precision": "bf16", "microbatch_size": MICROBATCH}
        candidates = list(layouts(MODEL, one, world, batch, told))
        if candidates and (drawn := (draw.choice(candidates), batch)) not in found:
            found.append(drawn)
    return found[:RANDOM]


def name_of(layout: Layout, batch: int) -> str:
    overlap = " overlap" if layout.overlap else ""
    return (
        f"{layout.world} ranks pp{layout.pp} ep{layout.ep} {layout.schedule} {layout.dispatcher}{overlap} "
        f"{layout.recompute} zero{layout.zero_stage} batch {batch}"
    )


class Cases:
    """What was measured, by part and name, kept in a file: layout, batch, `row` (its layers), and what to predict."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.ends = path, time.monotonic() + seconds
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else setting()

    def done(self, part: str) -> dict[str, Any]:
        """Results of a part by name."""
        return self.found.setdefault(part, {})

    def run(self, part: str, cases: Iterable[tuple[str, Callable[[], dict[str, dict[str, Any]]]]]) -> None:
        """cases: (name, what measures it and perhaps others, by their names)."""
        done = self.done(part)
        for name, measure in cases:
            if name in done:
                continue
            if time.monotonic() > self.ends:
                print(f"{part}: {len(done)} done; start again for the rest")
                return
            for one, case in measure().items():
                done[one] = case
                print(f"{part} {len(done)} {one}: {case['measured']:.4g}, {predicted(part, case):.4g}", flush=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.found, indent=1))
            partial.replace(self.path)


Measurements = Iterator[tuple[str, Callable[[], dict[str, dict[str, Any]]]]]


def case_of(layout: Layout, batch: int, cluster: ClusterConfig, **measured: Any) -> dict[str, Any]:
    return {"layout": asdict(layout), "batch": batch, "cluster": asdict(cluster)} | measured


def real(data: Path) -> Measurements:

    def measure(layout: Layout) -> dict[str, dict[str, Any]]:
        ranks = run_ranks(2, in_turn, training(layout, data, BATCH), layout)
        seconds = [max(turn) for turn in zip(*(steps for steps, _ in ranks), strict=True)]
        case = case_of(layout, BATCH, ranks[0][1], measured=statistics.fmean(seconds), seconds=seconds)
        return {name_of(layout, BATCH): case}

    for layout in two_ranks():
        yield name_of(layout, BATCH), partial(measure, layout)


def memory(data: Path) -> Measurements:
    rows: dict[str, dict[str, Any]] = {}

    def layer(rank: int, size: int, layout: Layout) -> dict[str, Any]:
        return measure_layer(MODEL, layout, LENGTH, World(rank, size, torch.device("cpu")), turns=1)

    def measure(layout: Layout, batch: int) -> dict[str, dict[str, Any]]:
        alone = replace(layout, world=layout.ep, ranks_per_node=layout.ep, pp=1)
        row = rows.setdefault(f"{layout.ep} {layout.dispatcher} {layout.recompute}", {})
        row |= run_ranks(layout.ep, layer, alone)[0] if not row else {}
        ranks = run_ranks(layout.world, held_bytes, training(layout, data, batch))
        states, whole = max(ranks, key=lambda of_rank: of_rank[1])
        here = ClusterConfig(num_ranks=layout.world, ranks_per_node=layout.world, measured=[row])
        case = case_of(
            layout, batch, here, measured=whole / 1e6, of_states=states / 1e6, states=[one for one, _ in ranks]
        )
        return {name_of(layout, batch): case}

    for layout, batch in random_layouts():
        yield name_of(layout, batch), partial(measure, layout, batch)


def sleeping() -> Measurements:
    """A launch of the emulated cluster measures a few layouts."""
    draw, drawn = random.Random(3), dict[tuple[int, float], dict[str, tuple[Layout, int]]]()
    while sum(map(len, drawn.values())) < RANDOM:
        world, pp, share = draw.choice(((2, 1, 0.6), (2, 2, 0.6), *((4, p, 0.4) for p in (1, 2, 4)),
                                        *((8, p, 0.25) for p in (1, 2, 4, 8))))  # fmt: skip
        batch = draw.choice((2, 3)) * pp * (world // pp)
        told = {"precision": "fp32", "zero_stage": 0, "microbatch_size": 1, "recompute": "none", "pp": pp}
        cluster = ClusterConfig(num_ranks=world, ranks_per_node=1)
        if candidates := list(layouts(sleeping_model(2 * pp), cluster, world, batch, told)):
            layout = draw.choice(candidates)
            drawn.setdefault((world, share), {})[f"{name_of(layout, batch)} all-to-all {share:.0%}"] = layout, batch

    def measure(share: float, together: dict[str, tuple[Layout, int]]) -> dict[str, dict[str, Any]]:
        rate, world = rate_for(share), next(iter(together.values()))[0].world
        words = json.dumps([(asdict(layout), batch) for layout, batch in together.values()])
        found = on_cluster(__file__, world, 1, rate, [words])
        return {
            name: case_of(
                layout, batch, sleeping_cluster(world, rate, one["row"]),
                measured=statistics.median(one["seconds"]), seconds=one["seconds"],
            )
            for (name, (layout, batch)), one in zip(together.items(), found, strict=True)
        }  # fmt: skip

    for (_, share), cases in drawn.items():
        names = list(cases)
        for k, name in enumerate(names):
            first = k - k % LAUNCHED
            yield name, partial(measure, share, {one: cases[one] for one in names[first : first + LAUNCHED]})


def predicted(part: str, case: dict[str, Any]) -> float:
    """What the planner says of a case: seconds, or MB."""
    layout, batch, cluster = Layout(**case["layout"]), case["batch"], as_cluster(case["cluster"])
    if part == "sleeping":
        step = StepModel(sleeping_model(2 * layout.pp), cluster, TOKENS).simulate(layout, batch)
        return step.total - step.reduce - step.update  # nothing is trained
    if part == "real":
        return StepModel(MODEL, cluster, LENGTH, "fp32").simulate(layout, batch).total
    return max(one.total - one.margin for one in planned_memory(case)) / 1e6


def planned_memory(case: dict[str, Any]) -> list[RankMemory]:
    """Of every pipeline rank."""
    layout, cluster = Layout(**case["layout"]), as_cluster(case["cluster"])
    model = MemoryModel(StepModel(MODEL, cluster, LENGTH, "fp32"), ema=False)
    return [model.rank(layout, case["batch"], r) for r in range(layout.pp)]


def states_equal(case: dict[str, Any]) -> bool:
    """Parameters, gradients and optimizer states of every rank, byte for byte."""
    mesh, planned = Layout(**case["layout"]).mesh, planned_memory(case)
    states = [one.weights + one.gradients + one.optimizer for one in planned]
    return all(held == states[mesh.coordinates(r).pp] for r, held in enumerate(case["states"]))


def report(found: dict[str, Any], file: Path | None, plot: Path | None) -> None:
    """A table a part in Markdown, behind one of all parts; printed where there is no file."""
    summary = ["| part | layouts | error at the median | at most | mean | wanted |", "|---|---|---|---|---|---|"]
    tables = list[str]()
    points: dict[str, list[tuple[float, float]]] = {}
    for part, wanted in WANTED.items():
        cases = found.get(part, {})
        if not cases:
            continue
        points[part] = [(predicted(part, case), case["measured"]) for case in cases.values()]
        errors = [100 * (told / measured - 1) for told, measured in points[part]]
        sizes = list(map(abs, errors))
        summary.append(
            f"| {part} | {len(errors)} | {statistics.median(sizes):.1f} % | {max(sizes):.1f} % | "
            f"{statistics.fmean(errors):+.1f} % | {wanted:g} % |"
        )
        unit = "MB" if part == "memory" else "s"
        tables += [
            "",
            f"## {part}",
            "",
            f"| layout | measured {unit} | predicted {unit} | error |",
            "|---|---|---|---|",
        ]
        for name, (told, measured), error in zip(cases, points[part], errors, strict=True):
            tables.append(f"| {name} | {measured:.4g} | {told:.4g} | {error:+.1f} % |")
        if part == "memory":
            equal = sum(map(states_equal, cases.values()))
            tables += [
                "",
                f"Parameters, gradients and optimizer states equal byte for byte in {equal} of {len(cases)}.",
            ]
    text = "\n".join([*summary, *tables, ""])
    if file is None:
        print(text)
    else:
        file.write_text(text)
    if plot is not None:
        draw_plot(points, plot)


def draw_plot(points: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Measured over predicted, a panel a part; on the diagonal the two agree."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(points), figsize=(4.2 * len(points), 4), squeeze=False)
    for axis, (part, pairs) in zip(axes[0], points.items(), strict=True):
        most = 1.05 * max(map(max, pairs))
        axis.plot([0, most], [0, most], color="0.7", linewidth=1)
        axis.fill_between([0, most], [0, 0.9 * most], [0, 1.1 * most], color="0.93", label="within 10 %")
        axis.scatter(*zip(*pairs, strict=True), s=16, alpha=0.8)
        unit = "MB" if part == "memory" else "s"
        axis.set(xlim=(0, most), ylim=(0, most), xlabel=f"predicted, {unit}", ylabel=f"measured, {unit}", title=part)
    axes[0][0].legend(loc="upper left", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def as_cluster(words: dict[str, Any]) -> ClusterConfig:
    merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), words)
    cluster = OmegaConf.to_object(merged)
    assert isinstance(cluster, ClusterConfig)
    return cluster


def small_data(folder: Path) -> Path:
    """Documents enough for a few steps."""
    source = folder / "source"
    source.mkdir()
    for i in range(200):
        (source / f"{i}.txt").write_text(f"document {i}: " + " ".join(str(i * k % 9973) for k in range(400)))
    prepare(PrepareConfig(source=str(source / "*.txt"), out=str(folder / "data"), held_out=0.1, workers=1), quiet=True)
    return folder / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(WANTED)}, report; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("plan_against_runs.json"))
    parser.add_argument("--report", type=Path, help="a Markdown file")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case starts later than this")
    parser.add_argument("--rank", nargs=1, help=argparse.SUPPRESS)  # how this script starts itself on the ranks
    options = parser.parse_args()
    options.parts = options.parts or [*WANTED, "report"]
    if unknown := set(options.parts) - {*WANTED, "report"}:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(WANTED)}, report")
    torch.set_num_threads(1)
    if options.rank:
        from_rank(
            sleeping_steps([(Layout(**words), batch) for words, batch in json.loads(options.rank[0])]), options.out
        )
        return
    cases = Cases(options.out, options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        if {"real", "memory"} & set(options.parts):
            data = small_data(Path(folder))
            for part, make in (("real", real), ("memory", memory)):
                if part in options.parts:
                    cases.run(part, make(data))
    if "sleeping" in options.parts:
        cases.run("sleeping", sleeping())
    if "report" in options.parts:
        report(cases.found, options.report, options.plot)


if __name__ == "__main__":
    main()
