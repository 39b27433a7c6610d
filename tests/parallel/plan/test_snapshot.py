"""The snapshot for torch's memory viewer: its own functions read it, and it says what the planner says."""

import pytest
from torch.cuda import _memory_viz

from launch.validate import BATCH, V3, config_of
from parallel.plan.memory import MemoryModel
from parallel.plan.snapshot import snapshot
from parallel.plan.step import StepModel


@pytest.fixture(scope="module")
def memory() -> MemoryModel:
    config = config_of("model=671b")
    return MemoryModel(StepModel(config.model, config.cluster))


@pytest.mark.parametrize("rank", [0, 7])
def test_the_trace_has_the_peak_of_the_plan_and_ends_with_the_states(memory: MemoryModel, rank: int) -> None:
    made, planned = snapshot(memory, V3, BATCH, rank), memory.rank(V3, BATCH, rank)
    live: dict[int, int] = {}
    most, last = 0, 0
    for event in made["device_traces"][0]:
        assert event["time_us"] >= last
        last = event["time_us"]
        if event["action"] == "alloc":
            start, end = event["addr"], event["addr"] + event["size"]
            assert all(end <= other or start >= other + size for other, size in live.items()), "blocks overlap"
            live[start] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
        most = max(most, sum(live.values()))
    assert most == pytest.approx(planned.total - planned.margin, rel=1e-6)
    stays = planned.weights + planned.gradients + planned.optimizer + planned.buffers + planned.workspace
    assert sum(live.values()) == pytest.approx(stays, rel=1e-6)
    (segment,) = made["segments"]
    assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    assert segment["active_size"] == sum(live.values())


def test_torchs_own_viewer_reads_it(memory: MemoryModel) -> None:
    made = snapshot(memory, V3, BATCH, 0)
    assert "1 segments" in _memory_viz.segsum(made) or "Summary of segments" in _memory_viz.segsum(made)
    assert f"{len(made['device_traces'][0])} entries" in _memory_viz.trace(made)
    for page in (_memory_viz.trace_plot(made), _memory_viz.segment_plot(made)):
        assert "<html" in page.lower() or "<script" in page
