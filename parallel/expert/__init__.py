"""Expert parallelism: `DISPATCHERS[name](mesh, config)` makes the dispatcher called `name`.

    auto          local or two_hop, by ep
    local         all experts are here
    all_to_all    one flat exchange, a row for each pair of a token and an expert
    two_hop       V3's: once to each node, forwarded there; sums come back
    deep_ep       DeepEP's kernels, on CUDA

A dispatcher is imported when it is made, so that a planner can read the names without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel.expert.dispatcher import DispatchConfig, Dispatcher
    from parallel.mesh import Mesh

DISPATCH_DTYPES = ("native", "fp8", "fp8_fp32_sf")


def _local(mesh: Mesh, config: DispatchConfig) -> Dispatcher:
    from parallel.expert.local import local

    return local(mesh, config)


def _all_to_all(mesh: Mesh, config: DispatchConfig) -> Dispatcher:
    from parallel.expert.all_to_all import all_to_all

    return all_to_all(mesh, config)


def _two_hop(mesh: Mesh, config: DispatchConfig) -> Dispatcher:
    from parallel.expert.two_hop import two_hop

    return two_hop(mesh, config)


def _deep_ep(mesh: Mesh, config: DispatchConfig) -> Dispatcher:
    from parallel.expert.deep_ep import DeepEPDispatcher

    return DeepEPDispatcher(mesh, config)


def default_dispatcher(ep: int) -> str:
    """Where experts are shared, V3's: inside one node its two hops are one, which sends no row twice to a rank."""
    return "two_hop" if ep > 1 else "local"


def _auto(mesh: Mesh, config: DispatchConfig) -> Dispatcher:
    return DISPATCHERS[default_dispatcher(mesh.config.ep)](mesh, config)


DISPATCHERS: dict[str, Callable[[Mesh, DispatchConfig], Dispatcher]] = {
    "auto": _auto,
    "local": _local,
    "all_to_all": _all_to_all,
    "two_hop": _two_hop,
    "deep_ep": _deep_ep,
}
