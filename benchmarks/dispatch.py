"""What a dispatcher costs: a MoE layer on emulated clusters, and the permutation alone on one rank.

    sudo .venv/bin/python benchmarks/dispatch.py [--out dispatch.json] [--rounds 7]

Clusters: nodes x ranks a node, links 20 times as slow as what two ranks of one node reach while those of all other
nodes do the same, for they share the cores of one machine (measured first). Each runs a MoE layer - router, dispatch,
experts, combine, shared expert - forward and backward, with the flat all-to-all, with two_hop and with two_hop and an
FP8 payload, in turn, in one run. Time is that of the slowest rank; the ratio is the median over rounds, with its
quartiles. Bytes across nodes are what the nodes' cards have counted, TCP and all, next to what the routing implies:

    flat       one row for each expert on another node, sent four times: dispatch, combine, and the backward of both
    two_hop    one row for each other node, the same

One rank: dispatch and combine, with sorting and counting, against a bare `index_select` of the same rows and the sum of
the same rows, by `index_add_` and by `embedding_bag` (faster on a CPU, and what `add_up` uses).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infra import distributed
from measuring.cluster import from_rank, on_cluster
from measuring.ratios import ratios, setting, shown
from model.config import ModelConfig
from model.moe import MLP, Experts, Router
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig, Dispatcher
from parallel.expert.payload import row_bytes
from parallel.mesh import Mesh, MeshConfig

SLOWER = 20  # links against the inside of a node
HIDDEN, EXPERT_HIDDEN, TOKENS, DTYPE = 2048, 64, 256, torch.bfloat16
VARIANTS = {"all_to_all": ("all_to_all", "native"), "two_hop": ("two_hop", "native"), "two_hop fp8": ("two_hop", "fp8")}
CLUSTERS = [  # nodes, ranks a node, experts, groups a token may reach (a node is a group)
    (2, 2, 32, 2),
    (4, 2, 32, 2),
    (2, 4, 32, 1),
    (8, 1, 64, 4),
]


def model_config(num_experts: int, n_group: int, topk_group: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=EXPERT_HIDDEN,
        n_routed_experts=num_experts,
        num_experts_per_tok=8,
        n_group=n_group,
        topk_group=topk_group,
    )


# On the ranks of an emulated cluster


def sent_by_node() -> int:
    """Bytes that have left this rank's node, once every rank has come here."""
    dist.barrier()
    sent = int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())
    total = torch.tensor(sent if os.environ["LOCAL_RANK"] == "0" else 0)
    dist.all_reduce(total)
    return int(total)


