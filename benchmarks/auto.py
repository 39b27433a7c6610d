"""How often and by how much `auto` beats the best fixed schedule of its shape and memory limit, on random costs.

    python benchmarks/auto.py [--settings 500] [--first 0] [--out auto.json]
    python benchmarks/auto.py --large

A setting draws ranks (2 to 16), microbatches (2 to 3 times as many), a shape, a memory limit, and costs: f, i, w, an
overlapped pair that gains up to 25 % or nothing, p2p, a slow rank, uneven stages, when results leave, what W keeps. It
is drawn from its number alone, so that pieces of a grid can be run by themselves: --first is where to begin. Fixed are
gpipe, 1f1b, interleaved_1f1b, zb1p, zbv, dualpipe and dualpipev, and zero_bubble at every memory limit up to that of
the setting. Every schedule found is validated. A loss would be a bug; the exit status says whether there was one.

--large times the search at 16 ranks x 64 microbatches, for every shape.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import auto
from parallel.pipeline.passes import validate
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.zero_bubble import zero_bubble

FIXED = {
    "loop": ("gpipe", "1f1b", "interleaved_1f1b", "zb1p"),
    "v": ("zbv", "dualpipev"),
    "bidirectional": ("dualpipe",),
}
FIXED["any"] = FIXED["loop"] + FIXED["v"] + FIXED["bidirectional"]
DEEPSEEK = Costs(49.1, 75.4, 32.0, 143.8, p2p=1.5)  # ms, as published for DeepSeek-V3


def setting(number: int) -> tuple[int, int, Costs, float, str]:
    """(ranks, microbatches, costs, memory limit, shape)."""
    rng = np.random.default_rng(number)
    num_ranks = int(rng.choice([2, 4, 6, 8, 16], p=[0.2, 0.3, 0.2, 0.2, 0.1]))
    num_microbatches = int(rng.integers(2, 3 * num_ranks + 1))
    shape = str(rng.choice(list(FIXED)))
    f, i, w = (float(time) for time in rng.uniform((0.5, 0.5, 0.1), (1.5, 2.5, 1.5)))
    costs = Costs(
        f,
        i,
        w,
        fb=(f + i + w) * float(rng.uniform(0.75, 1)) if rng.random() < 0.6 else None,
        p2p=float(rng.choice([0, 0.02, 0.1, 0.4])),
        kept_after_i=float(rng.choice([1, 0.5])),
        send_when=str(rng.choice(["ready", "slot_end"])),
        slow={int(rng.integers(num_ranks)): float(rng.uniform(1, 1.3))} if rng.random() < 0.3 else {},
    )
    if rng.random() < 0.25:  # uneven stages
        num_stages = 2 * num_ranks if shape == "v" or (shape == "loop" and rng.random() < 0.5) else num_ranks
        for name in ("f", "i", "w"):
            share = getattr(costs, name) * num_ranks / num_stages
            setattr(costs, name, (share * rng.uniform(0.7, 1.3, num_stages)).tolist())
    limits = [num_ranks / 2, num_ranks, num_ranks + 1, 1.5 * num_ranks, 2 * num_ranks, 4 * num_ranks, np.inf]
    return num_ranks, num_microbatches, costs, float(rng.choice(limits)), shape


def fixed_schedules(
    num_ranks: int, num_microbatches: int, costs: Costs, limit: float, shape: str
) -> Iterator[Schedule]:
    num_listed = len(costs.f) if isinstance(costs.f, list) else None
    for name in FIXED[shape]:
        schedule = SCHEDULES[name](num_ranks, num_microbatches)
        if num_listed in (None, schedule.num_stages):
            yield schedule
    if shape in ("loop", "any") and num_listed in (None, num_ranks):
        for most in range(1, 2 * num_ranks):
            if most <= limit:
                yield zero_bubble(num_ranks, num_microbatches, costs, most)


def run(number: int) -> dict[str, Any]:
    """One setting: times of the best fixed schedule and of auto's."""
    num_ranks, num_microbatches, costs, limit, shape = setting(number)
    best, best_name = np.inf, None
    for schedule in fixed_schedules(*setting(number)):
        timeline = simulate(schedule, costs)
        peak = max(timeline.peak_memory(rank) for rank in range(num_ranks))
        if peak <= limit + 1e-9 and timeline.pipeline_time < best:
            best, best_name = timeline.pipeline_time, schedule.name
    start = time.perf_counter()
    found = auto(num_ranks, num_microbatches, costs, limit, shape)
    seconds = time.perf_counter() - start
    validate(found)
    timeline = simulate(found, costs)
    assert max(timeline.peak_memory(rank) for rank in range(num_ranks)) <= limit + 1e-9
    return {
        "setting": number,
        "pp": num_ranks,
        "num_microbatches": num_microbatches,
        "shape": shape,
        "memory_limit": limit if np.isfinite(limit) else None,
        "pairs_gain": costs.fb is not None,
        "best_fixed": best_name,
        "best_fixed_time": best if best_name else None,
        "auto_time": timeline.pipeline_time,
        "gain": 1 - timeline.pipeline_time / best if best_name else None,
        "search_seconds": seconds,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One line a shape, and one for pairs that gain nothing."""
    columns = ("shape", "settings", "none fits", "won", "equal", "lost", "gain", "max", "seconds", "max")
    table = Table(*columns, caption="none fits: no fixed schedule does. gain, and seconds of the search: medians")
    for column in table.columns[1:]:
        column.justify = "right"
    groups = [(shape, [row for row in rows if row["shape"] == shape]) for shape in FIXED]
    groups.append(("no gain in pairs", [row for row in rows if not row["pairs_gain"]]))
    groups.append(("all", rows))
    for name, group in groups:
        gains = np.array([row["gain"] for row in group if row["gain"] is not None])
        seconds = np.array([row["search_seconds"] for row in group])
        if len(gains):
            counts = (len(group), len(group) - len(gains), (gains > 1e-9).sum())
            others = ((np.abs(gains) <= 1e-9).sum(), (gains < 0).sum())
            figures = (
                f"{np.median(gains):.1%}",
                f"{gains.max():.1%}",
                f"{np.median(seconds):.1f}",
                f"{seconds.max():.1f}",
            )
            table.add_row(name, *map(str, counts + others), *figures)
    console.print(table)


def show_large(console: Console) -> list[dict[str, Any]]:
    """16 ranks x 64 microbatches at DeepSeek-V3's costs, limit PP + 1."""
    table = Table(
        "shape",
        "best fixed",
        "its time",
        "auto",
        "gain",
        "search s",
        title="16 x 64, F 49.1 I 75.4 W 32 F&B 143.8 p2p 1.5",
    )
    rows = []
    for shape in FIXED:
        fitting = []
        for schedule in fixed_schedules(16, 64, DEEPSEEK, 17, shape):
            timeline = simulate(schedule, DEEPSEEK)
            if max(timeline.peak_memory(rank) for rank in range(16)) <= 17 + 1e-9:
                fitting.append((timeline.pipeline_time, schedule.name))
        best, name = min(fitting)
        start = time.perf_counter()
        ours = simulate(auto(16, 64, DEEPSEEK, 17, shape), DEEPSEEK).pipeline_time
        seconds = time.perf_counter() - start
        rows.append(
            {"shape": shape, "best_fixed": name, "best_fixed_time": best, "auto_time": ours, "search_seconds": seconds}
        )
        table.add_row(shape, name, f"{best:.1f}", f"{ours:.1f}", f"{1 - ours / best:.1%}", f"{seconds:.1f}")
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="instead, time the search at 16 x 64")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="show these pieces of the grid too")
    args = parser.parse_args()
    console = Console()
    auto(4, 8, Costs(fb=2.5), 4)  # compiles
    numbers = range(args.first, args.first + args.settings)
    if args.large:
        rows = show_large(console)
    else:
        rows = [run(number) for number in track(numbers, description="settings", console=Console(stderr=True))]
        for piece in args.add:
            rows += json.loads(piece.read_text(encoding="utf-8"))["rows"]
        show(rows, console)
    if args.out:
        figures = {
            "date": datetime.date.today().isoformat(),
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
            "rows": rows,
        }
        beside = args.out.with_suffix(".partial")
        beside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        beside.replace(args.out)
        console.print(f"written to {args.out}")
    lost = [row for row in rows if row["best_fixed_time"] and row["auto_time"] > row["best_fixed_time"]]
    if lost:
        sys.exit(f"auto lost on {len(lost)} of {len(rows)}: {lost[0]}")


if __name__ == "__main__":
    main()
