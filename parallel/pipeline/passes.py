"""What is done to schedules: check them, add their communication, write and read them as CSV.

`lower` takes all compute slots in one order that the dependencies allow - by their start, when every F, I and W takes
one unit of time - and puts the transfer of each result directly behind the slot that makes it. Every rank then gets
what concerns it, in that one order. So for any two ranks both sides name the same messages in the same order, which
NCCL needs, since it has no tags; and of all that has not happened yet, the first in that order can always happen, so
that blocking sends cannot deadlock. A receive stands as early as its sender's slot starts: it can be posted there and
be waited for late.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from parallel.pipeline.actions import Action, Op, Program, Schedule, Slot, depends_on, make_actions
from parallel.pipeline.replay import rank_of_rows, replay


class ScheduleError(ValueError):
    """A schedule that cannot run. `rank` and `slot` say where, `reason` why; `grid` is the text of the place,
    marked."""

    def __init__(self, schedule: Schedule, rank: int, slot: int, reason: str):
        self.rank, self.slot, self.reason = rank, slot, reason
        self.grid = _grid(schedule, rank, slot)
        super().__init__(f"{schedule.name}: rank {rank}, slot {slot}: {reason}\n{self.grid}")


@dataclass(frozen=True)
class Lowered:
    """A schedule with communication: `programs` has compute slots as before, and slots of sends and receives
    between."""

    schedule: Schedule
    programs: list[Program]


def _text(slot: Slot) -> str:
    return "&".join(map(str, slot))


def _grid(schedule: Schedule, rank: int, slot: int, before: int = 6, after: int = 4) -> str:
    """The programs around a slot, one line a rank, the slot in brackets."""
    first = max(slot - before, 0)
    rows = []
    for r, program in enumerate(schedule.programs):
        if abs(r - rank) <= 4:
            cells = [_text(s) for s in program[first : slot + after + 1]]
            if r == rank:
                cells += [""] * (slot - first + 1 - len(cells))
                cells[slot - first] = f"[{cells[slot - first] or 'nothing'}]"
            rows.append((f"rank {r}", *cells))
    width = max(len(cell) for row in rows for cell in row[1:] or [""])
    head = f"slots {first} to {slot + after}"
    return "\n".join([head, *(row[0].ljust(9) + " ".join(cell.ljust(width) for cell in row[1:]) for row in rows)])


def lower(schedule: Schedule) -> Lowered:
    """Adds sends and receives: safe with blocking sends, in need of no tags, neighbours in one batch.

    Raises ScheduleError for a schedule that deadlocks. Results that stay on their rank (the turn of a V) need none.
    """
    rank_R1, slot_S1, actions_A3 = schedule.columns
    num_slots = len(slot_S1) - 1
    ones_S = np.diff(slot_S1).astype(np.float64)
    start_S, _, _, next_R = replay(schedule, ones_S, np.repeat(ones_S, np.diff(slot_S1)))
    if (next_R != rank_R1[1:]).any():
        validate(schedule)

    # Transfers, by the row that makes the result: from src, where it is made, to dst, where the stage beside it is.
    stage_A, op_A, mb_A = actions_A3.T
    reader_A = np.where(op_A == Op.F, stage_A + 1, stage_A - 1)
    rows = np.flatnonzero((op_A != Op.W) & (reader_A >= 0) & (reader_A < schedule.num_stages))
    src, dst = rank_of_rows(schedule)[rows], ranks_of(schedule, reader_A[rows], mb_A[rows])
    crosses = src != dst
    rows, src, dst = rows[crosses], src[crosses], dst[crosses]
    forward = op_A[rows] == Op.F
    mbs = mb_A[rows].tolist()
    sends = make_actions(stage_A[rows].tolist(), _where(forward, Op.SEND_F, Op.SEND_B), mbs)
    receives = make_actions(reader_A[rows].tolist(), _where(forward, Op.RECV_F, Op.RECV_B), mbs)

    # What each rank does, in the one order: by start of the slot; slots that start together come before their transfers.
    items = [slot for program in schedule.programs for slot in program] + sends + receives
    slot_of_rows = np.searchsorted(slot_S1, rows, side="right") - 1
    rank_I = np.concatenate((np.repeat(np.arange(schedule.num_ranks), np.diff(rank_R1)), src, dst))
    start_I = np.concatenate((start_S, start_S[slot_of_rows], start_S[slot_of_rows]))
    row_I = np.concatenate((np.full(num_slots, -1), rows, rows))  # -1: slots first
    order = np.lexsort((row_I, start_I, rank_I))
    return Lowered(schedule, _batch(items, order, num_slots, rank_I[order], schedule.num_ranks))


def _where(condition: np.ndarray, yes: Op, no: Op) -> list[Op]:
    return [yes if one else no for one in condition.tolist()]


def _batch(items: list, order: np.ndarray, num_slots: int, rank_I: np.ndarray, num_ranks: int) -> list[Program]:
    """Programs of the items in this order: the first `num_slots` are slots, runs of the others become one slot."""
    transfers = order >= num_slots
    begins = np.ones(len(order), dtype=bool)  # an item that continues the batch before it does not begin a slot
    begins[1:] = ~(transfers[1:] & transfers[:-1] & (rank_I[1:] == rank_I[:-1]))
    firsts = np.flatnonzero(begins)
    ends = np.append(firsts[1:], len(order))
    ordered = [items[k] for k in order.tolist()]
    slots = [
        tuple(ordered[first:end]) if transfer else ordered[first]
        for first, end, transfer in zip(firsts.tolist(), ends.tolist(), transfers[firsts].tolist(), strict=True)
    ]
    bounds = np.searchsorted(rank_I[firsts], np.arange(num_ranks + 1)).tolist()
    return [slots[first:end] for first, end in pairwise(bounds)]


def validate(schedule: Schedule, memory_limit: float | None = None) -> None:
    """Raises ScheduleError unless every action stands once, on its rank, and every rank can run to its end.

    memory_limit: the most activations that a rank may hold, in those of one microbatch of 1/PP of the model.
    """
    rank_R1, slot_S1, actions_A3 = schedule.columns
    _check_slots(schedule)
    _check_once(schedule)
    ones_S = np.ones(len(slot_S1) - 1)
    _, _, _, next_R = replay(schedule, ones_S, np.ones(len(actions_A3)))
    if (next_R != rank_R1[1:]).any():
        _explain_deadlock(schedule, (next_R - rank_R1[:-1]).tolist())
    if memory_limit is not None:
        _check_memory(schedule, memory_limit)


def ranks_of(schedule: Schedule, stages: np.ndarray, mbs: np.ndarray) -> np.ndarray:
    """`schedule.rank_of`, of many at once."""
    route_of_mb = np.array([schedule.route_of(mb) for mb in range(schedule.num_microbatches)], dtype=np.int64)
    return np.array(schedule.placement)[route_of_mb[mbs], stages]


def _place(schedule: Schedule, row: int) -> tuple[int, int]:
    """(rank, slot) of a row of `schedule.columns`."""
    rank_R1, slot_S1, _ = schedule.columns
    slot = int(np.searchsorted(slot_S1, row, side="right")) - 1
    rank = int(np.searchsorted(rank_R1, slot, side="right")) - 1
    return rank, slot - int(rank_R1[rank])


def _action(schedule: Schedule, row: int) -> Action:
    stage, op, mb = schedule.columns.actions_A3[row].tolist()
    return Action(stage, Op(op), mb)


def _check_slots(schedule: Schedule) -> None:
    """Slots are one compute action or a pair; the actions exist, and stand on the rank that has their stage."""
    _, slot_S1, actions_A3 = schedule.columns
    stage_A, op_A, mb_A = actions_A3.T

    def fail(row: int, reason: str) -> None:
        raise ScheduleError(schedule, *_place(schedule, row), reason)

    for row in np.flatnonzero(op_A > Op.W)[:1]:
        fail(row, f"{_action(schedule, row)} is communication: schedules only compute, lower() adds the rest")
    wrong = (stage_A < 0) | (stage_A >= schedule.num_stages) | (mb_A < 0) | (mb_A >= schedule.num_microbatches)
    for row in np.flatnonzero(wrong)[:1]:
        there = f"stages 0 to {schedule.num_stages - 1}, microbatches 0 to {schedule.num_microbatches - 1}"
        fail(row, f"{_action(schedule, row)} does not exist: there are {there}")
    placed_A = ranks_of(schedule, stage_A, mb_A)
    for row in np.flatnonzero(placed_A != rank_of_rows(schedule))[:1]:
        fail(row, f"{_action(schedule, row)} is misplaced: the placement has it on rank {placed_A[row]}")
    size_S = np.diff(slot_S1)
    for slot in np.flatnonzero((size_S < 1) | (size_S > 2))[:1]:
        fail(slot_S1[slot], f"a slot has one action or an overlapped pair, this one has {size_S[slot]}")
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
        raise ScheduleError(schedule, rank, again, f"{Action(stage, Op(op), mb)} is doubled: it ran in slot {slot}")
    f, b, i, w = count
    for missing, what in (
        (f == 0, Op.F),
        ((b == 0) & (i == 0), Op.W if (w > 0).any() else Op.B),
        ((b == 0) & (w == 0), Op.W),
    ):
        for stage, mb in np.argwhere(missing)[:1].tolist():
            absent = f"{Action(stage, Op.I, mb)}" if what is Op.W and not i[stage, mb] else Action(stage, what, mb)
            rank = schedule.rank_of(stage, mb)
            raise ScheduleError(schedule, rank, len(schedule.programs[rank]), f"{absent} is missing")
    for stage, mb in np.argwhere((b > 0) & ((i > 0) | (w > 0)))[:1].tolist():
        op = Op.I if i[stage, mb] else Op.W
        row = int(np.flatnonzero(key_A == np.ravel_multi_index((op, stage, mb), shape))[0])
        full = Action(stage, Op.B, mb)
        raise ScheduleError(
            schedule, *_place(schedule, row), f"{_action(schedule, row)} is doubled: {full} includes it"
        )


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
            raise ScheduleError(schedule, rank, stuck_at[rank], f"{action} needs {need}, which runs {where}")
        rank = place[need][0]
    cycle = chain[chain.index(rank) :]
    waits = "; ".join(
        "rank {} with {} waits for {}".format(r, *blocker(r)) + f" of rank {place[blocker(r)[1]][0]}" for r in cycle
    )
    raise ScheduleError(schedule, rank, stuck_at[rank], f"deadlock: {waits}")


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
            raise ScheduleError(schedule, rank, slot, held)
