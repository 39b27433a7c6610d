"""What the executor costs: a step of every schedule over the time that its work alone would take, beside torch's.

    python benchmarks/executor.py [--pp 4 8] [--microbatches 8 16 32] [--costs 20/20/20 ...] [--turns 3] [--out FILE]
    python benchmarks/executor.py --part compute

Sleeping: stages that sleep through their F, I and W, so that a machine with few cores can play many ranks; real
tensors travel through gloo. *Eager ideal* is the simulated step of the same schedule when every result leaves as soon
as it is there. An operation is one sleep; what it costs beyond the ideal is `over`, and what sleeping itself
overshoots, measured in the same sleeps, is `of that sleep`. Ours and those of torch.distributed.pipelining run in turn,
in the same processes.

Computing: 4 dense layers a rank, 2 ranks, 8 microbatches of 4 x 256 tokens, one thread a rank: tokens a second over
twice those of one process that runs the whole model. torch's side has `nn.Linear` in place of ours, since its
zero-bubble schedules take autograd's graph apart; everything else is the same modules.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed import pipelining

from model.block import Block
from model.config import ModelConfig
from model.linear import Linear
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor, Phases
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.passes import lower
from parallel.pipeline.phases import Compute
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.synthetic import SyntheticStage
from parallel.pipeline.weight_grad import WeightGrads
from tests.ranks import run_ranks

Times = tuple[float, float, float]  # F, I, W of 1/PP of the model, seconds
SPEC = Spec((16, 16), torch.float32)  # what travels
CPU = torch.device("cpu")


@dataclass
class Sleeper:
    """`time.sleep` that counts by how much it overshoots."""

    overshoot: float = 0.0
    num_sleeps: int = 0

    def __call__(self, seconds: float) -> None:
        began = time.perf_counter()
        time.sleep(seconds)
        self.overshoot += time.perf_counter() - began - seconds
        self.num_sleeps += 1


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


# name: (class, stages a rank, whether the second stage comes back to the rank it left from)
TORCH: dict[str, tuple[str, int, bool]] = {
    "torch GPipe": ("ScheduleGPipe", 1, False),
    "torch 1F1B": ("Schedule1F1B", 1, False),
    "torch Interleaved1F1B": ("ScheduleInterleaved1F1B", 2, False),
    "torch ZBVZeroBubble": ("ScheduleZBVZeroBubble", 2, True),
    "torch DualPipeV": ("ScheduleDualPipeV", 2, True),
}
LIKE = {  # the schedule of ours that has the ideal of torch's
    "torch GPipe": "gpipe",
    "torch 1F1B": "1f1b",
    "torch Interleaved1F1B": "interleaved_1f1b",
    "torch ZBVZeroBubble": "zbv",
    "torch DualPipeV": "dualpipev",
}


def torch_step(
    name: str, rank: int, pp: int, num_microbatches: int, module_of: Callable[[int, int], nn.Module], batch: Tensor
) -> Callable[[], None]:
    """A step of one of torch's schedules. module_of(stage, num_stages); the loss is the sum of the output.

    Raises ValueError where torch's schedule does not take this shape.
    """
    schedule_class, per_rank, folded = TORCH[name]
    num_stages = pp * per_rank
    held = [rank, num_stages - 1 - rank][:per_rank] if folded else [rank + k * pp for k in range(per_rank)]
    example = batch[: len(batch) // num_microbatches]
    stages = [
        pipelining.PipelineStage(
            module_of(s, num_stages), s, num_stages, CPU, input_args=example, output_args=example.clone()
        )
        for s in held
    ]
    make = getattr(pipelining, schedule_class, None) or getattr(pipelining.schedules, schedule_class)
    whole = make(
        stages if per_rank > 1 else stages[0], num_microbatches, loss_fn=lambda y, target: y.sum(), scale_grads=False
    )
    has_first, has_last = 0 in held, num_stages - 1 in held

    def step() -> None:
        arguments = (batch,) if has_first else ()
        whole.step(*arguments, target=batch if has_last else None)

    return step


# Sleeping


def our_executor(schedule: Schedule, rank: int, stages: Mapping[int, Any], groups: tuple, overlap: bool) -> Executor:
    p2p = P2P(range(schedule.num_ranks), rank, *groups, CPU)
    return Executor(schedule, lower(schedule).programs[rank], rank, stages, p2p, overlap)


def sleeping_rank(rank: int, pp: int, num_microbatches: int, times: Times, turns: int) -> dict[str, Any]:
    """On every rank: for each schedule, the seconds of each turn and what each sleep overshot in it."""
    wake_on_time()
    groups = (dist.new_group(), dist.new_group())
    sleeper = Sleeper()
    steps: dict[str, Callable[[], None]] = {}
    for name, make in SCHEDULES.items():
        schedule = make(pp, num_microbatches)
        parts = [time * pp / schedule.num_stages for time in times]
        held = schedule.stages_of(rank)
        stages = {s: SyntheticStage(*parts, SPEC, CPU, sleeper) for s in held}
        steps[name] = our_executor(schedule, rank, stages, groups, overlap=False).step
    batch = torch.zeros(num_microbatches * SPEC.shape[0], SPEC.shape[1], requires_grad=True)
    for name in TORCH:

        def module_of(stage: int, num_stages: int) -> nn.Module:
            f, i, w = (time * pp / num_stages for time in times)
            return SleepingModule((f, i, w), sleeper)

        try:
            steps[name] = torch_step(name, rank, pp, num_microbatches, module_of, batch)
        except ValueError:
            continue  # this schedule does not take so few microbatches
    results: dict[str, Any] = {name: {"seconds": [], "overshoot": [], "num_sleeps": 0} for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            sleeper.overshoot, sleeper.num_sleeps = 0.0, 0
            dist.barrier()
            began = time.perf_counter()
            step()
            if not turn:
                continue  # the first is to warm up
            results[name]["seconds"].append(time.perf_counter() - began)
            results[name]["overshoot"].append(sleeper.overshoot / sleeper.num_sleeps)
            results[name]["num_sleeps"] = sleeper.num_sleeps
    return results


def sleeping(pp: int, num_microbatches: int, times: Times, turns: int) -> list[dict[str, Any]]:
    """One row a schedule. The time of a turn is that of its slowest rank; of the turns, the median."""
    ranks = run_ranks(pp, sleeping_rank, num_microbatches, times, turns, timeout=600)
    rows = []
    for name in ranks[0]:
        schedule = SCHEDULES[LIKE.get(name, name)](pp, num_microbatches)
        ideal = simulate(schedule, Costs(*times)).step_time
        seconds = [max(rank[name]["seconds"][turn] for rank in ranks) for turn in range(turns)]
        overshoot = statistics.mean(value for rank in ranks for value in rank[name]["overshoot"])
        median = statistics.median(seconds)
        num_sleeps = statistics.mean(rank[name]["num_sleeps"] for rank in ranks)
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
                "over_ms": 1e3 * (median - ideal) / num_sleeps,
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


# Computing

LAYERS, HIDDEN, LENGTH, PER_MICROBATCH, MICROBATCHES, RANKS = 4, 256, 256, 4, 8, 2
MODEL = ModelConfig(
    hidden_size=HIDDEN,
    intermediate_size=2 * HIDDEN,
    num_hidden_layers=LAYERS * RANKS,
    first_k_dense_replace=LAYERS * RANKS - 1,  # a config must have an expert; here every block is dense
    num_nextn_predict_layers=0,
    num_attention_heads=8,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    rope_scaling=None,
)


def layers_of(stage: int, num_stages: int, plain: bool) -> list[Block]:
    """The blocks of one stage; plain: with `nn.Linear`."""
    blocks = [Block(MODEL, is_moe=False) for _ in range(MODEL.num_hidden_layers // num_stages)]
    for block in blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if plain and isinstance(child, Linear):
                    out_features, in_features = child.weight.shape
                    setattr(module, name, nn.Linear(in_features, out_features, bias=False))
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
    return blocks


class Layers(nn.Module):
    """Blocks as one module, for torch's schedules and for one process."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).h_BLD
        return x


