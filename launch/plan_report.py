"""What launch/plan.py prints and writes: the ranked table, why the winner wins, memory, doubts, the bill."""

from __future__ import annotations

import json
import pickle  # written, for torch's memory viewer reads nothing else; never read
from dataclasses import asdict, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import conf
from infra.wording import counted
from launch.files import save
from launch.summary import as_csv, as_html, show_table
from launch.told import told
from parallel.expert import default_dispatcher
from parallel.plan.goodput import Goodput
from parallel.plan.interval import Interval, interval
from parallel.plan.layout import OVERLAPPING, Layout, illegal
from parallel.plan.memory import RankMemory, smallest_change
from parallel.plan.search import Plan, Planner, Row, pareto, terms
from parallel.plan.snapshot import snapshot

if TYPE_CHECKING:
    from launch.plan import PlanConfig


# Columns that a narrow terminal does without, the first first.
SPARE = ("margin_GB", "ranks", "TFLOP/s", "from_s", "to_s", "GPU-hours", "bubble_fraction")


def as_row(config: PlanConfig, number: int, row: Row, span: Interval | None) -> dict[str, Any]:
    """One line of the table, the plan's row `number`: what a layout takes, then its words."""
    layout, length = row.layout, config.data.sequence_length
    tokens = config.train.global_batch_size * length
    flops = config.model.flops_per_token(causal=True, sequence_length=length) * tokens
    short = f"pp{layout.pp} ep{layout.ep} {layout.schedule} {layout.dispatcher} {layout.recompute} {layout.precision}"
    if layout.schedule in OVERLAPPING and not layout.overlap:
        short += " no-overlap"
    elif layout.pairs and layout.schedule not in OVERLAPPING:
        short += " overlap"
    return {
        "row": number,
        "step_s": round(row.time.total, 3),
        "from_s": round(span.low, 3) if span else None,
        "to_s": round(span.high, 3) if span else None,
        "TFLOP/s": float(f"{flops / row.time.total / layout.world / 1e12:.4g}"),
        "bubble_fraction": row.time.bubble / row.time.total,
        "memory_GB": round(row.memory.total / 1e9, 1),
        "margin_GB": round(row.memory.margin / 1e9, 1),
        "ranks": layout.world,
        "layout": f"{short} zero{layout.zero_stage} mb{layout.microbatch_size}",
    }


@cache
def eval_samples() -> int:
    """Of a run whose line names none."""
    return int(OmegaConf.load(Path(conf.__path__[0]) / "pretrain.yaml").train.eval_samples)


def line_of(config: PlanConfig, model: str, layout: Layout) -> str:
    """The overrides of launch/pretrain.py that run this layout; `eval_samples` that are no batch of it are raised."""
    batch, length, least = config.train.global_batch_size, config.data.sequence_length, layout.least_batch
    words = [f"model={model}", *layout.words(), f"train.global_batch_size={batch}", f"data.sequence_length={length}"]
    if eval_samples() % least:
        words.append(f"train.eval_samples={-(-eval_samples() // least) * least}")
    return " ".join(words)


def beside_of(config: PlanConfig, words: dict[str, Any], planner: Planner, winner: Row) -> tuple[Row | None, str]:
    """The layout of these words, or None and why it is not legal here."""
    dispatcher = default_dispatcher(words.get("ep", winner.layout.ep))
    others: dict[str, Any] = {"overlap": True, "zero_stage": 1, "dispatcher": dispatcher}
    layout = replace(winner.layout, **(others | words))
    if "overlap" not in words:
        layout = replace(layout, overlap=layout.pairs)  # as the search has it where nothing pairs
    why = illegal(config.model, layout, config.train.global_batch_size)
    return (None, f"not legal here, {why}") if why else (planner.row(layout), "")


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
        f"[bold]{config.train.tokens / 1e12:g} T tokens[/bold]: {bill.days:.1f} days on {counted(world, 'rank')}, "
        f"{bill.gpu_hours / 1e6:.3f} M GPU-hours, ${bill.dollars / 1e6:.3f} M at ${config.cluster.dollars_per_hour:g} "
        f"an hour with {counted(bill.spare_nodes, 'spare node')}; useful {100 * bill.share:.1f} % of the time: "
        f"{bill.failures:.0f} failures expected, a checkpoint every {bill.interval_s / 60:.1f} minutes "
        f"({bill.save_s:.1f} s each)",
        soft_wrap=True,
        highlight=False,
    )


def show_interval(console: Console, name: str, found: Interval) -> None:
    """The step from its least to its most, and what each doubtful term moves it by."""
    moved = ", ".join(
        f"{term} {least:+.2f} to {most:+.2f}"
        for term, (least, most) in sorted(found.moved.items(), key=lambda item: item[1][0] - item[1][1])
    )
    console.print(
        f"[bold]{name}: {found.middle:.3f} s, between {found.low:.3f} and {found.high:.3f}[/bold]; the largest "
        f"unexplained term is {found.largest}. Seconds by term: {moved}; known: uneven stages "
        f"{found.uneven_stages:+.2f}",
        soft_wrap=True,
        highlight=False,
    )


