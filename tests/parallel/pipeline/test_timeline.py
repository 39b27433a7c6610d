import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Op, depends_on
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.timeline import Span, Timeline
from tests.parallel.pipeline.oracle import PLACEMENTS, random_schedule

schedules = st.builds(
    random_schedule, st.sampled_from(sorted(PLACEMENTS)), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6)
)
COSTS = Costs(8, 12, 4, p2p=1, optimizer=7, kept_after_i=0.25)


@settings(max_examples=60, deadline=None)
@given(schedules, st.integers(0, 10**6))
def test_spans_make_the_same_timeline(schedule, seed):
    timeline = simulate(schedule, COSTS)
    spans = [span for rank in timeline.spans for span in rank]
    random.Random(seed).shuffle(spans)
    later = [span._replace(start=span.start + 100, end=span.end + 100, ready=span.ready + 100) for span in spans]
    again = Timeline.from_spans(later, optimizer=7, activation=timeline.activation, kept_after_i=0.25)
    assert again.num_ranks == timeline.num_ranks
    assert again.spans == timeline.spans
    assert again.step_time == timeline.step_time
    for rank in range(schedule.num_ranks):
        assert again.bubbles(rank) == timeline.bubbles(rank)
        assert again.peak_memory(rank) == timeline.peak_memory(rank)


@settings(max_examples=60, deadline=None)
@given(schedules)
def test_every_moment_is_busy_or_has_a_cause(schedule):
    timeline = simulate(schedule, COSTS)
    for rank, program in enumerate(schedule.programs):
        assert sum(timeline.bubble_by_cause(rank).values()) == timeline.bubble_R[rank]
        for before, after in zip(timeline.bubbles(rank), timeline.bubbles(rank)[1:], strict=False):
            assert before.end < after.start
        for bubble in timeline.bubbles(rank):
            assert bubble.start < bubble.end
            if bubble.waited_for is not None:
                slot = next(program[span.slot] for span in timeline.spans[rank] if span.start == bubble.end)
                assert bubble.waited_for in {need for action in slot for need in depends_on(action, schedule)}
                assert bubble.for_rank == schedule.rank_of(bubble.waited_for.stage, bubble.waited_for.mb)


@settings(max_examples=60, deadline=None)
@given(schedules)
def test_all_memory_is_given_back(schedule):
    timeline = simulate(schedule, COSTS)
    for rank in range(schedule.num_ranks):
        _, values = timeline.memory_curve(rank)
        assert (values > -1e-9).all()
        assert abs(values[-1]) < 1e-9
        live = peak = 0
        for slot in schedule.programs[rank]:
            live += sum(action.op is Op.F for action in slot)
            peak = max(peak, live)
            live -= sum(action.op in (Op.B, Op.W) for action in slot)
        assert live == 0
        assert timeline.peak_live(rank) == peak


def test_causes_of_1f1b():
    timeline = simulate(SCHEDULES["1f1b"](4, 8), Costs(1, 1, 1, send_when="slot_end"))
    assert timeline.bubble_by_cause(0) == {"warm-up": 6.0, "cool-down": 3.0}
    assert timeline.bubble_by_cause(3) == {"warm-up": 3.0, "cool-down": 6.0}


def test_waiting_names_the_rank():
    timeline = simulate(SCHEDULES["1f1b"](4, 20), Costs(1, 1, 1, slow={2: 2.0}, send_when="slot_end"))
    causes = timeline.bubble_by_cause(3)
    assert causes["waiting for rank 2"] > 0.8 * sum(causes.values())
    assert {bubble.for_rank for bubble in timeline.bubbles(3) if bubble.cause == "waiting"} == {2}


def test_a_rank_that_never_runs_idles_for_an_unknown_reason():
    span = Span(1, 0, Action(1, Op.F, 0), 5.0, 7.0, 7.0)
    timeline = Timeline.from_spans([span])
    assert timeline.spans == [[], [span._replace(start=0.0, end=2.0, ready=2.0)]]
    assert timeline.bubble_by_cause(0) == {"warm-up": 0.0, "cool-down": 0.0, "unexplained": 2.0}
    assert Timeline.from_spans([]).step_time == 0


def test_memory_curve():
    schedule = SCHEDULES["zb1p"](1, 2)  # F0 I0 W0 F1 I1 W1
    times, values = simulate(schedule, Costs(1, 1, 1, kept_after_i=0.25)).memory_curve(0)
    assert list(zip(times.tolist(), values.tolist(), strict=True)) == [
        (0, 1), (2, 0.25), (3, 0), (3, 1), (5, 0.25), (6, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "share"), [("1f1b", 1), ("dualpipe", 1), ("zbv", 0.5), ("interleaved_1f1b", 0.5)])
def test_a_forward_keeps_its_share_of_the_model(name, share):
    timeline = simulate(SCHEDULES[name](4, 8))
    assert timeline.activation == share
    for rank in range(4):
        assert timeline.peak_memory(rank) == timeline.peak_live(rank) * share
