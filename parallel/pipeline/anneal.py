"""Improves an order by simulated annealing along its critical path.

The critical path is the chain of slots, on one rank or from one rank to another, that makes the step as long as it is:
nothing gets faster unless something on it changes. So a slot on it is moved, paired with a neighbour or split, the
whole is measured with the replay that `simulate` uses, and kept if it is no slower - or a little slower, early on. The
random numbers are our own, so that equal input gives an equal result.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from parallel.pipeline.greedy import random_below, random_state
from parallel.pipeline.replay import _NEEDS, _link, _replay
from parallel.pipeline.words import B, F, I, W, spell


@njit(cache=True)
def measure(layout, times, words_RL, length_R):
    """(end of the last slot, the critical path as rows of (rank, position), its length); inf if they cannot run.

    The path begins with the slot that ends last, and goes back in time.
    """
    path = np.empty((length_R.sum(), 2), np.int64)
    valid, rank_R1, slot_S1, actions, duration_S, ready_A = spell(layout, times, words_RL, length_R)
    if not valid:
        return np.inf, path, 0
    rank_A = np.empty(len(actions), np.int32)
    slot_A = np.empty(len(actions), np.int64)
    for r in range(len(rank_R1) - 1):
        for slot in range(rank_R1[r], rank_R1[r + 1]):
            rank_A[slot_S1[slot] : slot_S1[slot + 1]] = r
            slot_A[slot_S1[slot] : slot_S1[slot + 1]] = slot
    needs = _link(actions, layout.num_stages, layout.num_microbatches, _NEEDS)
    start_S, _, waited_S, next_R = _replay(rank_R1, slot_S1, needs, rank_A, duration_S, ready_A, times.p2p)
    end, slot, r = -1.0, 0, 0
    for rank in range(len(next_R)):
        if next_R[rank] != rank_R1[rank + 1]:
            return np.inf, path, 0
        last = next_R[rank] - 1
        if next_R[rank] > rank_R1[rank] and start_S[last] + duration_S[last] > end:
            end, slot, r = start_S[last] + duration_S[last], last, rank
    size = 0
    while True:
        path[size, 0], path[size, 1] = r, slot - rank_R1[r]
        size += 1
        if waited_S[slot] >= 0:
            r, slot = rank_A[waited_S[slot]], slot_A[waited_S[slot]]
        elif slot > rank_R1[r]:
            slot -= 1
        else:
            return end, path, size


@njit(cache=True)
def _insert(words_RL, length_R, r, position, letter):
    for k in range(length_R[r], position, -1):
        words_RL[r, k] = words_RL[r, k - 1]
    words_RL[r, position] = letter
    length_R[r] += 1


@njit(cache=True)
def _remove(words_RL, length_R, r, position):
    for k in range(position, length_R[r] - 1):
        words_RL[r, k] = words_RL[r, k + 1]
    length_R[r] -= 1


@njit(cache=True)
def _change(words_RL, length_R, r, p, num_chunks, may_pair, state):
    """One random change at position p of rank r; False if there was nothing to change."""
    letter = words_RL[r, p]
    op, last = letter // num_chunks, length_R[r] - 1
    what = random_below(state, 4)
    if op >= 4 and what == 0:  # split a pair
        code = letter - 4 * num_chunks
        backward = (I if code % 2 else B) * num_chunks + code // 2 % num_chunks
        forward = F * num_chunks + code // 2 // num_chunks
        f_first = random_below(state, 2)
        words_RL[r, p] = forward if f_first else backward
        _insert(words_RL, length_R, r, p + 1, backward if f_first else forward)
        return True
    if op == B and what == 0:  # split a backward
        c = letter % num_chunks
        words_RL[r, p] = I * num_chunks + c
        later = p + 1 + random_below(state, 1 + min(8 * num_chunks, last - p))
        _insert(words_RL, length_R, r, later, W * num_chunks + c)
        return True
    if op != W and op < 4 and what == 0 and may_pair:  # pair it with a neighbour
        step = 1 if random_below(state, 2) else -1
        q = p + step
        for _ in range(6):
            if q < 0 or q > last:
                return False
            other = words_RL[r, q]
            if other < 4 * num_chunks and other // num_chunks != W and (other // num_chunks == F) != (op == F):
                break
            q += step
        else:
            return False
        forward, backward = (letter, other) if op == F else (other, letter)
        c, only_i = backward % num_chunks, backward // num_chunks == I
        keep, gone = (p, q) if random_below(state, 2) else (q, p)
        if only_i and random_below(state, 4):  # make it whole: its W goes in too
            at = -1
            for k in range(max(p, q) + 1, last + 1):
                if words_RL[r, k] == W * num_chunks + c:
                    at = k
                    break
            if at < 0:
                return False
            _remove(words_RL, length_R, r, at)
            only_i = False
        code = 2 * (forward % num_chunks * num_chunks + c) + (1 if only_i else 0)
        words_RL[r, keep] = 4 * num_chunks + code
        _remove(words_RL, length_R, r, gone)
        return True
    reach = 1 if what == 1 else 4 if what == 2 else 16 * num_chunks
    q = p + (1 + random_below(state, reach)) * (1 if random_below(state, 2) else -1)
    q = min(max(q, 0), last)
    if q == p or words_RL[r, q] == letter:
        return False
    _remove(words_RL, length_R, r, p)
    _insert(words_RL, length_R, r, q, letter)
    return True


@njit(cache=True)
def anneal(layout, times, words_RL, length_R, num_tries, warmth, goal, seed):
    """(end of the last slot, words_RL, length_R) of the fastest of `num_tries` changes, or once `goal` is reached.

    `warmth`: by how much, on average, a change may make it slower at first; it sinks to 0 in even steps.
    """
    state = random_state(seed)
    words, length = words_RL.copy(), length_R.copy()
    best_words, best_length = words.copy(), length.copy()
    num_chunks = layout.count_RC.shape[1]
    end, path, size = measure(layout, times, words, length)
    best = end
    for k in range(num_tries):
        if best <= goal:
            break
        j = random_below(state, size)
        r, p = path[j]
        row, before = words[r].copy(), length[r]
        if _change(words, length, r, p, num_chunks, times.squeeze < 1.0, state):
            new_end, new_path, new_size = measure(layout, times, words, length)
            chance = (1.0 + random_below(state, 1 << 30)) / (1 << 30)
            if new_end <= end - warmth * (1 - k / num_tries) * np.log(chance):
                end, path, size = new_end, new_path, new_size
                if end < best:
                    best = end
                    best_words[:], best_length[:] = words, length
                continue
        words[r], length[r] = row, before
    return best, best_words, best_length


@njit(cache=True)
def merge(layout, times, words_RL, length_R):
    """The words with each I that is followed by its own W made a B, on all ranks where that costs no time."""
    num_ranks, num_chunks = layout.count_RC.shape
    words, length = words_RL.copy(), length_R.copy()
    end = measure(layout, times, words, length)[0]
    for r in range(num_ranks):
        row, before = words[r].copy(), length[r]
        owed = np.zeros(num_chunks, np.int64)
        p = 0
        while p < length[r]:
            letter = words[r, p]
            c = letter % num_chunks
            if letter >= 4 * num_chunks:
                code = letter - 4 * num_chunks
                owed[code // 2 % num_chunks] += code % 2
            elif letter // num_chunks == W:
                owed[c] -= 1
            elif letter // num_chunks == I:
                if owed[c] == 0 and p + 1 < length[r] and words[r, p + 1] == W * num_chunks + c:
                    words[r, p] = B * num_chunks + c
                    _remove(words, length, r, p + 1)
                else:
                    owed[c] += 1
            p += 1
        if measure(layout, times, words, length)[0] > end:
            words[r], length[r] = row, before
    return words, length
