"""What a step measures: spans of all ranks on one clock, the costs that explain them, and words for what differs."""

import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Group
from parallel.pipeline import measure
from parallel.pipeline.actions import Action, Op, depends_on
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.passes import lower
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.synthetic import SyntheticStage
from tests.ranks import run_ranks


@pytest.mark.parametrize("fb", [None, 2.5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_costs_come_back_from_a_simulated_step(name, fb):
    schedule = SCHEDULES[name](4, 9)
    stages = range(schedule.num_stages)
    costs = Costs(f=[1 + 0.1 * s for s in stages], i=[1.5] * len(stages), w=[0.8 + 0.05 * s for s in stages], p2p=0.25)
    costs.fb = fb
    timeline = simulate(schedule, costs)
    found = measure.calibrated(timeline)
    for key in ("f", "i", "w"):
        assert getattr(found, key) == pytest.approx(getattr(costs, key)), key
    assert found.p2p == pytest.approx(0.25)
    if name.startswith("dualpipe") and fb is not None:
        assert found.fb == pytest.approx(fb)
    assert simulate(schedule, found).step_time == pytest.approx(timeline.step_time)


def test_a_first_stage_that_does_not_split_shares_as_the_others_do():
    schedule = SCHEDULES["1f1b"](2, 4)
    timeline = simulate(schedule, Costs(f=1.0, i=2.0, w=1.0))
    spans = [
        s._replace(ready=s.end) if s.action.stage == 0 and s.action.op is Op.B else s for r in timeline.spans for s in r
    ]
    found = measure.calibrated(type(timeline).from_spans(spans))
    assert (found.i, found.w) == (pytest.approx([2.0, 2.0]), pytest.approx([1.0, 1.0]))


def test_a_result_that_left_long_before_says_nothing_of_the_travel():
    """A receive may take a while though its sender was through long ago: the reader was slow to wake."""
    schedule = SCHEDULES["gpipe"](2, 8)
    timeline = simulate(schedule, Costs(f=[1.0, 3.0], i=[3.0, 1.0], p2p=0.25))  # results queue up, both ways
    spans = [span for row in timeline.spans for span in row]
    sources = [[s for s in depends_on(span.action, schedule) if s.stage != span.action.stage] for span in spans]
    late = [span._replace(waited_for=of[0]) if of else span for span, of in zip(spans, sources, strict=True)]
    assert sum(before != after for before, after in zip(spans, late, strict=True)) > 10
    assert measure.calibrated(type(timeline).from_spans(late)).p2p == pytest.approx(0.25)


def test_costs_of_one_pipeline_serve_another():
    costs = Costs(f=[1.0, 3.0], i=[2.0, 2.0], w=[1.0, 1.0], fb=5.0, p2p=0.1)
    assert measure.rescaled(costs, 2, SCHEDULES["1f1b"](2, 4)) is costs
    other = measure.rescaled(costs, 2, SCHEDULES["zbv"](4, 8))
    assert (other.f, other.i, other.w, other.fb, other.p2p) == (1.0, 1.0, 0.5, 2.5, 0.1)


def test_differences_say_why():
    schedule = SCHEDULES["1f1b"](2, 3)
    simulated = simulate(schedule, Costs())
    measured = simulate(schedule, Costs(slow={0: 1.5}))
    rows = [span for row in measured.spans for span in row]
    lines = dict(zip((str(span.action) for span in rows), measure.differences(measured, simulated), strict=True))
    assert lines["0F0"] == "computed 0.5 ms longer than the mean of its stage"
    assert lines["1F0"] == "started 0.5 ms later, having waited for rank 0: 0F0 left 0.5 ms late and took 0 ms"
    assert measure.differences(simulated, simulated) == ["as simulated"] * len(rows)


def _measure(rank, world, ahead):
    if rank == 1:
        original = time.perf_counter
        measure.time.perf_counter = lambda: original() + ahead
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    offset = measure.clock_offset(group)
    measure.time.perf_counter = time.perf_counter if rank != 1 else original
    schedule = SCHEDULES["dualpipe"](world, 8)
    output = Spec((4,), torch.float32)
    device = torch.device("cpu")
    stages = {s: SyntheticStage(0.001, 0.001, 0.001, output, device) for s in schedule.stages_of(rank)}
    p2p = P2P(group.ranks, rank, dist.new_group(), dist.new_group(), device)
    executor = Executor(schedule, lower(schedule).programs[rank], rank, stages, p2p)
    executor.step()
    timeline = measure.measured(executor, group)
    return offset, timeline.spans, timeline.bubble_fraction, measure.bubble_fraction(executor, group)


def test_ranks_share_a_clock_and_a_timeline():
    ranks = run_ranks(4, _measure, 1000.0)
    assert [offset for offset, *_ in ranks] == pytest.approx([0, -1000, 0, 0], abs=1)  # seconds, at any load
    assert all(spans == ranks[0][1] for _, spans, *_ in ranks)
    schedule = SCHEDULES["dualpipe"](4, 8)
    for program, row in zip(schedule.programs, ranks[0][1], strict=True):
        assert [span.action for span in row] == [action for slot in program for action in slot]
        for span, after in pairwise(row):
            assert span.start <= span.ready <= span.end
            assert span.slot == after.slot or span.end <= after.start
    ready = {span.action: span.ready for row in ranks[0][1] for span in row}
    waits = [span for row in ranks[0][1] for span in row if span.waited_for]
    assert waits, "nobody waited in a pipeline that has to fill"
    assert all(isinstance(span.waited_for, Action) and span.start > ready[span.waited_for] - 1.0 for span in waits)
    for _, _, of_timeline, alone in ranks:
        assert alone == pytest.approx(of_timeline)
