import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Op, Schedule
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate, step_time_quantiles
from parallel.pipeline.validate import ScheduleError
from tests.parallel.pipeline.oracle import PLACEMENTS, random_schedule, slow_replay

whole = st.integers(1, 9).map(lambda number: 4 * number)  # whole numbers, halved and halved again, stay exact
costs = st.builds(
    Costs,
    f=whole,
    i=whole,
    w=whole,
    p2p=st.integers(0, 5),
    optimizer=st.integers(0, 9),
    send_when=st.sampled_from(["ready", "slot_end"]),
    slow=st.dictionaries(st.just(0), st.sampled_from([0.5, 2.0, 3.0])),
)
schedules = st.builds(
    random_schedule, st.sampled_from(sorted(PLACEMENTS)), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6)
)


def same_times(schedule, some_costs, tolerance):
    expected = slow_replay(schedule, some_costs)
    spans = [span for rank in simulate(schedule, some_costs).spans for span in rank]
    assert len(spans) == len(expected)
    for span in spans:
        for found, exact in zip((span.start, span.end, span.ready), expected[span.action], strict=True):
            assert found == (float(exact) if tolerance == 0 else pytest.approx(float(exact), rel=tolerance))


@settings(max_examples=150, deadline=None)
@given(schedules, costs)
def test_the_compiled_replay_is_the_slow_one(schedule, some_costs):
    same_times(schedule, some_costs, tolerance=0)


