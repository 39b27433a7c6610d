"""V3's all-to-all for fast nodes on a slow network (section 3.2.2): a token crosses once for each node it needs.

First hop: a token goes to every node that holds one of its experts, to the rank there with the sender's own in-node
index. Second hop: that rank forwards it within the node, once to each rank that holds one of its experts. On the way
back every rank adds up what its experts made of the token, the forwarding rank adds up its node, and one sum crosses.
Router groups lie on nodes (`MeshConfig.check_experts`), so a router limited to M nodes bounds what crosses by M rows
a token, for any K.
"""

from __future__ import annotations

from parallel.expert.chain import ChainDispatcher, Hop
from parallel.expert.dispatcher import DispatchConfig
from parallel.mesh import Mesh


def two_hop(mesh: Mesh, config: DispatchConfig) -> ChainDispatcher:
    across = Hop(mesh.peers, config.n_routed_experts // mesh.config.ep_nodes, once=True)
    within = Hop(mesh.node, config.n_routed_experts // mesh.config.ep, once=True)
    return ChainDispatcher(mesh, config, [across, within])
