"""`auto`: never slower than what is known, within its shape and memory, valid, and the same every time."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline import auto as search
from parallel.pipeline.actions import Op
from parallel.pipeline.anneal import anneal, measure, merge
from parallel.pipeline.auto import auto
from parallel.pipeline.greedy import Knobs, build
from parallel.pipeline.passes import check_lowered, lower, validate
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.words import layout_of, schedule_of, spell, times_of, words_of
from parallel.pipeline.zero_bubble import zero_bubble

# The fixed schedules of each shape, listed here once more: auto has its own list, which this one checks.
LOOP, V, BIDIRECTIONAL = ("gpipe", "1f1b", "interleaved_1f1b", "zb1p"), ("zbv", "dualpipev"), ("dualpipe",)
OF_SHAPE = {"loop": LOOP, "v": V, "bidirectional": BIDIRECTIONAL, "any": LOOP + V + BIDIRECTIONAL}


@pytest.fixture(autouse=True, scope="module")
def small_budgets():
    """What has to hold, holds for every budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MOST_BUILDS", 200)
        patch.setattr(search, "MOST_TURNS", 100)
        patch.setattr(search, "MOST_CHANGES", 500)
        yield


def time_and_memory(schedule, costs):
    timeline = simulate(schedule, costs)
    return timeline.pipeline_time, max(timeline.peak_memory(rank) for rank in range(schedule.num_ranks))


def fixed_schedules(shape, num_ranks, num_microbatches, costs, limit):
    for name in OF_SHAPE[shape]:
        if name != "dualpipe" or (num_ranks % 2 == 0 and num_microbatches >= 2):
            yield SCHEDULES[name](num_ranks, num_microbatches)
    if shape in ("loop", "any"):
        for most in range(1, 2 * num_ranks):
            if most <= limit:
                yield zero_bubble(num_ranks, num_microbatches, costs, most)


def random_setting(rng):
    num_ranks = int(rng.choice([1, 2, 3, 4, 6, 8]))
    num_microbatches = int(rng.integers(1, 3 * num_ranks + 2))
    f, i, w = rng.uniform(0.5, 2, 3).tolist()
    costs = Costs(
        f,
        i,
        w,
        fb=(f + i + w) * rng.uniform(0.75, 1.1) if rng.random() < 0.5 else None,
        p2p=float(rng.choice([0, 0.1, 0.5])),
        kept_after_i=float(rng.choice([1, 0.5, 0])),
        send_when=str(rng.choice(["ready", "slot_end"])),
        slow={int(rng.integers(num_ranks)): 1.3} if rng.random() < 0.3 else {},
    )
    shapes = [shape for shape in OF_SHAPE if shape != "bidirectional" or (num_ranks % 2 == 0 and num_microbatches > 1)]
    limit = float(rng.choice([1, 1.5, num_ranks, num_ranks + 1, 2 * num_ranks, 100]))
    return num_ranks, num_microbatches, costs, limit, str(rng.choice(shapes))


@pytest.mark.parametrize("seed", range(40))
def test_never_slower_than_any_fixed_schedule_of_its_shape_and_limit(seed):
    num_ranks, num_microbatches, costs, limit, shape = random_setting(np.random.default_rng(seed))
    schedule = auto(num_ranks, num_microbatches, costs, limit, shape)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == ("auto", num_ranks, num_microbatches)
    validate(schedule)
    check_lowered(lower(schedule))
    time, memory = time_and_memory(schedule, costs)
    assert memory <= limit + 1e-9
    for fixed in fixed_schedules(shape, num_ranks, num_microbatches, costs, limit):
        their_time, their_memory = time_and_memory(fixed, costs)
        assert their_memory > limit + 1e-9 or time <= their_time, fixed.name


def test_it_wins_where_there_is_something_to_win():
    # Unlimited memory and no p2p: the loop of two stages a rank can run without any bubble but the first forward.
    costs = Costs(1, 1, 1)
    assert time_and_memory(auto(4, 12, costs, shape="v"), costs)[0] == 36 + 3 * 0.5
    # A pair that saves time: no fixed loop makes pairs.
    costs = Costs(1, 1, 1, fb=2.4)
    best = min(time_and_memory(fixed, costs)[0] for fixed in fixed_schedules("loop", 4, 16, costs, 99))
    assert time_and_memory(auto(4, 16, costs, shape="loop"), costs)[0] < 0.95 * best
    # Less memory than any fixed bidirectional schedule.
    schedule = auto(4, 8, costs, 2, "bidirectional")
    assert schedule.num_routes == 2
    assert time_and_memory(schedule, costs)[1] <= 2


