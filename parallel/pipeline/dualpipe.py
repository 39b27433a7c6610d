"""DualPipe and DualPipeV: eight phases that lay forwards of one direction over backwards of the other.

Both are one order. Half a pipeline has h ranks, and sees microbatches in two *directions*: 0 enters at its outer end
and runs inwards, 1 comes back outwards. DualPipe has two such halves, mirrored: direction 0 of one is direction 1 of
the other. DualPipeV folds a chain of 2h stages at its middle, so that direction 1 is direction 0 on its way back. A
rank's *position* is its distance from the outer end. (DeepSeek-V3 report, section 3.2.1; the phases are those of
DeepSeek's published code.)

The phases want h microbatches a stage of the half, so 2h a direction. With fewer, the order is that of 2h with the
microbatches that do not exist struck out: still valid, still as low in memory, but with forwards and backwards that
have lost the partner to overlap with.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from parallel.pipeline.actions import Action, Op, Program, Schedule, Slot


class _Direction(NamedTuple):
    stage: int
    first_mb: int
    num_microbatches: int


def phase_counts(half: int, position: int, num_microbatches: int) -> tuple[int, ...]:
    """How often a rank at `position` of a half of `half` ranks runs each of the eight phases.

    `num_microbatches` is that of one direction, at least 2 * half.
    """
    outward, inward = half - 1 - position, position + 1
    main = num_microbatches - 2 * half + inward
    return 2 * outward, inward, outward, main, outward, inward, outward, inward


def _program(half: int, position: int, directions: tuple[_Direction, _Direction]) -> Program:
    slots: Program = []
    forwards, backwards = [0, 0], [0, 0]
    owed: deque[Slot] = deque()

    def make(direction: int, op: Op, index: int) -> Slot:
        stage, first_mb, num_microbatches = directions[direction]
        return (Action(stage, op, first_mb + index),) if index < num_microbatches else ()

    def forward(direction: int) -> Slot:
        forwards[direction] += 1
        return make(direction, Op.F, forwards[direction] - 1)

    def backward(direction: int, split: bool = False) -> Slot:
        index = backwards[direction]
        backwards[direction] += 1
        if split:
            owed.append(make(direction, Op.W, index))
        return make(direction, Op.I if split else Op.B, index)

    most = max(2 * half, *(direction.num_microbatches for direction in directions))
    f0, f0f1, i1wf1, main, b1f1b0, b1b0, wi0, w = phase_counts(half, position, most)
    for _ in range(f0):
        slots += (forward(0),)
    for _ in range(f0f1):
        slots += forward(0), forward(1)
    for _ in range(i1wf1):
        slots += backward(1, split=True), owed.popleft(), forward(1)
    for k in range(main):
        if k == 0 and position == half - 1:  # at the middle the first pair is pulled apart: the others wait for its F
            slots += forward(0), backward(1)
        else:
            slots += (forward(0) + backward(1),)
        slots += (forward(1) + backward(0),)
    for _ in range(b1f1b0):
        slots += backward(1), forward(1) + backward(0)
    for k in range(2 * b1b0):  # from the middle on, the backwards are split; on every second rank one slot later
        slots += (backward(1 - k % 2, split=k >= b1b0 // 2 * 2 + (position + 1) % 2),)
    for _ in range(wi0):
        slots += owed.popleft(), backward(0, split=True)
    slots += owed
    assert len(owed) == w
    return [slot for slot in slots if slot]


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe: two routes, down and up the same ranks; rank r holds stages r and num_ranks - 1 - r.

    Raises ValueError for an odd number of ranks, or fewer than two microbatches.
    """
    if num_ranks < 2 or num_ranks % 2:
        raise ValueError(f"dualpipe needs an even number of ranks, got {num_ranks}: use {num_ranks + 1}, or dualpipev")
    if num_microbatches < 2:
        raise ValueError(f"dualpipe needs a microbatch for each of its two directions, got {num_microbatches}")
    down = (num_microbatches + 1) // 2
    programs = []
    for rank in range(num_ranks):
        directions = (
            _Direction(rank, 0, down),
            _Direction(num_ranks - 1 - rank, down, num_microbatches - down),
        )
        position = min(rank, num_ranks - 1 - rank)
        programs.append(_program(num_ranks // 2, position, directions if rank == position else directions[::-1]))
    ranks = tuple(range(num_ranks))
    return Schedule("dualpipe", programs, (ranks, ranks[::-1]), num_microbatches)


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV: 2 * num_ranks stages, folded into a V; rank r holds stages r and 2 * num_ranks - 1 - r."""
    programs = []
    for rank in range(num_ranks):
        out, back = (_Direction(s, 0, num_microbatches) for s in (rank, 2 * num_ranks - 1 - rank))
        programs.append(_program(num_ranks, rank, (out, back)))
    ranks = tuple(range(num_ranks))
    return Schedule("dualpipev", programs, (ranks + ranks[::-1],), num_microbatches)
