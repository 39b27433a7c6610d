"""How fast schedules are made, checked, lowered and simulated.

    python benchmarks/simulate.py [--out simulate.json] [--turns 15]

First large schedules, once each, in a process of their own, with their peak memory: bytes for each action that do not
grow are memory that grows linearly. Then ours alone, on one core: each pass by itself, and all four for one schedule as
a rate. Then ours beside torch.distributed.pipelining on the same shapes, in turn in one run: its generator,
`_validate_schedule`, `_add_send_recv` and `_simulate_comms_compute` (private names, called without stages; its
simulator counts steps and knows no time, costs or memory). The ratio is the median over the turns, with quartiles.
Garbage is searched for as often as in launch/simulate.py, for both.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.simulate import YOUNG
from parallel.pipeline.actions import Schedule
from parallel.pipeline.passes import lower, validate
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate

COSTS = Costs(49.1, 75.4, 32.0, 143.8, p2p=1.5)  # DeepSeek-V3, ms
SHAPES = [("1f1b", 16, 120), ("zb1p", 16, 120), ("zbv", 16, 120), ("dualpipe", 16, 120), ("dualpipev", 16, 120)]
BESIDE_TORCH = [("interleaved_1f1b", 16, 128), ("zbv", 16, 120), ("dualpipev", 16, 120)]
LARGE = [("dualpipe", 128, 1024), ("dualpipe", 128, 4096)]


def step_and_bubble(schedule: Schedule) -> tuple[float, float]:
    timeline = simulate(schedule, COSTS)
    return timeline.step_time, timeline.bubble_fraction


def everything(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule = SCHEDULES[name](num_ranks, num_microbatches)
    validate(schedule)
    lower(schedule)
    step_and_bubble(schedule)


def torch_everything(name: str, num_ranks: int, num_microbatches: int) -> str:
    """The same in torch.distributed.pipelining; returns what it could not do."""
    from torch.distributed.pipelining import schedules as torchs

    num_stages = 2 * num_ranks
    kind: Any = {
        "interleaved_1f1b": torchs.ScheduleInterleaved1F1B,
        "zbv": torchs.ScheduleZBVZeroBubble,
        "dualpipev": torchs.ScheduleDualPipeV,
    }[name]
    setup = SimpleNamespace(
        pp_group_size=num_ranks,
        _n_microbatches=num_microbatches,
        num_stages=num_stages,
        n_local_stages=2,
        microbatches_per_round=num_ranks,
    )
    order = {rank: kind._calculate_single_rank_operations(setup, rank) for rank in range(num_ranks)}
    rank_of = torchs.generate_stage_to_rank_mapping(num_ranks, num_stages, "loop" if "inter" in name else "v")
    order = {rank: [action for action in actions if action is not None] for rank, actions in order.items()}
    failed = []
    try:
        torchs._validate_schedule({rank: list(actions) for rank, actions in order.items()}, *_sizes(setup))
    except Exception:
        failed.append("validate")
    lowered = torchs._add_send_recv(order, lambda stage: rank_of[stage], num_stages)
    try:
        torchs._simulate_comms_compute(lowered, lambda stage: rank_of[stage], num_stages)
    except Exception:
        failed.append("simulate")
    return ", ".join(failed)


def _sizes(setup: SimpleNamespace) -> tuple[int, int, int]:
    return setup.pp_group_size, setup.num_stages, setup._n_microbatches


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds of the processor: one thread, so a rate of it is a rate per core, whatever else runs beside."""
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def in_turn(runs: list[Callable[[], Any]], turns: int) -> list[list[float]]:
    for run in runs:
        run()  # compiles, imports
    rounds = [[timed(run) for run in runs] for _ in range(turns)]
    return [list(times) for times in zip(*rounds, strict=True)]


