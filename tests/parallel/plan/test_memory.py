"""Memory: curves against a slow twin, the published peak of DualPipe, verdicts."""

from dataclasses import replace

import numpy as np
import pytest

from launch.validate import BATCH, V3, config_of
from parallel.pipeline.actions import Op
from parallel.plan.layout import OVERLAPPING, RECOMPUTES, Layout, schedule_of
from parallel.plan.memory import CONTEXT, FRAGMENTATION, STEADY, MemoryModel, curves, kept, smallest_change
from parallel.plan.step import StepModel

NAMES = ("gpipe", "1f1b", "interleaved_1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")


@pytest.fixture(scope="module")
def memory() -> MemoryModel:
    config = config_of("model=671b")
    return MemoryModel(StepModel(config.model, config.cluster))


@pytest.mark.parametrize("name", NAMES)
def test_curves_are_those_of_a_walk_through_the_program(name: str) -> None:
    schedule = schedule_of(name, 4, 10, name in OVERLAPPING)
    rng = np.random.default_rng(1)
    forward, late = rng.random(schedule.num_stages), rng.random(schedule.num_stages)
    for rank, curve in enumerate(curves(schedule, forward, late)):
        held: dict[tuple[int, int], float] = {}
        walked = []
        for stage, op, mb in (action for slot in schedule.programs[rank] for action in slot):
            if op is Op.F:
                held[stage, mb] = forward[stage]
            elif op is Op.I:
                held[stage, mb] = late[stage]
            else:
                del held[stage, mb]
            walked.append(sum(held.values()))
        assert curve == pytest.approx(walked, abs=1e-12)
        assert not held


def test_dualpipe_holds_the_published_pp_plus_1() -> None:
    ones = np.ones(16)
    for curve in curves(schedule_of("dualpipe", 16, 120, paired=True), ones, ones):
        assert curve.max() == pytest.approx(17)


@pytest.mark.parametrize(
    ("name", "paired"),
    [*((n, n in OVERLAPPING) for n in NAMES if n != "gpipe"), ("1f1b", True), ("zbv", True), ("dualpipe", False)],
)
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_the_peak_is_reached_early(name: str, paired: bool, pp: int) -> None:
    """So it may be asked of a shorter step."""
    rng = np.random.default_rng(2)
    stages = schedule_of(name, pp, 2 * pp, paired).num_stages
    forward, late = 1 + rng.random(stages), 1 + rng.random(stages)
    short, long = (
        [c.max() for c in curves(schedule_of(name, pp, m, paired), forward, late)]
        for m in (STEADY * pp, 3 * STEADY * pp)
    )
    assert short == pytest.approx(long, rel=1e-9)


def test_over_time_starts_and_ends_empty_and_has_the_peak_of_the_program(memory: MemoryModel) -> None:
    peaks = memory.activations(V3, BATCH)[:, 0]
    for rank in (0, 7, 15):
        moments, held = memory.over_time(V3, BATCH, rank)
        assert (np.diff(moments) >= 0).all()
        assert held[-1] == pytest.approx(0, abs=1)
        assert held.max() == pytest.approx(peaks[rank])


def test_v3s_own_layout_fits_and_its_savings_are_needed(memory: MemoryModel) -> None:
    assert memory.fullest(V3, BATCH).total < 80e9
    for other in ({"recompute": "none"}, {"precision": "bf16"}, {"zero_stage": 0}, {"pp": 8}):
        assert memory.fullest(replace(V3, **other), BATCH).total > 80e9, other


@pytest.mark.parametrize("is_moe", [True, False])
def test_savings_save(is_moe: bool) -> None:
    config = config_of("model=671b").model

    def held(precision: str, recompute: str) -> float:
        return sum(t.bytes_per_token for t in kept(config, precision, recompute, is_moe))

    for precision in ("bf16", "fp8"):
        sizes = [held(precision, recompute) for recompute in RECOMPUTES]
        assert sizes == sorted(sizes, reverse=True)
    for recompute in RECOMPUTES:
        assert held("fp8", recompute) <= held("bf16", recompute)


def test_the_fullest_rank_is_the_fullest(memory: MemoryModel) -> None:
    ranks = [memory.rank(V3, BATCH, r).total for r in range(V3.pp)]
    assert memory.fullest(V3, BATCH).total == max(ranks)
    assert max(ranks) > min(ranks)


def test_the_smallest_change_makes_it_fit(memory: MemoryModel) -> None:
    for words in ({"recompute": "none"}, {"precision": "bf16"}, {"zero_stage": 0}):
        found = smallest_change(memory, replace(V3, **words), BATCH)
        assert found is not None
        assert found[1].total <= 80e9
        assert found[0].differs(replace(V3, **words))
    pairs = replace(V3, schedule="zbv", recompute="full", overlap=True)  # which hold more microbatches than zbv alone
    with_less = replace(memory.step.cluster, memory_gb=memory.fullest(replace(pairs, overlap=False), BATCH).total / 1e9)
    tight = MemoryModel(replace(memory.step, cluster=with_less))
    found = smallest_change(tight, pairs, BATCH)
    assert found is not None
    assert found[0].differs(pairs) == {"overlap": (False, True)}
    assert smallest_change(memory, replace(V3, ep=1, dispatcher="local"), BATCH) is None


def test_only_devices_have_a_context() -> None:
    """However fast the messages of a calibrated CPU are."""
    config = config_of("model=debug", "cluster=laptop")
    cpu, device = (replace(config.cluster, node_gbs=5.0, comm_sms=sms) for sms in (0, 1))
    layout = Layout(4, 4, pp=2, schedule="1f1b", microbatch_size=1)
    margins = []
    for cluster in (cpu, device):
        held = MemoryModel(StepModel(config.model, cluster, 256)).fullest(layout, 16)
        margins.append(held.margin - FRAGMENTATION / (1 + FRAGMENTATION) * (held.total - CONTEXT * (cluster is device)))
    assert margins == pytest.approx([0.0, CONTEXT], abs=1.0)
