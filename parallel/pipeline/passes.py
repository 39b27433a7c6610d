"""What is done to schedules: pair them up, add their communication, write and read them as CSV.

`lower` takes all compute slots in one order that the dependencies allow - by their start, when every action takes one
unit of time - and puts the transfer of each result directly behind the slots that start when its own does. Every
rank then gets what concerns it, in that one order. So for any two ranks both sides name the same messages in the same
order, which NCCL needs, since it has no tags; and of all that has not happened yet, the first in that order can
always happen, so that blocking sends cannot deadlock. A receive stands as early as its sender's slot starts: it can
be posted there and be waited for late.
"""

from __future__ import annotations

import csv
import io
import re
from bisect import bisect_left
from collections import deque
from itertools import chain, pairwise

import numpy as np

from parallel.pipeline.actions import (
    OPS,
    Action,
    Lowered,
    Op,
    Program,
    Schedule,
    Slot,
    depends_on,
    make_actions,
)
from parallel.pipeline.replay import replay
from parallel.pipeline.validate import ScheduleError, check_lowered, check_slots, validate

__all__ = [
    "PAIRABLE",
    "Lowered",
    "ScheduleError",
    "check_lowered",
    "forward_only",
    "from_csv",
    "in_turn",
    "lower",
    "pair_up",
    "posted_receives",
    "to_csv",
    "validate",
]

PAIRABLE = ("1f1b", "zbv")  # schedules without pairs, for which they are worth their memory


def lower(schedule: Schedule) -> Lowered:
    """Adds sends and receives: safe with blocking sends, in need of no tags, neighbours in one batch.

    Raises ScheduleError for a schedule that deadlocks. Results that stay on their rank (the turn of a V) need none.
    """
    check_slots(schedule)
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
    src, dst = schedule.rank_A[rows], schedule.ranks_of(reader_A[rows], mb_A[rows])
    crosses = src != dst
    rows, src, dst = rows[crosses], src[crosses], dst[crosses]
    forward = op_A[rows] == Op.F

    # What each rank does, in the one order: by start of the slot; slots that start together come before their
    # transfers. Items are the slots, then the sends, then the receives.
    slot_of_rows = np.searchsorted(slot_S1, rows, side="right") - 1
    rank_I = np.concatenate((np.repeat(np.arange(schedule.num_ranks), np.diff(rank_R1)), src, dst))
    start_I = np.concatenate((start_S, start_S[slot_of_rows], start_S[slot_of_rows]))
    row_I = np.concatenate((np.full(num_slots, -1), rows, rows))  # -1: slots first
    order = np.lexsort((row_I, start_I, rank_I))
    is_message = order >= num_slots
    message = order[is_message] - num_slots
    stages = np.concatenate((stage_A[rows], reader_A[rows]))[message]
    ops = np.concatenate((np.where(forward, Op.SEND_F, Op.SEND_B), np.where(forward, Op.RECV_F, Op.RECV_B)))[message]
    mbs = np.tile(mb_A[rows], 2)[message]
    messages = make_actions(stages.tolist(), map(OPS.__getitem__, ops.tolist()), mbs.tolist())
    return Lowered(schedule, _merge(schedule.programs, messages, is_message, rank_I[order]))


def _merge(
    programs: list[Program], messages: list[Action], is_message: np.ndarray, rank_I: np.ndarray
) -> list[Program]:
    """The slots of `programs` and between them the messages; `is_message` and `rank_I` say whose turn it is, and on
    which rank. Messages between two slots become one slot.
    """
    begins = np.ones(len(rank_I), dtype=bool)  # an item that continues the batch before it does not begin a slot
    begins[1:] = ~(is_message[1:] & is_message[:-1] & (rank_I[1:] == rank_I[:-1]))
    bounds = np.append(np.flatnonzero(begins[is_message]), len(messages)).tolist()
    every = tuple(messages)
    batches = (every[first:end] for first, end in pairwise(bounds))
    slots = chain.from_iterable(programs)
    merged = [next(batches) if one else next(slots) for one in is_message[begins].tolist()]
    ends = np.searchsorted(rank_I[begins], np.arange(len(programs) + 1)).tolist()
    return [merged[first:end] for first, end in pairwise(ends)]


