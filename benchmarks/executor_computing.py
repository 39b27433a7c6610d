"""How near a pipeline of two ranks comes to twice one process, with real computing, beside torch's schedules.

    python benchmarks/executor_computing.py [--turns 5] [--out FILE]

4 transformer layers a rank, 2 ranks, 8 microbatches of 4 x 256 tokens, one thread a rank: tokens a second over twice
those of one process that runs the whole model. torch's side has `nn.Linear` in place of ours, since its
zero-bubble schedules take autograd's graph apart; everything else is the same modules. Each side is held against one
process with its own kind of linear layer. `at once` are two processes with the whole model each, which share nothing
but the machine, and so are the limit of any schedule on it. Why they take longer than one alone: `cache` multiplies
matrices that stay in a core's cache, `memory` goes through 100 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from infra.allocator import keep_freed_memory
from measuring.ratios import ratios, setting, shown
from measuring.torch_schedules import our_executor, torch_step
from model.linear import Linear
from parallel.pipeline.executor import Phases
from parallel.pipeline.p2p import Spec
from parallel.pipeline.passes import in_turn
from parallel.pipeline.phases import Compute
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.weight_grad import WeightGrads
from tests.ranks import run_ranks

ALONE, AT_ONCE = "one process", "at once"
LAYERS, HIDDEN, HEADS, LENGTH, PER_MICROBATCH, MICROBATCHES, RANKS = 4, 256, 8, 256, 4, 8, 2


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer with a GELU of four times the width; plain: with `nn.Linear` in place of ours."""

    def __init__(self, plain: bool):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = _linear(HIDDEN, 3 * HIDDEN, plain), _linear(HIDDEN, HIDDEN, plain)
        self.up, self.down = _linear(HIDDEN, 4 * HIDDEN, plain), _linear(4 * HIDDEN, HIDDEN, plain)
        for parameter in self.parameters():
            if not plain:
                parameter.main_grad = torch.zeros_like(parameter)  # as every parameter here has

    def forward(self, x_BLD: Tensor) -> Tensor:
        qkv_BL3HC = self.qkv(self.norm_attention(x_BLD)).unflatten(-1, (3, HEADS, HIDDEN // HEADS))
        attended = F.scaled_dot_product_attention(*qkv_BL3HC.permute(2, 0, 3, 1, 4), is_causal=True)
        x_BLD = x_BLD + self.out(attended.transpose(1, 2).flatten(-2))
        return x_BLD + self.down(F.gelu(self.up(self.norm_mlp(x_BLD))))


def _linear(in_features: int, out_features: int, plain: bool) -> nn.Module:
    linear = nn.Linear(in_features, out_features, bias=False) if plain else Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=0.02)
    return linear


def layers_of(num_stages: int, plain: bool) -> nn.Sequential:
    """The layers of one of `num_stages` stages."""
    return nn.Sequential(*(TransformerLayer(plain) for _ in range(LAYERS * RANKS // num_stages)))


class LayersStage:
    """Layers as a stage of ours; the loss is the sum of the output."""

    def __init__(self, stage: int, num_stages: int, batch_MBLD: Tensor):
        self.is_first, self.is_last, self.batch_MBLD = stage == 0, stage == num_stages - 1, batch_MBLD
        self.output = Spec(tuple(batch_MBLD.shape[1:]), batch_MBLD.dtype)
        layers = layers_of(num_stages, plain=False)
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


def in_cache() -> Callable[[], None]:
    """Products of matrices of 150 KB."""
    a, out = torch.randn(192, 192), torch.empty(192, 192)

    def work() -> None:
        for _ in range(5000):
            torch.mm(a, a, out=out)

    return work


def through_memory() -> Callable[[], None]:
    """Reads and writes 100 MB, again and again."""
    x = torch.randn(25_000_000)

    def work() -> None:
        for _ in range(30):
            x.neg_()

    return work


def computing_rank(rank: int, pp: int, turns: int) -> dict[str, list[float]]:
    """On every rank: seconds of each turn of one process (rank 0 alone), of ours and of torch's schedules."""
    keep_freed_memory()  # as every training process does
    groups = (dist.new_group(), dist.new_group())
    batch_MBLD = torch.randn(MICROBATCHES, PER_MICROBATCH, LENGTH, HIDDEN)

    def whole(plain: bool) -> Callable[[], None]:
        model = layers_of(1, plain)

        def step() -> None:
            for x in batch_MBLD:  # the pipelines compute the gradient of the first input too
                model(x.requires_grad_()).sum().backward()

        return step

    def on_ranks(num_ranks: int, work: Callable[[], None]) -> Callable[[], None]:
        return lambda: work() if rank < num_ranks else None

    works = {"": whole(plain=False), "torch": whole(plain=True), "cache": in_cache(), "memory": through_memory()}
    steps = {
        f"{side} {name}".strip(): on_ranks(num_ranks, work)
        for side, work in works.items()
        for name, num_ranks in ((ALONE, 1), (AT_ONCE, pp))
    }
    for name in ("1f1b", "zbv", "dualpipe"):
        schedule = in_turn(SCHEDULES[name](pp, MICROBATCHES))
        stages = {s: LayersStage(s, schedule.num_stages, batch_MBLD) for s in schedule.stages_of(rank)}
        steps[name] = our_executor(schedule, rank, stages, groups).step
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
    return layers_of(num_stages, plain=True)


def computing(turns: int, console: Console) -> list[dict[str, Any]]:
    """One row for each: its rate over twice that of one process, and over that of two at once, by turn."""
    ranks = run_ranks(RANKS, computing_rank, turns, timeout=600)
    seconds = {name: [max(of) for of in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}
    tokens = MICROBATCHES * PER_MICROBATCH * LENGTH
    title = f"{RANKS} ranks, {LAYERS} layers each: median (quartiles)"
    table = Table("", "tokens/s", "of twice one process", "of two at once", title=title)
    rows = []
    for name in seconds:
        side = next((f"{side} " for side in ("torch", "cache", "memory") if name.startswith(side)), "")
        batches = RANKS if name.endswith(AT_ONCE) else 1
        row: dict[str, Any] = {"name": name, "tokens_per_second": batches * tokens / statistics.median(seconds[name])}
        for limit in (ALONE, AT_ONCE):
            row[limit] = [batches / RANKS * share for share in ratios(seconds[side + limit], seconds[name])]
        rows.append(row)
        table.add_row(
            name,
            f"{row['tokens_per_second']:.0f}" if side in ("", "torch ") else "",
            "" if name.endswith(ALONE) else shown(row[ALONE]),
            "" if name.endswith((ALONE, AT_ONCE)) else shown(row[AT_ONCE]),
        )
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("executor_computing.json"))
    args = parser.parse_args()
    console = Console(width=130)
    args.out.write_text(json.dumps(setting() | {"rows": computing(args.turns, console)}, indent=1))
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