def show_verdict(console: Console, name: str, planner: Planner, layout: Layout, held: RankMemory) -> None:
    """Whether a layout fits, with what margin, and if not the smallest change that makes it fit."""
    limit = planner.step.cluster.memory_gb
    if held.total <= planner.limit:
        console.print(
            f"{name} fits: {held.total / 1e9:.1f} of {limit:g} GB ({held.total / planner.limit:.1%}) on the fullest "
            f"rank, {held.margin / 1e9:.1f} of them margin for context, communicators and fragmentation",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
        return
    found = smallest_change(planner.memory, layout, planner.global_batch_size)
    change = "no single change makes it fit"
    if found is not None:
        words = " ".join(f"{name}={new}" for name, (_, new) in layout.differs(found[0]).items())
        change = f"smallest change: {words}, which makes it {found[1].total / 1e9:.1f} GB"
    line = f"{name} does not fit: {held.total / 1e9:.1f} of {limit:g} GB; {change}"
    console.print(line, style="yellow", soft_wrap=True, highlight=False)


def doubts(config: PlanConfig, planner: Planner, layout: Layout) -> list[str]:
    """What the figures rest on, a line each."""
    found = planner.step.doubts(layout)
    if config.expert_load is not None:
        share = 100 * planner.step.load_excess(layout.ep)
        found.append(f"experts loaded as in {config.expert_load}: {share:.1f} % above the mean at ep={layout.ep}")
    return found


def report(
    config: PlanConfig, model: str, planner: Planner, plan: Plan, bill: Goodput, overrides: list[str], console: Console
) -> None:
    """Why `beside` is not legal is said only where the command line (`overrides`) names one: else it is a default."""
    winner = plan.rows[0]
    words = told(config.beside) if config.beside else {}
    beside, where = beside_of(config, words, planner, winner) if words else (None, "")
    batch = config.train.global_batch_size
    spans = [interval(planner.step, row.layout, batch, config.doubt) for row in plan.rows[: config.show]]
    rows = [as_row(config, n, row, span) for n, (row, span) in enumerate(zip_longest(plan.rows, spans), start=1)]
    console.print(
        f"{counted(plan.num_legal, 'legal layout')}, {plan.num_fitting:,} fit {config.cluster.memory_gb:g} GB, "
        f"{len(rows)} of them replayed",
        highlight=False,
    )
    show_table(console, rows[: config.show], SPARE)
    if beside is not None:
        place = next((n for n, row in enumerate(plan.rows, start=1) if row.layout == beside.layout), None)
        where = f"row {place} of {plan.num_fitting}" if place else "not among those replayed"
    asked = any(word.lstrip("+").startswith("beside") for word in overrides)
    if beside is not None or (words and asked):
        named = " ".join(f"{name}={value}" for name, value in words.items())
        console.print(f"beside ({named}): {where}", soft_wrap=True, highlight=False)
    if beside is not None:
        show_verdict(console, "beside", planner, beside.layout, beside.memory)
    show_verdict(console, "winner", planner, winner.layout, winner.memory)
    show_terms(console, winner, beside)
    show_interval(console, "winner", spans[0])
    if beside is not None:
        show_interval(console, "beside", interval(planner.step, beside.layout, batch, config.doubt))
    show_neighbours(console, planner, winner)
    front = pareto(plan.rows)
    console.print("Pareto front of step time, memory and ranks")
    show_table(console, [as_row(config, plan.rows.index(row) + 1, row, None) for row in front[: config.show]], SPARE)
    if config.memory:
        show_memory(console, planner, winner)
    show_bill(console, config, bill, winner.layout.world)
    notes = doubts(config, planner, winner.layout)
    for note in notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, highlight=False)
    console.print(
        f"launch/pretrain.py {line_of(config, model, winner.layout)}", soft_wrap=True, highlight=False, markup=False
    )
    if config.out is not None:
        about = {"goodput": asdict(bill), "notes": notes, "step_interval": asdict(spans[0])}
        names = write(Path(config.out), config, model, plan, rows, about)
        if config.memory:
            fullest = planner.memory.fullest_rank(winner.layout, batch)
            content = pickle.dumps(snapshot(planner.memory, winner.layout, batch, fullest))
            save(Path(config.out) / "memory_snapshot.pickle", content)
            names += f" memory_snapshot.pickle (pp rank {fullest}, for https://pytorch.org/memory_viz)"
        console.print(f"{config.out}: {names}", soft_wrap=True, highlight=False)


def write(
    folder: Path, config: PlanConfig, model: str, plan: Plan, rows: list[dict[str, Any]], about: dict[str, Any]
) -> str:
    """Writes the whole table; returns the names of the files."""
    lines = [line_of(config, model, row.layout) for row in plan.rows]
    full = [shown | {"line": line} for shown, line in zip(rows, lines, strict=True)]
    content = {
        "num_legal": plan.num_legal,
        "num_fitting": plan.num_fitting,
        "rows": [
            {
                "line": line,
                "ranks": row.layout.world,
                "step_time": row.time.total,
                "terms": asdict(row.time),
                "memory_gb": row.memory.as_gb(),
            }
            for line, row in zip(lines, plan.rows, strict=True)
        ],
    } | about
    save(folder / "plan.json", json.dumps(content, indent=2))
    save(folder / "plan.csv", as_csv(full))
    title = f"{model} on {config.cluster.name}: {len(full)} layouts"
    save(folder / "plan.html", as_html(full, title, scatter=("memory_GB", "step_s")))
    return "plan.json plan.csv plan.html"
