"""What a run leaves behind of its last step, and what the simulator makes of it."""

import json

import pytest

from launch.execute import execute
from launch.simulate import PipelineConfig, SimulateConfig, step
from launch.trace import read_costs, write_comparison
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate

COSTS = Costs(f=[4.0, 5.0, 6.0, 7.0], i=[3.0] * 4, w=[2.0] * 4, p2p=0.5)


@pytest.fixture
def run(tmp_path):
    schedule = SCHEDULES["dualpipe"](4, 8)
    measured = simulate(schedule, Costs(**{**vars(COSTS), "slow": {1: 1.5}}))
    write_comparison(tmp_path / "trace", schedule, COSTS, measured, ("simulated", simulate(schedule, COSTS)))
    return tmp_path


def test_the_files_say_what_was_slow(run):
    assert {p.name for p in (run / "trace").iterdir()} == {
        "measured.json",
        "timeline.html",
        "timeline.png",
        "trace.json",
    }
    page = (run / "trace" / "timeline.html").read_text()
    assert "computed 2.5 ms longer than the mean of its stage" in page
    assert "having waited for rank 1" in page
    data = json.loads((run / "trace" / "measured.json").read_text())
    assert (data["schedule"], data["pp"], len(data["spans"])) == (
        "dualpipe",
        4,
        4 * 8 * 2 + sum(slot[0].op.name == "W" for program in SCHEDULES["dualpipe"](4, 8).programs for slot in program),
    )


def test_the_simulator_takes_its_costs(run):
    assert read_costs(run) == (COSTS, 4)
    same = SimulateConfig(PipelineConfig("dualpipe", 4), num_microbatches=8, measure=str(run))
    costs, schedule, timeline, *_ = step(same, [])
    assert costs == COSTS
    assert timeline.step_time == simulate(schedule, COSTS).step_time
    other = SimulateConfig(PipelineConfig("zbv", 2), num_microbatches=8, measure=str(run))
    other.costs["p2p"] = 0.0
    costs, _, timeline, *_ = step(other, ["costs.p2p=0.0", "parallel.schedule=zbv", "parallel.pp=2"])
    assert (costs.f, costs.i, costs.w, costs.p2p) == (11.0, 6.0, 4.0, 0.0)
    assert same.unit == "ms"


def test_what_is_not_named_is_as_the_run_had_it(run):
    config = SimulateConfig(PipelineConfig("zbv", 2), num_microbatches=20, measure=str(run))
    _, schedule, *_ = step(config, [])
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == ("dualpipe", 4, 8)
    _, schedule, *_ = step(config, ["num_microbatches=20", "parallel.schedule=zbv"])
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == ("zbv", 4, 20)


def test_a_run_without_a_trace_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no measured step .*: a run with parallel.pp above 1"):
        read_costs(tmp_path)


def test_what_cannot_be_executed_is_refused():
    with pytest.raises(ValueError, match=r"costs.fb cannot be executed"):
        execute(SCHEDULES["dualpipe"](2, 4), Costs(fb=2.0), 1e-3, "sleep")