def ours(turns: int, console: Console) -> list[dict[str, Any]]:
    names = ("generate", "validate", "lower", "simulate")
    table = Table("schedule", "actions", *names, "all /s", "simulate /s", box=SIMPLE_HEAD, pad_edge=False)
    rows = []
    for shape in SHAPES:
        schedule = SCHEDULES[shape[0]](*shape[1:])
        generate = partial(SCHEDULES[shape[0]], *shape[1:])
        passes = [partial(run, schedule) for run in (validate, lower, step_and_bubble)]
        *each, whole = map(statistics.median, in_turn([generate, *passes, partial(everything, *shape)], turns))
        row: dict[str, Any] = {
            "schedule": "{} {} x {}".format(*shape),
            "num_actions": len(schedule.columns.actions_A3),
            **{f"{name}_ms": ms for name, ms in zip(names, each, strict=True)},
            "all_per_second": 1e3 / whole,
            "simulations_per_second": 1e3 / each[-1],
        }
        rows.append(row)
        rates = (f"{row['all_per_second']:.0f}", f"{row['simulations_per_second']:.0f}")
        table.add_row(row["schedule"], str(row["num_actions"]), *(f"{ms:.2f} ms" for ms in each), *rates)
    console.print(table)
    return rows


def beside_torch(turns: int, console: Console) -> list[dict[str, Any]]:
    table = Table("all four", "ours", "torch", "torch / ours", "torch could not", box=SIMPLE_HEAD, pad_edge=False)
    rows = []
    for shape in BESIDE_TORCH:
        failed = torch_everything(*shape)
        our_times, torch_times = in_turn([partial(everything, *shape), partial(torch_everything, *shape)], turns)
        ratios = [theirs / mine for mine, theirs in zip(our_times, torch_times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row: dict[str, Any] = {
            "schedule": "{} {} x {}".format(*shape),
            "ours_ms": statistics.median(our_times),
            "torch_ms": statistics.median(torch_times),
            "ratio": [low, middle, high],
            "torch_could_not": failed,
        }
        rows.append(row)
        cells = (f"{row['ours_ms']:.1f} ms", f"{row['torch_ms']:.0f} ms", f"{middle:.0f} ({low:.0f} to {high:.0f})")
        table.add_row(row["schedule"], *cells, failed or "-")
    console.print(table)
    return rows


def large(name: str, num_ranks: int, num_microbatches: int) -> dict[str, Any]:
    """One large schedule through everything, in this process."""
    everything(name, 2, 4)  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    schedule = SCHEDULES[name](num_ranks, num_microbatches)
    validate(schedule)
    step_and_bubble(schedule)
    lower(schedule)
    seconds = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_actions = len(schedule.columns.actions_A3)
    return {
        "schedule": f"{name} {num_ranks} x {num_microbatches}",
        "num_actions": num_actions,
        "seconds": seconds,
        "peak_mb": after / 1024,
        "bytes_per_action": 1024 * (after - before) / num_actions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--large-only", type=int, metavar="K", help="only the K-th large schedule, as JSON")
    args = parser.parse_args()
    gc.set_threshold(YOUNG)
    if args.large_only is not None:
        print(json.dumps(large(*LARGE[args.large_only])))
        return
    console = Console()
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    figures["large"] = []  # first: Linux takes the peak of a parent, which is still small, for that of its child
    for k in range(len(LARGE)):
        command = [sys.executable, __file__, "--large-only", str(k)]
        alone = subprocess.run(command, check=True, capture_output=True, text=True)
        figures["large"].append(json.loads(alone.stdout))
        line = (
            "{schedule}: {num_actions:,} actions, {seconds:.1f} s, peak {peak_mb:.0f} MB, {bytes_per_action:.0f} bytes"
        )
        console.print(line.format(**figures["large"][-1]) + " an action")
    figures["ours"] = ours(args.turns, console)
    figures["beside_torch"] = beside_torch(args.turns, console)
    if args.out:
        beside = args.out.with_suffix(".partial")
        beside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        beside.replace(args.out)
        console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
