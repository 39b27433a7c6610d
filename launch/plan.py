"""Says which layout to train a model with on a cluster: how long a step takes, whether it fits, what the run costs.

    python launch/plan.py model=671b cluster=h800_2048 train.global_batch_size=15360
    python launch/plan.py parallel.pp=16 parallel.schedule=1f1b precision=bf16        # these words told, the rest found
    python launch/plan.py cluster=h100 worlds=[256,512,1024] train.global_batch_size=4096 out=DIR

It takes every legal layout, drops what does not fit, replays the schedules of the best exactly, and prints them ranked,
each with the line that starts it; the winner beside its neighbours; the Pareto front of time, memory and ranks; and
days and dollars for `train.tokens`. With out=DIR it writes plan.json, plan.csv and plan.html.

`memory=true` prints what every pipeline rank of the winner holds. `imbalance` is a factor on all computing and
travelling: 1 unless you fit it to a run of your own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from infra.hardware import ClusterConfig
from launch.errors import one_line_errors
from launch.files import save
from launch.summary import as_csv, as_html, as_table
from model.config import ModelConfig
from parallel.config import check_choice
from parallel.pipeline.schedules import SCHEDULES
from parallel.plan.goodput import Goodput, goodput, work_hours
from parallel.plan.layout import PRECISIONS, RECOMPUTES, Layout, illegal
from parallel.plan.memory import MemoryModel
from parallel.plan.search import Plan, Planner, Row, pareto, terms
from parallel.plan.step import StepModel


@dataclass
class ToldConfig:
    """Words of `parallel` that are told; what is null is searched."""

    pp: int | None = None
    ep: int | None = None
    schedule: str | None = None
    dispatcher: str | None = None
    overlap: bool | None = None
    recompute: str | None = None
    zero_stage: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("schedule", tuple(SCHEDULES)),
            ("dispatcher", ("local", "all_to_all", "two_hop")),
            ("recompute", RECOMPUTES),
            ("zero_stage", (0, 1)),
        ):
            if getattr(self, name) is not None:
                check_choice(f"parallel.{name}", getattr(self, name), choices)


@dataclass
class ToldPrecision:
    """`precision` of a run; its back end and recipe change no plan."""

    name: str | None = None
    backend: str = "reference"
    recipe: str = "deepseek_v3"

    def __post_init__(self) -> None:
        if self.name is not None:
            check_choice("precision", self.name, PRECISIONS)


@dataclass
class BatchConfig:
    """tokens: of the whole run. ramp_from: sequences of the first batch, which grows over `ramp_tokens`."""

    global_batch_size: int = 15360
    microbatch_size: int | None = None
    tokens: float = 14.8e12
    ramp_from: int | None = None
    ramp_tokens: float = 469e9

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ValueError(f"train.global_batch_size={self.global_batch_size} must be at least 1")


@dataclass
class LengthConfig:
    sequence_length: int = 4096


@dataclass
class PlanConfig:
    """worlds: numbers of ranks to try; null: all of the cluster. show: rows printed. exact: schedules replayed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ToldConfig = field(default_factory=ToldConfig)
    precision: ToldPrecision = field(default_factory=ToldPrecision)
    train: BatchConfig = field(default_factory=BatchConfig)
    data: LengthConfig = field(default_factory=LengthConfig)
    worlds: list[int] | None = None
    beside: dict[str, Any] | None = None
    moments: str = "bf16"  # dtype of the optimizer's moments
    ema: bool = True
    imbalance: float = 1.0
    exact: int = 200
    show: int = 12
    memory: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        check_choice("moments", self.moments, ("fp32", "bf16"))
        for name in ("exact", "show"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def told(self) -> dict[str, Any]:
        return asdict(self.parallel) | {"precision": self.precision.name, "microbatch_size": self.train.microbatch_size}


def planner_of(config: PlanConfig) -> Planner:
    step = StepModel(config.model, config.cluster, config.data.sequence_length, config.moments, config.imbalance)
    return Planner(step, MemoryModel(step, config.ema), config.train.global_batch_size)


def as_row(config: PlanConfig, number: int, row: Row) -> dict[str, Any]:
    """One line of the table: what a layout takes, then its words."""
    layout, length = row.layout, config.data.sequence_length
    tokens = config.train.global_batch_size * length
    flops = config.model.flops_per_token(causal=True, sequence_length=length) * tokens
    short = f"pp{layout.pp} ep{layout.ep} {layout.schedule} {layout.dispatcher} {layout.recompute} {layout.precision}"
    if layout.schedule.startswith("dualpipe") and not layout.overlap:
        short += " no-overlap"
    return {
        "rank": number,
        "step_s": round(row.time.total, 3),
        "TFLOP/s": round(flops / row.time.total / layout.world / 1e12, 1),
        "bubble_fraction": row.time.bubble / row.time.total,
        "memory_GB": round(row.memory.total / 1e9, 1),
        "ranks": layout.world,
        "layout": f"{short} zero{layout.zero_stage} mb{layout.microbatch_size}",
    }


def line_of(config: PlanConfig, model: str, layout: Layout) -> str:
    """The overrides of launch/pretrain.py that run this layout."""
    batch, length = config.train.global_batch_size, config.data.sequence_length
    return " ".join(
        [f"model={model}", *layout.words(), f"train.global_batch_size={batch}", f"data.sequence_length={length}"]
    )


def bill_of(config: PlanConfig, planner: Planner, row: Row) -> Goodput:
    """The whole run with this layout."""
    layout, train = row.layout, config.train
    unit = layout.dp * layout.microbatch_size * (2 if layout.schedule == "dualpipe" else 1)

    def seconds(size: int) -> float:
        return planner.step.simulate(layout, size).total

    hours = work_hours(
        train.tokens, config.data.sequence_length, train.global_batch_size, seconds, train.ramp_from,
        train.ramp_tokens, multiple_of=unit,
    )  # fmt: skip
    per_param = 4 + 2 * {"fp32": 4, "bf16": 2}[config.moments]
    return goodput(config.cluster, layout.world, hours, per_param * config.model.num_params())


def beside_of(config: PlanConfig, planner: Planner, winner: Row) -> Row | None:
    """The layout of `beside`, if it is legal here and fits."""
    if not config.beside:
        return None
    words: dict[str, Any] = {"overlap": True, "zero_stage": 1, "dispatcher": "two_hop"} | config.beside
    layout = replace(winner.layout, **words)
    if illegal(config.model, layout, config.train.global_batch_size):
        return None
    return planner.row(layout)


def show_terms(console: Console, winner: Row, beside: Row | None) -> None:
    table = Table(
        "term", "winner s", *(["beside s", "difference"] if beside else []), box=SIMPLE_HEAD,
        caption="seconds of the mean rank",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    mine, other = ({**asdict(row.time), "step": row.time.total} if row else {} for row in (winner, beside))
    for name, value in mine.items():
        more = [f"{other[name]:.3f}", f"{other[name] - value:+.3f}"] if other else []
        table.add_row(name, f"{value:.3f}", *more)
    console.print(table)


def show_neighbours(console: Console, planner: Planner, winner: Row) -> None:
    """What each legal layout one word away loses, and by which terms; then those that do not fit, in short."""
    neighbours = planner.neighbours(winner.layout)
    table = Table("with", "step s", "loses s", "by", box=SIMPLE_HEAD, title="one word away from the winner")
    for words, row, _ in neighbours:
        if row is not None:
            most = [f"{name} {value:+.2f}" for name, value in terms(row, winner).items() if abs(value) >= 0.005][:3]
            loss = row.time.total - winner.time.total
            table.add_row(words, f"{row.time.total:.3f}", f"{loss:+.3f}", ", ".join(most) or "nothing")
    console.print(table)
    for words, row, why in neighbours:
        if row is None:
            console.print(f"  {words}: {why}", soft_wrap=True, highlight=False)


_HELD = "GB at the fullest moment; buffers, workspace and margin are estimates, host is CPU memory"


def sparkline(seconds: np.ndarray, values: np.ndarray, width: int = 32) -> str:
    """The most held in each of `width` equal parts of the time, as blocks of eight heights."""
    edges = np.linspace(0, seconds[-1], width + 1)
    first = np.maximum(np.searchsorted(seconds, edges[:-1], side="right") - 1, 0)
    last = np.searchsorted(seconds, edges[1:], side="right")
    most = np.array([values[a : max(b, a + 1)].max() for a, b in zip(first, last, strict=True)])
    return "".join("▁▂▃▄▅▆▇█"[int(7 * level)] for level in most / max(most.max(), 1e-9))


def show_memory(console: Console, planner: Planner, winner: Row) -> None:
    batch, layout = planner.global_batch_size, winner.layout
    ranks = [planner.memory.rank(layout, batch, r) for r in range(layout.pp)]
    columns = list(ranks[0].as_gb())
    table = Table("pp rank", *columns, "total", "activations over the step", box=SIMPLE_HEAD, caption=_HELD)
    for r, rank in enumerate(ranks):
        figures = (f"{value:.2f}" for value in (*rank.as_gb().values(), rank.total / 1e9))
        table.add_row(str(r), *figures, sparkline(*planner.memory.over_time(layout, batch, r)))
    console.print(table)


def show_bill(console: Console, config: PlanConfig, bill: Goodput, world: int) -> None:
    console.print(
        f"[bold]{config.train.tokens / 1e12:g} T tokens[/bold]: {bill.days:.1f} days on {world} ranks, "
        f"{bill.gpu_hours / 1e6:.3f} M GPU-hours, ${bill.dollars / 1e6:.3f} M at ${config.cluster.dollars_per_hour:g} "
        f"an hour with {bill.spare_nodes} spare nodes; useful {100 * bill.share:.1f} % of the time: "
        f"{bill.failures:.0f} failures expected, a checkpoint every {bill.interval_s / 60:.1f} minutes "
        f"({bill.save_s:.1f} s each)",
        soft_wrap=True,
        highlight=False,
    )


def show_doubts(console: Console, config: PlanConfig, planner: Planner, winner: Row) -> None:
    """What the figures rest on."""
    rates, device = config.cluster.rates.device, config.cluster.device
    doubts = []
    if rates not in device:
        doubts.append(f"kernel rates were measured on {rates} and are scaled to {device} by its peaks")
    if shapes := planner.step.uncovered(winner.layout):
        doubts.append(f"shapes outside the measured tables: {', '.join(shapes)}")
    if config.imbalance != 1:
        doubts.append(f"imbalance={config.imbalance:g} is fitted, not predicted")
    for doubt in doubts:
        console.print(f"note: {doubt}", style="yellow", soft_wrap=True, highlight=False)


def report(config: PlanConfig, model: str, planner: Planner, plan: Plan, console: Console) -> None:
    winner = plan.rows[0]
    beside = beside_of(config, planner, winner)
    rows = [as_row(config, n, row) for n, row in enumerate(plan.rows, start=1)]
    console.print(
        f"{plan.num_legal:,} legal layouts, {plan.num_fitting:,} fit {config.cluster.memory_gb:g} GB, "
        f"{len(rows)} of them replayed",
        highlight=False,
    )
    console.print(as_table(rows[: config.show]))
    if beside is not None:
        place = next((n for n, row in enumerate(plan.rows, start=1) if row.layout == beside.layout), None)
        where = f"rank {place} of {plan.num_fitting}" if place else "not among those replayed"
        fits = "" if beside.memory.total <= planner.limit else f"; it needs {beside.memory.total / 1e9:.1f} GB"
        console.print(f"beside ({' '.join(f'{k}={v}' for k, v in (config.beside or {}).items())}): {where}{fits}")
    show_terms(console, winner, beside)
    show_neighbours(console, planner, winner)
    front = pareto(plan.rows)
    console.print("Pareto front of step time, memory and ranks")
    console.print(as_table([as_row(config, plan.rows.index(row) + 1, row) for row in front[: config.show]]))
    if config.memory:
        show_memory(console, planner, winner)
    bill = bill_of(config, planner, winner)
    show_bill(console, config, bill, winner.layout.world)
    show_doubts(console, config, planner, winner)
    console.print(
        f"launch/pretrain.py {line_of(config, model, winner.layout)}", soft_wrap=True, highlight=False, markup=False
    )
    if config.out is not None:
        write(Path(config.out), config, model, plan, rows, bill)
        console.print(f"{config.out}: plan.json plan.csv plan.html", soft_wrap=True, highlight=False)


def write(folder: Path, config: PlanConfig, model: str, plan: Plan, rows: list[dict[str, Any]], bill: Goodput) -> None:
    lines = [line_of(config, model, row.layout) for row in plan.rows]
    full = [shown | {"line": line} for shown, line in zip(rows, lines, strict=True)]
    content = {
        "num_legal": plan.num_legal,
        "num_fitting": plan.num_fitting,
        "rows": [
            {
                "line": line,
                "step_time": row.time.total,
                "terms": asdict(row.time),
                "memory_gb": row.memory.as_gb(),
            }
            for line, row in zip(lines, plan.rows, strict=True)
        ],
        "goodput": asdict(bill),
    }
    save(folder / "plan.json", json.dumps(content, indent=2))
    save(folder / "plan.csv", as_csv(full))
    save(folder / "plan.html", as_html(full, f"{model} on {config.cluster.name}: {len(full)} layouts"))


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


@one_line_errors()
@hydra.main("pkg://conf", "plan", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    config = cast(PlanConfig, OmegaConf.to_object(composed))
    planner, console = planner_of(config), Console()
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done)

        plan = planner.search(config.worlds or [config.cluster.num_ranks], config.told, config.exact, tell)
    report(config, HydraConfig.get().runtime.choices["model"], planner, plan, console)


if __name__ == "__main__":
    main()
