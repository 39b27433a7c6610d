"""The published figures, tolerance 0: bubbles, memory, step counts. docs/schedules.md derives the formulas."""

from dataclasses import replace
from itertools import product

import pytest

from parallel.pipeline.actions import Op
from parallel.pipeline.dualpipe import phase_counts
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate, step_time_quantiles

# F, I, W in whole even numbers, so that half a stage is whole too
EVERY = list(product((2, 4, 6, 10), repeat=3))


def bubbles(name, num_ranks, num_microbatches, f, i, w, fb=None, **extra):
    schedule = SCHEDULES[name](num_ranks, num_microbatches, **extra)
    return simulate(schedule, Costs(f, i, w, fb, send_when="slot_end")).bubble_R.tolist()


@pytest.mark.parametrize("num_ranks", range(2, 33))
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_1f1b_and_gpipe(name, num_ranks):
    for num_microbatches, (f, i, w) in product((num_ranks, 2 * num_ranks + 1), ((1, 1, 1), (2, 3, 1), (3, 1, 4))):
        formula = (num_ranks - 1) * (f + i + w)
        assert bubbles(name, num_ranks, num_microbatches, f, i, w) == [formula] * num_ranks


@pytest.mark.parametrize("num_ranks", range(2, 33))
def test_interleaved_1f1b(num_ranks):
    for v, (f, i, w) in product((1, 2, 4), ((4, 4, 4), (8, 12, 4))):
        formula = (num_ranks - 1) * (f + i + w) / v
        found = bubbles("interleaved_1f1b", num_ranks, 2 * num_ranks, f, i, w, stages_per_rank=v)
        assert found == [formula] * num_ranks


@pytest.mark.parametrize("num_ranks", range(2, 33))
def test_zb1p(num_ranks):
    for f, i, w in ((1, 1, 1), (2, 3, 1), (3, 2, 2), (2, 2, 1)):
        assert w <= min(f, i)
        b = i + w
        formula = (num_ranks - 1) * (f + b - 2 * w)
        assert bubbles("zb1p", num_ranks, 2 * num_ranks, f, i, w) == [formula] * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_zb1p_outside_the_domain_of_its_formula(num_ranks):
    for f, i, w in EVERY:
        found = bubbles("zb1p", num_ranks, 2 * num_ranks, f, i, w)
        assert found == [(num_ranks - 1) * (f + i - min(f, i, w))] * num_ranks


@pytest.mark.parametrize("num_ranks", range(2, 33, 2))
def test_dualpipe(num_ranks):
    for num_microbatches, (f, w) in product((2 * num_ranks, 3 * num_ranks + 2), ((1, 1), (3, 1), (3, 2))):
        i, b = f, f + w
        formula = (num_ranks / 2 - 1) * ((f + b) + b - 3 * w)
        assert bubbles("dualpipe", num_ranks, num_microbatches, f, i, w) == [formula] * num_ranks


@pytest.mark.parametrize("num_ranks", range(2, 33))
def test_dualpipev(num_ranks):
    for num_microbatches, (f, w) in product((2 * num_ranks, 3 * num_ranks + 1), ((2, 2), (6, 2), (6, 4))):
        i, b = f, f + w
        formula = (num_ranks - 1) * ((f + b) + b - 3 * w) / 2
        assert bubbles("dualpipev", num_ranks, num_microbatches, f, i, w) == [formula] * num_ranks


def dualpipe_middle(half, f, i, w, fb):
    """What the middle rank idles, for all costs: fill, drain, tail, and the first backward that comes late."""
    return (half - 1) * (f + fb - (i + w) + max(0, i - w)) + max(0, (half - 1) * (i - f) - f)


@pytest.mark.parametrize("half", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("gain", [0, 0.25, 0.5])
def test_dualpipe_for_all_costs(half, gain):
    for f, i, w in EVERY:
        fb = f + i + w - gain * min(f, i + w)
        expected = dualpipe_middle(half, f, i, w, fb)
        found = bubbles("dualpipe", 2 * half, 6 * half, f, i, w, fb)
        folded = bubbles("dualpipev", half, 3 * half, 2 * f, 2 * i, 2 * w, 2 * fb)
        assert folded[-1] == pytest.approx(expected, rel=1e-12)
        assert found[half - 1] == found[half] == pytest.approx(expected, rel=1e-12)
        published = (half - 1) * (fb + (i + w) - 3 * w)
        if f == i and w <= i:
            assert expected == published


@pytest.mark.parametrize(
    ("costs", "published", "replayed"),
    [
        ((1, 1, 1), 6, 6),
        ((2, 1, 1), 9, 12),
        ((3, 1, 1), 12, 18),
        ((1, 2, 1), 12, 11),
        ((2, 4, 2), 24, 22),
        ((1, 1, 2), 3, 6),
        ((1, 1, 3), 0, 6),
        ((1, 3, 5), 6, 11),
    ],
)
def test_the_documented_table_of_formula_and_replay(costs, published, replayed):
    f, i, w = costs
    assert 3 * ((f + i + w) + (i + w) - 3 * w) == published
    assert bubbles("dualpipe", 8, 20, f, i, w) == [replayed] * 8


def test_outer_ranks_idle_less_by_the_pairs_they_lack():
    f, i, w, fb, num_ranks, num_microbatches = 4, 4, 2, 8, 8, 20
    schedule = SCHEDULES["dualpipe"](num_ranks, num_microbatches)
    num_pairs = [sum(len(slot) == 2 for slot in program) for program in schedule.programs]
    found = bubbles("dualpipe", num_ranks, num_microbatches, f, i, w, fb)
    middle = dualpipe_middle(num_ranks // 2, f, i, w, fb)
    assert found == [middle - (num_pairs[3] - pairs) * (f + i + w - fb) for pairs in num_pairs]


def test_ranks_of_dualpipe_with_overlap_gain():
    assert bubbles("dualpipe", 8, 20, 10, 10, 10, 26) == [40, 44, 48, 48, 48, 48, 44, 40]


@pytest.mark.parametrize("num_ranks", range(2, 33, 2))
def test_peak_memory_of_dualpipe(num_ranks):
    for num_microbatches in (2 * num_ranks, 3 * num_ranks):
        timeline = simulate(SCHEDULES["dualpipe"](num_ranks, num_microbatches))
        assert [timeline.peak_live(rank) for rank in range(num_ranks)] == [num_ranks + 1] * num_ranks
        assert [timeline.peak_memory(rank) for rank in range(num_ranks)] == [num_ranks + 1] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8])