@pytest.mark.parametrize("limit", [2, 5, 100])
def test_any_is_never_slower_than_one_shape(limit):
    costs = Costs(1, 1.4, 0.7, 2.7, p2p=0.1)
    anyhow, *each = (time_and_memory(auto(4, 9, costs, limit, shape), costs)[0] for shape in reversed(OF_SHAPE))
    assert anyhow <= min(each)


@pytest.mark.parametrize("shape", ["loop", "v", "any"])
def test_one_rank_is_never_idle(shape):
    costs = Costs(1, 2, 3)
    assert time_and_memory(auto(1, 5, costs, shape=shape), costs)[0] == 30


def test_equal_input_gives_an_equal_schedule_in_another_process():
    code = (
        "from parallel.pipeline import auto as search; from parallel.pipeline.simulate import Costs\n"
        "search.MOST_BUILDS, search.MOST_TURNS, search.MOST_CHANGES = 200, 100, 500\n"
        "print([[[str(a) for a in s] for s in p] for p in search.auto(4, 6, Costs(1, 1.3, 0.7), 4).programs])\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    here = auto(4, 6, Costs(1, 1.3, 0.7), 4).programs
    assert there == f"{[[[str(a) for a in s] for s in p] for p in here]}\n"


def test_costs_of_single_stages_choose_the_placement():
    four, eight = [1.0, 2.0, 1.0, 1.0], [1.0] * 7 + [2.0]
    assert auto(4, 6, Costs(f=four)).num_stages == 4
    assert auto(4, 6, Costs(f=eight)).num_stages == 8
    with pytest.raises(ValueError, match="lists 3 stages"):
        auto(4, 6, Costs(f=[1.0, 1.0, 1.0]))
    assert auto(3, 6, shape="loop", stages_per_rank=4, costs=Costs(f=[1.0] * 12)).num_stages == 12


def test_two_arguments_are_enough():
    assert simulate(auto(2, 4)).bubble_fraction < simulate(SCHEDULES["zb1p"](2, 4)).bubble_fraction


@pytest.mark.parametrize("limit", [0, 0.99, -1, float("nan")])
def test_a_limit_that_nothing_keeps_names_the_least(limit):
    with pytest.raises(ValueError, match=r"memory_limit = .*: .*the least is 1$"):
        auto(4, 8, Costs(), limit)


def test_every_shape_keeps_the_least_limit():
    for shape in ("loop", "v", "bidirectional"):
        assert time_and_memory(auto(4, 8, Costs(), 1, shape), Costs())[1] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 4), "auto: there must be at least one rank"),
        ((4, 0), "auto: there must be at least one microbatch"),
        ((3, 8, Costs(), None, "bidirectional"), "even number of ranks and two microbatches, got 3 and 8: choose v"),
        ((4, 8, Costs(), None, "circle"), "choose one of loop, v, bidirectional, any"),
        ((4, 8, Costs(slow={7: 2.0})), "rank 7, but auto has ranks 0 to 3"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        auto(*arguments)


# ---- words: what the compiled searches write is what the slow classes mean


def spelled(schedule, costs, limit=1e9):
    layout = layout_of(schedule)
    return layout, times_of(schedule, layout, costs, limit), *words_of(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("send_when", ["ready", "slot_end"])
def test_words_mean_their_schedule(name, send_when):
    for shape, fb in itertools.product([(4, 9), (2, 2), (6, 3)], [None, 2.5]):
        schedule = SCHEDULES[name](*shape)
        costs = Costs(1, 1.5, 0.75, fb, p2p=0.125, slow={1: 1.5}, send_when=send_when)
        layout, times, words, length = spelled(schedule, costs)
        assert schedule_of(schedule, layout, times, words, length).programs == schedule.programs
        assert measure(layout, times, words, length)[0] == pytest.approx(
            simulate(schedule, costs).pipeline_time, rel=1e-12
        )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kept", [1.0, 0.25])
def test_words_keep_a_limit_exactly_where_the_timeline_does(name, kept):
    schedule, costs = SCHEDULES[name](4, 9), Costs(kept_after_i=kept)
    peak = time_and_memory(schedule, costs)[1]
    for limit, valid in ((peak, True), (peak - 0.1, False)):
        layout, times, words, length = spelled(schedule, costs, limit)
        assert spell(layout, times, words, length)[0] is valid
        assert np.isfinite(measure(layout, times, words, length)[0]) == valid


def test_words_that_cannot_run_are_found():
    layout, times, words, length = spelled(SCHEDULES["zb1p"](2, 2), Costs())
    words[0, :2] = words[0, [1, 0]]
    assert measure(layout, times, words, length)[0] < np.inf  # two forwards changed places: still the same
    first_w = int(np.argmax(words[1] == Op.W))
    words[1, [0, first_w]] = words[1, [first_w, 0]]
    assert not spell(layout, times, words, length)[0]  # a W before its I
    layout, times, words, length = spelled(SCHEDULES["1f1b"](2, 2), Costs())
    words[1, :2] = words[1, [1, 0]]
    assert spell(layout, times, words, length)[0]
    assert measure(layout, times, words, length)[0] == np.inf  # a B before its F: nobody can go on


def test_the_critical_path_is_without_gaps():
    schedule, costs = SCHEDULES["dualpipe"](4, 9), Costs(1, 1.5, 0.75, 2.5, p2p=0.125, send_when="slot_end")
    end, path, size = measure(*spelled(schedule, costs))
    spans = {(span.rank, span.slot): span for program in simulate(schedule, costs).spans for span in program}
    chain = [spans[tuple(place)] for place in path[:size].tolist()]
    assert chain[0].end == end
    assert chain[-1].start == 0
    for later, earlier in itertools.pairwise(chain):
        assert later.start == earlier.end + (costs.p2p if later.rank != earlier.rank else 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_constructions_are_valid_and_end_when_they_say(data):
    name = data.draw(st.sampled_from(["1f1b", "interleaved_1f1b", "zbv", "dualpipe"]))
    num_ranks = data.draw(st.sampled_from([2, 4]))
    empty = SCHEDULES[name](num_ranks, data.draw(st.integers(2, 9)))
    costs = Costs(
        1, 2, 0.5, 3.0, p2p=0.25, kept_after_i=0.5, send_when=data.draw(st.sampled_from(["ready", "slot_end"]))
    )
    limit = data.draw(st.sampled_from([2, 3.5, 100]))
    layout = layout_of(empty)
    times = times_of(empty, layout, costs, limit)
    num_chunks = layout.count_RC.shape[1]

    def knob(values):
        return np.array(data.draw(st.lists(values, min_size=num_ranks, max_size=num_ranks)))

    knobs = Knobs(
        cap_R=knob(st.integers(num_chunks, 9)),
        cap_RC=np.stack([knob(st.integers(1, 9)) for _ in range(num_chunks)], 1),
        fit_R=knob(st.sampled_from([0.0, 0.5, 1.0])),
        f_first_R=knob(st.booleans()),
        deep_first_R=knob(st.booleans()),
        patience_R=knob(st.sampled_from([-1.0, 0.0, 1.0])),
    )
    end, words, length = build(layout, times, knobs)
    assert np.isfinite(end)
    schedule = schedule_of(empty, layout, times, words, length)
    validate(schedule)
    time, memory = time_and_memory(schedule, costs)
    assert time == pytest.approx(end, rel=1e-12)
    assert memory <= limit + 1e-9


@pytest.mark.parametrize("name", ["gpipe", "interleaved_1f1b", "zbv", "dualpipe"])
def test_annealing_improves_and_keeps_its_word(name):
    schedule, costs = SCHEDULES[name](4, 7), Costs(1, 1.5, 0.75, 3.0, p2p=0.1)
    before, peak = time_and_memory(schedule, costs)
    layout, times, words, length = spelled(schedule, costs, peak)
    end, words, length = anneal(layout, times, words, length, 2000, 0.2, 0.0, 1)
    for merged in (False, True):
        if merged:
            words, length = merge(layout, times, words, length)
        found = schedule_of(schedule, layout, times, words, length)
        validate(found)
        time, memory = time_and_memory(found, costs)
        assert time == pytest.approx(end, rel=1e-12)
        assert time < before
        assert memory <= peak + 1e-9


def test_merging_makes_full_backwards():
    schedule, costs = SCHEDULES["zbv"](1, 3), Costs()
    layout, times, words, length = spelled(schedule, costs)
    merged = schedule_of(schedule, layout, times, *merge(layout, times, words, length))
    assert {action.op for slot in merged.programs[0] for action in slot} == {Op.F, Op.B}
