"""What the executor costs: a step of every schedule over the time that its work alone would take, beside torch's.

    python benchmarks/executor.py [--pp 4 8] [--microbatches 8 16 32] [--costs 20/20/20 ...] [--schedules dualpipe ...]

Stages sleep through their F, I and W, so that a machine with few cores can play many ranks; real tensors travel through
gloo. *Eager ideal* is the simulated step of the same schedule when every result leaves as soon as it is there, and the
two actions of a pair run in turn, each as soon as it can. Ours and those of torch.distributed.pipelining run in turn,
in the same processes.

An operation is one sleep. `over` is the time by which each of them would have to be longer for the simulated step to
take as long as the measured one did: of operations that stand behind one another, on one rank or on several, every one
counts. `of that sleep` is the same for the step that the simulator finds when it is given every sleep as long as it
was; for torch's schedules, which do not say which sleep is whose, the mean by which the sleeps overshot - that is less,
since a step waits for whoever overshoots most.

With real computing: executor_computing.py.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from measuring.ratios import setting
from measuring.torch_schedules import CPU, LIKE, TORCH, our_executor, torch_step
from parallel.pipeline.actions import Op, Schedule
from parallel.pipeline.p2p import Spec
from parallel.pipeline.passes import in_turn
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.synthetic import SyntheticStage
from tests.ranks import run_ranks

Times = tuple[float, float, float]  # F, I, W of 1/PP of the model, seconds
SPEC = Spec((16, 16), torch.float32)  # what travels


@dataclass
class Sleeper:
    """`time.sleep` that remembers how long it was asked to sleep, and how long it did."""

    sleeps: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, seconds: float) -> None:
        began = time.perf_counter()
        time.sleep(seconds)
        self.sleeps.append((seconds, time.perf_counter() - began))


def wake_on_time() -> None:
    """Asks Linux to end this process's sleeps to the nanosecond; by default it gathers wake-ups of 50 us into one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK


# torch's side: the same sleeps as autograd functions that its schedules can tell apart


class _InputGrad(torch.autograd.Function):
    """Forward takes F, backward takes I."""

    @staticmethod
    def forward(ctx, x, sleeper, f, i):
        ctx.sleeper, ctx.i = sleeper, i
        sleeper(f)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.sleeper(ctx.i)
        return grad, None, None, None


class _WeightGrad(torch.autograd.Function):
    """Backward takes W."""

    @staticmethod
    def forward(ctx, weight, sleeper, w):
        ctx.sleeper, ctx.w = sleeper, w
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.sleeper(ctx.w)
        return grad, None, None


