"""Times: the published profile and step, the laws they rest on, and a slow twin of the replayed step."""

from dataclasses import replace

import numpy as np
import pytest

from launch.validate import BATCH, PROFILE, PUBLISHED, V3, config_of, fitted, in_published_words
from model.config import ModelConfig
from parallel.pipeline.actions import Op, depends_on
from parallel.plan.cost import Kernels, LayerTimes, nodes_reached, pair_time, ranks_reached
from parallel.plan.layout import Layout, schedule_of
from parallel.plan.step import StepModel, slot_seconds


@pytest.fixture(scope="module")
def model() -> StepModel:
    config = config_of("model=671b")
    return StepModel(config.model, config.cluster)


def test_profiled_pair_within_3_per_cent(model: StepModel) -> None:
    even = StepModel(model.model, replace(model.cluster, expert_imbalance=0.0))
    _, layer, _ = even.layers(V3)
    whole = 4e3 * pair_time(layer, layer, even.cluster.sm_contention, 0.0, False)
    assert whole == pytest.approx(129.0, rel=0.03)
    assert whole == pytest.approx(4e3 * 132 / 112 * sum(layer.f + layer.i + layer.w))  # all journeys hide


def test_published_step_within_8_per_cent_and_fitted_within_half(model: StepModel) -> None:
    time = model.simulate(V3, BATCH)
    assert time.total == pytest.approx(PUBLISHED["time/step"][0], rel=0.08)
    for name, value in in_published_words(time).items():
        assert value == pytest.approx(PUBLISHED[name][0], rel=0.2), name
    fit = fitted(model, PUBLISHED["time/step"][0]).simulate(V3, BATCH)
    assert [fit.total, fit.total] == pytest.approx(PUBLISHED["time/step"], rel=0.005)
    assert set(PROFILE) == {f"{phase} {op}" for phase in ("attend", "experts") for op in "FBW"}


def layer(f: float, i: float, w: float, journey: float) -> LayerTimes:
    return LayerTimes((f, f), (i, i), (w, w), journey, journey, journey, journey)


def test_a_pair_is_the_slower_side_of_each_segment() -> None:
    hidden, exposed = layer(1.0, 2.0, 1.0, 0.1), layer(1.0, 2.0, 1.0, 9.0)
    assert pair_time(hidden, hidden, 1.25, 0.0, False) == 1.25 * 8
    assert pair_time(hidden, hidden, 1.25, 0.0, True) == 1.25 * 6
    assert pair_time(exposed, exposed, 1.25, 0.5, False) == 18.0 + 18.5
    silent = layer(1.0, 2.0, 1.0, 0.0)
    assert pair_time(silent, silent, 1.25, 0.0, False) == 8.0  # nothing travels: all SMs compute


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["1f1b", "zb1p", "zbv", "dualpipe", "dualpipev", "interleaved_1f1b", "gpipe"])
def test_the_step_is_that_of_a_naive_replay(model: StepModel, name: str, overlap: bool) -> None:
    """The slow twin: every slot starts when its rank is free and all that it needs has left (and travelled). The input
    gradient of a B that runs alone leaves before its W; pairs that are not overlapped run one after the other."""
    layout = replace(V3, pp=4, schedule=name, overlap=overlap)
    batch, times = 12 * layout.dp, model.stages(layout)
    schedule = layout.make_schedule(12)
    programs = schedule.programs if overlap else [[(a,) for slot in p for a in slot] for p in schedule.programs]
    left: dict = {}
    at, free, duration = [0] * 4, [0.0] * 4, dict[tuple, float]()
    while any(at[r] < len(programs[r]) for r in range(4)):
        for r in range(4):
            while at[r] < len(programs[r]):
                slot = programs[r][at[r]]
                needs = {n for a in slot for n in depends_on(a, schedule)}
                if not needs <= left.keys():
                    break
                start = max([free[r], *(left[n][0] + times.send * (left[n][1] != r) for n in needs)])
                f, b = slot[0], slot[-1]
                alone = times.single[f.op, f.stage]
                duration[slot] = times.pair[int(b.op is Op.I), f.stage, b.stage] if len(slot) == 2 else alone
                free[r] = start + duration[slot]
                early = times.single[Op.I, f.stage] if len(slot) == 1 and f.op is Op.B else duration[slot]
                left.update({a: (start + early, r) for a in slot})
                at[r] += 1
    step = model.simulate(layout, batch)
    assert step.total - step.reduce - step.update == pytest.approx(max(free), rel=1e-12)
    busy = sum(duration.values()) / 4
    assert step.forward + step.backward + step.weight + step.pair == pytest.approx(busy, rel=1e-12)


