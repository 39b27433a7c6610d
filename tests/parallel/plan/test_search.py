"""The search: what is legal, what wins, what is refused."""

from dataclasses import asdict, replace
from itertools import product

import pytest

from launch.plan import planner_of
from launch.validate import BATCH, V3, config_of
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.pipeline.passes import validate
from parallel.plan.layout import Layout, illegal, layouts
from parallel.plan.search import Plan, Planner, Row, pareto, terms


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of(config_of("model=671b"))


@pytest.fixture(scope="module")
def plan(planner: Planner) -> Plan:
    return planner.search([2048], {}, num_exact=60)


def test_over_ten_thousand_legal_layouts_and_v3s_own_near_the_top(planner: Planner, plan: Plan) -> None:
    assert plan.num_legal > 10_000
    assert len(plan.rows) == 60
    place = [row.layout for row in plan.rows].index(V3)
    assert place <= 2
    assert plan.rows[0].time.total > 0.99 * plan.rows[place].time.total


def test_rows_are_ranked_fit_and_are_replayed(planner: Planner, plan: Plan) -> None:
    times = [row.time.total for row in plan.rows]
    assert times == sorted(times)
    assert all(row.memory.total <= 80e9 for row in plan.rows)
    for row in plan.rows[:5]:
        assert row.time == planner.step.simulate(row.layout, BATCH)


def test_no_layout_is_listed_twice(planner: Planner) -> None:
    found = list(layouts(planner.step.model, planner.step.cluster, 2048, BATCH, {}))
    assert len(set(found)) == len(found)


def test_every_listed_layout_has_a_valid_schedule() -> None:
    config = config_of("model=debug", "cluster=laptop")
    shapes = set()
    for layout in layouts(config.model, config.cluster, 4, 24, {}):
        assert illegal(config.model, layout, 24) is None
        shapes.add((layout.schedule, layout.pp, layout.pairs, layout.num_microbatches(24)))
        schedule = layout.make_schedule(layout.num_microbatches(24))
        has_pairs = any(len(slot) == 2 for program in schedule.programs for slot in program)
        assert has_pairs or not layout.pairs or layout.num_microbatches(24) < 2 * layout.pp
        validate(schedule)
    assert len(shapes) > 10
    assert {name for name, _, pairs, _ in shapes if pairs} == {"1f1b", "zbv", "dualpipe", "dualpipev"}


def test_a_plan_lays_the_schedule_that_a_run_makes() -> None:
    for name, ep, overlap in product(("1f1b", "zbv", "zb1p", "dualpipe"), (1, 2), (True, False)):
        dispatcher = "two_hop" if ep > 1 else "local"
        run = ParallelConfig(2, ep, 8, name, dispatcher, overlap=overlap).make_schedule(8)
        planned = Layout(4, 8, 2, ep, name, dispatcher, overlap).make_schedule(8)
        assert planned.programs == run.programs


def test_told_words_are_kept(planner: Planner) -> None:
    told = {"pp": 16, "schedule": "1f1b", "precision": "fp8"}
    for row in planner.search([2048], told, num_exact=10).rows:
        assert {name: getattr(row.layout, name) for name in told} == told


def test_neighbours_are_one_word_away_and_never_faster(planner: Planner, plan: Plan) -> None:
    winner = plan.rows[0]
    neighbours = planner.neighbours(winner.layout)
    assert len(neighbours) > 10
    for words, row, why in neighbours:
        assert (row is None) == ("does not fit" in why)
        names = {word.partition("=")[0] for word in words.split()}
        assert names - {"dispatcher", "overlap"} <= set(asdict(winner.layout))
        assert len(names) <= 2
        if row is not None:
            assert row.time.total >= winner.time.total
            assert sum(terms(row, winner).values()) == pytest.approx(row.time.total - winner.time.total)


def test_pareto_front_is_what_nothing_beats(plan: Plan) -> None:
    front = pareto(plan.rows)

    def beats(a: Row, b: Row) -> bool:
        mine, other = ((r.time.total, r.memory.total, r.layout.world) for r in (a, b))
        return all(x <= y for x, y in zip(mine, other, strict=True)) and mine != other

    assert front
    for row in plan.rows:
        beaten = any(beats(other, row) for other in plan.rows)
        assert (not beaten) == any((f.time, f.memory) == (row.time, row.memory) for f in front)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"pp": 3}, r"pp=3 does not divide world=2048: .*; nearest .*: parallel\.pp=2 or parallel\.pp=4"),
        ({"pp": 16, "ep": 48}, r"ep=48 does not divide dp=128 .*: parallel\.ep=32 or parallel\.ep=64"),
        ({"microbatch_size": 7}, r"global_batch_size=15360 does not .*: train\.microbatch_size=6 or .*size=8"),
        ({"pp": 8, "dispatcher": "local", "ep": 8}, r"shares them: .*; nearest .*: parallel\.dispatcher=two_hop"),
    ],
)
def test_the_impossible_is_refused_with_the_nearest_possible(planner: Planner, told: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        planner.search([2048], told)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does() -> None:
    planner = planner_of(config_of("model=671b", "train.global_batch_size=15361"))
    with pytest.raises(ValueError, match=r"train.global_batch_size=15361 does not divide .* such as 153\d\d"):
        planner.search([2048], {})


def test_too_little_memory_is_refused_with_what_it_takes() -> None:
    planner = planner_of(config_of("model=671b", "cluster.memory_gb=20"))
    with pytest.raises(ValueError, match=r"none of \d+ layouts fits 20 GB .* use devices of at least \d+ GB"):
        planner.search([2048], {"precision": "fp8"})


def test_illegal_says_why() -> None:
    model = ModelConfig()
    assert "does not divide" in str(illegal(model, replace(V3, pp=3), BATCH))
    assert "stages" in str(illegal(model, replace(V3, pp=64, ep=32), BATCH))
    assert "even parallel.pp" in str(illegal(model, Layout(8, 8, 1, 1, "dualpipe", "local"), 8))
    assert illegal(model, V3, BATCH) is None
