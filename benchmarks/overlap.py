"""What overlap hides and gains on an emulated cluster, when computing is sleeping.

    sudo .venv/bin/python benchmarks/overlap.py [--ranks 4 8] [--shares 0.3 0.6 1.0] [--rounds 2] [--out FILE]

Ranks that shared a core would fill each other's waits. So attention and experts sleep for given times, F = I = W, while
real rows travel over the links of pp x ep 2 ranks, and few cores can play many. Every rank is a node with a network
card of its own, as H800 nodes have one a GPU; links are set so that the all-to-alls of a step take 30, 60 and 100 % of
its compute time. A pipeline runs 8 microbatches a rank, about as V3 did (120 on 16). DualPipe and 1F1B, with and
without overlap, in turn in the same processes, beside the simulator's prediction, which knows the sleeps, what one
dispatch and combine take when nothing else runs (measured first), and the bytes between pipeline ranks. With real
computing: overlap_computing.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from infra import distributed
from measuring.cluster import from_rank, on_cluster
from measuring.pipelined_step import PipelinedStep, measure_in_turn
from measuring.ratios import ratios, setting, shown
from measuring.sleeping_layers import HIDDEN, NUM_EXPERTS, PHASE, ROW_BYTES, TOKENS, TOP_K, evenly, sleeping_stages
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig, Dispatcher
from parallel.mesh import Mesh, MeshConfig
from parallel.pipeline.actions import Schedule
from parallel.pipeline.passes import in_turn, pair_up
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate

EP = 2
LAYER = 6 * PHASE  # seconds of compute of one layer: F, I and W of attention and of the experts
MICROBATCHES = 8  # a pipeline rank

VARIANTS = {  # name: (schedule, how it is laid out)
    "1f1b, in turn": ("1f1b", in_turn),
    "1f1b in pairs, overlap": ("1f1b", pair_up),
    "zbv in pairs, overlap": ("zbv", pair_up),
    "dualpipe, in turn": ("dualpipe", in_turn),
    "dualpipe, overlap": ("dualpipe", None),
}


def schedule_of(name: str, pp: int) -> Schedule:
    kind, lay_out = VARIANTS[name]
    schedule = SCHEDULES[kind](pp, MICROBATCHES * pp)
    return lay_out(schedule) if lay_out else schedule


def exchange_seconds(dispatcher: Dispatcher, rounds: int = 9) -> float:
    """Of one dispatch and combine of a layer's rows while all ranks do the same; the slowest rank's, the median."""
    x_TD, topk_idx_TK = torch.zeros(TOKENS, HIDDEN), evenly()
    weights_TK = torch.full(topk_idx_TK.shape, 1 / TOP_K)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        routed = dispatcher.start_dispatch(x_TD, topk_idx_TK, weights_TK).wait()
        dispatcher.start_combine(routed.x_RD, routed.handle).wait()
        took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds.append(took.item())
    dispatcher.times.take()
    dispatcher.traffic.record()
    return statistics.median(seconds)


def measure_rank(rounds: int) -> dict[str, Any]:
    """On every rank of the cluster: one exchange, then all variants in turn."""
    world = distributed.start()
    pp = world.size // EP
    mesh = Mesh(MeshConfig(pp=pp, ep=EP, ranks_per_node=1, world=world.size))
    dispatcher = DISPATCHERS["all_to_all"](mesh, DispatchConfig(NUM_EXPERTS))
    steps = {}
    for name in VARIANTS:
        schedule = schedule_of(name, pp)
        steps[name] = PipelinedStep(
            schedule, sleeping_stages(schedule, mesh, dispatcher, 2 * pp, evenly()), mesh, dispatcher
        )
    tokens_MBL = torch.zeros(MICROBATCHES * pp, 1, TOKENS + 1, dtype=torch.int64)
    exchange = exchange_seconds(dispatcher)
    results = measure_in_turn(steps, tokens_MBL, rounds)
    distributed.stop()
    return {"exchange": exchange, "steps": results}


def rate_for(share: float) -> float:
    """Bits per second at which the four all-to-alls of a layer take `share` of its compute time."""
    rows = TOKENS * TOP_K // 2
    return 4 * rows * ROW_BYTES * 8 / (share * LAYER)


def predicted(name: str, pp: int, share: float, exchange: float) -> float:
    """The simulator's step time: alone, a slot's exchanges are all exposed; a pair takes as long as the longer of its
    computing and its exchanges."""
    third, travel = 2 * LAYER / 3, 2 * exchange  # of the two layers of 1/PP of the model: F or I or W; F or I
    costs = Costs(
        f=third + travel,
        i=third + travel,
        w=third,
        fb=max(3 * third, 2 * travel),
        p2p_bytes=TOKENS * ROW_BYTES,
        p2p_bandwidth=rate_for(share) / 8,
    )
    return simulate(schedule_of(name, pp), costs).step_time


def show(world: int, share: float, exchange: float, results: dict[str, Any], console: Console) -> None:
    """Adds the prediction to each variant's results, and prints them."""
    pp = world // EP
    shape = f"pp {pp} x ep {EP}, {MICROBATCHES * pp} microbatches"
    links = f"{rate_for(share) / 1e6:.0f} Mbit/s, dispatch and combine {1e3 * exchange:.1f} ms"
    table = Table(title=f"{shape}, all-to-all {share:.0%} of compute: {links}")
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
        figures["simulated"] = predicted(name, pp, share, exchange)
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
    console = Console(width=150)
    rows = []
    for world in options.ranks:
        for share in options.shares:
            results = on_cluster(__file__, world, 1, rate_for(share), [options.rounds])
            show(world, share, results["exchange"], results["steps"], console)
            rows.append({"world": world, "share": share, **results})
    options.out.write_text(json.dumps(setting() | {"rows": rows}, indent=1))
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
