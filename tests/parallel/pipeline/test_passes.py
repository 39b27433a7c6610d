import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Op, Schedule
from parallel.pipeline.passes import (
    PAIRABLE,
    Lowered,
    ScheduleError,
    check_lowered,
    forward_only,
    from_csv,
    lower,
    pair_up,
    to_csv,
    validate,
)
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from tests.parallel.pipeline.oracle import PLACEMENTS, is_valid, random_schedule

schedules = st.builds(
    random_schedule, st.sampled_from(sorted(PLACEMENTS)), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6)
)


def parse(*rows):
    """Programs written down: one string a rank, slots by blanks, & in a pair."""
    return [[tuple(map(Action.parse, slot.split("&"))) for slot in row.split()] for row in rows]


def mutate(schedule, programs):
    return Schedule(schedule.name, programs, schedule.placement, schedule.num_microbatches)


@settings(max_examples=60, deadline=None)
@given(schedules)
def test_random_schedules_pass_and_lower_without_deadlock(schedule):
    assert is_valid(schedule)
    validate(schedule)
    lowered = lower(schedule)
    check_lowered(lowered)
    for program, with_messages in zip(schedule.programs, lowered.programs, strict=True):
        assert program == [slot for slot in with_messages if slot[0].op <= Op.W]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (4, 4), (4, 9), (6, 13), (8, 20)])
def test_lowered_schedules_run_with_blocking_sends_and_no_tags(name, shape):
    check_lowered(lower(SCHEDULES[name](*shape)))
    check_lowered(lower(forward_only(SCHEDULES[name](*shape))))


def test_every_message_is_sent_and_received_once_and_none_within_a_rank():
    schedule = SCHEDULES["dualpipev"](3, 8)
    messages = [a for program in lower(schedule).programs for slot in program for a in slot if a.op > Op.W]
    crossings = 2 * (2 * 3 - 1 - 1)  # both ways over every border of stages but the turn of the V
    assert len(messages) == len(set(messages)) == 2 * crossings * 8


def test_what_flies_in_opposite_directions_is_one_batch():
    lowered = lower(SCHEDULES["dualpipe"](4, 16))
    for rank in (1, 2):
        batches = [slot for slot in lowered.programs[rank] if slot[0].op > Op.W]
        both = [b for b in batches if {a.op in (Op.SEND_F, Op.SEND_B) for a in b} == {True, False}]
        assert len(both) > len(batches) / 2


@settings(max_examples=300, deadline=None)
@given(schedules, st.sampled_from(["drop", "double", "swap", "forget W", "move", "replace"]), st.integers(0, 10**6))
def test_mutations_are_caught_exactly_where_they_break(schedule, mutation, seed):
    rng = random.Random(seed)
    programs = [list(program) for program in schedule.programs]
    full = [rank for rank, program in enumerate(programs) if program]
    rank = rng.choice(full)
    program = programs[rank]
    k, other = rng.randrange(len(program)), rng.randrange(len(program))
    if mutation == "drop":
        program.pop(k)
    elif mutation == "double":
        program.insert(other, program[k])
    elif mutation == "swap":
        program[k], program[other] = program[other], program[k]
    elif mutation == "forget W":
        weights = [index for index, slot in enumerate(program) if slot[0].op is Op.W]
        if weights:
            program.pop(rng.choice(weights))
    elif mutation == "move":
        slot = program.pop(k)
        programs[rng.choice(full)].append(slot)
    else:
        stage, op, mb = program[k][0]
        program[k] = (
            rng.choice([Action(stage + 1, op, mb), Action(stage, Op((op + 1) % 4), mb), Action(stage, op, 99)]),
        )
    mutant = mutate(schedule, programs)
    if is_valid(mutant):
        validate(mutant)
    else:
        with pytest.raises(ScheduleError):
            validate(mutant)


GOOD = ("0F0 0F1 0I0 0W0 0B1", "1F0 1I0 1W0 1F1 1B1")


