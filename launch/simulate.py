"""Simulates one step of a pipeline schedule, and shows it.

    python launch/simulate.py parallel.schedule=dualpipe parallel.pp=8 num_microbatches=20 costs.f=1 costs.i=1 costs.w=1
    python launch/simulate.py parallel.schedule_csv=mine.csv costs.file=measured.yaml costs.p2p=0.2 out=DIR
    python launch/simulate.py parallel.schedule=auto parallel.pp=8 costs.w=0.6 auto.memory_limit=9 auto.shape=v
    python launch/simulate.py -m parallel.schedule=1f1b,zb1p,dualpipe parallel.pp=4,8 num_microbatches=16,32 out=DIR

    python launch/simulate.py parallel.schedule=dualpipev parallel.pp=4 measure=runs/first
    torchrun --nproc-per-node=4 launch/simulate.py execute=true parallel.schedule=zbv parallel.pp=4 out=DIR

With measure=RUN the costs are what that run measured, and the schedule its own where none is named; with cluster=NAME
model=NAME they are the planner's for that model there, in seconds. With execute=true the schedule also runs for real,
with stages that only take time (work=sleep or matmul), and the page shows what ran over what was simulated.

A run prints the grid and where the time goes; with out=DIR it writes report.json, schedule.json, schedule.csv (if the
schedule has one direction), trace.json, timeline.html and timeline.png. A sweep (-m) ends with one table of all its
runs, and with out=DIR writes summary.csv, summary.html and a folder a run. Without out= nothing is written.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from infra.hardware import ClusterConfig
from launch.costs import costs_of, measured_costs, measured_shape, named, planned_costs, read_text
from launch.errors import one_line_errors
from launch.files import check_folder, save
from launch.summary import Row, shape_of
from launch.sweep import is_asked, is_sweep, job_number, leave_row, row_or_note, sweep, swept_words
from launch.told import LayoutConfig, told
from model.config import ModelConfig
from parallel.config import check_at_least, check_choice
from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import MADE_FOR_COSTS, SHAPES, auto
from parallel.pipeline.dualpipe import shortfall
from parallel.pipeline.passes import ScheduleError, from_csv, in_turn, to_csv
from parallel.pipeline.render import chrome_trace, facts, html, key, picture, text
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate, stage_times, step_time_quantiles
from parallel.pipeline.timeline import COOL_DOWN, WARM_UP, Timeline

MICROSECONDS = {"": 1e3, "s": 1e6, "ms": 1e3, "us": 1.0}  # of one unit of time, for the trace
QUANTILES = (0.05, 0.5, 0.95)
YOUNG = 100_000  # objects between two searches for garbage: a schedule is many tuples, and no cycles
MOST_FORWARDS = 10_000_000  # of all ranks; about 15 GB
MOST_RUNS = 100_000
MOST_DRAWN = 200_000  # actions; viewers and browsers hold no more


@dataclass
class PipelineConfig:
    """Which schedule, over how many ranks. A schedule from a CSV brings its own ranks and microbatches."""

    schedule: str = "dualpipe"
    pp: int = 8
    stages_per_rank: int = 2  # of interleaved_1f1b, and of auto where it deals out stages in turn
    schedule_csv: str | None = None

    def __post_init__(self) -> None:
        check_choice("parallel.schedule", self.schedule, (*SCHEDULES, *MADE_FOR_COSTS))
        check_at_least("parallel.pp", self.pp)
        check_at_least("parallel.stages_per_rank", self.stages_per_rank)


@dataclass
class AutoConfig:
    """For schedules made for their costs. memory_limit: in activations of one microbatch of 1/PP of the model.

    shape: the placements that `auto` may choose from.
    """

    memory_limit: float | None = None
    shape: str = "any"

    def __post_init__(self) -> None:
        check_choice("auto.shape", self.shape, SHAPES)


def _cost_options() -> dict[str, Any]:
    """The fields of `Costs` and `file`. OmegaConf sets a dict only where there is none yet: `slow` starts as None."""
    return {"file": None, **asdict(Costs()), "slow": None}


@dataclass
class SimulateConfig:
    """`costs` are the fields of `Costs`, and `file`: a YAML or JSON file of them, which the command line overrides."""

    parallel: PipelineConfig = field(default_factory=PipelineConfig)
    num_microbatches: int = 20
    costs: dict[str, Any] = field(default_factory=_cost_options)
    auto: AutoConfig = field(default_factory=AutoConfig)
    model: ModelConfig | None = None
    cluster: ClusterConfig | None = None  # costs are then the planner's, in seconds, but for those named here
    layout: LayoutConfig = field(default_factory=LayoutConfig)  # with cluster=
    sequence_length: int = 4096  # with cluster=
    unit: str = ""  # of the costs: a word for the pictures, the scale of the trace
    seed: int = 0  # of costs.jitter
    num_runs: int = 100  # for the quantiles of the step time under costs.jitter
    out: str | None = None
    measure: str | None = None  # a run folder whose measured costs to take, in ms, but for those named here
    execute: bool = False  # also run it, one process a rank
    work: str = "sleep"  # of the stages that are executed

    def __post_init__(self) -> None:
        check_choice("work", self.work, ("sleep", "matmul"))
        check_folder("out", self.out)
        if self.measure is not None:
            self.unit = "ms"
        elif self.cluster is not None:
            self.unit = "s"
        check_at_least("num_microbatches", self.num_microbatches)
        check_at_least("sequence_length", self.sequence_length)
        check_at_least("seed", self.seed, 0)
        if not 1 <= self.num_runs <= MOST_RUNS:
            raise ValueError(f"num_runs={self.num_runs}: must be between 1 and {MOST_RUNS:,}")
        if self.measure is not None and self.cluster is not None:
            raise ValueError("measure= and cluster= both bring costs: name one of them")
        if self.cluster is None and (self.model is not None or told(self.layout)):
            raise ValueError("model= and layout= are for the planner's costs: name cluster=, as in cluster=h800_2048")
        check_choice("unit", self.unit, MICROSECONDS)


def schedule_of(config: SimulateConfig, costs: Costs) -> Schedule:
    parallel = config.parallel
    if parallel.schedule_csv is not None:
        return from_csv(read_text(parallel.schedule_csv), name=parallel.schedule_csv)
    shape = (parallel.pp, config.num_microbatches)
    stages = parallel.stages_per_rank if parallel.schedule in ("interleaved_1f1b", "auto") else 1
    if (forwards := math.prod(shape) * stages) > MOST_FORWARDS:
        what = f"parallel.pp={shape[0]} times num_microbatches={shape[1]}"
        what += f" times parallel.stages_per_rank={stages}" if stages > 1 else ""
        raise ValueError(f"{what} are {forwards:,} forwards: memory holds about {MOST_FORWARDS:,}")
    if parallel.schedule == "auto":
        return auto(*shape, costs, config.auto.memory_limit, config.auto.shape, parallel.stages_per_rank)
    if parallel.schedule in MADE_FOR_COSTS:
        return MADE_FOR_COSTS[parallel.schedule](*shape, costs, config.auto.memory_limit)
    if parallel.schedule == "interleaved_1f1b":
        return SCHEDULES["interleaved_1f1b"](*shape, parallel.stages_per_rank)
    return SCHEDULES[parallel.schedule](*shape)


def report_of(config: SimulateConfig, found: Step) -> dict[str, Any]:
    """What report.json holds; times in the unit of the costs, lists with one entry a rank."""
    costs, schedule, timeline = found.costs, found.schedule, found.timeline
    ranks = range(schedule.num_ranks)
    report = {
        "schedule": schedule.name,
        "pp": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "step_time": timeline.step_time,
        "pipeline_time": timeline.pipeline_time,
        "busy_time": timeline.busy_R.tolist(),
        "bubble_time": timeline.bubble_R.tolist(),
        "bubble_by_cause": [timeline.bubble_by_cause(rank) for rank in ranks],
        "bubble_fraction": timeline.bubble_fraction,
        "peak_live_microbatches": [timeline.peak_live(rank) for rank in ranks],
        "peak_activations": [timeline.peak_memory(rank) for rank in ranks],
        "unit": config.unit,
        "costs": asdict(costs) | {"p2p_bandwidth": costs.p2p_bandwidth if math.isfinite(costs.p2p_bandwidth) else None},
    }
    if costs.jitter:
        times = step_time_quantiles(
            schedule, costs, quantiles=QUANTILES, num_runs=config.num_runs, seed=config.seed, slots=found.slots
        )
        report["step_time_quantiles"] = dict(zip(map(str, QUANTILES), times, strict=True))
    return report


def write(
    folder: Path, config: SimulateConfig, costs: Costs, schedule: Schedule, timeline: Timeline, report: dict[str, Any]
) -> list[str]:
    """Writes the files of one run into `folder`; returns their names."""
    programs = [[list(map(str, slot)) for slot in program] for program in schedule.programs]
    as_data = {
        "name": schedule.name,
        "num_microbatches": schedule.num_microbatches,
        "placement": schedule.placement,
        "programs": programs,
    }
    files: dict[str, str | bytes] = {
        "report.json": json.dumps(report, indent=2, allow_nan=False),
        "schedule.json": json.dumps(as_data),
    }
    if schedule.num_routes == 1:
        files["schedule.csv"] = to_csv(schedule)
    if len(timeline.op_A) <= MOST_DRAWN:
        title = shape_of(schedule)
        trace = chrome_trace(
            timeline, schedule, p2p=costs.p2p_time, microseconds=MICROSECONDS[config.unit], title=title
        )
        files["trace.json"] = json.dumps(trace)
        files["timeline.html"] = html([(title, timeline)], title=title, unit=config.unit)
        files["timeline.png"] = picture(timeline, title=title, unit=config.unit)
    for name, content in files.items():
        save(folder / name, content)
    return list(files)


def show(console: Console, schedule: Schedule, timeline: Timeline, unit: str) -> None:
    """The grid, then a line a rank: where its time goes and what it holds."""
    console.print(text(timeline, console.width), soft_wrap=True)
    console.print(f"{key(timeline)}\n", style="dim", highlight=False)
    columns = ("rank", "busy", "bubble", WARM_UP, COOL_DOWN, "waiting", "most for", "memory", "live")
    caption = "memory, live: most activations and microbatches held at once"
    table = Table(*columns, box=SIMPLE_HEAD, caption=caption, collapse_padding=True, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for rank in range(schedule.num_ranks):
        causes = timeline.bubble_by_cause(rank)
        warm_up, cool_down = causes.pop(WARM_UP), causes.pop(COOL_DOWN)
        longest = max(causes, key=lambda cause: causes[cause], default="-").removeprefix("waiting for ")
        times = (timeline.busy_R[rank], timeline.bubble_R[rank], warm_up, cool_down, sum(causes.values()))
        peaks = (f"{timeline.peak_memory(rank):.4g}", str(timeline.peak_live(rank)))
        table.add_row(str(rank), *(f"{time:.6g}" for time in times), longest, *peaks)
    console.print(table)
    figures = ", ".join(f"{name} {value}" for name, value in facts(timeline, unit))
    console.print(f"[bold]{shape_of(schedule)}[/bold]: {figures}", soft_wrap=True)


class Step(NamedTuple):
    """A simulated step. notes: what its costs rest on. slots: times of its slots, where costs do not say them."""

    costs: Costs
    schedule: Schedule
    timeline: Timeline
    notes: list[str]
    slots: tuple[np.ndarray, np.ndarray] | None = None


def step(config: SimulateConfig, overrides: list[str]) -> Step:
    costs, notes, slots = costs_of(config.costs, overrides), list[str](), None
    if config.measure is not None:
        config = as_measured(config, overrides)
        make, pp = partial(schedule_of, config), config.parallel.pp
        costs, schedule = measured_costs(str(config.measure), make, pp, costs, overrides)
    elif config.cluster is not None:
        schedule = schedule_of(config, costs)
        model = config.model or ModelConfig()
        given = named(costs, overrides)
        planned, schedule, slots, notes = planned_costs(
            model, config.cluster, schedule, told(config.layout), config.sequence_length
        )
        costs = replace(planned, **given)
        if {"f", "i", "w", "fb", "send_when"} & set(given):  # then slots are as told
            slots = None
    else:
        schedule = schedule_of(config, costs)
    return Step(costs, schedule, simulate(schedule, costs, seed=config.seed, slots=slots), notes, slots)


def as_measured(config: SimulateConfig, overrides: list[str]) -> SimulateConfig:
    """With the schedule, the ranks and the microbatches of the run, but for those that the command line names."""
    told = {override.lstrip("+").partition("=")[0] for override in overrides}
    parallel, shape = config.parallel, measured_shape(str(config.measure))
    if "parallel.schedule_csv" not in told:
        words = {name: shape[name] for name in ("schedule", "pp") if name in shape and f"parallel.{name}" not in told}
        parallel = replace(parallel, **words)
    count = config.num_microbatches if "num_microbatches" in told else shape["num_microbatches"]
    return replace(config, parallel=parallel, num_microbatches=count)


def run_for_real(config: SimulateConfig, costs: Costs, schedule: Schedule, console: Console) -> None:
    """Executes the schedule on as many processes as it has ranks; the first shows what ran, and writes the page."""
    from launch.execute import execute
    from launch.trace import write_comparison
    from parallel.pipeline.measure import calibrated

    if config.cluster is not None and costs.fb is not None:
        raise ValueError(
            "execute=true gives F, I and W their own times one after the other, but cluster= plans them in overlapped "
            "pairs: use layout.overlap=false"
        )
    schedule = in_turn(schedule)  # a stage that only takes time has nothing to lay over another
    unit_ms = MICROSECONDS[config.unit] / 1e3
    measured = execute(schedule, costs, unit_ms / 1e3, config.work)
    if measured is None:
        return
    simulated = simulate(schedule, costs_in_ms(schedule, costs, unit_ms), seed=config.seed)
    show(console, schedule, measured, "ms")
    ratio = measured.step_time / simulated.step_time
    figures = f"measured {measured.step_time:.6g} ms, simulated {simulated.step_time:.6g} ms, ratio {ratio:.4f}"
    console.print(f"[bold]{schedule.name}, executed[/bold]: {figures}", soft_wrap=True)
    if config.out is not None:
        write_comparison(Path(config.out), schedule, calibrated(measured), measured, ("simulated", simulated))
        names = "measured.json timeline.html timeline.png trace.json"
        console.print(f"{config.out}: {names}", markup=False, highlight=False, soft_wrap=True)


def costs_in_ms(schedule: Schedule, costs: Costs, unit_ms: float) -> Costs:
    f, _, i, w = (stage_times(schedule, costs) * unit_ms).tolist()
    fb = None if costs.fb is None else costs.fb * unit_ms
    return replace(costs, f=f, i=i, w=w, fb=fb, p2p=costs.p2p_time * unit_ms, p2p_bandwidth=math.inf, optimizer=0.0)


def run_once(config: SimulateConfig, overrides: list[str], console: Console) -> None:
    try:
        found = step(config, overrides)
    except ScheduleError as error:
        console.print(error.grid, markup=False, highlight=False, soft_wrap=True)
        raise
    costs, schedule, timeline, notes, _ = found
    if config.execute:
        return run_for_real(config, costs, schedule, console)
    show(console, schedule, timeline, config.unit)
    report = report_of(config, found)
    if costs.jitter:
        figures = ", ".join(f"{float(q):.0%} {time:.6g}" for q, time in report["step_time_quantiles"].items())
        console.print(f"step time, quantiles of {config.num_runs} runs with jitter: {figures}", soft_wrap=True)
    if found.slots is None and costs.send_when == "ready":
        atomic = simulate(schedule, replace(costs, send_when="slot_end"), seed=config.seed)
        if atomic.step_time != timeline.step_time:
            figures = f"step time {atomic.step_time:.6g}, bubble {atomic.bubble_fraction:.1%}".replace("%", " %")
            why = "here an input gradient leaves when it is ready; when its slot ends, as published formulas have it"
            console.print(f"{why} (costs.send_when=slot_end): {figures}", soft_wrap=True, highlight=False)
    if lost := shortfall(schedule):
        console.print(lost, soft_wrap=True)
    report["notes"] = notes
    for note in notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, highlight=False)
    if config.out is not None:
        names = write(Path(config.out), config, costs, schedule, timeline, report)
        console.print(f"{config.out}: {' '.join(names)}", markup=False, highlight=False, soft_wrap=True)
        if "timeline.html" not in names:
            console.print(f"no pictures: {len(timeline.op_A):,} actions, of at most {MOST_DRAWN:,} that a viewer holds")


SHOWN = ("schedule", "pp", "num_microbatches", "step_time", "bubble_fraction", "peak_activations")
_NAMED = ("parallel.schedule", "parallel.schedule_csv", "parallel.pp", "num_microbatches")


def row_of(config: SimulateConfig, overrides: list[str]) -> Row:
    """Runs one combination of a sweep."""
    if config.execute:
        raise ValueError("execute=true runs one schedule, under torchrun: leave out -m")
    found = step(config, overrides)
    costs, schedule, timeline, *_ = found
    if config.out is not None:
        name = f"{job_number():03d}_{schedule.name}_pp{schedule.num_ranks}_m{schedule.num_microbatches}"
        report = report_of(config, found)
        write(Path(config.out) / name.replace("/", "_"), config, costs, schedule, timeline, report)
    return {
        "pp": schedule.num_ranks,
        "num_microbatches": schedule.num_microbatches,
        "step_time": timeline.step_time,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_activations": max(timeline.peak_memory(rank) for rank in range(schedule.num_ranks)),
    }


ConfigStore.instance().store(name="simulate_schema", node=SimulateConfig)


@one_line_errors()
@hydra.main("pkg://conf", "simulate", version_base="1.3")
@one_line_errors()
def run(composed: DictConfig) -> None:
    overrides = list(HydraConfig.get().overrides.task)
    if not is_sweep():
        return run_once(cast(SimulateConfig, OmegaConf.to_object(composed)), overrides, Console())
    known: Row = {
        "schedule": composed.parallel.schedule_csv or composed.parallel.schedule,
        "pp": composed.parallel.pp,
        "num_microbatches": composed.num_microbatches,
        **{name: value for name, value in swept_words().items() if name not in _NAMED},
        "step_time": None,
        "bubble_fraction": None,
        "peak_activations": None,
        "note": "",
    }
    leave_row(row_or_note(partial(row_of, overrides=overrides), composed, known))


def main() -> None:
    gc.set_threshold(YOUNG)
    if is_asked(sys.argv):
        by, scatter = ("pp", "num_microbatches", "step_time"), ("peak_activations", "step_time")
        sweep(run, "out", "simulated steps", by=by, scatter=scatter, always=SHOWN, spare=("peak_activations",))
    else:
        run()


if __name__ == "__main__":
    main()
