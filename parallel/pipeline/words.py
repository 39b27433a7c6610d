"""Programs as words, for compiled searches: how a schedule is written down, and what it means.

Microbatches of one stage are all alike, so they may as well come in order. A rank's program is then a *word* whose
letters name only what is done to which of the rank's *chunks* - the stages it holds, in the order of the model; a
stage of two routes is two chunks. The microbatch is how often that stood there before; a W belongs to the oldest I
that has none yet. A letter is an int: with C chunks, `op * C + chunk` for a single action, and from 4 * C on an
overlapped pair, `4 * C + (C * chunk of F + chunk of B) * 2`, plus one if the pair has an I instead of a B.

Words lie in an array words_RL with room for the longest, F, I and W of everything, of which rank r uses the first
length_R[r] letters.

Shape letters: R ranks, C chunks a rank, L letters, O ops, S slots, A actions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numba import njit

from parallel.pipeline.actions import Op, Program, Schedule, make_actions
from parallel.pipeline.simulate import Costs, stage_times

F, B, I, W = 0, 1, 2, 3  # as in Op, for compiled code


class Layout(NamedTuple):
    """Where everything is, as integers. `before_RC2` and `after_RC2` are (rank, chunk) of the stage before and after,
    -1 where there is none; the microbatches of a chunk are `first_RC` to `first_RC + count_RC`."""

    stage_RC: np.ndarray
    first_RC: np.ndarray
    count_RC: np.ndarray
    before_RC2: np.ndarray
    after_RC2: np.ndarray
    num_stages: int
    num_microbatches: int


class Times(NamedTuple):
    """Costs for compiled searches: `work_ORC` has the time of F, B, I, W on each chunk, with slow ranks; a pair takes
    `squeeze` times its parts; `limit` and what is held are counted in chunks, of which `kept` is held from I to W."""

    work_ORC: np.ndarray
    squeeze: float
    slot_end: bool
    p2p: float
    kept: float
    limit: float


def _chunks_of(schedule: Schedule, rank: int) -> list[tuple[int, int]]:
    """(stage, route) of every chunk of `rank`."""
    return sorted(
        (s, route) for route, ranks in enumerate(schedule.placement) for s, r in enumerate(ranks) if r == rank
    )


def layout_of(schedule: Schedule) -> Layout:
    """Of the placement and number of microbatches of `schedule`; its programs do not matter."""
    num_ranks, num_stages = schedule.num_ranks, schedule.num_stages
    mbs_of: list[list[int]] = [[] for _ in schedule.placement]
    for mb in range(schedule.num_microbatches):
        mbs_of[schedule.route_of(mb)].append(mb)
    chunks = [_chunks_of(schedule, rank) for rank in range(num_ranks)]
    place = {chunk: (r, c) for r, row in enumerate(chunks) for c, chunk in enumerate(row)}
    return Layout(
        np.array([[s for s, _ in row] for row in chunks]),
        np.array([[mbs_of[route][0] if mbs_of[route] else 0 for _, route in row] for row in chunks]),
        np.array([[len(mbs_of[route]) for _, route in row] for row in chunks]),
        np.array([[place.get((s - 1, route), (-1, -1)) for s, route in row] for row in chunks]),
        np.array([[place.get((s + 1, route), (-1, -1)) for s, route in row] for row in chunks]),
        num_stages,
        schedule.num_microbatches,
    )


def times_of(schedule: Schedule, layout: Layout, costs: Costs, memory_limit: float) -> Times:
    """What `costs` and `memory_limit` (in activations of one microbatch of 1/PP of the model) mean for this layout."""
    times = stage_times(schedule, costs)
    slow_R = np.array([costs.slow.get(rank, 1.0) for rank in range(schedule.num_ranks)])
    whole = times[:2].sum() / schedule.num_ranks
    return Times(
        work_ORC=np.ascontiguousarray(times[:, layout.stage_RC] * slow_R[:, None]),  # one memory layout: compiled once
        squeeze=1.0 if costs.fb is None else float(costs.fb / whole),
        slot_end=costs.send_when == "slot_end",
        p2p=float(costs.p2p_time),
        kept=float(costs.kept_after_i),
        limit=float(memory_limit * schedule.num_stages / schedule.num_ranks),
    )


def words_of(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """(words_RL, length_R) of a schedule whose microbatches come in order."""
    chunks = [{chunk: c for c, chunk in enumerate(_chunks_of(schedule, rank))} for rank in range(schedule.num_ranks)]
    num_chunks = len(chunks[0])
    words = np.zeros((schedule.num_ranks, 3 * num_chunks * schedule.num_microbatches), np.int64)
    for rank, program in enumerate(schedule.programs):
        for position, slot in enumerate(program):
            first, *second = (chunks[rank][action.stage, schedule.route_of(action.mb)] for action in slot)
            words[rank, position] = slot[0].op * num_chunks + first
            if second:
                pair = 2 * (num_chunks * first + second[0]) + (slot[1].op is Op.I)
                words[rank, position] = 4 * num_chunks + pair
    return words, np.array([len(program) for program in schedule.programs])


def schedule_of(like: Schedule, layout: Layout, times: Times, words_RL: np.ndarray, length_R: np.ndarray) -> Schedule:
    """The schedule of these words, with the name and placement of `like`."""
    valid, rank_R1, slot_S1, actions_A3, _, _ = spell(layout, times, words_RL, length_R)
    assert valid
    stage_A, op_A, mb_A = actions_A3.T.tolist()
    actions = make_actions(stage_A, map(Op, op_A), mb_A)
    slots = [tuple(actions[first:end]) for first, end in pairwise(slot_S1.tolist())]
    programs: list[Program] = [slots[first:end] for first, end in pairwise(rank_R1.tolist())]
    return Schedule(like.name, programs, like.placement, like.num_microbatches)


@njit(cache=True)
def spell(layout, times, words_RL, length_R):
    """(valid, rank_R1, slot_S1, actions_A3, duration_S, ready_A) of the words: what `actions.Columns` and
    `simulate.slot_times` would be. Not valid are words that hold too much, or that have a W before its I.
    """
    num_ranks, num_chunks = layout.count_RC.shape
    num_slots = length_R.sum()
    rank_R1 = np.zeros(num_ranks + 1, np.int64)
    slot_S1 = np.zeros(num_slots + 1, np.int64)
    actions = np.empty((2 * num_slots, 3), np.int64)
    duration_S = np.empty(num_slots)
    ready = np.empty(2 * num_slots)
    split = np.empty((num_chunks, layout.num_microbatches), np.int64)  # the microbatches whose W is to come, in order
    slot, a = 0, 0
    for r in range(num_ranks):
        done = np.zeros((4, num_chunks), np.int64)  # F; B or I; I alone; W
        held = 0.0
        for position in range(length_R[r]):
            letter = words_RL[r, position]
            start, before = a, 0.0
            f_chunk, op, chunk = -1, letter // num_chunks, letter % num_chunks
            factor = 1.0
            if op >= 4:
                code = letter - 4 * num_chunks
                op = I if code % 2 else B
                f_chunk, chunk = code // 2 // num_chunks, code // 2 % num_chunks
                factor = times.squeeze
            elif op == F:
                f_chunk = chunk
            if f_chunk >= 0:
                before = times.work_ORC[F, r, f_chunk]
                actions[a, 0], actions[a, 1] = layout.stage_RC[r, f_chunk], F
                actions[a, 2] = layout.first_RC[r, f_chunk] + done[F, f_chunk]
                ready[a] = before * factor
                done[F, f_chunk] += 1
                a += 1
                held += 1
                if held > times.limit + 1e-9:
                    return False, rank_R1, slot_S1, actions, duration_S, ready
            total = before
            if op != F:
                actions[a, 0], actions[a, 1] = layout.stage_RC[r, chunk], op
                work = times.work_ORC[op, r, chunk]
                total += work
                ready[a] = (before + (times.work_ORC[I, r, chunk] if op == B else work)) * factor
                if op == W:
                    mb = done[W, chunk]
                    if mb >= done[I, chunk]:
                        return False, rank_R1, slot_S1, actions, duration_S, ready
                    actions[a, 2] = layout.first_RC[r, chunk] + split[chunk, mb]
                    done[W, chunk] += 1
                    held -= times.kept
                else:
                    mb = done[B, chunk]
                    actions[a, 2] = layout.first_RC[r, chunk] + mb
                    done[B, chunk] += 1
                    if op == I:
                        split[chunk, done[I, chunk]] = mb
                        done[I, chunk] += 1
                    held -= 1.0 if op == B else 1 - times.kept
                a += 1
            duration_S[slot] = total * factor
            if times.slot_end:
                ready[start:a] = duration_S[slot]
            slot += 1
            slot_S1[slot] = a
        rank_R1[r + 1] = slot
    return True, rank_R1, slot_S1, actions[:a], duration_S, ready[:a]
