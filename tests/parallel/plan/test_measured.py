"""Layers that were measured whole: which layouts they cover, the times and the bytes of stages made of them."""

from dataclasses import replace

import numpy as np
import pytest

from infra.hardware import ClusterConfig, KernelRates
from parallel.pipeline.actions import Op
from parallel.plan.layout import Layout, schedule_of
from parallel.plan.measured import in_flight, key, row_for, stage_bytes
from parallel.plan.memory import MemoryModel, curves, freed_before_heads, half_of_pairs, rises
from parallel.plan.step import StepModel
from tests.parallel.layouts import tiny

MODEL = tiny(5)  # one dense layer, four with experts, one depth of prediction
LAYOUT = Layout(4, 4, pp=2, ep=2, schedule="zb1p", dispatcher="all_to_all", overlap=False, zero_stage=0)
JOURNEYS = {"dispatch": 0.5, "combine": 0.25, "dispatch_back": 0.25, "combine_back": 0.5}
SECONDS = {
    "dense": {"f": [1.0, 2.0], "i": [2.0, 4.0], "w": [1.0, 1.0]},
    "moe": {"f": [1.0, 3.0], "i": [2.0, 6.0], "w": [1.0, 2.0], **JOURNEYS},
    "first": [0.5, 0.0, 0.25],
    "last": [2.0, 3.0, 1.0],
}
BYTES = {
    "dense": [10, 12, 15, 20, 3, 18],
    "moe": [20, 26, 30, 40, 4, 33],
    "first": [1, 0, 16, 22, 3, 19],
    "last": [7, 5, 70, 60, 5, 50],
}


def cluster(**changes: object) -> ClusterConfig:
    row = {"of": key(MODEL, LAYOUT, 16), "seconds": SECONDS, "bytes": BYTES}
    rates = KernelRates(device="X", bf16_tflops=1, fp8_tflops=1, hbm_gbs=1, stream_gbs=1, dense=[[1, 1, 1, 1]])
    rates.attention_forward = rates.attention_backward = 1.0
    words = {"device": "X", "ranks_per_node": 4, "measured": [row], "rates": rates} | changes
    return ClusterConfig(**words)  # type: ignore[arg-type]


def test_a_row_covers_its_own_layers_under_any_pipeline_and_no_other() -> None:
    found = cluster()
    for same in ({}, {"pp": 1}, {"schedule": "1f1b"}, {"zero_stage": 1}):
        assert row_for(MODEL, found, replace(LAYOUT, **same), 16) is found.measured[0]
    for other in ({"ep": 1}, {"recompute": "full"}, {"microbatch_size": 2}, {"precision": "fp8"}):
        assert row_for(MODEL, found, replace(LAYOUT, **other), 16) is None
    assert row_for(MODEL, found, LAYOUT, 32) is None
    assert row_for(replace(MODEL, hidden_size=32), found, LAYOUT, 16) is None
    assert row_for(replace(MODEL, num_hidden_layers=9), found, LAYOUT, 16) is found.measured[0]


def test_stages_take_what_was_measured() -> None:
    step = StepModel(MODEL, cluster(), 16)
    times = step.stages(LAYOUT)
    first, last = step.split(2)
    assert sorted(first + last) == list(range(6))
    moe = {"f": 4 + 0.75, "i": 8 + 0.75, "w": 3.0}
    dense = {"f": 3.0, "i": 6.0, "w": 2.0}
    for op, name, k in ((Op.F, "f", 0), (Op.I, "i", 1), (Op.W, "w", 2)):
        expected = dense[name] + (len(first) - 1) * moe[name] + SECONDS["first"][k]
        assert times.single[op, 0] == pytest.approx(expected)
        assert times.single[op, 1] == pytest.approx(len(last) * moe[name] + SECONDS["last"][k])


def test_load_and_slowness_come_on_top_of_what_was_measured() -> None:
    even = StepModel(MODEL, cluster(), 16).layers(LAYOUT)[1]
    loaded = StepModel(MODEL, cluster(expert_imbalance=0.5), 16).layers(LAYOUT)[1]
    assert loaded.f == (even.f[0], 1.5 * even.f[1])
    assert loaded.dispatch == 1.5 * even.dispatch
    slower = StepModel(MODEL, cluster(), 16, slower=2.0).layers(LAYOUT)[1]
    assert (slower.f, slower.dispatch) == ((2.0, 6.0), even.dispatch)


def test_what_was_measured_needs_no_table_and_what_was_not_is_flagged() -> None:
    step = StepModel(MODEL, cluster(), 16)
    assert step.doubts(LAYOUT) == []
    assert step.doubts(replace(LAYOUT, ep=1, dispatcher="local")) != []
    unsure = StepModel(MODEL, cluster(calibrated={"not_measured": ["messages between nodes"]}), 16)
    assert unsure.doubts(LAYOUT) == []
    assert unsure.doubts(replace(LAYOUT, world=8)) == ["messages between nodes were not measured"]


