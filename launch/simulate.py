"""Simulates one step of a pipeline schedule, and shows it.

    python launch/simulate.py parallel.schedule=dualpipe parallel.pp=8 num_microbatches=20 costs.f=1 costs.i=1 costs.w=1
    python launch/simulate.py parallel.schedule_csv=mine.csv costs.file=measured.yaml costs.p2p=0.2 out=DIR
    python launch/simulate.py parallel.schedule=auto parallel.pp=8 costs.w=0.6 auto.memory_limit=9 auto.shape=v
    python launch/simulate.py -m parallel.schedule=1f1b,zb1p,dualpipe parallel.pp=4,8 num_microbatches=16,32 out=DIR

    python launch/simulate.py parallel.schedule=dualpipev parallel.pp=4 measure=runs/first
    torchrun --nproc-per-node=4 launch/simulate.py execute=true parallel.schedule=zbv parallel.pp=4 out=DIR

With measure=RUN the costs are what that run measured; with execute=true the schedule also runs for real, with stages
that only take time (work=sleep or matmul), and the page shows what ran over what was simulated.

A run prints the grid and where the time goes; with out=DIR it writes report.json, schedule.json, schedule.csv (if the
schedule has one direction), trace.json, timeline.html and timeline.png. A sweep (-m) ends with one table of all its
runs, and with out=DIR writes summary.csv, summary.html and a folder a run. Without out= nothing is written.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.errors import explain, one_line_errors
from launch.files import save
from launch.summary import Row, as_csv, as_html, as_table
from parallel.config import check_choice
from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import MADE_FOR_COSTS, SHAPES, auto
from parallel.pipeline.dualpipe import shortfall
from parallel.pipeline.passes import ScheduleError, from_csv, to_csv
from parallel.pipeline.render import chrome_trace, facts, html, picture, text
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate, stage_times, step_time_quantiles
from parallel.pipeline.timeline import COOL_DOWN, WARM_UP, Timeline

MICROSECONDS = {"": 1e3, "s": 1e6, "ms": 1e3, "us": 1.0}  # of one unit of time, for the trace
QUANTILES = (0.05, 0.5, 0.95)
YOUNG = 100_000  # objects between two searches for garbage: a schedule is many tuples, and no cycles
MOST_FORWARDS = 10_000_000  # of all ranks; about 15 GB
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
        check_positive("parallel.pp", self.pp)
        check_positive("parallel.stages_per_rank", self.stages_per_rank)


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
    unit: str = ""  # of the costs: a word for the pictures, the scale of the trace
    seed: int = 0  # of costs.jitter
    num_runs: int = 100  # for the quantiles of the step time under costs.jitter
    out: str | None = None
    measure: str | None = None  # a run folder whose measured costs to take, in ms, but for those named here
    execute: bool = False  # also run it, one process a rank
    work: str = "sleep"  # of the stages that are executed

    def __post_init__(self) -> None:
        check_choice("work", self.work, ("sleep", "matmul"))
        if self.measure is not None:
            self.unit = "ms"
        check_positive("num_microbatches", self.num_microbatches)
        check_positive("num_runs", self.num_runs)
        check_choice("unit", self.unit, MICROSECONDS)


def check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1")


def costs_of(options: dict[str, Any], overrides: list[str]) -> Costs:
    """`Costs` from the options: what `costs.file` says holds, but for what the command line (`overrides`) names."""
    options = dict(options)
    path = options.pop("file")
    if path is not None:
        try:
            found = yaml.safe_load(_read(path))
        except yaml.YAMLError as error:
            raise ValueError(f"costs.file={path}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise ValueError(f"costs.file={path}: must hold names and values, as in 'f: 1.5'")
        for name in found:
            check_choice(f"costs.file={path}: option", name, [one.name for one in fields(Costs)])
        given = {override.lstrip("+").partition("=")[0].removeprefix("costs.") for override in overrides}
        options.update({name: value for name, value in found.items() if name not in given})
    slow = options.pop("slow") or {}
    if not isinstance(slow, dict) or not all(str(rank).isdecimal() for rank in slow):
        raise ValueError(f"costs.slow={slow}: expected a factor for each slow rank, as in {{3: 1.07}}")
    return Costs(**options, slow={int(rank): factor for rank, factor in slow.items()})


def schedule_of(config: SimulateConfig, costs: Costs) -> Schedule:
    parallel = config.parallel
    if parallel.schedule_csv is not None:
        return from_csv(_read(parallel.schedule_csv), name=parallel.schedule_csv)
    shape = (parallel.pp, config.num_microbatches)
    if math.prod(shape) > MOST_FORWARDS:
        what = f"parallel.pp={shape[0]} times num_microbatches={shape[1]}"
        raise ValueError(f"{what} are {math.prod(shape):,} forwards: memory holds about {MOST_FORWARDS:,}")
    if parallel.schedule == "auto":
        return auto(*shape, costs, config.auto.memory_limit, config.auto.shape, parallel.stages_per_rank)
    if parallel.schedule in MADE_FOR_COSTS:
        return MADE_FOR_COSTS[parallel.schedule](*shape, costs, config.auto.memory_limit)
    if parallel.schedule == "interleaved_1f1b":
        return SCHEDULES["interleaved_1f1b"](*shape, parallel.stages_per_rank)
    return SCHEDULES[parallel.schedule](*shape)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # a spreadsheet writes a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None


def report_of(config: SimulateConfig, costs: Costs, schedule: Schedule, timeline: Timeline) -> dict[str, Any]:
    """What report.json holds; times in the unit of the costs, lists with one entry a rank."""
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
        times = step_time_quantiles(schedule, costs, quantiles=QUANTILES, num_runs=config.num_runs, seed=config.seed)
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
        title = f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches"
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
    console.print()
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
    shape = f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches"
    figures = ", ".join(f"{name} {value}" for name, value in facts(timeline, unit))
    console.print(f"[bold]{shape}[/bold]: {figures}", soft_wrap=True)


def step(config: SimulateConfig, overrides: list[str]) -> tuple[Costs, Schedule, Timeline]:
    costs = costs_of(config.costs, overrides)
    if config.measure is not None:
        costs, schedule = measured_step(config, costs, overrides)
    else:
        schedule = schedule_of(config, costs)
    return costs, schedule, simulate(schedule, costs, seed=config.seed)


def measured_step(config: SimulateConfig, given: Costs, overrides: list[str]) -> tuple[Costs, Schedule]:
    """The schedule under the costs of the run `config.measure`, but for those that the command line names."""
    from launch.trace import read_costs
    from parallel.pipeline.measure import per_rank, rescaled

    costs, num_ranks = read_costs(Path(config.measure or ""))
    names = {override.removeprefix("costs.").partition("=")[0] for override in overrides if "costs." in override}
    named = {name: getattr(given, name) for name in names - {"file"}}
    schedule = schedule_of(config, replace(per_rank(costs, num_ranks, config.parallel.pp), **named))
    return replace(rescaled(costs, num_ranks, schedule), **named), schedule


def run_for_real(config: SimulateConfig, costs: Costs, schedule: Schedule, console: Console) -> None:
    """Executes the schedule on as many processes as it has ranks; the first shows what ran, and writes the page."""
    from launch.execute import execute
    from launch.trace import write_comparison
    from parallel.pipeline.measure import calibrated

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
    return replace(costs, f=f, i=i, w=w, fb=fb, p2p=costs.p2p_time * unit_ms, p2p_bytes=0.0, optimizer=0.0)


def run_once(config: SimulateConfig, overrides: list[str], console: Console) -> None:
    try:
        costs, schedule, timeline = step(config, overrides)
    except ScheduleError as error:
        console.print(error.grid, markup=False, highlight=False, soft_wrap=True)
        raise
    if config.execute:
        return run_for_real(config, costs, schedule, console)
    show(console, schedule, timeline, config.unit)
    report = report_of(config, costs, schedule, timeline)
    if costs.jitter:
        figures = ", ".join(f"{float(q):.0%} {time:.6g}" for q, time in report["step_time_quantiles"].items())
        console.print(f"step time, quantiles of {config.num_runs} runs with jitter: {figures}", soft_wrap=True)
    if lost := shortfall(schedule):
        console.print(lost, soft_wrap=True)
    if config.out is not None:
        names = write(Path(config.out), config, costs, schedule, timeline, report)
        console.print(f"{config.out}: {' '.join(names)}", markup=False, highlight=False, soft_wrap=True)
        if "timeline.html" not in names:
            console.print(f"no pictures: {len(timeline.op_A):,} actions, of at most {MOST_DRAWN:,} that a viewer holds")


def run_of_sweep(config: SimulateConfig, overrides: list[str], number: int) -> Row:
    """Runs one combination of a sweep. One that cannot be does not end the others: its row says why."""
    row: Row = {
        "schedule": config.parallel.schedule_csv or config.parallel.schedule,
        "pp": config.parallel.pp,
        "num_microbatches": config.num_microbatches,
        **dict(override.lstrip("+").split("=", 1) for override in overrides if not override.startswith(_NAMED)),
        "step_time": None,
        "bubble_fraction": None,
        "peak_activations": None,
        "note": "",
    }
    try:
        costs, schedule, timeline = step(config, overrides)
    except ValueError as error:
        line = explain(error)
        if line is None:
            raise
        return row | {"note": line}
    if config.out is not None:
        name = f"{number:03d}_{schedule.name}_pp{schedule.num_ranks}_m{schedule.num_microbatches}"
        report = report_of(config, costs, schedule, timeline)
        write(Path(config.out) / name.replace("/", "_"), config, costs, schedule, timeline, report)
    return row | {
        "pp": schedule.num_ranks,
        "num_microbatches": schedule.num_microbatches,
        "step_time": timeline.step_time,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_activations": max(timeline.peak_memory(rank) for rank in range(schedule.num_ranks)),
    }


_NAMED = ("out=", "parallel.schedule=", "parallel.schedule_csv=", "parallel.pp=", "num_microbatches=")


def end_sweep(rows: list[Row], out: str | None, console: Console) -> None:
    """Shows and writes the one table: by shape, the fastest first, without the columns that never change."""
    rows = sorted(rows, key=lambda row: (row["pp"], row["num_microbatches"], row["step_time"] or float("inf")))
    always = {"schedule", "pp", "num_microbatches", "step_time", "bubble_fraction", "peak_activations"}
    keys = [key for key in rows[0] if key in always or len({str(row[key]) for row in rows}) > 1]
    rows = [{key: row[key] for key in keys} for row in rows]
    console.print(as_table([{key: row[key] for key in keys if key != "note"} for row in rows]))
    if out is not None:
        save(Path(out) / "summary.csv", as_csv(rows))
        save(Path(out) / "summary.html", as_html(rows, f"{len(rows)} simulated steps"))
        console.print(f"{out}: summary.csv summary.html", markup=False, highlight=False, soft_wrap=True)


ConfigStore.instance().store(name="simulate_schema", node=SimulateConfig)


def main() -> None:
    gc.set_threshold(YOUNG)
    console = Console()
    rows: list[Row] = []  # one a run of a sweep
    out: str | None = None

    @hydra.main("pkg://conf", "simulate", version_base="1.3")
    @one_line_errors()
    def run(composed: DictConfig) -> None:
        nonlocal out
        config = cast(SimulateConfig, OmegaConf.to_object(composed))
        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN:
            out = config.out
            with console.status(f"{len(rows)} steps simulated"):
                rows.append(run_of_sweep(config, list(job.overrides.task), len(rows)))
        else:
            run_once(config, list(job.overrides.task), console)

    with tempfile.TemporaryDirectory() as scratch, one_line_errors():
        OmegaConf.register_new_resolver("scratch", lambda: scratch, replace=True)  # where Hydra records a sweep
        run()
        if rows:
            end_sweep(rows, out, console)
    if refused := dict.fromkeys(row["note"] for row in rows if row["note"]):
        sys.exit("\n".join(f"error: {note}" for note in refused))


if __name__ == "__main__":
    main()