@settings(max_examples=100, deadline=None)
@given(schedules, costs, st.floats(0.5, 1.5))
def test_the_compiled_replay_with_squeezed_pairs(schedule, some_costs, squeeze):
    some_costs.fb = (some_costs.f + some_costs.i + some_costs.w) * squeeze
    same_times(schedule, some_costs, tolerance=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("send_when", ["ready", "slot_end"])
def test_every_schedule_is_replayed_exactly(name, send_when):
    same_times(SCHEDULES[name](4, 11), Costs(8, 4, 12, p2p=1, slow={1: 2.0}, send_when=send_when), tolerance=0)


def test_costs_of_a_rank_with_more_stages_are_shared_out():
    for name in ("1f1b", "interleaved_1f1b", "zbv", "dualpipev"):
        timeline = simulate(SCHEDULES[name](4, 8), Costs(2, 4, 6))
        assert timeline.busy_R.tolist() == [8 * 12] * 4


def test_a_list_has_one_time_a_stage():
    schedule = SCHEDULES["interleaved_1f1b"](2, 4)
    uneven = simulate(schedule, Costs([1, 2, 3, 4], [10, 20, 30, 40], 1.0))
    assert uneven.busy_R.tolist() == [4 * (1 + 3 + 10 + 30 + 1), 4 * (2 + 4 + 20 + 40 + 1)]
    even = simulate(schedule, Costs([1.0] * 4, [0.5] * 4, [0.5] * 4))
    assert even.step_time == simulate(schedule, Costs(2, 1, 1)).step_time


def test_pairs_of_uneven_stages_are_squeezed_alike():
    schedule = Schedule(
        "pair",
        [[(Action(0, Op.F, 0),), (Action(0, Op.F, 1), Action(0, Op.B, 0)), (Action(0, Op.B, 1),)]],
        ((0,),),
        2,
    )
    spans = simulate(schedule, Costs([10], [6], [4], fb=15)).spans[0]
    assert (spans[1].start, spans[1].end) == (10, 25)
    assert spans[1].ready == 10 + 10 * 0.75
    assert spans[2].ready == 10 + 16 * 0.75


def test_results_leave_when_ready_or_when_the_slot_ends():
    schedule = SCHEDULES["1f1b"](2, 1)
    assert simulate(schedule, Costs(1, 2, 4, send_when="slot_end")).step_time == 1 + 1 + 6 + 6
    assert simulate(schedule, Costs(1, 2, 4, send_when="ready")).step_time == 1 + 1 + 2 + 6


def test_latency_and_bandwidth_count_between_ranks_only():
    costs = Costs(1, 1, 1, p2p=2, p2p_bytes=30, p2p_bandwidth=10, send_when="slot_end")
    assert simulate(SCHEDULES["gpipe"](2, 1), costs).step_time == 1 + 5 + 1 + 2 + 5 + 2
    assert simulate(SCHEDULES["gpipe"](1, 1), costs).step_time == 3
    assert simulate(SCHEDULES["zbv"](1, 1), costs).step_time == 3  # the turn of the V stays on its rank


@pytest.mark.parametrize("name", SCHEDULES)
def test_uniform_slowness_scales_and_one_slow_rank_delays(name):
    schedule = SCHEDULES[name](4, 12)
    plain = simulate(schedule, Costs(4, 4, 4)).step_time
    assert simulate(schedule, Costs(4, 4, 4, slow=dict.fromkeys(range(4), 2.0))).step_time == 2 * plain
    for rank in range(4):
        one_slow = simulate(schedule, Costs(4, 4, 4, slow={rank: 1.5})).step_time
        assert plain < one_slow <= 1.5 * plain
        assert one_slow >= 1.5 * 12 * 12


def test_slower_parts_never_shorten_a_step():
    schedule = SCHEDULES["dualpipe"](4, 9)
    base = {"f": 3, "i": 4, "w": 2, "fb": 8, "p2p": 1, "optimizer": 5}
    step = simulate(schedule, Costs(**base)).step_time
    for name, value in base.items():
        assert simulate(schedule, Costs(**{**base, name: 2 * value})).step_time > step


def test_jitter_has_a_seed_and_a_mean():
    schedule = SCHEDULES["1f1b"](1, 2000)
    costs = Costs(1, 1, 1, jitter=0.1)
    one = simulate(schedule, costs, seed=1)
    assert one.step_time == simulate(schedule, costs, seed=1).step_time
    assert one.step_time != simulate(schedule, costs, seed=2).step_time
    times = one.end_A - one.start_A
    forward = times[one.op_A == Op.F]
    assert forward.mean() == pytest.approx(1, abs=4 * 0.1 / math.sqrt(2000))
    assert forward.std() == pytest.approx(0.1, rel=0.1)


def test_quantiles():
    schedule = SCHEDULES["dualpipe"](4, 12)
    low, middle, high = step_time_quantiles(schedule, Costs(jitter=0.1), num_runs=30)
    assert low < middle < high
    assert simulate(schedule).step_time < middle
    assert step_time_quantiles(schedule, Costs(), num_runs=2) == [simulate(schedule).step_time] * 3


@pytest.mark.parametrize("shape", [(16, 120), (2, 1000)])
def test_a_step_is_never_shorter_than_its_busiest_rank(shape):
    for name in SCHEDULES:
        timeline = simulate(SCHEDULES[name](*shape), Costs(3, 5, 2, p2p=0.25))
        assert (timeline.bubble_R >= 0).all()
        assert timeline.busy_R.tolist() == [shape[1] * 10] * shape[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"f": 0}, r"costs\.f = 0: it must be above 0"),
        ({"i": -1.0}, r"costs\.i = -1\.0: it must be above 0"),
        ({"w": math.nan}, r"costs\.w = nan: it must be a finite number"),
        ({"f": math.inf}, r"costs\.f = inf: it must be a finite number"),
        ({"f": 1e308}, r"costs\.f = 1e\+308: choose a unit in which it is between"),
        ({"w": 1e-320}, r"costs\.w = 1e-320: choose a unit in which it is between"),
        ({"f": "fast"}, r"costs\.f = 'fast': it must be a finite number"),
        ({"f": True}, r"costs\.f = True: it must be a finite number"),
        ({"f": None}, r"costs\.f = None: it must be a finite number"),
        ({"f": [1.0, 0.0]}, r"costs\.f\[1\] = 0\.0: it must be above 0"),
        ({"f": []}, r"costs\.f is an empty list"),
        ({"fb": 0}, r"costs\.fb = 0: it must be above 0"),
        ({"p2p": -1}, r"costs\.p2p = -1: it must not be negative"),
        ({"p2p_bandwidth": 0}, r"costs\.p2p_bandwidth = 0: it must be above 0"),
        ({"optimizer": math.nan}, r"costs\.optimizer = nan"),
        ({"kept_after_i": 1.5}, r"costs\.kept_after_i = 1\.5: it is a share, so at most 1"),
        ({"send_when": "soon"}, r"costs\.send_when = 'soon': choose one of ready, slot_end"),
        ({"slow": {0: 0}}, r"costs\.slow\[0\] = 0: it must be above 0"),
        ({"slow": {0.5: 2}}, r"costs\.slow names rank 0\.5: ranks are whole numbers from 0"),
        ({"jitter": -0.1}, r"costs\.jitter = -0\.1: it must not be negative"),
    ],
)
def test_wrong_costs_are_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        Costs(**wrong)
    assert "\n" not in str(error.value)


def test_costs_that_do_not_fit_the_schedule():
    schedule = SCHEDULES["1f1b"](4, 8)
    with pytest.raises(ValueError, match=r"costs\.f lists 3 stages, but 1f1b on 4 ranks has 4"):
        simulate(schedule, Costs([1, 1, 1]))
    with pytest.raises(ValueError, match=r"costs\.slow names rank 4, but 1f1b has ranks 0 to 3"):
        simulate(schedule, Costs(slow={4: 1.1}))
    with pytest.raises(ValueError, match="at least one run"):
        step_time_quantiles(schedule, Costs(), num_runs=0)


def test_what_cannot_run_is_not_simulated():
    programs = [[(Action(0, Op.F, 0),), (Action(0, Op.B, 0),)], [(Action(1, Op.B, 0),), (Action(1, Op.F, 0),)]]
    with pytest.raises(ScheduleError, match="1B0 needs 1F0"):
        simulate(Schedule("bad", programs, ((0, 1),), 1))
    with pytest.raises(ScheduleError, match="2F0 does not exist"):
        simulate(Schedule("bad", [[(Action(2, Op.F, 0),)], []], ((0, 1),), 1))
