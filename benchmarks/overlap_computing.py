"""What overlap hides and gains when ranks really compute; and what it costs where there is nothing to hide.

    sudo .venv/bin/python benchmarks/overlap_computing.py [--parts cost cluster] [--shares 0.3 0.6 1.0] [--rounds 5]

cluster: 2 nodes x 1 rank, one thread each, ep 2, no pipeline: a MoE layer, 1F1B in pairs, in turn and overlapped. Ranks
         that shared a core would fill each other's waits, so there are no more of them than cores. Links are set so
         that the all-to-alls of a step travel for 30, 60 and 100 % of its compute time: for how long they travel over
         links as good as none is measured first, and what that leaves goes to the links. Time in which one rank waits
         for the other to take part is not travel. Experts are large for their rows, and sequences long, since the same
         cores also have to copy what travels, which no order can hide. Attention's heads together are three times as
         wide as the model, as V3's are. Routing is balanced by force.
cost:    1 rank, local dispatcher: phases against plain autograd over the same model, and pairs overlapped against the
         same slots in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infra import distributed
from infra.allocator import keep_freed_memory
from infra.precision import PrecisionConfig
from launch.emulate import BUCKET_BYTES
from measuring.cluster import from_rank, on_cluster
from measuring.pipelined_step import PipelinedStep, measure_in_turn
from measuring.ratios import ratios, setting, shown
from model.config import ModelConfig
from model.transformer import Transformer, init_model_
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, MeshConfig
from parallel.parallelize import parallelize
from parallel.pipeline.passes import in_turn, pair_up
from parallel.pipeline.schedules import SCHEDULES

LENGTH, MICROBATCHES = 1024, 16
FREE = 40e9  # bits a second that nobody notices
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    moe_intermediate_size=2048,
    num_hidden_layers=1,
    num_nextn_predict_layers=0,
    num_attention_heads=16,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=0,
    n_group=1,
    topk_group=1,
    aux_loss_alpha=0.0,
    initializer_range=0.02,
    rope_scaling=None,
)


def make_steps(ep: int) -> tuple[dict[str, PipelinedStep], Tensor]:
    """1F1B, and 1F1B in pairs, in turn and overlapped; and this rank's batch."""
    mesh = Mesh(MeshConfig(ep=ep, ranks_per_node=1, world=ep))
    alone = SCHEDULES["1f1b"](1, MICROBATCHES)
    replica = parallelize(
        MODEL,
        ParallelConfig(ep=ep, ranks_per_node=1, dispatcher="two_hop" if ep > 1 else "local", force_balance=True),
        mesh,
        alone,
        precision=PrecisionConfig("fp32"),
        device=torch.device("cpu"),
        seed=0,
        weight_decay=0.0,
        microbatch=(1, LENGTH),
    )
    pairs = pair_up(alone)
    kinds = {"slots of one": alone, "pairs in turn": in_turn(pairs), "pairs overlapped": pairs}
    steps = {
        name: PipelinedStep(schedule, replica.stages, mesh, replica.dispatcher) for name, schedule in kinds.items()
    }
    generator = torch.Generator().manual_seed(mesh.rank)
    return steps, torch.randint(MODEL.vocab_size, (MICROBATCHES, 1, LENGTH + 1), generator=generator)


def measure_rank(rounds: int, kinds: list[str]) -> dict[str, Any]:
    """On every rank of the cluster."""
    world = distributed.start()
    steps, tokens_MBL = make_steps(world.size)
    results = measure_in_turn({kind: steps[kind] for kind in kinds}, tokens_MBL, rounds)
    distributed.stop()
    return results


