"""Who sits where: the mesh of ranks, `pp x dp`, and the groups of ranks that talk to one another.

A pipeline has `pp` ranks, each holding some stages; `dp = world / pp` copies of the pipeline run side by side. Inside
one pipeline rank the `dp` ranks are cut into expert-parallel groups of `ep` ranks: together they hold one copy of
every expert, so an expert exists `expert_dp = dp / ep` times. A node holds `ranks_per_node` ranks.

    rank = pp_rank * dp + dp_rank,      dp_rank = expert_dp_rank * ep + ep_rank,      node = rank // ranks_per_node

The pipeline axis is outermost and the expert axis innermost, because their traffic differs by orders of magnitude:
every MoE layer sends each token to several experts, a pipeline border sends it once. With this order an ep group is a
run of consecutive ranks, fills its nodes completely and spans as few as it can: V3's EP64 is 8 whole nodes of 8, and
the pipeline crosses between nodes, where its few bytes do not hurt. With k experts a rank, expert e
lives on ep rank e // k, so a routing group of consecutive experts lives on one node.

Six kinds of groups, each a partition of the world (`MeshConfig.partition`):

    pp          the ranks of one pipeline: same dp_rank
    dp          the ranks that hold the same stages: same pp_rank
    ep          the ranks that hold one copy of all experts of these stages
    expert_dp   the ranks that hold the same experts of the same stages
    node        the part of my ep group on my node, by in-node index          (first-hop receivers forward inside it)
    peers       the ranks of my ep group with my in-node index, by node       (the only ones I talk to across nodes)

The module imports torch only when a `Mesh` is built, so a planner can use `MeshConfig` without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AXES = ("pp", "dp", "ep", "expert_dp", "node", "peers")


def _nearest(name: str, value: int, legal: Iterable[int]) -> str:
    """The nearest legal values below and above, as words: 'ep=4 or ep=8'."""
    legal = sorted(legal)
    below = [v for v in legal if v < value][-1:]
    above = [v for v in legal if v > value][:1]
    return " or ".join(f"{name}={v}" for v in below + above)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class Coordinates(NamedTuple):
    """Where a rank stands: `node` counts nodes of the whole world, `local` is the in-node index within the ep group."""

    pp: int
    dp: int
    ep: int
    expert_dp: int
    node: int
    local: int


@dataclass
class MeshConfig:
    """Sizes of the mesh, checked. Raises ValueError naming the numbers that disagree and the nearest legal ones.

    pp: ranks of a pipeline; ep: ranks that share one copy of the experts; ranks_per_node: ranks of one machine (a world
    smaller than that is one machine that is not full); world: all ranks.
    """

    pp: int = 1
    ep: int = 1
    ranks_per_node: int = 8
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "ranks_per_node", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.world % self.pp:
            raise ValueError(
                f"pp={self.pp} does not divide world={self.world}: use "
                f"{_nearest('pp', self.pp, _divisors(self.world))}, "
                f"or start {-(-self.world // self.pp) * self.pp} ranks"
            )
        if self.world % self.node_size:
            raise ValueError(
                f"world={self.world} does not fill nodes of ranks_per_node={self.ranks_per_node}: use "
                f"{_nearest('ranks_per_node', self.ranks_per_node, _divisors(self.world))}, or start "
                f"{_nearest('world', self.world, range(0, 2 * self.world + self.node_size, self.node_size))} ranks"
            )
        legal = [d for d in _divisors(self.dp) if d % self.node_size == 0 or self.node_size % d == 0]
        if self.ep not in legal:
            why = (
                f"does not divide dp={self.dp} (dp = world / pp = {self.world} / {self.pp})"
                if self.dp % self.ep
                else f"neither fills nodes of {self.node_size} ranks nor divides one"
            )
            raise ValueError(f"ep={self.ep} {why}: use {_nearest('ep', self.ep, legal)}")

    @property
    def dp(self) -> int:
        return self.world // self.pp

    @property
    def expert_dp(self) -> int:
        return self.dp // self.ep

    @property
    def node_size(self) -> int:
        """Ranks on one node: `ranks_per_node`, or the world where that is smaller."""
        return min(self.ranks_per_node, self.world)

    @property
    def ep_per_node(self) -> int:
        """Ranks of one ep group that share a node."""
        return min(self.ep, self.node_size)

    @property
    def ep_nodes(self) -> int:
        """Nodes that one ep group spans."""
        return self.ep // self.ep_per_node

    def coordinates(self, rank: int) -> Coordinates:
        pp, dp = divmod(rank, self.dp)
        expert_dp, ep = divmod(dp, self.ep)
        return Coordinates(pp, dp, ep, expert_dp, rank // self.node_size, ep % self.ep_per_node)

    def partition(self, axis: str) -> list[list[int]]:
        """All groups of one axis, as lists of world ranks; together they are the world."""
        keys = {
            "pp": lambda c: (c.dp,),
            "dp": lambda c: (c.pp,),
            "ep": lambda c: (c.pp, c.expert_dp),
            "expert_dp": lambda c: (c.pp, c.ep),
            "node": lambda c: (c.pp, c.expert_dp, c.node),
            "peers": lambda c: (c.pp, c.expert_dp, c.local),
        }
        if axis not in keys:
            raise ValueError(f"{axis!r} is no axis of the mesh: one of {', '.join(AXES)}")
        groups: dict[tuple, list[int]] = {}
        for rank in range(self.world):
            groups.setdefault(keys[axis](self.coordinates(rank)), []).append(rank)
        return list(groups.values())

    def check_experts(self, n_routed_experts: int, n_group: int) -> None:
        """Raises ValueError unless every ep rank holds equally many experts and every routing group lies on one node.

        One group (`n_group=1`) is no node limit, and may span nodes.
        """
        if n_routed_experts % self.ep:
            legal = [d for d in _divisors(n_routed_experts) if self.dp % d == 0]
            raise ValueError(
                f"n_routed_experts={n_routed_experts} cannot be shared by ep={self.ep} ranks: "
                f"use {_nearest('ep', self.ep, legal)}"
            )
        if n_group > 1 and n_group % self.ep_nodes:
            legal = list(range(self.ep_nodes, 2 * n_group + self.ep_nodes, self.ep_nodes))
            raise ValueError(
                f"n_group={n_group} routing groups do not lie whole on the {self.ep_nodes} nodes of ep={self.ep} "
                f"({self.ep_per_node} ranks a node): use {_nearest('n_group', n_group, legal)}"
            )


@dataclass(frozen=True)
class Group:
    """One group of ranks and my place in it. `pg` is None for a group of one, which has nothing to send."""

    ranks: tuple[int, ...]  # world ranks, in the order of the group
    rank: int  # my index among them
    pg: ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)


class Mesh:
    """This rank's place in the mesh, `at`, and its groups: `pp`, `dp`, `ep`, `expert_dp`, `node`, `peers`.

    Building one is collective: every rank of the world does it, at the same point. A world of one needs no process
    group. `timeout` is that of every group: how long a collective waits for a rank that is alive but silent.
    Raises ValueError when the config's world is not the world that was started.
    """

    def __init__(self, config: MeshConfig, timeout: timedelta | None = None):
        import torch.distributed as dist

        started = dist.get_world_size() if dist.is_initialized() else 1
        if started != config.world:
            raise ValueError(f"the mesh is made for world={config.world} ranks, but {started} were started")
        self.config = config
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.at = config.coordinates(self.rank)
        self._timeout = timeout
        self.pp = self.group(config.partition("pp"))
        self.dp = self.group(config.partition("dp"))
        self.ep = self.group(config.partition("ep"))
        self.expert_dp = self.group(config.partition("expert_dp"))
        self.node = self.group(config.partition("node"))
        self.peers = self.group(config.partition("peers"))

    def group(self, partition: Sequence[Sequence[int]], backend: Any = None) -> Group:
        """My group of a partition of the world. Collective, as every rank takes part in making every group."""
        import torch.distributed as dist

        mine = None
        for ranks in partition:
            pg = dist.new_group(list(ranks), timeout=self._timeout, backend=backend) if len(ranks) > 1 else None
            if self.rank in ranks:
                mine = Group(tuple(ranks), ranks.index(self.rank), pg)
        if mine is None:
            raise ValueError(f"rank {self.rank} is in no group of {partition}")
        return mine