class LayersStage:
    """Blocks as a stage of ours; the loss is the sum of the output."""

    def __init__(self, stage: int, num_stages: int, batch_MBLD: Tensor):
        blocks = layers_of(stage, num_stages, plain=False)
        self.is_first, self.is_last, self.batch_MBLD = stage == 0, stage == num_stages - 1, batch_MBLD
        self.output = Spec(tuple(batch_MBLD.shape[1:]), batch_MBLD.dtype)
        layers = Layers(blocks)
        self.phase = Compute("layers", ("x",), ("y",), lambda x: (layers(x),))
        self.saved: dict[int, Any] = {}
        self.weight_grads = WeightGrads()
        for layer in layers.modules():
            if isinstance(layer, Linear):
                layer.weight_grad = self.weight_grads

    def forward(self, mb: int, x: Tensor | None) -> Phases:
        yield "layers"
        (y,), self.saved[mb] = self.phase.forward([self.batch_MBLD[mb] if x is None else x], True)
        return y

    def backward(self, mb: int, grad: Tensor | None, split: bool) -> Phases:
        yield "layers"
        grad = torch.ones(self.output.shape) if grad is None else grad
        with self.weight_grads.deferred(mb) if split else nullcontext():
            (dx,) = self.phase.backward(self.saved.pop(mb), [grad])
        return None if self.is_first else dx

    def weight_grad(self, mb: int) -> None:
        self.weight_grads.run(mb)


