"""The compiled heart: dependencies as row numbers, and the replay of programs in time.

A schedule's order on each rank is fixed, so its exact times are the longest paths through a graph with two kinds of
edges: the program of a rank, and `actions.NEEDS`. `link` finds the second kind, `replay` walks both, once each, in
any order that is possible: a rank runs until it needs what is not there, and whoever makes that wakes it. What
remains blocked when nobody can run is a deadlock. Lowering, validation and simulation are this walk with different
durations.

Rows are those of `actions.Columns`. Shape letters: A actions, S slots, R ranks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from parallel.pipeline.actions import NEEDS, Op, Schedule

MISSING = -2  # a need that no row fills; -1 is no need

# NEEDS for compiled code: [op, k] is (stage offset, op), with op -1 where there is no k-th need.
_NEEDS = np.full((4, 2, 2), -1, dtype=np.int64)
for _op, _needs in NEEDS.items():
    for _k, _need in enumerate(_needs):
        _NEEDS[_op, _k] = _need


@njit(cache=True)
def _link(actions_A3, num_stages, num_microbatches, table):
    row_of = np.full((4, num_stages, num_microbatches), MISSING, dtype=np.int32)
    for a in range(len(actions_A3)):
        stage, op, mb = actions_A3[a]
        if 0 <= op < 4 and 0 <= stage < num_stages and 0 <= mb < num_microbatches:
            row_of[op, stage, mb] = a
    needs_A2 = np.full((len(actions_A3), 2), -1, dtype=np.int32)
    for a in range(len(actions_A3)):
        stage, op, mb = actions_A3[a]
        if not (0 <= op < 4 and 0 <= stage < num_stages and 0 <= mb < num_microbatches):
            needs_A2[a] = MISSING
            continue
        for k in range(2):
            offset, needed = table[op, k]
            if needed < 0 or stage + offset < 0 or stage + offset >= num_stages:
                continue
            row = row_of[needed, stage + offset, mb]
            if needed == 1 and row < 0:  # Op.B stands for B or I
                row = row_of[2, stage + offset, mb]
            needs_A2[a, k] = row
    return needs_A2


@njit(cache=True)
def _replay(rank_R1, slot_S1, needs_A2, rank_A, duration_S, ready_A, p2p):
    num_ranks, num_slots, num_actions = len(rank_R1) - 1, len(slot_S1) - 1, len(needs_A2)
    start_S = np.full(num_slots, np.nan)
    waited_S = np.full(num_slots, -1, dtype=np.int32)
    leaves_A = np.full(num_actions, -1.0)  # when the result leaves; -1: not yet run
    sleeper_A = np.full(num_actions, -1, dtype=np.int32)  # the rank that sleeps until this row has run
    next_R = rank_R1[:-1].copy()
    free_R = np.zeros(num_ranks)
    awake = np.arange(num_ranks)  # a stack; a rank is on it at most once
    num_awake = num_ranks
    while num_awake:
        num_awake -= 1
        rank = awake[num_awake]
        while next_R[rank] < rank_R1[rank + 1]:
            slot = next_R[rank]
            start = free_R[rank]
            waited = -1
            blocked = False
            for a in range(slot_S1[slot], slot_S1[slot + 1]):
                for k in range(2):
                    need = needs_A2[a, k]
                    if need == -1:
                        continue
                    if need < 0 or leaves_A[need] < 0:
                        blocked = True
                        if need >= 0:
                            sleeper_A[need] = rank
                        break
                    arrives = leaves_A[need] + (p2p if rank_A[need] != rank else 0.0)
                    if arrives > start:
                        start = arrives
                        waited = need
                if blocked:
                    break
            if blocked:
                break
            start_S[slot] = start
            waited_S[slot] = waited
            free_R[rank] = start + duration_S[slot]
            next_R[rank] += 1
            for a in range(slot_S1[slot], slot_S1[slot + 1]):
                leaves_A[a] = start + ready_A[a]
                if sleeper_A[a] >= 0 and sleeper_A[a] != rank:
                    awake[num_awake] = sleeper_A[a]
                    num_awake += 1
    return start_S, leaves_A, waited_S, next_R


def link(schedule: Schedule) -> np.ndarray:
    """needs_A2: the rows that each row of `schedule.columns` depends on; -1 for none, MISSING where the schedule
    lacks it."""
    return _link(schedule.columns.actions_A3, schedule.num_stages, schedule.num_microbatches, _NEEDS)


def replay(
    schedule: Schedule, duration_S: np.ndarray, ready_A: np.ndarray, p2p: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs the programs: a slot starts when its rank is free and all its needs have arrived.

    A slot takes `duration_S`; the result of an action leaves `ready_A` after the start of its slot, and takes `p2p`
    to another rank. Returns start_S (NaN: never ran), leaves_A, waited_S (the row whose result came last and was
    waited for, else -1), and next_R, the first slot that a rank did not run: all at their ends unless there is a
    deadlock.
    """
    rank_R1, slot_S1, _ = schedule.columns
    return _replay(rank_R1, slot_S1, link(schedule), schedule.rank_A, duration_S, ready_A, float(p2p))


assert (Op.F, Op.B, Op.I, Op.W) == (0, 1, 2, 3), "the compiled code counts on these numbers"
