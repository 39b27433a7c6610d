"""The mesh: its arithmetic against a table written by hand, its groups on real ranks, its refusals word by word."""

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import AXES, Mesh, MeshConfig
from tests.ranks import run_ranks


def test_layout_of_two_pipelines_of_four_on_nodes_of_two():
    mesh = MeshConfig(pp=2, ep=4, ranks_per_node=2, world=16)
    assert (mesh.dp, mesh.expert_dp, mesh.ep_per_node, mesh.ep_nodes) == (8, 2, 2, 2)
    assert mesh.partition("dp") == [list(range(8)), list(range(8, 16))]
    assert mesh.partition("pp") == [[r, r + 8] for r in range(8)]
    assert mesh.partition("ep") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert mesh.partition("expert_dp")[:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert mesh.partition("node")[:3] == [[0, 1], [2, 3], [4, 5]]
    assert mesh.partition("peers")[:3] == [[0, 2], [1, 3], [4, 6]]
    assert mesh.coordinates(13) == (1, 5, 1, 1, 6, 1)


def test_v3_layout_fills_nodes():
    mesh = MeshConfig(pp=16, ep=64, ranks_per_node=8, world=2048)
    assert (mesh.dp, mesh.expert_dp, mesh.ep_nodes) == (128, 2, 8)
    assert all(ranks == list(range(ranks[0], ranks[0] + 64)) and ranks[0] % 8 == 0 for ranks in mesh.partition("ep"))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 8, 1), (2, 2, 8, 4), (1, 8, 2, 8), (4, 2, 4, 16), (2, 3, 6, 12), (1, 6, 8, 6)]
)
def test_every_axis_partitions_the_world(sizes):
    mesh = MeshConfig(*sizes)
    size = {"pp": mesh.pp, "dp": mesh.dp, "ep": mesh.ep, "expert_dp": mesh.expert_dp}
    size |= {"node": mesh.ep_per_node, "peers": mesh.ep_nodes}
    for axis in AXES:
        groups = mesh.partition(axis)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(mesh.world))
        assert {len(ranks) for ranks in groups} == {size[axis]}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"pp": 4, "world": 6}, "pp=4 does not divide world=6: use pp=3 or pp=6, or start 8 ranks"),
        ({"ep": 3, "world": 8, "pp": 2}, r"ep=3 does not divide dp=4 .*: use ep=2 or ep=4"),
        ({"ep": 16, "world": 8}, r"ep=16 does not divide dp=8 .*: use ep=8"),
        (
            {"ep": 6, "world": 12, "ranks_per_node": 4},
            "ep=6 neither fills nodes of 4 ranks nor divides one: use ep=4 or ep=12",
        ),
        (
            {"world": 6, "ranks_per_node": 4},
            "world=6 does not fill nodes of ranks_per_node=4: .*=3 or .*=6, .*=4 or world=8",
        ),
        ({"pp": 0}, "pp=0 must be at least 1"),
    ],
)
def test_illegal_sizes_are_refused_with_the_nearest_legal_ones(sizes, words):
    with pytest.raises(ValueError, match=words):
        MeshConfig(**sizes)


def test_experts_must_lie_on_ranks_and_groups_on_nodes():
    mesh = MeshConfig(ep=8, ranks_per_node=2, world=8)
    mesh.check_experts(32, 8)
    mesh.check_experts(32, 1)
    with pytest.raises(ValueError, match="n_routed_experts=12 cannot be shared by ep=8 ranks: use ep=4"):
        mesh.check_experts(12, 4)
    with pytest.raises(ValueError, match=r"n_group=2 routing groups do not lie whole on the 4 nodes .*: use n_group=4"):
        mesh.check_experts(32, 2)


def test_a_mesh_of_one_needs_no_process_group():
    mesh = Mesh(MeshConfig())
    assert not dist.is_initialized()
    assert all(getattr(mesh, axis).size == 1 and getattr(mesh, axis).pg is None for axis in AXES)


def _sums(rank: int, world_size: int) -> dict[str, tuple[float, tuple[int, ...], int]]:
    mesh = Mesh(MeshConfig(pp=2, ep=2, ranks_per_node=2, world=world_size))
    out = {}
    for axis in AXES:
        group, x = getattr(mesh, axis), torch.tensor(float(rank))
        if group.pg is not None:
            dist.all_reduce(x, group=group.pg)
        out[axis] = (x.item(), group.ranks, group.rank)
    return out


def test_groups_reach_the_ranks_they_name():
    for rank, seen in enumerate(run_ranks(8, _sums)):
        for total, ranks, index in seen.values():
            assert total == sum(ranks)
            assert ranks[index] == rank


def _wrong_world(rank: int, world_size: int) -> str:
    try:
        Mesh(MeshConfig(world=4))
    except ValueError as error:
        return str(error)
    return ""


def test_a_mesh_for_another_world_is_refused():
    assert run_ranks(2, _wrong_world) == ["the mesh is made for world=4 ranks, but 2 were started"] * 2
