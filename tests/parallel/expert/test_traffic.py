"""Counts: each dispatcher's bytes against what the routing implies, the published ratios, and the balance figures."""

import pytest
import torch
from torch import Tensor

from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig
from parallel.expert.permutation import balanced_topk_idx
from parallel.expert.traffic import load_figures
from parallel.mesh import Mesh, MeshConfig
from tests.ranks import run_ranks

HIDDEN, TOKENS = 256, 12


def node_limited(rank: int, num_experts: int, n_group: int, topk_group: int, top_k: int = 8) -> Tensor:
    """A random routing that reaches exactly `topk_group` groups, top_k / topk_group experts in each."""
    generator = torch.Generator().manual_seed(rank)
    size = num_experts // n_group
    groups = torch.rand(TOKENS, n_group, generator=generator).topk(topk_group).indices
    inside = torch.rand(TOKENS, topk_group, size, generator=generator).topk(top_k // topk_group).indices
    return (groups.unsqueeze(2) * size + inside).flatten(1)


def expected_bytes(topk_idx_TK: Tensor, mesh: Mesh, num_experts: int, name: str, row: int) -> dict[str, int]:
    """One leg's bytes of this rank's tokens, by a loop over tokens, whoever forwards them."""
    per_rank, per_node = num_experts // mesh.config.ep, num_experts // mesh.config.ep_nodes
    across = within = 0
    for experts in topk_idx_TK.tolist():
        if name == "all_to_all":
            ranks = [e // per_rank for e in experts]
            across += sum(r // mesh.config.ep_per_node != mesh.at.node for r in ranks)
            within += sum(r // mesh.config.ep_per_node == mesh.at.node and r != mesh.rank for r in ranks)
        else:
            across += len({e // per_node for e in experts} - {mesh.at.node})
            ranks = {e // per_rank for e in experts}  # reached on each node from the rank with my in-node index
            within += sum(r % mesh.config.ep_per_node != mesh.at.local for r in ranks)
    return {"across": across * row, "within": within * row}


def _count(rank: int, world_size: int, ranks_per_node: int, num_experts: int, topk_group: int) -> dict:
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=ranks_per_node, world=world_size))
    n_group = mesh.config.ep_nodes
    topk_idx = node_limited(rank, num_experts, n_group, topk_group)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    out = {}
    for name, dtype in [
        ("all_to_all", "native"),
        ("two_hop", "native"),
        ("two_hop", "fp8"),
        ("two_hop", "fp8_fp32_sf"),
    ]:
        dispatcher = DISPATCHERS[name](mesh, DispatchConfig(num_experts, n_group, topk_group, dtype))
        routed = dispatcher.start_dispatch(x, topk_idx, torch.rand(TOKENS, 8)).wait()
        dispatcher.start_combine(routed.x_RD, routed.handle).wait()
        wanted = torch.tensor(list(expected_bytes(topk_idx, mesh, num_experts, name, HIDDEN * 2).values()))
        torch.distributed.all_reduce(wanted)
        out[name, dtype] = dispatcher.traffic.record(mesh.ep), wanted.tolist()
        assert dispatcher.traffic.record()["dispatch_bytes_across_nodes"] == 0  # counting starts anew
    return out


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "num_experts", "topk_group", "ratio"),
    [(4, 2, 32, 2, 0.25), (8, 2, 32, 2, 0.25), (8, 1, 64, 4, 0.5), (8, 4, 64, 1, 0.125)],
)
def test_bytes_are_those_the_routing_implies(ranks, ranks_per_node, num_experts, topk_group, ratio):
    counts = run_ranks(ranks, _count, ranks_per_node, num_experts, topk_group)[0]
    for name in ("all_to_all", "two_hop"):
        record, (across, within) = counts[name, "native"]
        for leg in ("dispatch", "combine"):
            assert (record[f"{leg}_bytes_across_nodes"], record[f"{leg}_bytes_within_nodes"]) == (across, within)
        assert record["nodes_per_token"] == topk_group
    native = counts["two_hop", "native"][0]
    flat = counts["all_to_all", "native"][0]
    assert native["dispatch_bytes_across_nodes"] == ratio * flat["dispatch_bytes_across_nodes"]
    for dtype, bytes_of_scales in [("fp8", 2), ("fp8_fp32_sf", 8)]:
        fp8 = counts["two_hop", dtype][0]
        for where in ("across", "within"):
            key = f"dispatch_bytes_{where}_nodes"
            assert fp8[key] / max(native[key], 1) in (0, pytest.approx((HIDDEN + bytes_of_scales) / (2 * HIDDEN)))
            assert fp8[f"combine_bytes_{where}_nodes"] == native[f"combine_bytes_{where}_nodes"]


def test_one_rank_sends_nothing():
    dispatcher = DISPATCHERS["two_hop"](Mesh(MeshConfig()), DispatchConfig(8))
    routed = dispatcher.start_dispatch(torch.randn(3, 4), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)).wait()
    dispatcher.start_combine(routed.x_RD, routed.handle).wait()
    record = dispatcher.traffic.record()
    assert not any(value for key, value in record.items() if "bytes" in key)
    assert record["nodes_per_token"] == 1


def test_max_vio_of_experts_ranks_and_nodes():
    load = torch.tensor([[4, 0, 2, 2, 2, 2, 2, 2], [2] * 8])
    figures = load_figures(load, MeshConfig(ep=4, ranks_per_node=2, world=4))
    assert figures == {"max_vio": 0.5, "max_vio_rank": 0.0, "max_vio_node": 0.0}
    load = torch.tensor([[8, 0, 0, 0, 0, 0, 0, 0]])
    figures = load_figures(load, MeshConfig(ep=4, ranks_per_node=2, world=4))
    assert figures == {"max_vio": 7.0, "max_vio_rank": 3.0, "max_vio_node": 1.0}


@pytest.mark.parametrize(
    ("num_experts", "n_group", "topk_group", "top_k"), [(32, 4, 2, 8), (64, 8, 4, 8), (16, 1, 1, 4)]
)
def test_forced_balance_is_balanced_and_stays_on_its_nodes(num_experts, n_group, topk_group, top_k):
    topk_idx = balanced_topk_idx(
        torch.zeros(4 * num_experts, top_k, dtype=torch.int64), num_experts, n_group, topk_group
    )
    assert set(torch.bincount(topk_idx.flatten(), minlength=num_experts).tolist()) == {4 * top_k}
    groups = topk_idx // (num_experts // n_group)
    assert all(len(set(row)) == topk_group for row in groups.tolist())
    assert all(len(set(row)) == top_k for row in topk_idx.tolist())


def test_forced_balance_replaces_the_router():
    config = DispatchConfig(8, force_balance=True)
    dispatcher = DISPATCHERS["local"](Mesh(MeshConfig()), config)
    routed = dispatcher.dispatch(torch.randn(8, 4), torch.zeros(8, 2, dtype=torch.int64), torch.rand(8, 2))
    assert routed.num_tokens_per_expert_E.tolist() == [2] * 8


def test_forced_balance_needs_enough_experts_in_a_group():
    with pytest.raises(
        ValueError, match="top 8 experts in 1 groups need 8 experts a group, but 16 experts in 4 groups"
    ):
        balanced_topk_idx(torch.zeros(4, 8, dtype=torch.int64), 16, 4, 1)
