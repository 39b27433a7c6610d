"""The words of a pipeline: actions, slots, schedules - and the one rule that says what an action waits for.

A *stage* is a contiguous piece of the model, a *microbatch* a piece of the batch. What a rank does to them is an
`Action`, which prints and parses as ``2F0``: stage 2, forward, microbatch 0. The letters are those of
torch.distributed.pipelining:

    F   forward
    B   full backward, B = I + W
    I   input gradient                      (the zero-bubble paper calls our I "B" and our W "W")
    W   weight gradient

    SEND_F RECV_F   the output of a forward, from the rank of one stage to the rank of the next
    SEND_B RECV_B   the gradient of a stage's input, from the rank of one stage to the rank of the one before

A rank's *program* is a list of *slots*; a slot is a tuple of actions, nearly always of one. A slot of two is an
overlapped pair: a forward of one microbatch laid over a backward (B or I) of another. A slot of communication actions
is one batch of sends and receives, posted together; only `passes.lower` makes those.

A `Schedule` is data: the programs and the placement. It owns no stages, knows no time, and imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import NamedTuple

import numpy as np


class Op(IntEnum):
    F = 0
    B = 1
    I = 2
    W = 3
    SEND_F = 4
    RECV_F = 5
    SEND_B = 6
    RECV_B = 7

    __hash__ = int.__hash__  # Enum's own is in Python: every set and dict of actions would call it

    def __str__(self) -> str:
        return self.name


OPS = tuple(Op)  # by number, several times as fast as Op(number)
_ACTION = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W)(\d+)")


class Action(NamedTuple):
    """Operation `op` of stage `stage` on microbatch `mb`; for sends and receives, `stage` is the one on this rank."""

    stage: int
    op: Op
    mb: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.name}{self.mb}"

    @staticmethod
    def parse(text: str) -> Action:
        """The inverse of `str`. Raises ValueError on anything that is not an action."""
        match = _ACTION.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not an action: expected stage, op ({' '.join(Op.__members__)}) and microbatch, as in 2F0"
            )
        return Action(int(match[1]), Op[match[2]], int(match[3]))


Slot = tuple[Action, ...]
Program = list[Slot]


def make_actions(stages: Iterable[int], ops: Iterable[Op], mbs: Iterable[int]) -> list[Action]:
    """Many actions at once, several times as fast as one by one."""
    return list(map(tuple.__new__, repeat(Action), zip(stages, ops, mbs, strict=False)))


def slots_of(stage: int, op: Op, mbs: Iterable[int]) -> Program:
    """Slots of one action each: `op` of `stage` on each of `mbs`."""
    return list(zip(make_actions(repeat(stage), repeat(op), mbs), strict=True))


class Columns(NamedTuple):
    """Programs as integers, for what must be fast: R ranks, S slots, A actions, each in the order of the rank before
    it.

    Rank r has the slots rank_R1[r] to rank_R1[r + 1], slot s the actions slot_S1[s] to slot_S1[s + 1]; a row of
    actions_A3 is stage, op, microbatch.
    """

    rank_R1: np.ndarray
    slot_S1: np.ndarray
    actions_A3: np.ndarray


@dataclass(frozen=True)
class Schedule:
    """What every rank computes, in order.

    `placement` has one row a *route*; `placement[route][stage]` is the rank that runs `stage` for the microbatches of
    that route. One-directional schedules have one route. DualPipe has two: the first half of the microbatches runs
    down the ranks, the second half up, so that rank r holds stage r and stage PP-1-r. Microbatches are numbered over
    all routes, the first route's first; with an uneven number the first routes get one more.
    """

    name: str
    programs: list[Program]
    placement: tuple[tuple[int, ...], ...]
    num_microbatches: int

    def __post_init__(self) -> None:
        for what, number in (
            ("rank", self.num_ranks),
            ("stage", self.num_stages),
            ("microbatch", self.num_microbatches),
        ):
            if number < 1:
                raise ValueError(f"{self.name}: there must be at least one {what}")

    @property
    def num_ranks(self) -> int:
        return len(self.programs)

    @property
    def num_stages(self) -> int:
        return len(self.placement[0])

    @property
    def num_routes(self) -> int:
        return len(self.placement)

    def route_of(self, mb: int) -> int:
        """The route that microbatch `mb` takes."""
        quotient, remainder = divmod(self.num_microbatches, self.num_routes)
        in_longer = (quotient + 1) * remainder
        return mb // (quotient + 1) if mb < in_longer else remainder + (mb - in_longer) // quotient

    def rank_of(self, stage: int, mb: int) -> int:
        """The rank that runs `stage` for microbatch `mb`."""
        return self.placement[self.route_of(mb)][stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds, over all routes, in ascending order."""
        return tuple(sorted({s for route in self.placement for s, r in enumerate(route) if r == rank}))

    def ranks_of(self, stages: np.ndarray, mbs: np.ndarray) -> np.ndarray:
        """`rank_of`, for many at once."""
        route_of = np.array([self.route_of(mb) for mb in range(self.num_microbatches)], dtype=np.int64)
        return np.array(self.placement)[route_of[mbs], stages]

    @cached_property
    def columns(self) -> Columns:
        """The programs as arrays."""
        slots = list(chain.from_iterable(self.programs))
        return Columns(
            rank_R1=np.array([0, *accumulate(map(len, self.programs))]),
            slot_S1=np.array([0, *accumulate(map(len, slots))]),
            actions_A3=np.fromiter(chain.from_iterable(chain.from_iterable(slots)), np.int64).reshape(-1, 3),
        )

    @cached_property
    def rank_A(self) -> np.ndarray:
        """The rank in whose program each row of `columns` stands."""
        rank_R1, slot_S1, _ = self.columns
        return np.repeat(np.arange(self.num_ranks, dtype=np.int32), np.diff(slot_S1[rank_R1]))

    def backward_of(self, stage: int, mb: int) -> Action:
        """The action that makes the gradient of the input of `stage`: its B, or its I where the backward is split."""
        return Action(stage, Op.I if (stage, mb) in self.split_backwards else Op.B, mb)

    @cached_property
    def split_backwards(self) -> frozenset[tuple[int, int]]:
        """The (stage, mb) whose backward is split into I and W."""
        return frozenset((a.stage, a.mb) for program in self.programs for slot in program for a in slot if a.op is Op.I)


