"""Every dispatcher, on one, two and four nodes, alone and under every schedule: gradients as in one process."""

import pytest

from parallel.config import ParallelConfig
from parallel.pipeline.schedules import SCHEDULES
from tests.parallel.layouts import tiny
from tests.parallel.test_parallelize import check_layout

# (dispatcher, ep, nodes that an ep group spans)
ALONE = [
    (name, ep, nodes) for name in ("all_to_all", "two_hop") for ep in (1, 2, 4, 8) for nodes in (1, 2, 4) if nodes <= ep
]
SOME_ALONE = {("all_to_all", 4, 2), ("two_hop", 4, 2), ("two_hop", 8, 4)}
PIPED = [(name, schedule) for name in ("all_to_all", "two_hop") for schedule in SCHEDULES]
SOME_PIPED = {("two_hop", "interleaved_1f1b")}


def _mostly_slow(cases, some):
    return [case if case in some else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("dispatcher", "ep", "nodes"), _mostly_slow(ALONE, SOME_ALONE))
def test_experts_shared_by_ranks_and_nodes(dispatcher, ep, nodes):
    check_layout(tiny(), ParallelConfig(ep=ep, dispatcher=dispatcher, ranks_per_node=ep // nodes), ep, 2)


@pytest.mark.parametrize(("dispatcher", "schedule"), _mostly_slow(PIPED, SOME_PIPED))
def test_experts_under_every_schedule(dispatcher, schedule):
    parallel = ParallelConfig(pp=2, ep=4, schedule=schedule, dispatcher=dispatcher, ranks_per_node=2)
    check_layout(tiny(), parallel, 8, 4)
