"""What overlap hides and gains on an emulated cluster, when computing is sleeping.

    sudo .venv/bin/python benchmarks/overlap.py [--ranks 4 8] [--shares 0.3 0.6 1.0] [--rounds 2] [--out FILE]

Ranks that shared a core would fill each other's waits. So attention and experts sleep for given times, F = I = W, while
real rows travel over the links of pp x ep 2 ranks, and few cores can play many. Every rank is a node with a network
card of its own, as H800 nodes have one a GPU; links are set so that the all-to-alls of a step take 30, 60 and 100 % of
its compute time. A pipeline runs 8 microbatches a rank, about as V3 did (120 on 16). DualPipe and 1F1B, with and
without overlap, in turn in the same processes, beside the simulator's prediction, which knows the sleeps, the bytes and
the rate of the links and nothing else. With real computing: overlap_computing.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from infra import distributed
from measuring.cluster import from_rank, on_cluster
from measuring.pipelined_step import PipelinedStep, in_turn
from measuring.ratios import ratios, setting, shown
from model.linear import Linear, at_once
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig, Dispatcher
from parallel.mesh import Mesh, MeshConfig
from parallel.pipeline.actions import Schedule
from parallel.pipeline.p2p import Spec
from parallel.pipeline.passes import pair_up
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.stage import TransformerStage

EP = 2
HIDDEN, TOKENS, TOP_K, NUM_EXPERTS = 256, 256, 8, 16  # half of a token's experts are on the other node
LAYER = 0.12  # seconds of compute of one layer: F, I and W of attention and of the experts
PHASE = LAYER / 6
MICROBATCHES = 8  # a pipeline rank
ROW_BYTES = HIDDEN * 4


class _Sleep(torch.autograd.Function):
    """Sleeps through F and I; offers a W that sleeps."""

    @staticmethod
    def forward(ctx, x, weight, weight_grad):
        ctx.weight, ctx.weight_grad = weight, weight_grad
        time.sleep(PHASE)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(PHASE)
        ctx.weight_grad(ctx.weight, lambda: time.sleep(PHASE))
        return grad, None, None


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_grad = at_once
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, self.weight_grad)


class SleepingBlock(nn.Module):
    """A MoE layer whose attention and experts sleep; its tokens are routed evenly, and really travel."""

    is_moe = True

    def __init__(self, dispatcher: Dispatcher):
        super().__init__()
        self.attention, self.expert = Sleeper(), Sleeper()
        self.mlp = SimpleNamespace(dispatcher=dispatcher)
        first = torch.arange(TOKENS).unsqueeze(1)
        self.topk_idx_TK = (first + torch.arange(0, NUM_EXPERTS, NUM_EXPERTS // TOP_K)) % NUM_EXPERTS
        self.weights_TK = torch.full((TOKENS, TOP_K), 1 / TOP_K)

    def attend(self, h_BLD: Tensor, documents_BL: Tensor | None) -> SimpleNamespace:
        h_BLD = self.attention(h_BLD)
        x_TD = h_BLD.flatten(0, 1)
        nothing = torch.zeros(())
        return SimpleNamespace(
            h_BLD=h_BLD,
            x_TD=x_TD,
            topk_weights_TK=self.weights_TK,
            balance_loss=nothing,
            topk_idx_TK=self.topk_idx_TK,
            load_E=torch.zeros(NUM_EXPERTS, dtype=torch.int64),
        )

    def shared_expert(self, x_TD: Tensor) -> Tensor:
        return x_TD.view_as(x_TD)

    def experts(self, x_RD: Tensor, weights_R: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return self.expert(x_RD) * weights_R.unsqueeze(1)


def sleeping_stages(
    schedule: Schedule, mesh: Mesh, dispatcher: Dispatcher, num_layers: int
) -> dict[int, TransformerStage]:
    """`num_layers` in the whole model, shared out evenly; the head is next to nothing."""
    each, last = num_layers // schedule.num_stages, schedule.num_stages - 1
    start = nn.Parameter(torch.zeros(1, TOKENS, HIDDEN))
    head = Linear(HIDDEN, 8)
    nn.init.zeros_(head.weight)
    return {
        s: TransformerStage(
            {s * each + n: SleepingBlock(dispatcher) for n in range(each)},  # type: ignore[misc]
            Spec((1, TOKENS, HIDDEN), torch.float32),
            is_first=s == 0,
            embed=(lambda tokens_BL: start.clone()) if s == 0 else None,
            norm=(lambda h_BLD: h_BLD) if s == last else None,
            head=head if s == last else None,
        )
        for s in schedule.stages_of(mesh.at.pp)
    }


VARIANTS = {  # name: (schedule, whether it is paired up, overlap)
    "1f1b, in turn": ("1f1b", False, False),
    "1f1b in pairs, overlap": ("1f1b", True, True),
    "zbv in pairs, overlap": ("zbv", True, True),
    "dualpipe, in turn": ("dualpipe", False, False),
    "dualpipe, overlap": ("dualpipe", False, True),
}


def schedule_of(name: str, pp: int) -> Schedule:
    kind, paired, _ = VARIANTS[name]
    schedule = SCHEDULES[kind](pp, MICROBATCHES * pp)
    return pair_up(schedule) if paired else schedule


def measure_rank(rounds: int) -> dict[str, Any]:
    """On every rank of the cluster: all variants in turn."""
    world = distributed.start()
    pp = world.size // EP
    mesh = Mesh(MeshConfig(pp=pp, ep=EP, ranks_per_node=1, world=world.size))
    dispatcher = DISPATCHERS["all_to_all"](mesh, DispatchConfig(NUM_EXPERTS))
    steps = {}
    for name, (_, _, overlap) in VARIANTS.items():
        schedule = schedule_of(name, pp)
        steps[name] = PipelinedStep(
            schedule, sleeping_stages(schedule, mesh, dispatcher, 2 * pp), mesh, dispatcher, overlap
        )
    tokens_MBL = torch.zeros(MICROBATCHES * pp, 1, TOKENS + 1, dtype=torch.int64)
    results = in_turn(steps, tokens_MBL, rounds)
    distributed.stop()
    return results


def rate_for(share: float) -> float:
    """Bits per second at which the four all-to-alls of a layer take `share` of its compute time."""
    rows = TOKENS * TOP_K // 2
    return 4 * rows * ROW_BYTES * 8 / (share * LAYER)


def predicted(name: str, pp: int, share: float) -> float:
    """The simulator's step time: alone, a slot's travel is all exposed; in a pair, none is."""
    _, _, overlap = VARIANTS[name]
    third, travel = 2 * LAYER / 3, 2 * share * LAYER / 2  # of the two layers of 1/PP of the model, F or I or W
    whole = 3 * third + 2 * travel
    costs = Costs(
        f=third + travel,
        i=third + travel,
        w=third,
        fb=3 * third if overlap else whole,
        p2p_bytes=TOKENS * ROW_BYTES,
        p2p_bandwidth=rate_for(share) / 8,
    )
    return simulate(schedule_of(name, pp), costs).step_time


def show(world: int, share: float, results: dict[str, Any], console: Console) -> None:
    """Adds the prediction to each variant's results, and prints them."""
    pp = world // EP
    shape = f"pp {pp} x ep {EP}, {MICROBATCHES * pp} microbatches"
    table = Table(title=f"{shape}, all-to-all {share:.0%} of compute, {rate_for(share) / 1e6:.0f} Mbit/s")
    for column in (
        "schedule",
        "step",
        "simulated",
        "step / simulated",
        "faster than 1f1b",
        "of itself in turn",
        "hidden",
    ):
        table.add_column(column, justify="right")
    base = results["1f1b, in turn"]["seconds"]
    for name, figures in results.items():
        figures["simulated"] = predicted(name, pp, share)
        seconds = figures["seconds"]
        median = statistics.median(seconds)
        same_in_turn = results.get(f"{name.split(' ')[0].rstrip(',')}, in turn")
        table.add_row(
            name,
            f"{median:.2f} s",
            f"{figures['simulated']:.2f} s",
            f"{median / figures['simulated']:.3f}",
            shown(ratios(base, seconds)),
            shown(ratios(seconds, same_in_turn["seconds"])) if same_in_turn else "",
            shown(figures["hidden"]) if any(figures["hidden"]) else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(4, 8), default=[4, 8])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.6, 1.0], help="of communication")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("overlap.json"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # how this script starts itself: rounds
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank:
        from_rank(measure_rank(options.rank), options.out)
        return
    console = Console(width=130)
    rows = []
    for world in options.ranks:
        for share in options.shares:
            results = on_cluster(__file__, world, 1, rate_for(share), [options.rounds])
            show(world, share, results, console)
            rows.append({"world": world, "share": share, "results": results})
    options.out.write_text(json.dumps(setting() | {"rows": rows}, indent=1))
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
