"""One rank holds all experts: dispatch sorts the tokens by expert, combine adds them up again, nothing is sent."""

from __future__ import annotations

from parallel.expert.chain import ChainDispatcher
from parallel.expert.dispatcher import DispatchConfig
from parallel.mesh import Mesh


def local(mesh: Mesh, config: DispatchConfig) -> ChainDispatcher:
    """Raises ValueError when the experts are spread over several ranks."""
    if mesh.config.ep > 1:
        raise ValueError(
            f"dispatcher=local keeps all experts on one rank, but ep={mesh.config.ep}: use ep=1, "
            "or dispatcher=all_to_all or two_hop"
        )
    return ChainDispatcher(mesh, config, hops=[])
