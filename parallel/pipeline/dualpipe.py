"""DualPipe and DualPipeV: eight phases that lay forwards of one direction over backwards of the other.

Both are one order. Half a pipeline has h ranks, and sees microbatches in two *directions*: 0 enters at its outer end
and runs inwards, 1 comes back outwards. DualPipe has two such halves, mirrored: direction 0 of one is direction 1 of
the other. DualPipeV folds a chain of 2h stages at its middle, so that direction 1 is direction 0 on its way back. A
rank's *position* is its distance from the outer end. (DeepSeek-V3 report, section 3.2.1; the phases are those of
DeepSeek's published code.)

The phases want 2h microbatches a direction. With fewer, the order is that of 2h with the microbatches that do not exist
struck out: still valid, still as low in memory, but with forwards and backwards that have lost the partner to overlap
with: `shortfall` says how many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from parallel.pipeline.actions import Action, Op, Program, Schedule, Slot, slots_of


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
    """The eight phases. Slots of microbatches that do not exist are empty, and dropped at the end."""
    most = max(2 * half, *(direction.num_microbatches for direction in directions))
    n1, n2, n3, n4, n5, n6, n7, n8 = phase_counts(half, position, most)

    def slots(direction: int, op: Op) -> Program:
        stage, first_mb, num_microbatches = directions[direction]
        return slots_of(stage, op, range(first_mb, first_mb + num_microbatches)) + [()] * (most - num_microbatches)

    def backwards(direction: int, num_split_first: int, num_split_last: int) -> Iterator[Slot]:
        full, split = slots(direction, Op.B), slots(direction, Op.I)
        border = most - num_split_last
        return chain(split[:num_split_first], full[num_split_first:border], split[border:])

    def weight(slot: Slot) -> Slot:
        return tuple(Action(stage, Op.W, mb) for stage, _, mb in slot)

    # Split are the backwards of phase 3, the second half of those of phase 6, and those of phase 7.
    f0, f1 = iter(slots(0, Op.F)), iter(slots(1, Op.F))
    b0, b1 = backwards(0, 0, n6 - n6 // 2 + n7), backwards(1, n3, n6 // 2)
    program: Program = [next(f0) for _ in range(n1)]
    for _ in range(n2):
        program += next(f0), next(f1)
    for _ in range(n3):
        i1 = next(b1)
        program += i1, weight(i1), next(f1)
    for k in range(n4):
        if k == 0 and position == half - 1:  # at the middle the first pair is pulled apart: others wait for its F
            program += next(f0), next(b1)
        else:
            program.append(next(f0) + next(b1))
        program.append(next(f1) + next(b0))
    for _ in range(n5):
        program += next(b1), next(f1) + next(b0)
    last = [next(b) for _ in range(n6) for b in (b1, b0)]
    program += last
    owed = deque(weight(slot) for slot in last[n6:])
    for _ in range(n7):
        i0 = next(b0)
        program += owed.popleft(), i0
        owed.append(weight(i0))
    assert len(owed) == n8
    program += owed
    return [slot for slot in program if slot]


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe: two routes, down and up the same ranks; rank r holds stages r and num_ranks - 1 - r.

    Raises ValueError for an odd number of ranks, or fewer than two microbatches.
    """
    if num_ranks < 2 or num_ranks % 2:
        raise ValueError(f"dualpipe needs an even number of ranks, got {num_ranks}: use {num_ranks + 1}, or dualpipev")
    if num_microbatches < 2:
        raise ValueError(f"dualpipe needs a microbatch for each of its two directions, got {num_microbatches}: use 2")
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


def shortfall(schedule: Schedule) -> str | None:
    """What dualpipe or dualpipev has lost by having too few microbatches, in one line; None if nothing."""
    wanted = 2 * schedule.num_ranks
    if schedule.name not in ("dualpipe", "dualpipev") or schedule.num_microbatches >= wanted:
        return None
    pairs = sum(len(slot) == 2 for program in schedule.programs for slot in program)
    forwards = schedule.num_stages * schedule.num_microbatches
    return (
        f"{schedule.name} on {schedule.num_ranks} ranks wants {wanted} microbatches or more: with "
        f"{schedule.num_microbatches}, {pairs} of {forwards} forwards overlap a backward, the others run alone"
    )
