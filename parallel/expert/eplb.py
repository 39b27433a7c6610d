"""Redundant experts: from the experts' loads to replicas and places, so that no rank is the one all others wait for.

An expert with c replicas gives each of them 1/c of its tokens. `balance` decides how many replicas each expert gets
and on which rank each lies: as many experts a rank, never two replicas of one expert on one rank. With routing groups
that divide among the nodes it is *hierarchical* - groups are given to nodes, and replicas stay on the node of their
group, so tokens travel to no more nodes than before - and otherwise *global*. Three steps, as in DeepSeek's EPLB,
each for all layers at once:

    1. groups go to nodes, the heaviest first, to the node with the least load that has room;
    2. in each node the expert with the largest share gets another replica, until the slots are full - or earlier, as
       an empty slot beside a heavy expert may be better than any replica in it: several numbers are tried;
    3. replicas go to ranks like groups to nodes; then, which EPLB does not do, the fullest rank swaps experts with
       others, or gets another replica of one of its own elsewhere, as long as that helps.

With a `previous` placement, experts stay where they are as far as that costs at most `slack` of the largest load;
what is placed anew gets the names of the nodes and ranks it overlaps most.

Letters: L layers, E experts, S slots, R ranks, C slots of a rank, B problems solved at once (layers, or layers x
nodes).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_TRIES = 9  # how many numbers of replicas are tried, from all slots to none
_LESS = 1 - 1e-9  # a load has fallen if it is below this share of what it was


class Placement(NamedTuple):
    """Slot s is on rank `s // (S / num_ranks)` and holds expert `expert_LS[layer, s]`, one of `replicas_LE` copies.

    A slot is empty, -1, where any expert in it would make the fullest rank fuller.
    """

    expert_LS: Ints
    replicas_LE: Ints

    def rank_loads(self, load_LE: Floats, num_ranks: int) -> Floats:
        """What each rank gets, [L, num_ranks], of loads [L, E]."""
        share_LS = np.take_along_axis(load_LE / self.replicas_LE, np.maximum(self.expert_LS, 0), axis=1)
        share_LS = np.where(self.expert_LS < 0, 0.0, share_LS)
        return share_LS.reshape(len(load_LE), num_ranks, -1).sum(2)


def balance(
    load_LE: Floats,
    num_slots: int,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    previous_LS: Ints | None = None,
    slack: float = 0.01,
) -> Placement:
    """Replicas and places for the measured or predicted loads of each layer.

    load_LE: non-negative, any unit. num_slots: experts and replicas on all ranks together. Raises ValueError when the
    numbers do not divide, or when the slots cannot be filled without two replicas of one expert on one rank.
    """
    load_LE = np.asarray(load_LE, dtype=np.float64)
    num_layers, num_experts = load_LE.shape
    _check(num_experts, num_slots, num_ranks, num_nodes, num_groups)
    if num_groups % num_nodes:
        num_nodes = num_groups = 1  # global: groups cannot lie whole on nodes
    size = num_experts // num_groups  # experts of a group
    group_load = load_LE.reshape(num_layers, num_groups, size).sum(2)
    one_each = np.ones((num_layers, num_groups), dtype=np.int64)
    nowhere = np.zeros((num_layers, num_nodes, num_groups), dtype=bool)
    greedy = _filled(nowhere, one_each, group_load, num_groups // num_nodes)
    swapped = _improved(greedy, group_load)  # evener nodes, but their experts may fit the ranks worse: try both

    def placed(groups: Bools, kept: Bools | None = None, enough_L: Floats | None = None) -> Placement:
        enough_L = np.zeros(num_layers) if enough_L is None else enough_L
        expert_LS = _place(load_LE, groups, kept, num_slots, num_ranks, enough_L)
        if previous_LS is not None:
            expert_LS = _keep_slots(expert_LS, previous_LS, num_ranks, num_nodes, rename=kept is None)
        return Placement(expert_LS, _count(expert_LS, num_experts))

    if previous_LS is None:
        return _better(placed(greedy), placed(swapped), load_LE, num_ranks)
    on_rank = _holds(previous_LS.reshape(num_layers, num_ranks, -1), num_experts)
    on_node: Bools = on_rank.reshape(num_layers, num_nodes, -1, num_groups, size).any(axis=(2, 4))  # type: ignore[assignment]
    fresh = _better(placed(_renamed(greedy, on_node)), placed(_renamed(swapped, on_node)), load_LE, num_ranks)
    enough_L = fresh.rank_loads(load_LE, num_ranks).max(1) * (1 + slack)
    return _better(fresh, placed(on_node, on_rank, enough_L), load_LE, num_ranks, slack)


def _better(first: Placement, second: Placement, load_LE: Floats, num_ranks: int, slack: float = 0.0) -> Placement:
    """Layer by layer, the second where its largest rank load is at most that of the first and `slack` of it more."""
    first_L, second_L = (p.rank_loads(load_LE, num_ranks).max(1) for p in (first, second))
    pick_L1 = (second_L <= first_L * (1 + slack))[:, None]
    return Placement(*(np.where(pick_L1, s, f) for f, s in zip(first, second, strict=True)))


def num_moved(before_LS: Ints, after_LS: Ints, num_ranks: int) -> int:
    """How many experts have to be sent to a rank that did not hold them."""
    shape = (len(before_LS), num_ranks, -1)
    num_experts = int(max(before_LS.max(), after_LS.max())) + 1
    before, after = (_holds(slots.reshape(shape), num_experts) for slots in (before_LS, after_LS))
    return int((after & ~before).sum())


def _check(num_experts: int, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int) -> None:
    for small, large, name, of in (
        (num_ranks, num_slots, "num_ranks", "num_slots"),
        (num_nodes, num_ranks, "num_nodes", "num_ranks"),
        (num_groups, num_experts, "num_groups", "num_experts"),
    ):
        if large % small:
            raise ValueError(f"{name}={small} does not divide {of}={large}: use {of}={large // small * small + small}")
    if num_slots < num_experts:
        raise ValueError(f"num_slots={num_slots} is fewer than num_experts={num_experts}: every expert needs one")
    scopes = num_nodes if num_groups % num_nodes == 0 else 1
    if num_slots // num_ranks > num_experts // scopes:
        raise ValueError(
            f"num_slots={num_slots} on num_ranks={num_ranks} are {num_slots // num_ranks} a rank, more than the "
            f"{num_experts // scopes} different experts there are: use num_slots={num_ranks * num_experts // scopes}"
        )


def _place(
    load_LE: Floats, node_groups: Bools, kept: Bools | None, num_slots: int, num_ranks: int, enough_L: Floats
) -> Ints:
    """Steps 2 and 3 in every node: which expert lies in each slot [L, S].

    `kept` [L, R, E] is where experts may stay; a largest load of `enough_L` need not be improved.
    """
    num_layers, num_nodes, num_groups = node_groups.shape
    size = load_LE.shape[1] // num_groups
    groups = np.nonzero(node_groups)[2].reshape(num_layers * num_nodes, -1)
    expert_BE = (groups[:, :, None] * size + np.arange(size)).reshape(len(groups), -1)  # of each node, by global number
    layer_B1 = np.repeat(np.arange(num_layers), num_nodes)[:, None]
    load_BE = load_LE[layer_B1, expert_BE]
    ranks, capacity, num_spare = (
        num_ranks // num_nodes,
        num_slots // num_ranks,
        num_slots // num_nodes - load_BE.shape[1],
    )
    empty = np.zeros((len(groups), num_spare), dtype=np.int64)
    expert_BE, load_BE = (
        np.hstack([expert_BE, empty - 1]),
        np.hstack([load_BE, empty]),
    )  # an empty slot is an expert, too
    enough_B, nowhere = np.repeat(enough_L, num_nodes), np.zeros((len(groups), ranks, load_BE.shape[1]), dtype=bool)
    best, best_load_B = nowhere, np.full(len(groups), np.inf)
    if kept is not None:
        kept = np.pad(kept.reshape(len(groups), ranks, -1), ((0, 0), (0, 0), (0, 1)))  # no rank has kept expert -1
        nowhere = np.take_along_axis(kept, np.broadcast_to(expert_BE[:, None, :], nowhere.shape), axis=2)
    tries = sorted({int(n) for n in np.linspace(num_spare, 0, _TRIES)}, reverse=True)
    counts = [_replicas(load_BE, num_spare, num_used, ranks) for num_used in tries]
    if kept is not None:
        as_it_is = nowhere.sum(1)
        num_empty_B1 = num_slots // num_nodes - as_it_is.sum(1, keepdims=True)
        counts.insert(0, as_it_is + (np.arange(load_BE.shape[1]) - load_BE.shape[1] >= -num_empty_B1))
    for count_BE in counts:
        holds = nowhere.copy()
        _drop_surplus(holds, count_BE, load_BE)
        holds = _improved(_filled(holds, count_BE, load_BE, capacity), load_BE, num_spare, enough_B)
        largest_B = _rank_loads(holds, load_BE).max(1)
        better_B = largest_B < np.maximum(best_load_B * _LESS, enough_B)
        better_B &= best_load_B > enough_B
        best = np.where(better_B[:, None, None], holds, best)
        best_load_B = np.where(better_B, largest_B, best_load_B)
    local = np.nonzero(best)[2].reshape(len(groups), -1)
    return np.take_along_axis(expert_BE, local, axis=1).reshape(num_layers, num_slots)


def _replicas(load_BE: Floats, num_spare: int, num_used: int, most: int) -> Ints:
    """Doubles the largest share `num_used` times, to at most `most` replicas; the other spare slots are empty."""
    count_BE = np.ones(load_BE.shape, dtype=np.int64)
    count_BE[:, load_BE.shape[1] - num_used :] = 0
    real = np.arange(load_BE.shape[1]) < load_BE.shape[1] - num_spare
    rows = np.arange(len(load_BE))
    for _ in range(num_used):
        share_BE = np.where(real & (count_BE < most), load_BE / np.maximum(count_BE, 1), -1.0)
        count_BE[rows, share_BE.argmax(1)] += 1
    return count_BE


def _rank_loads(holds: Bools, load_BE: Floats) -> Floats:
    """[B, R]: the sums of the shares."""
    return (holds @ (load_BE / np.maximum(holds.sum(1), 1))[:, :, None])[:, :, 0]


def _drop_surplus(holds: Bools, count_BE: Ints, load_BE: Floats) -> None:
    """Takes replicas beyond the count from the fullest ranks that hold them, in place."""
    rank_load = _rank_loads(holds, load_BE)
    for b, e in zip(*np.nonzero(holds.sum(1) > count_BE), strict=True):
        surplus = int(holds[b, :, e].sum() - count_BE[b, e])
        order = np.argsort(np.where(holds[b, :, e], -rank_load[b], np.inf), kind="stable")
        holds[b, order[:surplus], e] = False


def _filled(holds: Bools, count_BE: Ints, load_BE: Floats, capacity: int) -> Bools:
    """Places what is not placed yet, the largest share first, on the least loaded rank that has room and lacks it."""
    holds = holds.copy()
    missing_BE = count_BE - holds.sum(1)
    share_BE = load_BE / np.maximum(count_BE, 1)
    rank_load = (holds @ share_BE[:, :, None])[:, :, 0]
    for _ in range(int(missing_BE.sum(1).max(initial=0))):
        b = np.nonzero(missing_BE.sum(1) > 0)[0]
        e = np.where(missing_BE > 0, share_BE, -1.0)[b].argmax(1)
        missing_BE[b, e] -= 1
        room = holds[b].sum(2) < capacity
        legal = room & ~holds[b, :, e]
        r = np.where(legal, rank_load[b], np.inf).argmin(1)
        for i in np.nonzero(~legal.any(1))[0]:
            r[i] = _make_room(holds[b[i]], share_BE[b[i]], rank_load, b[i], room[i], e[i])
        rank_load[b, r] += share_BE[b, e]
        holds[b, r, e] = True
    return holds


def _make_room(holds_RE: Bools, share_E: Floats, rank_load_BR: Floats, b: int, room_R: Bools, e: int) -> int:
    """Every rank with room holds `e` already: moves another expert there from the least loaded full rank that lacks it.

    There always is one: a full rank holds more experts than a rank with room, so one that the latter lacks.
    """
    to = int(np.where(room_R, rank_load_BR[b], np.inf).argmin())
    source = int(np.where(holds_RE[:, e], np.inf, rank_load_BR[b]).argmin())
    other = int(np.where(holds_RE[source] & ~holds_RE[to], share_E, -1.0).argmax())
    holds_RE[source, other], holds_RE[to, other] = False, True
    rank_load_BR[b, [source, to]] += share_E[other] * np.array([-1, 1])
    return source


def _improved(holds: Bools, load_BE: Floats, num_spare: int = 0, enough_B: Floats | float = 0.0) -> Bools:
    """Swaps and trades experts of the fullest rank while its load falls and is more than `enough`.

    The last `num_spare` experts are empty slots.
    """
    holds = holds.copy()
    enough_B = np.broadcast_to(enough_B, len(holds))
    empty_E = np.arange(holds.shape[2]) >= holds.shape[2] - num_spare
    active = np.arange(len(holds))
    while len(active):
        fell = _swap(holds, load_BE, active, enough_B)
        for i in np.nonzero(~fell)[0]:
            b = active[i]
            fell[i] = _trade(holds[b], load_BE[b], empty_E, enough_B[b])
        active = active[fell]
    return holds


def _swap(holds: Bools, load_BE: Floats, active: Ints, enough_B: Floats) -> Bools:
    """The best swap of an expert of the fullest rank for one of another rank, in each problem; where the load fell."""
    held, rows = holds[active], np.arange(len(active))
    share = load_BE[active] / np.maximum(held.sum(1), 1)
    slots = np.nonzero(held)[2].reshape(*held.shape[:2], -1)  # [B, R, C]
    value = share[rows[:, None, None], slots]
    load = value.sum(2)
    top = load.argmax(1)
    mine, my_value = slots[rows, top], value[rows, top]  # [B, C]
    give = my_value[:, None, :, None] - value[:, :, None, :]  # [B, R, C of mine, C of theirs]
    worse = np.maximum(load[rows, top][:, None, None, None] - give, load[:, :, None, None] + give)
    they_lack = ~np.take_along_axis(held, np.broadcast_to(mine[:, None, :], slots.shape), axis=2)
    i_lack = ~held[rows[:, None, None], top[:, None, None], slots]
    worse = np.where(they_lack[:, :, :, None] & i_lack[:, :, None, :], worse, np.inf)
    best = worse.reshape(len(active), -1).argmin(1)
    rank, given, taken = np.unravel_index(best, worse.shape[1:])
    fell = (worse[rows, rank, given, taken] < load[rows, top] * _LESS) & (load[rows, top] > enough_B[active])
    b, r, t = active[fell], rank[fell], top[fell]
    e, f = mine[rows, given][fell], slots[rows, rank, taken][fell]
    holds[b, t, e] = holds[b, r, f] = False
    holds[b, t, f] = holds[b, r, e] = True
    return fell


def _trade(holds_RE: Bools, load_E: Floats, empty_E: Bools, enough: float) -> bool:
    """Another replica of an expert of the fullest rank, in an empty slot or that of a replicated one, if it helps."""
    count_E = holds_RE.sum(0)
    share_E = load_E / np.maximum(count_E, 1)
    load_R = holds_RE @ share_E
    e_C = np.nonzero(holds_RE[load_R.argmax()])[0]
    r_N, f_N = np.nonzero(holds_RE & ((count_E > 1) | empty_E))
    if load_R.max() <= enough or not len(r_N):
        return False
    more_C, fewer_N = load_E[e_C] / (count_E[e_C] + 1), load_E[f_N] / np.maximum(count_E[f_N] - 1, 1)
    change_CR = (more_C - share_E[e_C])[:, None] * holds_RE[:, e_C].T
    change_NR = (fewer_N - share_E[f_N])[:, None] * holds_RE[:, f_N].T
    new_CNR = load_R + change_CR[:, None, :] + change_NR[None, :, :]
    new_CNR[:, np.arange(len(r_N)), r_N] += more_C[:, None] - fewer_N
    worst_CN = np.where(holds_RE[r_N[None, :], e_C[:, None]], np.inf, new_CNR.max(2))
    c, n = np.unravel_index(worst_CN.argmin(), worst_CN.shape)
    if worst_CN[c, n] >= load_R.max() * _LESS:
        return False
    holds_RE[r_N[n], f_N[n]], holds_RE[r_N[n], e_C[c]] = False, True
    return True


def _holds(slots_BRC: Ints, num_experts: int) -> Bools:
    """[B, R, E]: whether a rank holds an expert."""
    holds = np.zeros((*slots_BRC.shape[:2], num_experts + 1), dtype=bool)
    np.put_along_axis(holds, slots_BRC, True, axis=2)  # empty slots, -1, into the last column
    return holds[:, :, :-1]


def _count(expert_LS: Ints, num_experts: int) -> Ints:
    return _holds(expert_LS[:, :, None], num_experts).sum(1)


def _matching(new: Bools, old: Bools) -> Ints:
    """For each old place the new one that takes its name, [B, R]: the pairs with the largest overlap first."""
    overlap = new.astype(np.int64) @ old.astype(np.int64).transpose(0, 2, 1)
    num_problems, num_places, _ = overlap.shape
    rows, name = np.arange(num_problems), np.empty((num_problems, num_places), dtype=np.int64)
    for _ in range(num_places):
        n, o = np.divmod(overlap.reshape(num_problems, -1).argmax(1), num_places)
        name[rows, o] = n
        overlap[rows, n, :] = overlap[rows, :, o] = -1
    return name


def _renamed(new: Bools, old: Bools) -> Bools:
    return np.take_along_axis(new, _matching(new, old)[:, :, None], axis=1)


def _keep_slots(expert_LS: Ints, previous_LS: Ints, num_ranks: int, num_nodes: int, rename: bool) -> Ints:
    """The same placement, with experts that stay on their rank in the slot they had.

    With `rename` the ranks of a node first change places for the largest overlap.
    """
    num_experts = int(max(expert_LS.max(), previous_LS.max())) + 1
    shape = (len(expert_LS) * num_nodes, num_ranks // num_nodes, -1)
    new: Ints = expert_LS.reshape(shape)
    old: Ints = previous_LS.reshape(shape)
    if rename:
        name = _matching(_holds(new, num_experts), _holds(old, num_experts))[:, :, None]
        new = np.take_along_axis(new, name, axis=1)
    new, old = (_numbered(slots.reshape(-1, slots.shape[2])) for slots in (new, old))
    stays = (old[:, :, None] == new[:, None, :]).any(2)  # slots whose expert is still on the rank
    comes = ~(new[:, :, None] == old[:, None, :]).any(2)
    out = old.copy()
    out[~stays] = new[comes]  # as many go as come, rank by rank
    return np.maximum(out, -1).reshape(expert_LS.shape)


def _numbered(slots: Ints) -> Ints:
    """Tells the empty slots of a rank apart: -1, -2, ..."""
    return np.where(slots < 0, -(slots < 0).cumsum(1), slots)