def posted_receives(program: Program, ahead: int) -> list[int]:
    """How many receives of a lowered program are posted before each slot that computes: its own and those that stand
    before the next such slot - and where one of these is missing, at least `ahead` with it."""
    slot_of_receives = [index for index, slot in enumerate(program) for a in slot if a.op in (Op.RECV_F, Op.RECV_B)]
    posted, found = 0, []
    for index, slot in enumerate(program):
        if slot[0].op > Op.W:
            continue
        due = bisect_left(slot_of_receives, index + 2)
        if posted < due:
            posted = min(max(due, posted + ahead), len(slot_of_receives))
        found.append(posted)
    return found


def forward_only(schedule: Schedule) -> Schedule:
    """The schedule's forwards in their order, for evaluation."""
    programs: list[Program] = [
        [(action,) for slot in program for action in slot if action.op is Op.F] for program in schedule.programs
    ]
    return Schedule(f"{schedule.name} (forward only)", programs, schedule.placement, schedule.num_microbatches)


def in_turn(schedule: Schedule) -> Schedule:
    """The same actions in the same order, each in a slot of its own: what runs where pairs are not overlapped."""
    programs: list[Program] = [[(action,) for slot in program for action in slot] for program in schedule.programs]
    return Schedule(schedule.name, programs, schedule.placement, schedule.num_microbatches)


def pair_up(schedule: Schedule) -> Schedule:
    """The same forwards and the same backwards, each in their order, as overlapped pairs wherever a rank has both.

    Merging neighbours alone would stall a pipeline: a rank that answers a forward one pair later than one slot later
    keeps the others waiting. So forwards run ahead: in each round a rank runs its next F and its next backward
    together if what they need was there before the round. On 1F1B, rank r then keeps 2 (PP - r) microbatches, not
    PP - r. A split backward that finds a partner becomes a full B, whose W then hides travel inside the pair; other
    W's fill the rounds in which a rank would idle.
    """
    forwards, backwards = (
        [deque(a for slot in program for a in slot if a.op in ops) for program in schedule.programs]
        for ops in ((Op.F,), (Op.B, Op.I))
    )
    programs: list[Program] = [[] for _ in schedule.programs]
    owed: list[deque[Action]] = [deque() for _ in programs]
    done: set[Action] = set()
    while any(forwards) or any(backwards):
        ran: list[Action] = []
        for rank, program in enumerate(programs):
            queues = forwards[rank], backwards[rank]
            can = [q.popleft() for q in queues if q and done.issuperset(depends_on(q[0], schedule))]
            ran += can
            if len(can) == 2:
                program.append((can[0], can[1]._replace(op=Op.B)))
            elif can:
                program.append((can[0],))
                if can[0].op is Op.I:
                    owed[rank].append(can[0]._replace(op=Op.W))
            elif owed[rank]:
                program.append((owed[rank].popleft(),))
        if not ran:
            validate(schedule)
        done.update(ran)
    for program, weights in zip(programs, owed, strict=True):
        program += [(w,) for w in weights]
    return Schedule(f"{schedule.name} (paired)", programs, schedule.placement, schedule.num_microbatches)