@pytest.mark.parametrize(
    ("rows", "rank", "slot", "reason"),
    [
        (("0F0 0F1 0I0 0W0", GOOD[1]), 0, 4, "0B1 is missing"),
        (("0F0 0F1 0I0 0B1", GOOD[1]), 0, 4, "0W0 is missing"),
        (("0F0 0F1 0W0 0B1", GOOD[1]), 0, 4, "0I0 is missing"),
        (("0F0 0I0 0W0 0B1", GOOD[1]), 0, 4, "0F1 is missing"),
        (("0F0 0F1 0I0 0W0 0B1 0F1", GOOD[1]), 0, 5, "0F1 is doubled: it ran in slot 1"),
        (("0F0 0F1 0I0 0W0 0B1 0I1", GOOD[1]), 0, 5, "0I1 is doubled: 0B1 includes it"),
        (("0F0 0F1 0W0 0I0 0B1", GOOD[1]), 0, 2, "0W0 needs 0I0, which runs only in slot 3"),
        (("0F0 0F1&0B1 0I0 0W0", GOOD[1]), 0, 1, "0B1 needs 0F1, which runs in the same slot"),
        (("0F0 0F1 1I0 0W0 0B1", GOOD[1]), 0, 2, "1I0 is misplaced: the placement has it on rank 1"),
        (("0F0 0F1 0I0 0W0 2B1", GOOD[1]), 0, 4, "2B1 does not exist"),
        (("0F0 0F1 0I0 0W0 0B2", GOOD[1]), 0, 4, "0B2 does not exist"),
        (("0F0 0F1&0W0 0I0 0B1", GOOD[1]), 0, 1, "0F1&0W0 is no overlapped pair"),
        (("0F0 0I0&0F1 0W0 0B1", GOOD[1]), 0, 1, "0I0&0F1 is no overlapped pair"),
        (("0F0 0F1&0I0&0W0 0B1", GOOD[1]), 0, 1, "this one has 3"),
        (("0F0 0SEND_F0 0F1 0I0 0W0 0B1", GOOD[1]), 0, 1, "0SEND_F0 is communication"),
        (
            ("0F0 0I0 0W0 0F1 0B1", "1F1 1F0 1I0 1W0 1B1"),
            0,
            1,
            "deadlock: rank 0 with 0I0 waits for 1I0 of rank 1; rank 1 with 1F1 waits for 0F1 of rank 0",
        ),
    ],
)
def test_errors_name_the_place_and_the_reason(rows, rank, slot, reason):
    placement = ((0, 1),)
    validate(Schedule("good", parse(*GOOD), placement, 2))
    with pytest.raises(ScheduleError) as error:
        validate(Schedule("bad", parse(*rows), placement, 2))
    assert (error.value.rank, error.value.slot) == (rank, slot)
    assert reason in error.value.reason
    first, *grid = str(error.value).splitlines()
    assert first == f"bad: rank {rank}, slot {slot}: {error.value.reason}"
    marked = rows[rank].split()[slot] if slot < len(rows[rank].split()) else "nothing"
    assert f"[{marked}]" in "\n".join(grid)


def test_an_empty_slot_is_refused():
    with pytest.raises(ScheduleError, match="this one has 0"):
        validate(Schedule("bad", [[(Action(0, Op.F, 0),), (), (Action(0, Op.B, 0),)]], ((0,),), 1))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p", "zbv", "dualpipe", "dualpipev", "interleaved_1f1b"])
def test_memory_limit_is_that_of_the_timeline(name):
    schedule = SCHEDULES[name](4, 12)
    timeline = simulate(schedule)
    peak = max(timeline.peak_memory(rank) for rank in range(4))
    validate(schedule, memory_limit=peak)
    with pytest.raises(ScheduleError, match="activations are live, the limit is") as error:
        validate(schedule, memory_limit=peak - 0.5)
    assert timeline.peak_memory(error.value.rank) > peak - 0.5


@pytest.mark.parametrize("seed", range(5))
def test_wrong_communication_is_caught(seed):
    rng = random.Random(seed)
    lowered = lower(SCHEDULES["dualpipe"](4, 8))

    def broken(change):
        programs = [list(program) for program in lowered.programs]
        rank = rng.choice([1, 2])
        change(programs[rank], [k for k, slot in enumerate(programs[rank]) if slot[0].op > Op.W])
        with pytest.raises(ScheduleError) as error:
            check_lowered(replace(lowered, programs=programs))
        return str(error.value)

    def lose(program, messages):
        k = rng.choice(messages)
        program[k] = program[k][1:]

    def before_it_is_made(program, messages):
        sends = [k for k in messages if any(a.op is Op.SEND_F for a in program[k])]
        k = rng.choice(sends)
        program[k - 1 : k + 1] = program[k], program[k - 1]

    def late(program, messages):
        receives = [k for k in messages if any(a.op is Op.RECV_F for a in program[k])]
        program.append(program.pop(rng.choice(receives)))

    broken(lose)
    broken(before_it_is_made)
    broken(late)


def test_blocking_sends_that_face_each_other_deadlock():
    schedule = SCHEDULES["1f1b"](2, 3)
    rows = parse(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2",
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1B2 1SEND_B2",
    )
    with pytest.raises(ScheduleError, match="deadlock under blocking sends: rank 0 in 0SEND_F1; rank 1 in 1SEND_B0"):
        check_lowered(Lowered(schedule, rows))


def test_messages_are_told_apart_by_their_order():
    schedule = SCHEDULES["gpipe"](2, 2)
    rows = parse(
        "0F0 0F1 0SEND_F1 0SEND_F0 0RECV_B0 0RECV_B1 0B0 0B1",
        "1RECV_F0 1RECV_F1 1F0 1F1 1B0 1B1 1SEND_B0 1SEND_B1",
    )
    with pytest.raises(ScheduleError, match="1RECV_F0 would receive 0SEND_F1 of rank 0"):
        check_lowered(Lowered(schedule, rows))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dualpipe"])
@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (4, 10)])
def test_csv_goes_out_and_comes_in(name, shape):
    schedule = SCHEDULES[name](*shape)
    assert from_csv(to_csv(schedule), name) == schedule
    assert from_csv(to_csv(lower(schedule)), name) == schedule


