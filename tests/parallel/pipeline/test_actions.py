import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Op, Schedule, carried_by, channel_of, depends_on
from parallel.pipeline.replay import link
from parallel.pipeline.schedules import SCHEDULES
from tests.parallel.pipeline.oracle import PLACEMENTS, random_schedule


@given(st.integers(0, 999), st.sampled_from(Op), st.integers(0, 9999))
def test_actions_print_and_parse(stage, op, mb):
    action = Action(stage, op, mb)
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0 3B1", "-1F0", "2f0", "2SEND0"])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ValueError, match="is not an action"):
        Action.parse(text)


def test_the_rule():
    schedule = SCHEDULES["zb1p"](3, 4)
    assert depends_on(Action(0, Op.F, 2), schedule) == ()
    assert depends_on(Action(2, Op.F, 1), schedule) == (Action(1, Op.F, 1),)
    assert depends_on(Action(2, Op.I, 1), schedule) == (Action(2, Op.F, 1),)
    assert depends_on(Action(1, Op.I, 1), schedule) == (Action(1, Op.F, 1), Action(2, Op.I, 1))
    assert depends_on(Action(1, Op.W, 1), schedule) == (Action(1, Op.I, 1),)
    whole = SCHEDULES["1f1b"](3, 4)
    assert depends_on(Action(1, Op.B, 3), whole) == (Action(1, Op.F, 3), Action(2, Op.B, 3))


@pytest.mark.parametrize("shape", PLACEMENTS)
@pytest.mark.parametrize("seed", range(5))
def test_the_compiled_rule_is_the_rule(shape, seed):
    schedule = random_schedule(shape, 3, 5, seed)
    rows = [Action(stage, Op(op), mb) for stage, op, mb in schedule.columns.actions_A3.tolist()]
    assert rows == [action for program in schedule.programs for slot in program for action in slot]
    for row, needs in zip(rows, link(schedule).tolist(), strict=True):
        assert {rows[need] for need in needs if need != -1} == set(depends_on(row, schedule))


@pytest.mark.parametrize(("num_microbatches", "routes"), [(4, "0011"), (5, "00011"), (2, "01"), (1, "0")])
def test_the_first_routes_get_one_more(num_microbatches, routes):
    schedule = Schedule("", [[], []], ((0, 1), (1, 0)), num_microbatches)
    assert "".join(str(schedule.route_of(mb)) for mb in range(num_microbatches)) == routes
    assert [schedule.rank_of(0, mb) for mb in range(num_microbatches)] == [int(route) for route in routes]


def test_messages_know_what_they_carry_and_where():
    schedule = SCHEDULES["dualpipe"](4, 8)
    assert schedule.stages_of(1) == (1, 2)
    for mb, lower_rank, higher_rank in ((0, 1, 2), (7, 2, 1)):
        assert channel_of(Action(1, Op.SEND_F, mb), schedule) == (lower_rank, higher_rank)
        assert channel_of(Action(2, Op.RECV_F, mb), schedule) == (lower_rank, higher_rank)
        assert channel_of(Action(2, Op.SEND_B, mb), schedule) == (higher_rank, lower_rank)
        assert channel_of(Action(1, Op.RECV_B, mb), schedule) == (higher_rank, lower_rank)
    for message in (Action(1, Op.SEND_F, 0), Action(2, Op.RECV_F, 0)):
        assert carried_by(message, schedule) == Action(1, Op.F, 0)
    for name, op in (("zb1p", Op.I), ("1f1b", Op.B)):
        for message in (Action(2, Op.SEND_B, 3), Action(1, Op.RECV_B, 3)):
            assert carried_by(message, SCHEDULES[name](4, 8)) == Action(2, op, 3)