def test_peak_memory_of_the_others(num_ranks):
    def peaks(name):
        timeline = simulate(SCHEDULES[name](num_ranks, 3 * num_ranks))
        return [timeline.peak_memory(rank) for rank in range(num_ranks)]

    assert peaks("gpipe") == [3 * num_ranks] * num_ranks
    assert peaks("1f1b") == list(range(num_ranks, 0, -1))
    assert peaks("zb1p") == peaks("zbv") == [num_ranks] * num_ranks
    assert peaks("dualpipev") == [num_ranks + 0.5] * num_ranks  # 2 * num_ranks + 1 half stages


def test_step_counts_of_dualpipe():
    assert [list(phase_counts(4, position, 10)) for position in range(4)] == [
        [6, 1, 3, 3, 3, 1, 3, 1],
        [4, 2, 2, 4, 2, 2, 2, 2],
        [2, 3, 1, 5, 1, 3, 1, 3],
        [0, 4, 0, 6, 0, 4, 0, 4],
    ]
    assert phase_counts(8, 0, 60) == (14, 1, 7, 45, 7, 1, 7, 1)
    assert phase_counts(8, 7, 60) == (0, 8, 0, 52, 0, 8, 0, 8)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(8, 20), (16, 120)])
def test_programs_have_these_counts(num_ranks, num_microbatches):
    half = num_ranks // 2
    for rank, program in enumerate(SCHEDULES["dualpipe"](num_ranks, num_microbatches).programs):
        position = min(rank, num_ranks - 1 - rank)
        n1, n2, n3, n4, n5, n6, n7, n8 = phase_counts(half, position, num_microbatches // 2)
        apart = int(position == half - 1)
        sizes = [len(slot) for slot in program]
        assert sizes.count(2) == 2 * n4 + n5 - apart
        lone = [slot[0].op for slot in program if len(slot) == 1]
        assert lone.count(Op.F) == n1 + 2 * n2 + n3 + apart
        assert lone.count(Op.I) == lone.count(Op.W) == n3 + n6 + n7
        assert lone.count(Op.W) == n3 + n7 + n8
        assert lone.count(Op.B) == n5 + n6 + apart


def test_overlapped_pairs_of_deepseek_v3():
    programs = SCHEDULES["dualpipe"](16, 120).programs
    pairs = [sum(len(slot) == 2 for slot in program) for program in programs[:8]]
    assert pairs == [97, 98, 99, 100, 101, 102, 103, 103]
    lone = [sum(slot[0].op is Op.F for slot in program if len(slot) == 1) for program in programs[:8]]
    assert lone == [120 - num for num in pairs]


V3_STEP = {"f": 49.1, "i": 75.4, "w": 32.0, "fb": 143.8, "optimizer": 290.0, "send_when": "slot_end"}  # ms


def test_the_step_of_deepseek_v3():
    """ISCA 2025, table 4: the parts of a step on 2048 H800, replayed; the published step is 19.926 s."""
    schedule = SCHEDULES["dualpipe"](16, 120)
    assert simulate(schedule, Costs(**V3_STEP)).step_time == pytest.approx(18_800, abs=10)
    with_p2p = Costs(**V3_STEP, p2p=1.5)
    assert simulate(schedule, with_p2p).step_time == pytest.approx(19_009, abs=1)
    assert simulate(schedule, replace(with_p2p, slow={7: 1.07})).step_time == pytest.approx(19_926, abs=10)
    (median,) = step_time_quantiles(schedule, replace(with_p2p, jitter=0.07), quantiles=(0.5,), num_runs=100)
    assert median == pytest.approx(19_900, abs=20)


@pytest.mark.parametrize(
    ("num_microbatches", "pairs", "bubble", "of_zb1p", "peak"),
    [(16, 50, 6, 7, 9), (12, 20, 10, 7, 9), (8, 0, 9, 7, 8), (4, 0, 13, 11, 4), (2, 0, 15, 13, 2)],
)
def test_the_documented_table_of_few_microbatches(num_microbatches, pairs, bubble, of_zb1p, peak):
    schedule = SCHEDULES["dualpipe"](8, num_microbatches)
    assert sum(len(slot) == 2 for program in schedule.programs for slot in program) == pairs
    assert bubbles("dualpipe", 8, num_microbatches, 1, 1, 1) == [bubble] * 8
    assert bubbles("zb1p", 8, num_microbatches, 1, 1, 1) == [of_zb1p] * 8
    assert max(simulate(schedule).peak_live(rank) for rank in range(8)) == peak


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
def test_up_to_pp_microbatches_none_overlap(num_ranks):
    def num_pairs(num_microbatches):
        programs = SCHEDULES["dualpipe"](num_ranks, num_microbatches).programs
        return sum(len(slot) == 2 for program in programs for slot in program)

    assert {num_pairs(num_microbatches) for num_microbatches in range(2, num_ranks + 1)} == {0}
    assert num_pairs(num_ranks + 2) > 0
