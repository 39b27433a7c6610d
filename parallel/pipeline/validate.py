"""What can be wrong with a schedule, or go wrong as it runs, said at the place where it is wrong.

`validate` looks at schedules, which only compute: is every action there once, on its rank, after what it needs? and
does no rank hold more activations than it may? `check_lowered` looks at programs with communication: would they run
with sends that block until they are received, and messages that are told apart by their order alone?
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NoReturn

import numpy as np

from parallel.pipeline.actions import Action, Lowered, Op, Program, Schedule, Slot, carried_by, channel_of, depends_on
from parallel.pipeline.replay import replay


class ScheduleError(ValueError):
    """Programs that cannot run. `rank` and `slot` say where, `reason` why; `grid` is the text of the place, marked.

    The first line of the message is the error, the rest the grid.
    """

    def __init__(self, name: str, programs: list[Program], rank: int, slot: int, reason: str):
        self.rank, self.slot, self.reason = rank, slot, reason
        self.grid = _grid(programs, rank, slot)
        super().__init__(f"{name}: rank {rank}, slot {slot}: {reason}\n{self.grid}")


class PipelineError(RuntimeError):
    """A rank could not finish its step: says in which slot and why, and shows the slot in the grid below.

    Raised from what went wrong: a ConnectionError where another rank is lost.
    """

    def __init__(self, schedule: Schedule, rank: int, slot: int, cause: Exception):
        said = str(cause).partition("\n")[0]
        reason = said if isinstance(cause, ConnectionError) else f"{type(cause).__name__}: {said}"
        super().__init__(str(ScheduleError(schedule.name, schedule.programs, rank, slot, reason)))


def _text(slot: Slot) -> str:
    return ("&" if slot and slot[0].op <= Op.W else "+").join(map(str, slot))


def _grid(programs: list[Program], rank: int, slot: int, before: int = 6, after: int = 4) -> str:
    """The programs around a slot, one line a rank, the slot in brackets."""
    first = max(slot - before, 0)
    rows = []
    for r, program in enumerate(programs):
        if abs(r - rank) <= 4:
            cells = [_text(s) for s in program[first : slot + after + 1]]
            if r == rank:
                cells += [""] * (slot - first + 1 - len(cells))
                cells[slot - first] = f"[{cells[slot - first] or 'nothing'}]"
            rows.append((f"rank {r}", *cells))
    width = max(len(cell) for row in rows for cell in row[1:] or [""])
    head = f"slots {first} to {slot + after}"
    return "\n".join([head, *(row[0].ljust(9) + " ".join(cell.ljust(width) for cell in row[1:]) for row in rows)])


def validate(schedule: Schedule, memory_limit: float | None = None) -> None:
    """Raises ScheduleError unless every action stands once, on its rank, and every rank can run to its end.

    memory_limit: the most activations that a rank may hold, in those of one microbatch of 1/PP of the model.
    """
    rank_R1, slot_S1, actions_A3 = schedule.columns
    check_slots(schedule)
    _check_once(schedule)
    ones_S = np.ones(len(slot_S1) - 1)
    _, _, _, next_R = replay(schedule, ones_S, np.ones(len(actions_A3)))
    if (next_R != rank_R1[1:]).any():
        _explain_deadlock(schedule, (next_R - rank_R1[:-1]).tolist())
    if memory_limit is not None:
        _check_memory(schedule, memory_limit)


def _error(schedule: Schedule, rank: int, slot: int, reason: str) -> ScheduleError:
    return ScheduleError(schedule.name, schedule.programs, rank, slot, reason)


def _place(schedule: Schedule, row: int) -> tuple[int, int]:
    """(rank, slot) of a row of `schedule.columns`."""
    rank_R1, slot_S1, _ = schedule.columns
    slot = int(np.searchsorted(slot_S1, row, side="right")) - 1
    rank = int(np.searchsorted(rank_R1, slot, side="right")) - 1
    return rank, slot - int(rank_R1[rank])


def _action(schedule: Schedule, row: int) -> Action:
    stage, op, mb = schedule.columns.actions_A3[row].tolist()
    return Action(stage, Op(op), mb)


def check_slots(schedule: Schedule) -> None:
    """Slots are one compute action or a pair; the actions exist, and stand on the rank that has their stage."""
    rank_R1, slot_S1, actions_A3 = schedule.columns
    stage_A, op_A, mb_A = actions_A3.T

    def fail(row: int, reason: str) -> NoReturn:
        raise _error(schedule, *_place(schedule, row), reason)

    size_S = np.diff(slot_S1)
    for slot in np.flatnonzero((size_S < 1) | (size_S > 2))[:1]:
        rank = int(np.searchsorted(rank_R1, slot, side="right")) - 1
        reason = f"a slot has one action or an overlapped pair, this one has {size_S[slot]}"
        raise _error(schedule, rank, int(slot - rank_R1[rank]), reason)
    for row in np.flatnonzero(op_A > Op.W)[:1]:
        fail(row, f"{_action(schedule, row)} is communication: schedules only compute, lower() adds the rest")
    wrong = (stage_A < 0) | (stage_A >= schedule.num_stages) | (mb_A < 0) | (mb_A >= schedule.num_microbatches)
    for row in np.flatnonzero(wrong)[:1]:
        there = f"stages 0 to {schedule.num_stages - 1}, microbatches 0 to {schedule.num_microbatches - 1}"
        fail(row, f"{_action(schedule, row)} does not exist: there are {there}")
    placed_A = schedule.ranks_of(stage_A, mb_A)
    for row in np.flatnonzero(placed_A != schedule.rank_A)[:1]:
        fail(row, f"{_action(schedule, row)} is misplaced: the placement has it on rank {placed_A[row]}")
    first = slot_S1[:-1][size_S == 2]
    for row in first[(op_A[first] != Op.F) | ((op_A[first + 1] != Op.B) & (op_A[first + 1] != Op.I))][:1]:
        pair = f"{_action(schedule, row)}&{_action(schedule, row + 1)}"
        fail(row, f"{pair} is no overlapped pair: an F comes first, a B or I second")


def _check_once(schedule: Schedule) -> None:
    """Every stage has one F of every microbatch, and either one B, or one I and one W."""
    stage_A, op_A, mb_A = schedule.columns.actions_A3.T
    shape = (4, schedule.num_stages, schedule.num_microbatches)
    key_A = np.ravel_multi_index((op_A, stage_A, mb_A), shape)
    count = np.bincount(key_A, minlength=int(np.prod(shape))).reshape(shape)
    for op, stage, mb in np.argwhere(count > 1)[:1].tolist():
        rows = np.flatnonzero(key_A == np.ravel_multi_index((op, stage, mb), shape))
        (rank, slot), (_, again) = (_place(schedule, int(row)) for row in rows[:2])
        raise _error(schedule, rank, again, f"{Action(stage, Op(op), mb)} is doubled: it ran in slot {slot}")
    f, b, i, w = count
    for missing, op in ((f == 0, Op.F), ((b == 0) & (i == 0), Op.B), ((b == 0) & (w == 0), Op.W)):
        for stage, mb in np.argwhere(missing)[:1].tolist():
            absent = Action(stage, Op.I if op is Op.B and w[stage, mb] else op, mb)
            rank = schedule.rank_of(stage, mb)
            raise _error(schedule, rank, len(schedule.programs[rank]), f"{absent} is missing")
    for stage, mb in np.argwhere((b > 0) & ((i > 0) | (w > 0)))[:1].tolist():
        op = Op.I if i[stage, mb] else Op.W
        row = int(np.flatnonzero(key_A == np.ravel_multi_index((op, stage, mb), shape))[0])
        full = Action(stage, Op.B, mb)
        raise _error(schedule, *_place(schedule, row), f"{_action(schedule, row)} is doubled: {full} includes it")


def _explain_deadlock(schedule: Schedule, stuck_at: list[int]) -> None:
    """Raises the error for a replay in which rank r could not run slot stuck_at[r]."""
    place = {
        action: (rank, slot)
        for rank, program in enumerate(schedule.programs)
        for slot, actions in enumerate(program)
        for action in actions
    }

    def blocker(rank: int) -> tuple[Action, Action]:
        return next(
            (action, need)
            for action in schedule.programs[rank][stuck_at[rank]]
            for need in depends_on(action, schedule)
            if place[need][1] >= stuck_at[place[need][0]]
        )

    rank = next(r for r, program in enumerate(schedule.programs) if stuck_at[r] < len(program))
    chain: list[int] = []
    while rank not in chain:  # whoever waits, waits for a rank that waits: the chain must close
        chain.append(rank)
        action, need = blocker(rank)
        if place[need][0] == rank:
            slot = place[need][1]
            where = "in the same slot" if slot == stuck_at[rank] else f"only in slot {slot}"
            raise _error(schedule, rank, stuck_at[rank], f"{action} needs {need}, which runs {where}")
        rank = place[need][0]
    cycle = chain[chain.index(rank) :]
    waits = "; ".join(
        "rank {} with {} waits for {}".format(r, *blocker(r)) + f" of rank {place[blocker(r)[1]][0]}" for r in cycle
    )
    raise _error(schedule, rank, stuck_at[rank], f"deadlock: {waits}")


def _check_memory(schedule: Schedule, limit: float) -> None:
    """Counts activations in program order: F takes one share before its slot, B or W gives it back after."""
    rank_R1, slot_S1, actions_A3 = schedule.columns
    op_A = actions_A3[:, 1]
    share = schedule.num_ranks / schedule.num_stages
    taken_S = np.add.reduceat((op_A == Op.F).astype(np.int64), slot_S1[:-1])
    given_S = np.add.reduceat(((op_A == Op.B) | (op_A == Op.W)).astype(np.int64), slot_S1[:-1])
    for rank in range(schedule.num_ranks):
        slots = slice(rank_R1[rank], rank_R1[rank + 1])
        live = np.cumsum(taken_S[slots] - given_S[slots]) + given_S[slots]
        for slot in np.flatnonzero(live * share > limit + 1e-9)[:1].tolist():
            held = f"{live[slot] * share:g} activations are live, the limit is {limit:g}"
            raise _error(schedule, rank, slot, held)


def check_lowered(lowered: Lowered) -> None:
    """Runs programs with communication the hard way; raises ScheduleError where they go wrong.

    All actions of a slot of communication are posted at once, and the rank goes on when all are done. A send is done
    when it is received. The k-th send from one rank to another meets the k-th receive there, whatever they carry.
    """
    schedule, programs = lowered.schedule, lowered.programs
    at = [0] * len(programs)  # the slot each rank is in
    pending = [0] * len(programs)  # its messages that are posted and not done
    there: list[set[Action]] = [set() for _ in programs]  # what has been made or received on each rank
    posted: dict[tuple[int, int], tuple[deque[Action], deque[Action]]] = defaultdict(lambda: (deque(), deque()))

    def fail(rank: int, reason: str) -> NoReturn:
        raise ScheduleError(schedule.name, programs, rank, at[rank], reason)

    def post(rank: int, message: Action) -> None:
        sends = message.op in (Op.SEND_F, Op.SEND_B)
        if sends and carried_by(message, schedule) not in there[rank]:
            fail(rank, f"{message} sends the result of {carried_by(message, schedule)}, which is not there yet")
        posted[channel_of(message, schedule)][not sends].append(message)
        pending[rank] += 1

    def meet(channel: tuple[int, int]) -> None:
        sends, receives = posted[channel]
        while sends and receives:
            send, receive = sends.popleft(), receives.popleft()
            if carried_by(send, schedule) != carried_by(receive, schedule):
                fail(channel[1], f"{receive} would receive {send} of rank {channel[0]}, which was sent before")
            there[channel[1]].add(carried_by(send, schedule))
            for rank in channel:
                pending[rank] -= 1
                if not pending[rank]:
                    at[rank] += 1
                    awake.append(rank)

    awake = list(range(len(programs)))
    while awake:
        rank = awake.pop()
        while at[rank] < len(programs[rank]) and not pending[rank]:
            slot = programs[rank][at[rank]]
            messages = [action for action in slot if action.op > Op.W]
            for action in slot:
                if action.op > Op.W:
                    post(rank, action)
                elif missing := [need for need in depends_on(action, schedule) if need not in there[rank]]:
                    fail(rank, f"{action} needs {missing[0]}, which is not there yet")
            there[rank].update(action for action in slot if action.op <= Op.W)
            if not messages:
                at[rank] += 1
            for channel in {channel_of(message, schedule): None for message in messages}:
                meet(channel)
    stuck = [rank for rank, program in enumerate(programs) if at[rank] < len(program)]
    if stuck:
        waits = "; ".join(f"rank {rank} in {_text(programs[rank][at[rank]])}" for rank in stuck[:4])
        fail(stuck[0], f"deadlock under blocking sends: {waits}{' ...' if len(stuck) > 4 else ''}")
