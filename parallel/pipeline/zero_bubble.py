"""Zero-bubble schedules: W waits for nobody, so it goes where the bubble was. (Qi et al., 2401.10241, 2405.15362)

`zb1p` and `zbv` are fixed orders. `zero_bubble` makes an order for given times and a memory limit: with num_ranks
activations it comes out like ZB-H1, with 2 * num_ranks - 1 like ZB-H2, and between them in between.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from numba import njit

from parallel.pipeline.actions import Op, Program, Schedule, make_actions, slots_of
from parallel.pipeline.simulate import Costs, simulate, stage_times


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B with split backwards, where rank r runs its W r microbatches late. Memory: num_ranks on each."""
    programs = []
    for rank in range(num_ranks):
        forwards, backwards, weights = (slots_of(rank, op, range(num_microbatches)) for op in (Op.F, Op.I, Op.W))
        warm_up = min(num_ranks - rank, num_microbatches)
        program: Program = forwards[:warm_up]
        for mb in range(num_microbatches):
            program.append(backwards[mb])
            program += weights[max(mb - rank, 0) : mb - rank + 1] if mb >= rank else []
            program += forwards[warm_up + mb : warm_up + mb + 1]
        programs.append(program + weights[max(num_microbatches - rank, 0) :])
    return Schedule("zb1p", programs, (tuple(range(num_ranks)),), num_microbatches)


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V: 2 * num_ranks stages folded into a V; rank r holds stages r and 2 * num_ranks - 1 - r. Memory as zb1p.

    Made for 2 * num_ranks - 1 microbatches or more; of fewer, those that do not exist are struck out.
    """
    most = max(2 * num_ranks - 1, num_microbatches)
    programs = []
    for rank in range(num_ranks):
        f0, i0, w0 = (iter(slots_of(rank, op, range(most))) for op in (Op.F, Op.I, Op.W))
        f1, i1, w1 = (iter(slots_of(2 * num_ranks - 1 - rank, op, range(most))) for op in (Op.F, Op.I, Op.W))
        program = [next(f0) for _ in range(2 * (num_ranks - rank) - 1)]
        for _ in range(rank):
            program += next(f1), next(f0)
        for _ in range(num_ranks - rank):
            program += next(f1), next(i1), next(w1)
        for _ in range(most - num_ranks):
            program += [slot for slot in (next(f0, None),) if slot]
            program += next(i0), next(w0), next(f1), next(i1), next(w1)
        for _ in range(rank):
            program += next(i0), next(i1)
        for _ in range(num_ranks - rank):
            program += next(i0), next(w0)
        program += [*w1, *w0]
        programs.append([slot for slot in program if slot[0].mb < num_microbatches])
    ranks = tuple(range(num_ranks))
    return Schedule("zbv", programs, (ranks + ranks[::-1],), num_microbatches)


def zero_bubble(
    num_ranks: int, num_microbatches: int, costs: Costs | None = None, memory_limit: float | None = None
) -> Schedule:
    """The best of a family of greedy orders for these costs, with at most `memory_limit` activations on a rank.

    ZB-H1 itself belongs to the family where the limit allows it. The limit is in activations of one microbatch of
    1/PP of the model; without one it is 2 * num_ranks - 1. Whenever a rank is free, it runs an I if one can run, else
    an F if one can run and there is memory for it, else a W. The family has two knobs: how many microbatches rank r
    may have between F and I, from num_ranks - r (ZB-H1) to twice as many less one (ZB-H2); and how much of a W has to
    fit before the next F or I arrives for the W to go first. Raises ValueError for a limit under one microbatch.
    """
    costs = costs or Costs()
    limit = 2.0 * num_ranks - 1 if memory_limit is None else float(memory_limit)
    if not limit >= 1:
        raise ValueError(f"memory_limit = {limit:g}: a rank holds at least the activations of one microbatch")
    placement = (tuple(range(num_ranks)),)
    times = stage_times(Schedule("zero_bubble", [[] for _ in range(num_ranks)], placement, num_microbatches), costs)
    distance = num_ranks - 1 - np.arange(num_ranks)
    best_time, best = np.inf, None
    for stretch in (0.0, 0.25, 0.5, 0.75, 1.0):
        in_flight = 1 + distance + np.ceil(distance * stretch).astype(np.int64)
        for fit, f_first in product((0.0, 0.5, 1.0), (False, True)):
            end, ops = _greedy(
                times, costs.p2p_time, num_microbatches, in_flight, limit, costs.kept_after_i, fit, f_first
            )
            if end < best_time:
                best_time, best = end, ops
    assert best is not None
    h1 = zb1p(num_ranks, num_microbatches)
    if limit >= num_ranks and simulate(h1, replace(costs, slow={}, jitter=0.0)).pipeline_time < best_time:
        return replace(h1, name="zero_bubble")
    programs: list[Program] = []
    for rank, ops in enumerate(best):
        mb = np.empty_like(ops)
        for op in (Op.F, Op.I, Op.W):
            mb[ops == op] = np.arange(num_microbatches)
        actions = make_actions([rank] * len(ops), [Op(op) for op in ops.tolist()], mb.tolist())
        programs.append([(action,) for action in actions])
    return Schedule("zero_bubble", programs, placement, num_microbatches)


@njit(cache=True)
def _greedy(times, p2p, num_microbatches, in_flight_R, limit, kept_after_i, fit, f_first):
    """(end of the last slot, ops of every rank in order). times: [op, stage], with stage = rank."""
    F, I, W = 0, 2, 3
    num_ranks = len(in_flight_R)
    done = np.zeros((num_ranks, 4), np.int64)
    ops = np.empty((num_ranks, 3 * num_microbatches), np.int64)
    held = np.zeros(num_ranks)  # activations
    decides = np.zeros(num_ranks)  # when a rank is free, or has reason to look again
    free = np.zeros(num_ranks)
    arrives = np.full((num_ranks, 4, num_microbatches), np.inf)  # of what F and I need from the neighbour, where known
    arrives[0, F] = 0.0
    remaining = num_ranks * 3 * num_microbatches
    while remaining:
        rank = np.argmin(decides)
        now = decides[rank]
        num_f, num_i, num_w = done[rank, F], done[rank, I], done[rank, W]
        can_f = num_f < num_microbatches and num_f - num_i < in_flight_R[rank] and held[rank] + 1 <= limit + 1e-9
        f_at = arrives[rank, F, num_f] if can_f else np.inf
        i_at = arrives[rank, I, num_i] if num_i < num_f else np.inf
        soonest = min(f_at, i_at)
        if f_at <= now and (f_first or i_at > now):
            op = F
        elif i_at <= now:
            op = I
        elif num_w < num_i and soonest - now >= fit * times[W, rank]:
            op = W
        else:  # sleep; a neighbour that makes what is needed sets the clock
            decides[rank] = soonest
            continue
        end = now + times[op, rank]
        ops[rank, num_f + num_i + num_w] = op
        mb = done[rank, op]
        done[rank, op] += 1
        remaining -= 1
        free[rank] = decides[rank] = end
        if op == F:
            held[rank] += 1
        else:
            held[rank] -= 1 - kept_after_i if op == I else kept_after_i
        reader = rank + 1 if op == F else rank - 1
        if op == F and rank == num_ranks - 1:
            arrives[rank, I, mb] = end
        elif op != W and 0 <= reader < num_ranks:
            arrives[reader, op, mb] = end + p2p
            if free[reader] <= now:  # asleep: let it look again when this arrives
                decides[reader] = min(decides[reader], end + p2p)
    return free.max(), ops
