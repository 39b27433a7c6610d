"""Intervals: what moves a step, and by how much."""

from dataclasses import replace

import numpy as np
import pytest

from launch.validate import BATCH, PUBLISHED, V3, config_of
from parallel.plan.interval import Ranges, interval
from parallel.plan.step import StepModel

NOTHING = Ranges([0.04, 0.04], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0])


@pytest.fixture(scope="module")
def step() -> StepModel:
    config = config_of("model=671b")
    return StepModel(config.model, config.cluster)


def test_without_doubt_the_interval_is_the_step(step: StepModel) -> None:
    found = interval(step, V3, BATCH, NOTHING)
    total = step.simulate(V3, BATCH).total
    assert [found.low, found.middle, found.high] == pytest.approx([total] * 3)
    assert max(abs(end) for ends in found.moved.values() for end in ends) < 1e-9


def test_the_published_step_lies_within_the_default_interval(step: StepModel) -> None:
    found = interval(step, V3, BATCH, Ranges())
    assert found.low < PUBLISHED["time/step"][0] < found.high
    assert found.largest == "kernels"
    assert found.uneven_stages > 0  # 61 layers on 16 stages


@pytest.mark.parametrize(
    ("term", "range_"),
    [("expert load", [0.0, 0.4]), ("slow rank", [1.0, 1.5]), ("jitter", [0.0, 0.5]), ("network", [1.0, 9.0])],
)
def test_the_term_in_most_doubt_is_named(step: StepModel, term: str, range_: list[float]) -> None:
    found = interval(step, V3, BATCH, replace(NOTHING, **{term.replace(" ", "_"): range_}))
    assert found.largest == term
    assert found.high > found.middle
    assert sum(ends != pytest.approx((0, 0), abs=1e-9) for ends in found.moved.values()) == 1


def test_a_slow_rank_costs_what_its_own_slots_take(step: StepModel) -> None:
    """Without a pipeline there is nothing to hide behind: the step is as much slower as the rank."""
    alone = replace(V3, pp=1, schedule="1f1b", overlap=False)
    reduce_and_update = sum(step.optimizer(alone))
    found = interval(step, alone, BATCH, replace(NOTHING, slow_rank=[1.0, 1.1]))
    assert found.moved["slow rank"][1] == pytest.approx(0.1 * (found.middle - reduce_and_update))


def test_the_load_of_a_run_is_read_by_rank(step: StepModel) -> None:
    load = np.ones((3, 256))
    load[0, :4] = 2.0  # of 64 ranks one has twice the mean in one of three layers
    run = replace(step, expert_load=load)
    assert run.load_excess(64) == pytest.approx((2 * 256 / 260 - 1) / 3)
    assert run.load_excess(1) == 0
    assert run.load_excess(8) < run.load_excess(64)
    assert step.load_excess(64) == 0.04


@pytest.mark.parametrize("wrong", [{"jitter": [0.1, 0.0]}, {"slow_rank": [0.9, 1.0]}, {"kernels": [1.0]}])
def test_wrong_ranges_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"doubt\..*expected \[least, most\]"):
        Ranges(**wrong)
