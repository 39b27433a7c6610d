"""The schedules by name: who computes what, in which order.

Every generator takes (num_ranks, num_microbatches) and returns a `Schedule` whose programs only compute; `passes.lower`
adds the communication. One rank is ordinary: there each of them is gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable

from parallel.pipeline.actions import Action, Op, Program, Schedule, slots_of
from parallel.pipeline.dualpipe import dualpipe, dualpipev
from parallel.pipeline.zero_bubble import zb1p, zbv


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards: the least order, the most memory. (Huang et al., 2019)"""
    programs: list[Program] = [
        slots_of(rank, Op.F, range(num_microbatches)) + slots_of(rank, Op.B, range(num_microbatches))
        for rank in range(num_ranks)
    ]
    return Schedule("gpipe", programs, (tuple(range(num_ranks)),), num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B: after a warm-up, one forward and one backward in turn, so that rank r keeps num_ranks - r microbatches.

    (Narayanan et al., 2019)
    """
    programs = []
    for rank in range(num_ranks):
        forwards = slots_of(rank, Op.F, range(num_microbatches))
        backwards = slots_of(rank, Op.B, range(num_microbatches))
        programs.append(_alternate(forwards, backwards, warm_up=num_ranks - 1 - rank))
    return Schedule("1f1b", programs, (tuple(range(num_ranks)),), num_microbatches)


def interleaved_1f1b(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """1F1B over `stages_per_rank` stages a rank, dealt out in turn: the bubble shrinks by that factor.

    Microbatches go in groups of num_ranks, each through all stages of a rank; the last group may be smaller.
    (Narayanan et al., 2021)
    """
    programs = []
    groups = range(0, num_microbatches, max(num_ranks, 1))
    order = [(lap, g + k) for g in groups for lap in range(stages_per_rank) for k in range(num_ranks)]
    for rank in range(num_ranks):
        last = (stages_per_rank - 1) * num_ranks + rank
        forwards: Program = [(Action(lap * num_ranks + rank, Op.F, mb),) for lap, mb in order]
        backwards: Program = [(Action(last - lap * num_ranks, Op.B, mb),) for lap, mb in order]
        warm_up = (stages_per_rank - 1) * num_ranks + 2 * (num_ranks - 1 - rank)
        programs.append(_strike(_alternate(forwards, backwards, warm_up), num_microbatches))
    placement = tuple(range(num_ranks)) * stages_per_rank
    return Schedule("interleaved_1f1b", programs, (placement,), num_microbatches)


def _alternate(forwards: Program, backwards: Program, warm_up: int) -> Program:
    """`warm_up` forwards, then a forward and a backward in turn, then the backwards that remain."""
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    turns = [slot for pair in zip(forwards[warm_up:], backwards, strict=False) for slot in pair]
    return forwards[:warm_up] + turns + backwards[steady:]


def _strike(program: Program, num_microbatches: int) -> Program:
    """The program without the microbatches that do not exist: what was possible stays possible."""
    return [slot for slot in program if slot[0].mb < num_microbatches]


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "zb1p": zb1p,
    "zbv": zbv,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
