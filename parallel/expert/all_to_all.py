"""The flat all-to-all: one exchange over the whole ep group, one row for each pair of a token and an expert.

A token with K experts crosses the network up to K times, whether or not its experts share a node or a rank.
"""

from __future__ import annotations

from parallel.expert.chain import ChainDispatcher, Hop
from parallel.expert.dispatcher import DispatchConfig
from parallel.mesh import Mesh


def all_to_all(mesh: Mesh, config: DispatchConfig) -> ChainDispatcher:
    return ChainDispatcher(mesh, config, [Hop(mesh.ep, config.n_routed_experts // mesh.config.ep, once=False)])
