"""Builds an order greedily: walk through time, and let every rank that is free take the best of what it can do.

What is best depends on the costs in ways that no formula has yet caught, so it is a matter of *knobs*: the caller
tries many settings, since a construction costs microseconds an action, and `tune` goes on from a good one.

A dead end is possible only through the knobs. Memory alone cannot cause one: a chunk leaves room on its rank for one
microbatch of every chunk further down the model, so that what is deepest can always go on, come back, and make room.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from parallel.pipeline.words import F, I, W

PAIR = 4


class Knobs(NamedTuple):
    """Of each rank. `cap_R`, `cap_RC`: most microbatches between F and I, in all and of each chunk. `fit_R`: the share
    of a W that must fit before the next F or I arrives. `f_first_R`, `deep_first_R`: what goes first. `patience_R`:
    how long to wait for the other half of an overlapped pair; negative makes no pairs."""

    cap_R: np.ndarray
    cap_RC: np.ndarray
    fit_R: np.ndarray
    f_first_R: np.ndarray
    deep_first_R: np.ndarray
    patience_R: np.ndarray


@njit(cache=True)
def build(layout, times, knobs):
    """(end of the last slot, words_RL, length_R); the end is inf where the knobs lead into a dead end.

    Whenever a rank is free: a pair, if it makes pairs and has both; else an I or an F, if one can run and there is room
    for it; else a W, if it fits before the next of these arrives, or if the room it makes is what an F waits for.
    """
    work, count = times.work_ORC, layout.count_RC
    num_ranks, num_chunks = count.shape
    done = np.zeros((num_ranks, 4, num_chunks), np.int64)
    f_at = np.full((num_ranks, num_chunks, layout.num_microbatches), np.inf)  # when what F needs arrives
    i_at = np.full((num_ranks, num_chunks, layout.num_microbatches), np.inf)  # and what I needs
    owed = np.zeros((num_ranks, num_chunks), np.int64)
    words = np.zeros((num_ranks, 3 * num_chunks * layout.num_microbatches), np.int64)
    length = np.zeros(num_ranks, np.int64)
    held = np.zeros(num_ranks)
    decides = np.zeros(num_ranks)
    free = np.zeros(num_ranks)
    for rank in range(num_ranks):
        for c in range(num_chunks):
            if layout.before_RC2[rank, c, 0] < 0:
                f_at[rank, c, :] = 0.0
    remaining = 3 * count.sum()
    while remaining > 0:
        r = np.argmin(decides)
        now = decides[r]
        if now == np.inf:
            return np.inf, words, length
        in_flight = 0
        for c in range(num_chunks):
            in_flight += done[r, F, c] - done[r, I, c]
        best_f, best_i, best_w = -1, -1, -1
        pair = knobs.patience_R[r] >= 0
        alone = False  # may best_f run without a B that makes room?
        next_f, next_i = np.inf, np.inf
        starved = False
        for k in range(num_chunks):
            c = num_chunks - 1 - k if knobs.deep_first_R[r] else k
            num_f, num_i = done[r, F, c], done[r, I, c]
            reserve = num_chunks - 1 - c  # a lower chunk leaves room for those above, which free it
            if num_f < count[r, c]:
                fits = held[r] + 1 + reserve <= times.limit + 1e-9
                room = min(knobs.cap_R[r] - in_flight - reserve, knobs.cap_RC[r, c] - (num_f - num_i))
                if fits and room >= (0 if pair else 1):
                    if f_at[r, c, num_f] <= now:
                        if best_f < 0 or (room > 0 and not alone):
                            best_f, alone = c, room > 0
                    else:
                        next_f = min(next_f, f_at[r, c, num_f])
                elif room > 0 and f_at[r, c, num_f] <= now:
                    starved = True
            if num_i < num_f:
                if i_at[r, c, num_i] <= now:
                    if best_i < 0:
                        best_i = c
                else:
                    next_i = min(next_i, i_at[r, c, num_i])
            if owed[r, c] and (best_w < 0 or owed[r, c] > owed[r, best_w]):
                best_w = c
        kind = -1
        wakes = np.inf  # if it runs nothing: a neighbour that makes what is needed sets the clock
        if best_f >= 0 and best_i >= 0 and pair:
            kind = PAIR
        elif best_i >= 0 and pair and next_f - now <= knobs.patience_R[r]:
            wakes = next_f
        elif best_f >= 0 and alone and pair and next_i - now <= knobs.patience_R[r]:
            wakes = next_i
        elif best_f >= 0 and alone and (knobs.f_first_R[r] or best_i < 0):
            kind = F
        elif best_i >= 0:
            kind = I
        else:
            wakes = min(next_f, next_i)
        if kind < 0 and best_w >= 0 and (starved or wakes - now >= knobs.fit_R[r] * work[W, r, best_w]):
            kind = W
        if kind < 0:
            decides[r] = wakes
            continue
        f_end, i_end = now, now
        if kind == PAIR:
            f, i, w = work[F, r, best_f], work[I, r, best_i], work[W, r, best_i]
            end = now + (f + i + w) * times.squeeze
            f_end, i_end = now + f * times.squeeze, now + (f + i) * times.squeeze
            if times.slot_end:
                f_end, i_end = end, end
            letter = 4 * num_chunks + 2 * (best_f * num_chunks + best_i)
            remaining -= 3
        else:
            c = best_f if kind == F else best_i if kind == I else best_w
            end = now + work[kind, r, c]
            f_end, i_end = end, end
            letter = kind * num_chunks + c
            remaining -= 1
        words[r, length[r]] = letter
        length[r] += 1
        free[r] = decides[r] = end
        if kind in (F, PAIR):
            mb = done[r, F, best_f]
            done[r, F, best_f] += 1
            held[r] += 1
            to, chunk = layout.after_RC2[r, best_f]
            if to < 0:
                i_at[r, best_f, mb] = end
            else:
                arrives = f_end + (times.p2p if to != r else 0.0)
                f_at[to, chunk, mb] = arrives
                if free[to] <= now and to != r:
                    decides[to] = min(decides[to], arrives)
        if kind in (I, PAIR):
            mb = done[r, I, best_i]
            done[r, I, best_i] += 1
            to, chunk = layout.before_RC2[r, best_i]
            if to >= 0:
                arrives = i_end + (times.p2p if to != r else 0.0)
                i_at[to, chunk, mb] = arrives
                if free[to] <= now and to != r:
                    decides[to] = min(decides[to], arrives)
            if kind == I:
                held[r] -= 1 - times.kept
                owed[r, best_i] += 1
            else:
                held[r] -= 1
        if kind == W:
            held[r] -= times.kept
            owed[r, best_w] -= 1
    return free.max(), words, length


@njit(cache=True)
def tune(layout, times, knobs, num_tries, goal, seed):
    """Turns one knob at a time, on one rank or on all, and keeps what is no slower: (end, words_RL, length_R)."""
    state = random_state(seed)
    num_ranks, num_chunks = layout.count_RC.shape
    end, words, length = build(layout, times, knobs)
    for _ in range(num_tries):
        if end <= goal:
            break
        turned = Knobs(
            knobs.cap_R.copy(),
            knobs.cap_RC.copy(),
            knobs.fit_R.copy(),
            knobs.f_first_R.copy(),
            knobs.deep_first_R.copy(),
            knobs.patience_R.copy(),
        )
        r, c = random_below(state, num_ranks), random_below(state, num_chunks)
        first, last = r, r + 1
        if random_below(state, 3) == 0:
            first, last = (0, r + 1) if random_below(state, 2) else (r, num_ranks)
        what = random_below(state, 8)
        step = 1 if random_below(state, 2) else -1
        amount = random_below(state, 1024) / 1024
        for k in range(first, last):
            if what <= 1:
                turned.cap_R[k] = max(turned.cap_R[k] + step, num_chunks)
            elif what <= 3:
                turned.cap_RC[k, c] = max(turned.cap_RC[k, c] + step, 1)
            elif what == 4:
                turned.fit_R[k] = amount
            elif what == 5:
                turned.f_first_R[k] = not turned.f_first_R[k]
            elif what == 6:
                turned.deep_first_R[k] = not turned.deep_first_R[k]
            elif turned.patience_R[k] >= 0:
                turned.patience_R[k] = 2 * amount * times.work_ORC[1, k, c]
        new_end, new_words, new_length = build(layout, times, turned)
        if new_end <= end:
            end, words, length, knobs = new_end, new_words, new_length, turned
    return end, words, length


@njit(cache=True)
def random_below(state, below):
    """The next whole number below `below`, of a generator that is ours alone (xorshift)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.int64((x >> np.uint64(11)) % np.uint64(below))


@njit(cache=True)
def random_state(seed):
    """The state of that generator, to begin with."""
    return np.array([np.uint64(seed) * np.uint64(2685821657736338717) + np.uint64(88172645463325252)])