class SleepingModule(nn.Module):
    def __init__(self, times: Times, sleeper: Sleeper):
        super().__init__()
        self.times, self.sleeper = times, sleeper
        self.weight = nn.Parameter(torch.ones(SPEC.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        f, i, w = self.times
        return _InputGrad.apply(x, self.sleeper, f, i) * _WeightGrad.apply(self.weight, self.sleeper, w)


def sleeping_rank(
    rank: int, pp: int, num_microbatches: int, times: Times, names: list[str], turns: int
) -> dict[str, Any]:
    """On every rank: for each schedule, the seconds of each turn and its sleeps, asked for and slept."""
    wake_on_time()
    groups = (dist.new_group(), dist.new_group())
    sleeper = Sleeper()
    steps: dict[str, Callable[[], None]] = {}
    for name in (name for name in names if name in SCHEDULES):
        schedule = in_turn(SCHEDULES[name](pp, num_microbatches))
        parts = [time * pp / schedule.num_stages for time in times]
        held = schedule.stages_of(rank)
        stages = {s: SyntheticStage(*parts, SPEC, CPU, sleeper) for s in held}
        steps[name] = our_executor(schedule, rank, stages, groups).step
    batch = torch.zeros(num_microbatches * SPEC.shape[0], SPEC.shape[1], requires_grad=True)
    for name in (name for name in names if name in TORCH):

        def module_of(stage: int, num_stages: int) -> nn.Module:
            f, i, w = (time * pp / num_stages for time in times)
            return SleepingModule((f, i, w), sleeper)

        try:
            steps[name] = torch_step(name, rank, pp, num_microbatches, module_of, batch)
        except ValueError:
            continue  # this schedule does not take so few microbatches
    results: dict[str, Any] = {name: {"seconds": [], "sleeps": []} for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            sleeper.sleeps = []
            dist.barrier()
            began = time.perf_counter()
            step()
            if not turn:
                continue  # the first is to warm up
            results[name]["seconds"].append(time.perf_counter() - began)
            results[name]["sleeps"].append(sleeper.sleeps)
    return results


def as_slept(schedule: Schedule, slept: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The `slots` of `simulate`, each of one action: how long each rank's sleeps were, in the order of its program."""
    duration_A, ready_A = [], []
    for program, sleeps in zip(schedule.programs, map(iter, slept), strict=True):
        for (action,) in program:
            ready_A.append(next(sleeps))
            has_w = action.op is Op.B and action.stage > 0  # of the first stage, I and W are one sleep
            duration_A.append(ready_A[-1] + (next(sleeps) if has_w else 0.0))
        assert next(sleeps, None) is None, "every sleep is one of the program's"
    return np.array(duration_A), np.array(ready_A)


def sleeping(pp: int, num_microbatches: int, times: Times, names: list[str], turns: int) -> list[dict[str, Any]]:
    """One row a schedule. The time of a turn is that of its slowest rank; of the turns, the median."""
    ranks = run_ranks(pp, sleeping_rank, num_microbatches, times, names, turns, timeout=600)
    rows = []
    for name in ranks[0]:
        schedule = in_turn(SCHEDULES[LIKE.get(name, name)](pp, num_microbatches))
        ideal = simulate(schedule, Costs(*times)).step_time
        # costs are of 1/PP of the model, a sleep is of one stage
        longer = Costs(*(time + 1e-6 * schedule.num_stages / pp for time in times))
        in_line = (simulate(schedule, longer).step_time - ideal) / 1e-6  # operations that stand behind one another
        seconds = [max(rank[name]["seconds"][turn] for rank in ranks) for turn in range(turns)]
        median = statistics.median(seconds)
        sleeps = [[rank[name]["sleeps"][turn] for rank in ranks] for turn in range(turns)]
        if name in SCHEDULES:
            slept = [as_slept(schedule, [[real for _, real in rank] for rank in turn]) for turn in sleeps]
            overshoot = (
                statistics.median(simulate(schedule, slots=slots).step_time - ideal for slots in slept) / in_line
            )
        else:
            overshoot = statistics.mean(real - asked for turn in sleeps for rank in turn for asked, real in rank)
        rows.append(
            {
                "schedule": name,
                "pp": pp,
                "num_microbatches": num_microbatches,
                "times_ms": [1e3 * time for time in times],
                "ideal_ms": 1e3 * ideal,
                "step_ms": 1e3 * median,
                "ratio": median / ideal,
                "ratios": [value / ideal for value in seconds],
                "over_ms": 1e3 * (median - ideal) / in_line,
                "in_line": in_line,
                "sleep_ms": 1e3 * overshoot,
            }
        )
    return rows


def show_sleeping(rows: list[dict[str, Any]], console: Console) -> None:
    first = rows[0]
    times = "/".join(f"{time:g}" for time in first["times_ms"])
    title = f"PP {first['pp']}, {first['num_microbatches']} microbatches, F/I/W {times} ms"
    table = Table("schedule", "ideal", "step", "of ideal", "over, an operation", "of that sleep", title=title)
    for row in rows:
        table.add_row(
            row["schedule"],
            f"{row['ideal_ms']:.0f} ms",
            f"{row['step_ms']:.0f} ms",
            f"{row['ratio']:.3f}",
            f"{row['over_ms']:.2f} ms",
            f"{row['sleep_ms']:.2f} ms",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[16])
    parser.add_argument("--costs", nargs="+", default=["20/20/20", "20/21/13", "15/15/30"], help="F/I/W in ms")
    every = [*SCHEDULES, *TORCH]
    parser.add_argument("--schedules", nargs="+", default=every, choices=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("executor.json"))
    args = parser.parse_args()
    console = Console(width=130)
    rows: list[dict[str, Any]] = []
    for pp, costs, num_microbatches in product(args.pp, args.costs, args.microbatches):
        f, i, w = (float(part) / 1e3 for part in costs.split("/"))
        shape = sleeping(pp, num_microbatches, (f, i, w), args.schedules, args.turns)
        show_sleeping(shape, console)
        rows += shape
    args.out.write_text(json.dumps(setting() | {"rows": rows}, indent=1))
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