def test_slot_seconds_take_pairs_from_the_right_stages(model: StepModel) -> None:
    schedule, times = schedule_of("dualpipe", 4, 12, paired=True), model.stages(replace(V3, pp=4))
    assert any(len(slot) == 2 for program in schedule.programs for slot in program)
    seconds = iter(slot_seconds(schedule, times))
    for slot in (slot for program in schedule.programs for slot in program):
        if len(slot) == 1:
            expected = times.single[slot[0].op, slot[0].stage]
        else:
            f, b = slot
            expected = times.pair[int(b.op is Op.I), f.stage, b.stage]
            assert expected < times.single[Op.F, f.stage] + times.single[b.op, b.stage]
        assert next(seconds) == expected


def test_without_overlap_a_pair_is_its_parts(model: StepModel) -> None:
    times = model.stages(replace(V3, overlap=False))
    assert np.array_equal(times.pair[0], times.single[Op.F][:, None] + times.single[Op.B])


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb1p", "interleaved_1f1b", "dualpipe", "dualpipev", "zbv"])
def test_the_estimate_is_near_the_replay(model: StepModel, schedule: str, overlap: bool) -> None:
    """Near enough to choose what is replayed; 8 ranks, whose 16 stages 61 layers fill about evenly."""
    layout = replace(V3, pp=8, schedule=schedule, overlap=overlap)
    assert model.estimate(layout, BATCH) == pytest.approx(model.simulate(layout, BATCH).total, rel=0.05)


def test_journeys_two_hop_sends_once_a_node(model: StepModel) -> None:
    config = model.model
    assert 3.6 < nodes_reached(config, 8) < 3.65  # 4 nodes at most, 8 of 128 experts
    assert nodes_reached(config, 1) == 1
    rng = np.random.default_rng(0)
    drawn = [rng.choice(128, 8, replace=False) for _ in range(4000)]
    assert nodes_reached(config, 8) == pytest.approx(np.mean([len(set(d // 32)) for d in drawn]), rel=0.01)
    assert ranks_reached(config, 64) == pytest.approx(np.mean([len(set(d // 4)) for d in drawn]), rel=0.01)
    two_hop, flat = (
        Kernels(config, model.cluster, replace(V3, dispatcher=d), 4096).journey(2.0) for d in ("two_hop", "all_to_all")
    )
    assert two_hop < flat
    assert Kernels(config, model.cluster, replace(V3, ep=1), 4096).journey(2.0) == 0.0


def test_a_send_stays_inside_the_node_where_pipelines_are_short(model: StepModel) -> None:
    """Layouts of other depths share their layers, not their borders: 8 ranks on one node, 16 on two."""
    near, far = (model.stages(Layout(world, 8, pp, 1, "1f1b", "local")).send for world, pp in ((8, 2), (16, 2)))
    assert 0 < near < far


def test_another_imbalance_is_not_answered_from_memory(model: StepModel) -> None:
    before = model.simulate(V3, BATCH)
    after = replace(model, imbalance=1.5).simulate(V3, BATCH)
    assert after.pair == pytest.approx(1.5 * before.pair)
    assert after.reduce == before.reduce


def test_gradients_take_the_way_inside_the_node_first(model: StepModel) -> None:
    """Ranks beside one another sum over the node's links: ZeRO-1 on one node is far quicker than on eight."""
    small = replace(model, model=ModelConfig(num_hidden_layers=4, n_routed_experts=8, n_group=1, topk_group=1))
    inside, outside = (small.optimizer(Layout(world, 8, 1, 1))[0] for world in (8, 64))
    assert 0 < inside < outside
    assert small.optimizer(Layout(1, 1, 1, 1))[0] == 0.0


def test_precision_and_recompute_cost_what_they_should(model: StepModel) -> None:
    def step(**words: object) -> float:
        return model.simulate(replace(V3, **words), BATCH).total  # type: ignore[arg-type]

    assert step(precision="bf16") > step()
    assert step(recompute="none") < step(recompute="selective") < step(recompute="full")
    assert step(overlap=False) > step()