def test_csv_is_torchs_both_ways(tmp_path):
    from torch.distributed.pipelining import schedules as torchs

    schedule = SCHEDULES["dualpipev"](4, 10)
    one_rank = torchs.ScheduleDualPipeV._calculate_single_rank_operations
    setup = SimpleNamespace(pp_group_size=4, _n_microbatches=10)
    theirs = SimpleNamespace(pipeline_order={rank: one_rank(setup, rank) for rank in range(4)})
    torchs.PipelineScheduleMulti._dump_csv(theirs, tmp_path / "torch.csv")
    with open(tmp_path / "torch.csv", newline="") as file:
        text = file.read()
    assert to_csv(schedule) == text
    assert from_csv(text, "dualpipev") == schedule

    (tmp_path / "ours.csv").write_bytes(to_csv(schedule).encode())
    read = SimpleNamespace(pipeline_order={}, _validate_and_set_stage_mapping=lambda order: None)
    torchs.PipelineScheduleMulti._load_csv(read, tmp_path / "ours.csv")
    assert read.pipeline_order == theirs.pipeline_order


def test_csv_with_the_communication_of_torch():
    from torch.distributed.pipelining import schedules as torchs

    schedule = SCHEDULES["zb1p"](3, 5)
    order = {
        rank: [torchs._Action.from_str(str(a)) for (a,) in program] for rank, program in enumerate(schedule.programs)
    }
    lowered = torchs._add_send_recv(order, lambda stage: stage, 3)
    text = "\r\n".join(",".join(map(str, ["0UNSHARD", *lowered[rank], ""])) for rank in range(3))
    assert from_csv(text, "zb1p") == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0", r"csv: row 1, column 2: '0X0' is not an action"),
        ("0F0,0B0\r\n\r\n1F0,(1B0;1F1)OVERLAP", r"row 3, column 2: '\(1B0;1F1\)OVERLAP' is not an action"),
        ("0F0,0B0\n0F1,0B1", "stage 0 is in the rows of ranks 0 and 1"),
        ("0F0,0B0\n2F0,2B0", "stage 1 is missing, though there is stage 2"),
        ("0F0,0B0,0F999999999999,0B999999999999", "microbatch 1 is missing"),
        ("", "no actions"),
        ("0F0,0F0,0B0", "0F0 is doubled"),
        ("0F0,0W0,0I0", "0W0 needs 0I0"),
        ("0B0,0F0\n1F0,1B0", "deadlock|needs"),
        ("0F0,0SEND_F0,0B0,0RECV_B0\n1RECV_F0,1F0,1B0,1SEND_B0", "0B0 needs 1B0, which is not there yet"),
        ("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0", r"deadlock under blocking sends: rank 0 in 0SEND_F0\+0RECV_B0"),
        ("0F0,0SEND_F0,0SEND_B0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "0SEND_B0 has nobody on its other end"),
        ("0F0,1SEND_B0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "1SEND_B0 is misplaced"),
    ],
)
def test_bad_csv_is_refused_with_the_place(text, message):
    with pytest.raises(ValueError, match=message) as error:
        from_csv(text)
    assert str(error.value).startswith("csv: ")


def test_two_directions_do_not_fit_csv():
    with pytest.raises(ValueError, match="one direction"):
        to_csv(SCHEDULES["dualpipe"](4, 8))
    with pytest.raises(ValueError, match="one direction"):
        to_csv(lower(SCHEDULES["dualpipe"](4, 8)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["1f1b", "zbv", "interleaved_1f1b", "zb1p"]), st.integers(1, 6), st.integers(1, 14))
def test_paired_schedules_run_and_keep_their_orders(name, pp, num_microbatches):
    schedule = SCHEDULES[name](pp, num_microbatches)
    paired = pair_up(schedule)
    validate(paired)
    check_lowered(lower(paired))
    for ops in ((Op.F,), (Op.B, Op.I)):
        for before, after in zip(schedule.programs, paired.programs, strict=True):
            order = [[(a.stage, a.mb) for slot in p for a in slot if a.op in ops] for p in (before, after)]
            assert order[0] == order[1]


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_paired_1f1b_pairs_all_it_can_in_the_memory_it_says(pp):
    num_microbatches = 4 * pp
    paired = pair_up(SCHEDULES["1f1b"](pp, num_microbatches))
    for rank, program in enumerate(paired.programs):
        num_pairs = sum(len(slot) == 2 for slot in program)
        assert num_pairs == num_microbatches - (2 * (pp - rank) - 1)
        assert simulate(paired).peak_live(rank) == 2 * (pp - rank)


def test_pairs_pay_where_they_hide_travel():
    alone = Costs(f=1.4, i=1.4, w=1.0)
    hidden = Costs(f=1.4, i=1.4, w=1.0, fb=3.0)
    for name in PAIRABLE:
        schedule = SCHEDULES[name](4, 16)
        assert simulate(pair_up(schedule), hidden).step_time < 0.95 * simulate(schedule, alone).step_time