def cluster_part(shares: list[float], rounds: int, console: Console) -> list[dict[str, Any]]:
    free = on_cluster(__file__, 2, 1, FREE, [2, "pairs in turn"])["pairs in turn"]
    comm, travel, compute = (statistics.median(free[name]) for name in ("comm", "travel", "computing"))
    console.print(f"computing {compute:.2f} s a step; all-to-alls over links as good as none {comm:.2f} s,")
    console.print(f"of which {travel:.2f} s of travel, the rest waiting until both ranks take part")
    table = Table(title=f"2 ranks, ep 2, {MODEL.num_hidden_layers} MoE layer, {MICROBATCHES} microbatches")
    for column in ("travel / compute", "waiting", "links", "in turn", "overlapped", "overlapped / in turn", "hidden"):
        table.add_column(column, justify="right")
    rows = []
    for share in shares:
        if share * compute <= travel:
            console.print(f"all-to-alls travel for more than {share:.0%} of computing over any link")
            continue
        at_once = (
            4 * MODEL.num_hidden_layers * MICROBATCHES * BUCKET_BYTES[0]
        )  # an idle link lets a bucket of bytes through
        rate = (free["bytes"] - at_once) * 8 / (share * compute - travel)
        results = on_cluster(__file__, 2, 1, rate, [rounds, "pairs in turn", "pairs overlapped"])
        before, after = results["pairs in turn"], results["pairs overlapped"]
        took, got = (statistics.median(ratios(before[name], before["computing"])) for name in ("comm", "travel"))
        waiting = took - got
        rows.append({"share": share, "share_measured": got, "waiting": waiting, "mbit": rate / 1e6, **results})
        table.add_row(
            f"{share:.0%}, measured {got:.0%}",
            f"{waiting:.0%}",
            f"{rate / 1e6:.0f} Mbit/s",
            f"{statistics.median(before['seconds']):.2f} s",
            f"{statistics.median(after['seconds']):.2f} s",
            shown(ratios(after["seconds"], before["seconds"])),
            shown(after["hidden"]),
        )
    console.print(table)
    return rows


def cost_part(rounds: int, console: Console) -> dict[str, list[float]]:
    """Seconds of each, in turn: plain autograd; phases, one slot of one after the other; pairs in turn; overlapped."""
    keep_freed_memory()  # as every training process does
    model = init_model_(Transformer(MODEL), seed=0)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]  # as every parameter here has
    steps, tokens_MBL = make_steps(ep=1)

    def plain() -> None:
        for batch_BL in tokens_MBL:
            model.losses(batch_BL[:, :-1], batch_BL[:, 1:], MICROBATCHES * LENGTH, MICROBATCHES).lm_loss.backward()

    runs: dict[str, Callable[[], None]] = {"plain autograd": plain}
    runs |= {name: lambda step=step: step.run(tokens_MBL) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:  # the first is to warm up
                seconds[name].append(time.perf_counter() - began)
    table = Table(title=f"1 rank, {MODEL.num_hidden_layers} MoE layer, {MICROBATCHES} microbatches, nothing to hide")
    for column in ("", "step", "against"):
        table.add_column(column, justify="right")
    against = {
        "slots of one": "plain autograd",
        "pairs in turn": "slots of one",
        "pairs overlapped": "pairs in turn",
    }
    for name, values in seconds.items():
        other = against.get(name)
        ratio = f"{shown(ratios(values, seconds[other]))} x {other}" if other else ""
        table.add_row(name, f"{statistics.median(values):.3f} s", ratio)
    console.print(table)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["cost", "cluster"], default=["cost", "cluster"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.6, 1.0], help="of communication")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("overlap_computing.json"))
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)  # how this script starts itself: rounds, kinds
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank:
        rounds, *kinds = options.rank
        from_rank(measure_rank(int(rounds), kinds), options.out)
        return
    console = Console(width=130)
    report = setting()
    if "cost" in options.parts:
        report["cost"] = cost_part(options.rounds, console)
    if "cluster" in options.parts:
        report["cluster"] = cluster_part(options.shares, options.rounds, console)
    options.out.write_text(json.dumps(report, indent=1))
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
