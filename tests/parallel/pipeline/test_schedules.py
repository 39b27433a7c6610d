import subprocess
import sys
from types import SimpleNamespace

import pytest

from parallel.pipeline.actions import Op
from parallel.pipeline.dualpipe import shortfall
from parallel.pipeline.passes import validate
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.zero_bubble import zero_bubble


def shapes(name, largest=8):
    for num_ranks in range(1, largest + 1):
        for num_microbatches in (1, 2, 3, 5, num_ranks, 2 * num_ranks - 1, 2 * num_ranks, 3 * num_ranks + 1):
            if name != "dualpipe" or (num_ranks % 2 == 0 and num_microbatches >= 2):
                yield num_ranks, num_microbatches


def test_no_torch():
    names = ["actions", "dualpipe", "passes", "schedules", "simulate", "timeline", "zero_bubble"]
    lines = ["import sys", *(f"import parallel.pipeline.{name}" for name in names), "assert 'torch' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_shape_is_valid(name):
    for shape in shapes(name):
        validate(SCHEDULES[name](*shape))


@pytest.mark.parametrize("stages_per_rank", [1, 2, 3, 5])
def test_every_interleaved_shape_is_valid(stages_per_rank):
    for shape in shapes("interleaved_1f1b", largest=6):
        validate(SCHEDULES["interleaved_1f1b"](*shape, stages_per_rank))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dualpipe"])
def test_one_rank_is_gradient_accumulation(name):
    timeline = simulate(SCHEDULES[name](1, 5), Costs(1, 2, 3, send_when="slot_end"))
    assert timeline.step_time == 5 * 6
    assert timeline.bubble_R.tolist() == [0]


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches"), [(1, 2), (1, 5), (2, 4), (2, 9), (3, 6), (4, 8), (4, 10), (5, 13), (8, 20)]
)
def test_dualpipev_is_torchs(num_ranks, num_microbatches):
    from torch.distributed.pipelining.schedules import ScheduleDualPipeV

    torchs = SimpleNamespace(pp_group_size=num_ranks, _n_microbatches=num_microbatches)
    for rank, program in enumerate(SCHEDULES["dualpipev"](num_ranks, num_microbatches).programs):
        expected = ScheduleDualPipeV._calculate_single_rank_operations(torchs, rank)
        assert [tuple(map(str, a.sub_actions or [a])) for a in expected] == [tuple(map(str, s)) for s in program]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (4, 4), (4, 12), (8, 8), (3, 9)])
@pytest.mark.parametrize("stages_per_rank", [1, 2, 3])
def test_interleaved_1f1b_is_torchs_where_it_has_one(num_ranks, num_microbatches, stages_per_rank):
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

    torchs = SimpleNamespace(
        pp_group_size=num_ranks,
        _n_microbatches=num_microbatches,
        n_local_stages=stages_per_rank,
        microbatches_per_round=num_ranks,
    )
    ours = SCHEDULES["interleaved_1f1b"](num_ranks, num_microbatches, stages_per_rank)
    for rank, program in enumerate(ours.programs):
        expected = ScheduleInterleaved1F1B._calculate_single_rank_operations(torchs, rank)
        assert [str(a) for a in expected if a is not None] == [str(a) for (a,) in program]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 8), (4, 16), (8, 5)])
def test_zbv_steps_like_torchs(num_ranks, num_microbatches):
    from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

    torchs = SimpleNamespace(pp_group_size=num_ranks, _n_microbatches=num_microbatches, num_stages=2 * num_ranks)
    for rank, program in enumerate(SCHEDULES["zbv"](num_ranks, num_microbatches).programs):
        expected = ScheduleZBVZeroBubble._calculate_single_rank_operations(torchs, rank)
        assert [str(a) for a in expected if a is not None] == [str(a) for (a,) in program]


@pytest.mark.parametrize("num_microbatches", range(2, 17))
def test_dualpipe_below_two_pp_loses_pairs_and_nothing_else(num_microbatches):
    schedule, full = SCHEDULES["dualpipe"](8, num_microbatches), SCHEDULES["dualpipe"](8, 16)
    pairs, most = (sum(len(slot) == 2 for program in s.programs for slot in program) for s in (schedule, full))
    assert (pairs < most) == (num_microbatches < 16)
    timeline = simulate(schedule)
    assert max(timeline.peak_live(rank) for rank in range(8)) <= 9
    assert timeline.step_time <= simulate(full).step_time


