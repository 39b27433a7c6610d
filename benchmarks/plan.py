"""How fast the planner is, on one core.

    python benchmarks/plan.py [--out plan.json] [--turns 5]

For DeepSeek-V3 on 2,048 H800: analytic configurations a second (memory of the fullest rank and the step in closed
form, from nothing cached), schedules replayed a second, and the whole search. Times are of the processor, so a rate is
one of a core, whatever runs beside. (calculon's public figure for its own, smaller question is 38 configurations a
second and core; another model and another machine, so no ratio is made of it.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.plan import planner_of
from launch.validate import BATCH, config_of
from parallel.plan.layout import Layout, layouts, schedule_of
from parallel.plan.search import Planner


def fresh() -> Planner:
    schedule_of.cache_clear()
    return planner_of(config_of("model=671b", "cluster=h800_2048"))


def seconds(run: Callable[[Planner], object], turns: int) -> list[float]:
    """Of the processor, each turn with empty caches."""
    found = []
    for _ in range(turns):
        planner = fresh()
        start = time.process_time()
        run(planner)
        found.append(time.process_time() - start)
    return found


def legal(planner: Planner) -> list[Layout]:
    return list(layouts(planner.step.model, planner.step.cluster, 2048, BATCH, {}))


def analytic(planner: Planner) -> None:
    for layout in legal(planner):
        planner.memory.fullest(layout, BATCH)
        planner.step.estimate(layout, BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    planner = fresh()
    plan = planner.search([2048], {})  # compiles
    exact = [row.layout for row in plan.rows]

    def replay(planner: Planner) -> None:
        for layout in exact:
            planner.step.simulate(layout, BATCH)

    rows = []
    for name, count, run in (
        ("analytic", plan.num_legal, analytic),
        ("replayed", len(exact), replay),
        ("whole search", plan.num_legal, lambda planner: planner.search([2048], {})),
    ):
        times = seconds(run, arguments.turns)
        rows.append(
            {
                "what": name,
                "layouts": count,
                "seconds": statistics.median(times),
                "least": min(times),
                "most": max(times),
                "layouts_per_second": count / statistics.median(times),
            }
        )
    table = Table("what", "layouts", "seconds", "least", "most", "layouts / s and core")
    for row in rows:
        table.add_row(
            row["what"], f"{row['layouts']:,}", *(f"{row[k]:.2f}" for k in ("seconds", "least", "most")),
            f"{row['layouts_per_second']:,.0f}",
        )  # fmt: skip
    Console().print(table)
    if arguments.out:
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
        }
        arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