def to_csv(schedule: Schedule | Lowered) -> str:
    """One row a rank, one cell an action, as torch.distributed.pipelining writes it: (0F3;1B2)OVERLAP_F_B is a pair.

    Raises ValueError for more than one route: in that format a stage belongs to one rank.
    """
    num_routes = schedule.schedule.num_routes if isinstance(schedule, Lowered) else schedule.num_routes
    if num_routes > 1:
        raise ValueError(f"CSV holds schedules of one direction, this one has {num_routes}: a stage is on two ranks")
    text = io.StringIO()
    writer = csv.writer(text)
    for program in schedule.programs:
        cells: list[str] = []
        for slot in program:
            if len(slot) == 2 and slot[0].op is Op.F:
                cells.append(f"({slot[0]};{slot[1]})OVERLAP_F_B")
            else:
                cells += map(str, slot)
        writer.writerow(cells)
    return text.getvalue()


def from_csv(text: str, name: str = "csv") -> Schedule:
    """The schedule of such a CSV, validated. Stages are placed on the rank whose row has them; cells may be empty, and
    empty lines are skipped.

    Sends and receives, if there are any, are checked for deadlock - neighbours in a row as one batch - and then
    dropped: `lower` makes them. So are torch's UNSHARD, RESHARD and REDUCE_GRAD. Raises ValueError with the place of
    what is wrong.
    """
    programs: list[Program] = []
    for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
        if not row:
            continue
        programs.append([])
        for column, cell in enumerate(row):
            try:
                slot = _parse_cell(cell)
            except ValueError as error:
                raise ValueError(f"{name}: row {number}, column {column + 1}: {error}") from None
            if slot and slot[0].op > Op.W and programs[-1] and programs[-1][-1][0].op > Op.W:
                programs[-1][-1] += slot
            elif slot:
                programs[-1].append(slot)
    only_compute = [[slot for slot in program if slot[0].op <= Op.W] for program in programs]
    schedule = _place_stages(only_compute, name)
    validate(schedule)
    if only_compute != programs:
        for rank, program in enumerate(programs):
            _check_messages(schedule, program, rank)
        check_lowered(Lowered(schedule, programs))
    return schedule


def _parse_cell(cell: str) -> Slot:
    cell = cell.strip()
    if not cell or re.fullmatch(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)", cell):
        return ()
    if pair := re.fullmatch(r"\(([^;]*);([^;]*)\)OVERLAP_F_B", cell):
        return Action.parse(pair[1]), Action.parse(pair[2])
    return (Action.parse(cell),)


def _place_stages(programs: list[Program], name: str) -> Schedule:
    """The schedule of these programs, if each stage is on one rank and no stage is left out."""
    rank_of: dict[int, int] = {}
    mbs = set()
    for rank, program in enumerate(programs):
        for stage, _, mb in (action for slot in program for action in slot):
            mbs.add(mb)
            if rank_of.setdefault(stage, rank) != rank:
                raise ValueError(f"{name}: stage {stage} is in the rows of ranks {rank_of[stage]} and {rank}: one only")
    for what, numbers in (("stage", rank_of.keys()), ("microbatch", mbs)):
        if not numbers:
            raise ValueError(f"{name}: no actions")
        if max(numbers) >= len(numbers):
            gap = next(k for k in range(len(numbers)) if k not in numbers)
            raise ValueError(f"{name}: {what} {gap} is missing, though there is {what} {max(numbers)}")
    placement = tuple(rank_of[stage] for stage in range(len(rank_of)))
    return Schedule(name, programs, (placement,), len(mbs))


def _check_messages(schedule: Schedule, program: Program, rank: int) -> None:
    """Raises ScheduleError for sends and receives between stages or ranks that do not exist."""
    for index, slot in enumerate(program):
        for action in slot:
            if action.op > Op.W:
                beside = action.stage + (1 if action.op in (Op.SEND_F, Op.RECV_B) else -1)
                known = max(action.stage, beside) < schedule.num_stages and beside >= 0
                if not known or action.mb >= schedule.num_microbatches:
                    reason = f"{action} has nobody on its other end"
                elif schedule.rank_of(action.stage, action.mb) != rank:
                    reason = f"{action} is misplaced: stage {action.stage} is on another rank"
                else:
                    continue
                raise ScheduleError(schedule.name, [program], 0, index, reason)