@dataclass(frozen=True)
class Lowered:
    """A schedule with communication: `programs` has its compute slots, and between them slots of sends and receives."""

    schedule: Schedule
    programs: list[Program]


# THE rule, as data: what an op needs is the op named here of the stage so many further down the model. B stands for the
# backward of that stage: for its B, or for its I where it is split.
NEEDS: dict[Op, tuple[tuple[int, Op], ...]] = {
    Op.F: ((-1, Op.F),),
    Op.B: ((0, Op.F), (1, Op.B)),
    Op.I: ((0, Op.F), (1, Op.B)),
    Op.W: ((0, Op.I),),
}


def depends_on(action: Action, schedule: Schedule) -> tuple[Action, ...]:
    """The actions whose results `action` needs: THE rule, asked by all that checks, lowers, simulates or runs.

    F needs the F of the stage before; B and I need their own F and the B or I of the stage after; W needs its own I.
    """
    result = []
    for offset, op in NEEDS[action.op]:
        stage = action.stage + offset
        if 0 <= stage < schedule.num_stages:
            result.append(schedule.backward_of(stage, action.mb) if op is Op.B else Action(stage, op, action.mb))
    return tuple(result)


def carried_by(message: Action, schedule: Schedule) -> Action:
    """The action whose result a send or receive carries."""
    stage, op, mb = message
    if op in (Op.SEND_F, Op.RECV_F):
        return Action(stage if op is Op.SEND_F else stage - 1, Op.F, mb)
    return schedule.backward_of(stage if op is Op.SEND_B else stage + 1, mb)


def channel_of(message: Action, schedule: Schedule) -> tuple[int, int]:
    """(rank that sends, rank that receives) a send or receive."""
    stage, op, mb = message
    beside = stage + (1 if op in (Op.SEND_F, Op.RECV_B) else -1)
    ranks = schedule.rank_of(stage, mb), schedule.rank_of(beside, mb)
    return ranks if op in (Op.SEND_F, Op.SEND_B) else ranks[::-1]