def seconds_of(fn: Callable[[], object]) -> float:
    """Of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    fn()
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item()


class Layer:
    """One MoE layer, with the experts of this rank, over any dispatcher."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        torch.manual_seed(0)
        self.router = Router(config).to(DTYPE)
        self.experts = Experts(config, config.n_routed_experts // mesh.ep.size).to(DTYPE)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size).to(DTYPE)
        for module in (self.router, self.experts, self.shared_experts):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        self.router.e_score_correction_bias.zero_()

    def forward_backward(self, dispatcher: Dispatcher, x_TD: Tensor) -> None:
        routing = self.router(x_TD.unsqueeze(0))
        routed = dispatcher.dispatch(x_TD, routing.topk_idx_TK, routing.topk_weights_TK)
        y_RD = self.experts(routed.x_RD, routed.weights_R, routed.num_tokens_per_expert_E)
        y_TD = dispatcher.combine(y_RD, routed.handle) + self.shared_experts(x_TD)
        y_TD.backward(torch.ones_like(y_TD))


def theory(topk_idx_TK: Tensor, mesh: Mesh, num_experts: int, dispatcher: str, dispatch_dtype: str) -> int:
    """Bytes that must cross nodes for this rank's tokens, forward and backward, from the routing alone."""
    node_TK = topk_idx_TK // (num_experts // mesh.config.ep_nodes)
    if dispatcher == "two_hop":
        reached = torch.zeros(len(node_TK), mesh.config.ep_nodes, dtype=torch.bool).scatter_(1, node_TK, True)
        rows = reached.sum() - reached[:, mesh.at.node].sum()
    else:
        rows = (node_TK != mesh.at.node).sum()
    return 2 * int(rows) * (row_bytes(HIDDEN, DTYPE.itemsize, dispatch_dtype) + HIDDEN * DTYPE.itemsize)


def measure_cluster(num_experts: int, topk_group: int, rounds: int) -> dict[str, dict]:
    """Every variant in turn; on rank 0, times of each round and bytes of one forward and backward."""
    world = distributed.start()
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = Mesh(MeshConfig(ep=world.size, ranks_per_node=ranks_per_node, world=world.size))
    config = model_config(num_experts, mesh.config.ep_nodes, topk_group)
    layer = Layer(config, mesh)
    dispatchers = {
        name: DISPATCHERS[kind](mesh, DispatchConfig(num_experts, config.n_group, topk_group, dtype))
        for name, (kind, dtype) in VARIANTS.items()
    }
    torch.manual_seed(world.rank + 1)
    x_TD = torch.randn(TOKENS, HIDDEN).to(DTYPE).requires_grad_()
    topk_idx_TK = layer.router(x_TD.unsqueeze(0)).topk_idx_TK
    results: dict[str, dict] = {name: {"seconds": []} for name in dispatchers}
    for turn in range(rounds + 1):
        for name, dispatcher in dispatchers.items():
            before = sent_by_node()
            took = seconds_of(lambda d=dispatcher: layer.forward_backward(d, x_TD))
            on_links = sent_by_node() - before
            if turn == 0:
                continue  # the first is to warm up
            results[name]["seconds"].append(took)
            results[name]["bytes_on_links"] = on_links
    for name, (kind, dtype) in VARIANTS.items():
        expected = torch.tensor(theory(topk_idx_TK, mesh, num_experts, kind, dtype))
        dist.all_reduce(expected)
        results[name]["bytes_in_theory"] = int(expected)
        counted = dispatchers[name].traffic.record(mesh.ep)
        per_pass = {key: value / (rounds + 1) for key, value in counted.items() if "bytes" in key}
        results[name] |= per_pass | {"nodes_per_token": counted["nodes_per_token"]}
    distributed.stop()
    return results


def measure_inside() -> dict[str, float]:
    """Bits per second from the first to the second rank of a node, on all nodes at once; best of a few."""
    world = distributed.start()
    local_rank = int(os.environ["LOCAL_RANK"])
    x = torch.zeros(16_000_000, dtype=torch.uint8)

    def send() -> None:
        if local_rank == 0:
            dist.send(x, world.rank + 1)
        if local_rank == 1:
            dist.recv(x, world.rank - 1)

    best = min(seconds_of(send) for _ in range(5))
    distributed.stop()
    return {"bits_per_second": 8 * len(x) / best}


# On this machine


def measure_one_rank(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the local dispatcher and of bare data movement of the same rows, in turn."""
    hidden, tokens, top_k, num_experts = 2048, 1024, 8, 64
    dispatcher = DISPATCHERS["local"](Mesh(MeshConfig()), DispatchConfig(num_experts))
    torch.manual_seed(0)
    results: dict[str, dict[str, list[float]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        x_TD = torch.randn(tokens, hidden).to(dtype)
        topk_idx_TK = torch.rand(tokens, num_experts).topk(top_k).indices
        weights_TK = torch.rand(tokens, top_k)
        token_R = topk_idx_TK.flatten().argsort(stable=True) // top_k
        row_R, start_T = token_R.argsort(stable=True), torch.arange(0, tokens * top_k, top_k)

        def ours(x_TD: Tensor = x_TD, topk_idx_TK: Tensor = topk_idx_TK, weights_TK: Tensor = weights_TK) -> None:
            routed = dispatcher.start_dispatch(x_TD, topk_idx_TK, weights_TK).wait()
            dispatcher.start_combine(routed.x_RD, routed.handle).wait()

        def bare_add(x_TD: Tensor = x_TD, token_R: Tensor = token_R) -> None:
            torch.zeros_like(x_TD).index_add_(0, token_R, x_TD.index_select(0, token_R))

        def bare_bag(
            x_TD: Tensor = x_TD, token_R: Tensor = token_R, row_R: Tensor = row_R, start_T: Tensor = start_T
        ) -> None:
            F.embedding_bag(row_R, x_TD.index_select(0, token_R), start_T, mode="sum")

        times: dict[str, list[float]] = {
            "dispatch + combine": [],
            "select + index_add_": [],
            "select + embedding_bag": [],
        }
        for turn in range(5 * rounds + 1):
            for name, fn in zip(times, (ours, bare_add, bare_bag), strict=True):
                began = time.perf_counter()
                fn()
                if turn:
                    times[name].append(time.perf_counter() - began)
        results[str(dtype).removeprefix("torch.")] = times
    return results


def cluster_table(name: str, rate: float, results: dict[str, dict]) -> Table:
    table = Table(title=f"{name}, links of {rate / 1e6:.0f} Mbit/s: MoE layer, forward + backward")
    for column in ("dispatcher", "ms", "faster than flat", "MB on links", "MB in theory", "links / theory", "of flat"):
        table.add_column(column, justify="right")
    flat = results["all_to_all"]
    for variant, result in results.items():
        on_links, in_theory = result["bytes_on_links"], result["bytes_in_theory"]
        table.add_row(
            variant,
            f"{statistics.median(result['seconds']) * 1e3:.0f}",
            shown(ratios(flat["seconds"], result["seconds"]), 2),
            f"{on_links / 1e6:.2f}",
            f"{in_theory / 1e6:.2f}",
            f"{on_links / in_theory:.3f}",
            f"{on_links / flat['bytes_on_links']:.3f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dispatch.json"))
    parser.add_argument("--rounds", type=int, default=7)
    every = list(range(len(CLUSTERS)))
    parser.add_argument("--clusters", type=int, nargs="*", choices=every, default=every, help="which of CLUSTERS")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)  # how this script starts itself on the ranks
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank:
        what, *numbers = options.rank
        result: dict = measure_inside() if what == "inside" else measure_cluster(*map(int, numbers))
        from_rank(result, options.out)
        return

    console = Console(width=130)
    clusters, rates = {}, {}
    for nodes, ranks_per_node, num_experts, topk_group in [CLUSTERS[i] for i in options.clusters]:
        inside = on_cluster(__file__, nodes, 2, 1e9, ["inside"])["bits_per_second"]
        rate = inside / SLOWER
        console.print(f"{nodes} nodes: inside each {inside / 1e9:.1f} Gbit/s, so links of {rate / 1e6:.0f} Mbit/s")
        words = ["cluster", num_experts, topk_group, options.rounds]
        name = f"{nodes} nodes x {ranks_per_node} ranks, {num_experts} experts, top-8 on at most {topk_group} nodes"
        clusters[name] = on_cluster(__file__, nodes, ranks_per_node, rate, words)
        rates[name] = rate
        console.print(cluster_table(name, rate, clusters[name]))
    one_rank = measure_one_rank(options.rounds)
    table = Table(title="one rank, 1,024 tokens of 2,048, top-8 of 64: against bare data movement")
    for column in ("dtype", "movement", "ms", "dispatch + combine / it"):
        table.add_column(column, justify="right")
    for dtype, times in one_rank.items():
        for name, seconds in times.items():
            milliseconds = f"{statistics.median(seconds) * 1e3:.2f}"
            table.add_row(dtype, name, milliseconds, shown(ratios(times["dispatch + combine"], seconds), 2))
    console.print(table)
    options.out.write_text(
        json.dumps(setting() | {"links": rates, "clusters": clusters, "one_rank": one_rank}, indent=1)
    )
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
