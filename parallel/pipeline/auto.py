"""`auto`: the best order that a search finds for given costs and memory, and never a slower one than is known.

Three steps, for every placement that the shape allows:

1. The *known* orders that fit the memory limit: every fixed schedule, and `zero_bubble` at every limit up to it.
2. Greedy constructions with many settings of their knobs (greedy.py); the best few settings are tuned.
3. The best of both, over all placements, are improved by annealing (anneal.py).

What wins is what `simulate` says is fastest; of equals, what holds least. The known orders take part to the end, so
the result is never slower than any of them, exactly. Random numbers are seeded and budgets are counts, not seconds:
equal input gives an equal schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from rich.console import Console
from rich.progress import Progress

from parallel.pipeline.actions import Action, Op, Program, Schedule
from parallel.pipeline.anneal import anneal, merge
from parallel.pipeline.greedy import Knobs, build, tune
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.words import F, I, Layout, Times, layout_of, schedule_of, times_of, words_of
from parallel.pipeline.zero_bubble import zero_bubble

SHAPES = ("loop", "v", "bidirectional", "any")

# Budgets of one placement, in actions visited, and their bounds in constructions, turns of a knob, and changes.
BUILD_VISITS, MOST_BUILDS, FEWEST_BUILDS = 1e7, 1500, 50
TUNE_VISITS, MOST_TURNS, NUM_TUNED = 1.5e7, 1000, 4
ANNEAL_VISITS, MOST_CHANGES, NUM_AGAIN = 3e7, 15_000, 2  # each start; the best once more, twice
WARMTH = 0.2  # of a forward: how much slower a change may be, at first
MOST_LIMITS = 32  # of zero_bubble
QUIET = 16 * 64  # ranks x microbatches; more shows a progress bar

UNLIMITED = 1 << 20  # microbatches in flight
STRETCHES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)


@dataclass(frozen=True)
class _Placed:
    """A placement: as a schedule without programs, as integers, and the time below which no order can get."""

    empty: Schedule
    layout: Layout
    times: Times
    goal: float

    @property
    def num_actions(self) -> int:
        return 3 * int(self.layout.count_RC.sum())


@dataclass(frozen=True)
class _Start:
    """An order to improve, and how long it takes."""

    end: float
    placed: _Placed
    words_RL: np.ndarray
    length_R: np.ndarray


def auto(
    num_ranks: int,
    num_microbatches: int,
    costs: Costs | None = None,
    memory_limit: float | None = None,
    shape: str = "any",
    stages_per_rank: int = 2,
) -> Schedule:
    """The fastest order found for `costs`, with at most `memory_limit` activations on a rank.

    memory_limit: in activations of one microbatch of 1/PP of the model, as `Timeline.peak_memory`; None is no limit.
    shape: loop (one stage a rank, or `stages_per_rank` dealt out in turn), v (two, folded), bidirectional (two routes,
    as DualPipe), or any of them. Costs with one time a stage go with the placements of so many stages. Jitter is left
    out of account, and so is the optimizer, which takes the same time after every order.

    Raises ValueError for a shape that cannot be, costs that fit no placement, or a limit below 1, the least.
    """
    limit = math.inf if memory_limit is None else float(memory_limit)
    if not limit >= 1:
        raise ValueError(
            f"memory_limit = {limit:g}: a rank holds at least the activations of one microbatch, so the least is 1"
        )
    costs = replace(costs or Costs(), jitter=0.0)
    by_shape = _placements(num_ranks, num_microbatches, costs, shape, stages_per_rank)
    serial = _one_at_a_time(by_shape[0][0])
    simulate(serial, costs)  # costs that do not fit say so
    known = [serial, *known_schedules(num_ranks, num_microbatches, costs, limit, stages_per_rank)]
    found: list[Schedule] = []
    with Progress(console=Console(stderr=True), transient=True, disable=num_ranks * num_microbatches <= QUIET) as bar:
        for empties in by_shape:  # each for itself: any is then never slower than one of them
            placements = [empty.placement for empty in empties]
            here = [schedule for schedule in known if schedule.placement in placements] or [_one_at_a_time(empties[0])]
            found += here + _search([_place(empty, costs, limit) for empty in empties], here, costs, bar)
    return replace(min(found, key=lambda schedule: _time_and_memory(schedule, costs)), name="auto")


def known_schedules(
    num_ranks: int, num_microbatches: int, costs: Costs, limit: float, stages_per_rank: int = 2
) -> Iterator[Schedule]:
    """The fixed schedules, and `zero_bubble` at every limit, that hold no more than `limit` and that the costs fit."""
    shape = (num_ranks, num_microbatches)
    generators: list[Callable[[], Schedule]] = []
    for name, generate in SCHEDULES.items():
        if name == "interleaved_1f1b":
            generators.append(lambda: SCHEDULES["interleaved_1f1b"](*shape, max(stages_per_rank, 1)))
        elif name != "dualpipe" or _can_be_bidirectional(*shape):
            generators.append(lambda generate=generate: generate(*shape))  # type: ignore[misc]
    if _fits(num_ranks, costs):
        most = min(limit, 2.0 * num_ranks - 1, num_microbatches)
        limits = np.append(np.arange(1, most), most)
        if len(limits) > MOST_LIMITS:
            limits = np.linspace(1, most, MOST_LIMITS).round()
        generators += [lambda most=most: zero_bubble(*shape, costs, most) for most in limits]  # type: ignore[misc]
    for make in generators:
        schedule = make()
        if _fits(schedule.num_stages, costs) and _time_and_memory(schedule, costs)[1] <= limit + 1e-9:
            yield schedule


def _time_and_memory(schedule: Schedule, costs: Costs) -> tuple[float, float]:
    timeline = simulate(schedule, costs)
    return timeline.pipeline_time, max(timeline.peak_memory(rank) for rank in range(schedule.num_ranks))


def _can_be_bidirectional(num_ranks: int, num_microbatches: int) -> bool:
    return num_ranks % 2 == 0 and num_microbatches >= 2


def _fits(num_stages: int, costs: Costs) -> bool:
    """Whether costs that list stages list so many."""
    return all(not isinstance(time, list | tuple) or len(time) == num_stages for time in (costs.f, costs.i, costs.w))


def _placements(
    num_ranks: int, num_microbatches: int, costs: Costs, shape: str, stages_per_rank: int
) -> list[list[Schedule]]:
    """For every shape that is allowed, its placements that the costs fit, as schedules without programs."""
    if shape not in SHAPES:
        raise ValueError(f"shape = {shape!r}: choose one of {', '.join(SHAPES)}")
    ranks = tuple(range(num_ranks))
    loop = [(ranks,), (ranks * stages_per_rank,)] if stages_per_rank > 1 else [(ranks,)]
    placements: dict[str, list] = {"loop": loop, "v": [(ranks + ranks[::-1],)], "bidirectional": [(ranks, ranks[::-1])]}
    if not _can_be_bidirectional(num_ranks, num_microbatches):
        if shape == "bidirectional":
            raise ValueError(
                f"shape = 'bidirectional' needs an even number of ranks and two microbatches, got {num_ranks} and "
                f"{num_microbatches}: choose v"
            )
        del placements["bidirectional"]
    by_shape = [
        [Schedule("auto", [[] for _ in ranks], placement, num_microbatches) for placement in placements[name]]
        for name in placements
        if shape in (name, "any")
    ]
    fitting = [[empty for empty in empties if _fits(empty.num_stages, costs)] for empties in by_shape]
    return [empties for empties in fitting if empties] or by_shape


def _one_at_a_time(empty: Schedule) -> Schedule:
    """Each microbatch through the whole model before the next: the order that any limit allows."""
    programs: list[Program] = [[] for _ in empty.programs]
    stages = range(empty.num_stages)
    for mb in range(empty.num_microbatches):
        for action in [Action(s, Op.F, mb) for s in stages] + [Action(s, Op.B, mb) for s in reversed(stages)]:
            programs[empty.rank_of(action.stage, mb)].append((action,))
    return replace(empty, programs=programs)


def _place(empty: Schedule, costs: Costs, limit: float) -> _Placed:
    layout = layout_of(empty)
    times = times_of(empty, layout, costs, limit)
    arrives_RC = np.zeros(layout.stage_RC.shape)
    for s, r, c in sorted((s, r, c) for (r, c), s in np.ndenumerate(layout.stage_RC)):
        rank, chunk = layout.before_RC2[r, c]
        if s:
            arrives_RC[r, c] = arrives_RC[rank, chunk] + times.work_ORC[F, rank, chunk] + times.p2p * (rank != r)
    # All work comes after the first arrival; and at least one F and one backward of a rank have nobody to overlap with.
    whole_RC = times.work_ORC[:2].sum(0)
    squeeze = min(times.squeeze, 1.0)
    work_R = (whole_RC * layout.count_RC).sum(1) * squeeze + whole_RC.min(1) * (1 - squeeze)
    return _Placed(empty, layout, times, float((arrives_RC.min(1) + work_R).max()) * (1 + 1e-12))


def _search(placed: list[_Placed], known: list[Schedule], costs: Costs, bar: Progress) -> list[Schedule]:
    """The improved orders: of the best known, of the best construction of each placement, of the fastest of these."""
    best = min(known, key=lambda schedule: _time_and_memory(schedule, costs))
    home = next(one for one in placed if one.empty.placement == best.placement)
    starts = [_Start(simulate(best, costs).pipeline_time, home, *words_of(best))]
    for one in placed:
        starts += _construct(one, bar)
    starts = starts[:1] + sorted(starts[1:], key=lambda start: start.end)
    rounds = bar.track(range(len(starts) + NUM_AGAIN), description="improve")
    for seed in rounds:
        k = seed if seed < len(starts) else min(range(len(starts)), key=lambda k: starts[k].end)
        if min(start.end for start in starts) > starts[k].placed.goal:
            starts[k] = _improve(starts[k], seed)
    return [_finish(start) for start in starts]


def _improve(start: _Start, seed: int) -> _Start:
    one = start.placed
    changes = int(min(ANNEAL_VISITS / one.num_actions, MOST_CHANGES))
    warmth = WARMTH * one.times.work_ORC[F].mean()
    found = anneal(one.layout, one.times, start.words_RL, start.length_R, changes, warmth, one.goal, seed)
    return _Start(found[0], one, *found[1:])


def _finish(start: _Start) -> Schedule:
    one = start.placed
    words, length = merge(one.layout, one.times, start.words_RL, start.length_R)
    return schedule_of(one.empty, one.layout, one.times, words, length)


def _construct(one: _Placed, bar: Progress) -> list[_Start]:
    """The best of a few greedy constructions that were tuned, if there is one."""
    settings = list(_settings(one))
    num_builds = int(np.clip(BUILD_VISITS / one.num_actions, FEWEST_BUILDS, MOST_BUILDS))
    chosen = np.random.default_rng(0).permutation(len(settings))[:num_builds].tolist()
    built = []
    for k in bar.track(chosen, description=f"construct with {one.empty.num_stages} stages"):
        built.append((build(one.layout, one.times, settings[k])[0], k))
    several: dict[float, int] = {}  # different ends, so different orders
    for end, k in sorted(built):
        if math.isfinite(end) and len(several) < NUM_TUNED:
            several.setdefault(end, k)
    turns = int(min(TUNE_VISITS / NUM_TUNED / one.num_actions, MOST_TURNS))
    tuned = (
        tune(one.layout, one.times, settings[k], turns, one.goal, seed)
        for seed, k in enumerate(bar.track(list(several.values()), description="tune"))
    )
    return sorted((_Start(end, one, words, length) for end, words, length in tuned), key=lambda s: s.end)[:1]


def _settings(one: _Placed) -> Iterator[Knobs]:
    """Settings of the knobs: caps by the time that a microbatch is on its way, and every choice of the others."""
    layout, times = one.layout, one.times
    away_RC = np.zeros(layout.stage_RC.shape)  # from the start of F to the end of I, if nothing waits
    for _, r, c in sorted(((s, r, c) for (r, c), s in np.ndenumerate(layout.stage_RC)), reverse=True):
        rank, chunk = layout.after_RC2[r, c]
        away_RC[r, c] = times.work_ORC[F, r, c] + times.work_ORC[I, r, c]
        if rank >= 0:
            away_RC[r, c] += away_RC[rank, chunk] + 2 * times.p2p * (rank != r)
    busy_RC = times.work_ORC[:2].sum(0) * layout.count_RC
    in_flight_RC = away_RC * layout.count_RC / busy_RC.sum(1).max()
    num_ranks, num_chunks = in_flight_RC.shape
    no_cap_R, no_cap_RC = np.full(num_ranks, UNLIMITED), np.full((num_ranks, num_chunks), UNLIMITED)
    caps = [(no_cap_R, no_cap_RC)]
    for stretch in STRETCHES:
        total_R = np.maximum(np.ceil(stretch * in_flight_RC.sum(1) - 1e-9).astype(np.int64), num_chunks)
        caps += [(total_R, no_cap_RC), (np.full(num_ranks, total_R.max()), no_cap_RC)]
        if num_chunks > 1:
            caps.append((no_cap_R, np.maximum(np.ceil(stretch * in_flight_RC - 1e-9).astype(np.int64), 1)))
    backward = times.work_ORC[1].max()
    patiences = (-1.0, 0.0, 0.5 * backward, backward) if times.squeeze < 1 else (-1.0,)
    for (cap_R, cap_RC), fit, f_first, deep_first, patience in product(
        caps, (0.0, 0.5, 1.0), (False, True), (False, True), patiences
    ):
        alike = (np.full(num_ranks, knob) for knob in (fit, f_first, deep_first, patience))
        yield Knobs(cap_R, cap_RC, *alike)


MADE_FOR_COSTS: dict[str, Callable[..., Schedule]] = {"zero_bubble": zero_bubble, "auto": auto}