def test_stage_bytes_are_those_of_a_walk_over_the_layers() -> None:
    split = [[0, 1], [2, 3, 4, 5]]
    found = stage_bytes({"bytes": BYTES}, split, 1, 1)
    assert found.forward_S.tolist() == [10 + 1 + 20, 4 * 20 + 7]
    assert found.late_S.tolist() == [12 + 0 + 26, 4 * 26 + 5]
    # F of stage 0: the dense layer with the embedding rises 16, then 11 stay and the next rises 30
    assert found.rise_OS[Op.F, 0] == max(16, 11 + 30)
    # I of stage 1: the end (two layers and the head) rises 60 and leaves 57 - 47 more; then each layer 6 more
    assert found.rise_OS[Op.I, 1] == max(60, 10 + 40, 10 + 6 + 40)
    assert found.rise_OS[Op.B, 0] == max(33, -20 + 19)  # stage 0 hands no gradient on, so its B is one piece
    assert found.rise_OS[Op.B, 1] == max(found.rise_OS[Op.I, 1], 109 - 87 + 5)


def test_memory_peaks_within_an_action() -> None:
    memory = MemoryModel(StepModel(MODEL, cluster(), 16))
    size = memory.stage_bytes(LAYOUT)
    schedule = schedule_of("zb1p", 2, 8, paired=False)
    most = []
    for held, rise in zip(curves(schedule, size.forward_S, size.late_S), rises(schedule, size.rise_OS), strict=True):
        now, peak = 0.0, 0.0
        for after, climb in zip(held, rise, strict=True):
            peak, now = max(peak, now + climb, after), after
        most.append(peak)
    assert memory.activations(LAYOUT, 16)[:, 1] == pytest.approx(np.array(most))
    rank = memory.rank(LAYOUT, 16, 0)
    assert rank.activations + rank.workspace + rank.buffers == pytest.approx(most[0])


def test_what_is_under_way_between_stages() -> None:
    """Two ranks, 1F1B, two microbatches: rank 0 runs F0 F1 B0 B1 and is sent two gradients, which it reads in turn."""
    schedule = schedule_of("1f1b", 2, 2, paired=False)
    assert [str(a) for slot in schedule.programs[0] for a in slot] == ["0F0", "0F1", "0B0", "0B1"]
    sent = [1, 2, 2, 2]  # nothing that was sent is let go of
    posted = in_flight(schedule, 0, ahead=8, window=8) - sent
    assert posted[-1] == 0  # all are read
    assert posted.max() == 2
    one_by_one = in_flight(schedule, 0, ahead=1, window=1)
    assert (one_by_one <= posted + sent).all()
    assert in_flight(schedule_of("1f1b", 1, 4, paired=False), 0, 8, 8).tolist() == [0] * 8


def test_of_a_pair_half_of_each_side_is_held() -> None:
    schedule = schedule_of("dualpipev", 2, 8, paired=True)
    assert any(len(slot) == 2 for program in schedule.programs for slot in program)
    forward_S = np.array([8.0, 6.0, 4.0, 2.0])
    for rank, half in enumerate(half_of_pairs(schedule, forward_S)):
        rows = iter(half.tolist())
        for slot in schedule.programs[rank]:
            for place, action in enumerate(slot):
                laid_over = len(slot) == 2 and place == 0
                assert next(rows) == (forward_S[action.stage] / 2 if laid_over else 0)


def test_heads_beside_a_backward_climb_when_it_has_let_go() -> None:
    schedule = schedule_of("zbv", 2, 8, paired=True)
    forward_S, late_S = np.array([8.0, 6.0, 4.0, 2.0]), np.array([4.0, 3.0, 2.0, 1.0])
    found = 0
    for rank, freed in enumerate(freed_before_heads(schedule, forward_S, late_S)):
        rows = iter(freed.tolist())
        for slot in schedule.programs[rank]:
            for place, action in enumerate(slot):
                beside = slot[1 - place] if len(slot) == 2 and place == 0 else None
                heads = beside is not None and action.stage == 3
                assert next(rows) == (forward_S[beside.stage] if heads and beside else 0)
                found += heads
    assert found


def test_a_measured_pair_says_how_much_of_its_journeys_hides() -> None:
    """The row's MoE layer takes 15 of computing and 1.5 of journeys alone."""
    layout = replace(LAYOUT, schedule="dualpipev", overlap=True)

    def pair(**measured: float) -> float:
        row = {"of": key(MODEL, LAYOUT, 16), "seconds": SECONDS | measured, "bytes": BYTES}
        step = StepModel(MODEL, cluster(measured=[row], p2p_gbs=1e9, node_latency_us=0.0), 16)
        assert step.split(4)[1] == [1]  # one layer with experts
        return float(step.stages(layout).pair[0, 1, 1])

    assert pair(pair=15.75) == pytest.approx(15.75, rel=1e-6)  # half of them
    assert pair(pair=17.0) == pytest.approx(17.0, rel=1e-6)  # a pair that is slower than its parts
    assert pair() == pytest.approx(15.0 * cluster().sm_contention)  # nothing measured: all of them hide