def computing_rank(rank: int, pp: int, turns: int) -> dict[str, list[float]]:
    """On every rank: seconds of each turn of one process (rank 0 alone), of ours and of torch's schedules."""
    groups = (dist.new_group(), dist.new_group())
    batch_MBLD = torch.randn(MICROBATCHES, PER_MICROBATCH, LENGTH, HIDDEN)
    whole = Layers(layers_of(0, 1, plain=True))

    def alone() -> None:
        if rank == 0:
            for x in batch_MBLD:
                whole(x.requires_grad_()).sum().backward()

    steps: dict[str, Callable[[], None]] = {"one process": alone}
    for name in ("1f1b", "zbv", "dualpipe"):
        schedule = SCHEDULES[name](pp, MICROBATCHES)
        stages = {s: LayersStage(s, schedule.num_stages, batch_MBLD) for s in schedule.stages_of(rank)}
        steps[name] = our_executor(schedule, rank, stages, groups, overlap=False).step
    batch = batch_MBLD.flatten(0, 1).detach().requires_grad_()
    for name in ("torch 1F1B", "torch ZBVZeroBubble", "torch DualPipeV"):
        steps[name] = torch_step(name, rank, pp, MICROBATCHES, _plain_layers, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            if turn:  # the first is to warm up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _plain_layers(stage: int, num_stages: int) -> nn.Module:
    return Layers(layers_of(stage, num_stages, plain=True))


def computing(turns: int, console: Console) -> list[dict[str, Any]]:
    """Tokens a second of each schedule over twice those of one process, by turn; the median and the quartiles."""
    ranks = run_ranks(RANKS, computing_rank, turns, timeout=600)
    alone = ranks[0].pop("one process")
    tokens = MICROBATCHES * PER_MICROBATCH * LENGTH
    one_process = tokens / statistics.median(alone)
    title = f"{RANKS} ranks, {LAYERS} layers each, against {RANKS} x one process's {one_process:.0f} tokens/s"
    table = Table("schedule", "tokens/s", "of twice one process", "quartiles", title=title)
    rows = []
    for name in ranks[0]:
        seconds = [max(rank[name][turn] for rank in ranks) for turn in range(turns)]
        shares = [one / (RANKS * time) for one, time in zip(alone, seconds, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
        rows.append(
            {"schedule": name, "tokens_per_second": tokens / statistics.median(seconds), "share": [low, middle, high]}
        )
        table.add_row(name, f"{rows[-1]['tokens_per_second']:.0f}", f"{middle:.1%}", f"{low:.1%} to {high:.1%}")
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[16])
    parser.add_argument("--costs", nargs="+", default=["20/20/20", "20/21/13", "15/15/30"], help="F/I/W in ms")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--part", choices=["both", "sleep", "compute"], default="both")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    console = Console()
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
    }
    if args.part != "compute":
        figures["sleeping"] = []
        for pp, costs, num_microbatches in product(args.pp, args.costs, args.microbatches):
            f, i, w = (float(part) / 1e3 for part in costs.split("/"))
            rows = sleeping(pp, num_microbatches, (f, i, w), args.turns)
            show_sleeping(rows, console)
            figures["sleeping"] += rows
    if args.part != "sleep":
        figures["computing"] = computing(args.turns, console)
    if args.out:
        beside = args.out.with_suffix(".partial")
        beside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        beside.replace(args.out)


if __name__ == "__main__":
    main()