def test_the_shortfall_is_said():
    assert shortfall(SCHEDULES["dualpipe"](8, 16)) is None
    assert shortfall(SCHEDULES["dualpipev"](4, 8)) is None
    assert shortfall(SCHEDULES["1f1b"](8, 2)) is None
    schedule = SCHEDULES["dualpipe"](8, 6)
    pairs = sum(len(slot) == 2 for program in schedule.programs for slot in program)
    said = shortfall(schedule)
    assert f"wants 16 microbatches or more: with 6, {pairs} of 48 forwards overlap a backward" in said


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("num_microbatches", [2, 9, 15, 21])
def test_weight_gradients_run_in_the_order_of_their_input_gradients(name, num_microbatches):
    for program in SCHEDULES[name](4, num_microbatches).programs:
        actions = [action for slot in program for action in slot]
        order = {op: [(a.stage, a.mb) for a in actions if a.op is op] for op in (Op.I, Op.W)}
        assert order[Op.I] == order[Op.W]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dualpipe", (7, 20), "even number of ranks, got 7"),
        ("dualpipe", (1, 20), "even number of ranks, got 1"),
        ("dualpipe", (8, 1), "each of its two directions, got 1"),
        ("dualpipe", (0, 4), "even number of ranks, got 0"),
        *((name, (0, 4), f"{name}: there must be at least one rank") for name in SCHEDULES if name != "dualpipe"),
        *((name, (2, 0), f"{name}: there must be at least one microb") for name in SCHEDULES if name != "dualpipe"),
        ("interleaved_1f1b", (2, 4, 0), "interleaved_1f1b: there must be at least one stage"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(name, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        SCHEDULES[name](*shape)
    assert "\n" not in str(error.value)


RANDOM_COSTS = [
    (num_ranks, num_microbatches, Costs(f, i, w, p2p=p2p, kept_after_i=kept))
    for num_ranks, num_microbatches, f, i, w, p2p, kept in [
        (4, 8, 1, 1, 1, 0, 1.0),
        (8, 24, 5, 7, 3, 1, 0.5),
        (7, 20, 2, 9, 9, 0, 1.0),
        (3, 29, 1, 2, 2, 1, 0.25),
        (10, 12, 9, 2, 4, 2, 0.0),
        (1, 6, 1, 2, 3, 0, 1.0),
    ]
]


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "costs"), RANDOM_COSTS)
def test_zero_bubble_keeps_its_limit_and_beats_zb1p(num_ranks, num_microbatches, costs):
    h1 = simulate(SCHEDULES["zb1p"](num_ranks, num_microbatches), costs).step_time
    for limit in (1, 2, num_ranks - 0.5, num_ranks, 1.5 * num_ranks, 2 * num_ranks - 1, None):
        if limit is not None and limit < 1:
            continue
        schedule = zero_bubble(num_ranks, num_microbatches, costs, limit)
        validate(schedule)
        timeline = simulate(schedule, costs)
        if limit is not None:
            assert max(timeline.peak_memory(rank) for rank in range(num_ranks)) <= limit
        if limit is None or limit >= num_ranks:
            assert timeline.step_time <= h1


def test_zero_bubble_between_h1_and_h2():
    """ZB-H2 hides the first round trip: no rank idles between its first slot and its last. (2401.10241, figure 3)"""
    num_ranks, num_microbatches = 4, 12
    timeline = simulate(zero_bubble(num_ranks, num_microbatches, Costs(), 2 * num_ranks - 1))
    assert timeline.step_time == 3 * num_microbatches + num_ranks - 1
    tight = simulate(zero_bubble(num_ranks, num_microbatches, Costs(), 2))
    assert tight.step_time > timeline.step_time


def test_zero_bubble_wins_where_costs_are_uneven():
    costs = Costs(3, 4, 7)
    step = {limit: simulate(zero_bubble(8, 32, costs, limit), costs).step_time for limit in (8, 15)}
    assert step[15] < simulate(SCHEDULES["zb1p"](8, 32), costs).step_time


def test_zero_bubble_refuses_a_limit_below_one_microbatch():
    for limit in (0.5, 0, -1, float("nan")):
        with pytest.raises(ValueError, match="memory_limit"):
            zero_bubble(4, 8, Costs(), limit)
