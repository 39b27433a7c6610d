"""What expert parallelism costs and how evenly it is loaded, counted where it happens.

`Traffic` counts the bytes that leave this rank, by leg and by whether they stay on the node: `dispatch` carries
activations on the way to the experts and gradients on the way back from a combine, `combine` the partial sums,
`routing` what describes the rows (row counts, the expert and weight of each pair). Bytes a rank keeps for itself are
not traffic.

`load_figures` turns counts of tokens per expert into figures per expert, rank and node.
Letters: E experts, M MoE layers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group, MeshConfig

LEGS = ("dispatch", "combine", "routing")


class Traffic:
    """Counts of this rank since the last `record`."""

    def __init__(self) -> None:
        self.bytes_across_nodes = dict.fromkeys(LEGS, 0)
        self.bytes_within_nodes = dict.fromkeys(LEGS, 0)
        self.num_tokens = 0  # tokens this rank has routed
        self.num_token_nodes = 0  # target nodes of those tokens, summed
        self.num_pairs = 0  # pairs this rank's experts have received

    def add(self, leg: str, across: int, within: int) -> None:
        """Adds bytes sent to other nodes and to other ranks of this node."""
        self.bytes_across_nodes[leg] += across
        self.bytes_within_nodes[leg] += within

    def count_nodes(self, topk_idx_TK: Tensor, experts_per_node: int) -> None:
        """Adds the target nodes of some tokens."""
        node_TK = (topk_idx_TK // experts_per_node).sort(dim=1).values
        self.num_tokens += len(node_TK)
        self.num_token_nodes += len(node_TK) + int((node_TK[:, 1:] != node_TK[:, :-1]).sum())

    def record(self, group: Group | None = None) -> dict[str, float]:
        """The figures of this rank, or summed over a group (collective), for the step's record; counting starts anew.

        `dispatch_bytes_across_nodes` and its kin are bytes; `nodes_per_token` is the mean number of target nodes;
        `received_pairs_max_over_mean` is the load of the busiest rank over the mean.
        """
        counts = [*self.bytes_across_nodes.values(), *self.bytes_within_nodes.values()]
        sums = torch.tensor([*counts, self.num_tokens, self.num_token_nodes, self.num_pairs], dtype=torch.int64)
        busiest = torch.tensor(self.num_pairs)
        size = 1
        if group is not None and group.pg is not None:
            size = group.size
            device = "cuda" if dist.get_backend(group.pg) == "nccl" else "cpu"
            sums, busiest = sums.to(device), busiest.to(device)
            dist.all_reduce(sums, group=group.pg)
            dist.all_reduce(busiest, op=dist.ReduceOp.MAX, group=group.pg)
        *num_bytes, num_tokens, num_token_nodes, num_pairs = sums.tolist()
        names = [f"{leg}_bytes_{where}_nodes" for where in ("across", "within") for leg in LEGS]
        self.__init__()  # type: ignore[misc]
        return dict(zip(names, num_bytes, strict=True)) | {
            "nodes_per_token": num_token_nodes / max(num_tokens, 1),
            "received_pairs_max_over_mean": int(busiest) * size / max(num_pairs, 1),
        }


def load_figures(num_tokens_per_expert_ME: Tensor, config: MeshConfig) -> dict[str, float]:
    """How evenly the experts of M layers are loaded, from the counts [M, E] of a whole batch.

    `max_vio` is the published MaxVio, (max - mean) / mean over a layer's experts, mean over layers; `max_vio_rank` and
    `max_vio_node` the same for the sums over the experts of one ep rank and of one node.
    """
    figures = {}
    for name, parts in (("max_vio", None), ("max_vio_rank", config.ep), ("max_vio_node", config.ep_nodes)):
        load = num_tokens_per_expert_ME.double()
        if parts is not None:
            load = load.unflatten(1, (parts, -1)).sum(2)
        figures[name] = (load.amax(1) / load.mean(1).clamp_min(1e-30) - 1).mean().item()
    return figures
