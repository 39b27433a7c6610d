"""What a schedule costs: (Schedule, Costs) -> Timeline, exactly.

The order of every rank is fixed, so a step is one walk through the dependencies (replay.py); nothing is sampled,
rounded or approximated, and with small whole numbers as costs the times are exact to the last bit.

When does a result leave its slot? `send_when` says:

    slot_end   when the slot ends: a full B and an overlapped pair are atomic. Published formulas mean this.
    ready      when it is there: the input gradient of a full B after its I part, and the parts of a pair one after the
               other in the order F, I, W, each squeezed in the ratio of the pair to its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parallel.pipeline.actions import Op, Schedule
from parallel.pipeline.replay import link, replay
from parallel.pipeline.timeline import Timeline
from parallel.pipeline.validate import check_slots, validate

SEND_WHEN = ("ready", "slot_end")


@dataclass
class Costs:
    """Times of one microbatch, in any one unit.

    f, i and w are those of 1/PP of the model: a rank that holds v stages of a route spends 1/v on each. Or a list with
    one time a stage, which is the time of that very stage. Raises ValueError for what cannot be.
    """

    f: Any = 1.0  # forward: float | list[float], a union that OmegaConf does not know
    i: Any = 1.0  # input gradient
    w: Any = 1.0  # weight gradient
    # An overlapped pair F&B of 1/PP of the model; None is f + i + w, no gain. Pairs of other parts (F&I, stages of
    # other sizes) are squeezed in the same ratio.
    fb: float | None = None
    p2p: float = 0.0  # from one rank to another: the latency, to which p2p_bytes / p2p_bandwidth are added
    p2p_bytes: float = 0.0
    p2p_bandwidth: float = math.inf
    optimizer: float = 0.0  # after the last slot of all ranks
    kept_after_i: float = 1.0  # the share of a microbatch's activations that is held from I to W
    send_when: str = "ready"  # or slot_end
    slow: dict[int, float] = field(default_factory=dict)  # rank: factor on the time of its every slot
    jitter: float = 0.0  # relative standard deviation of the time of every slot: log-normal, mean 1

    @property
    def p2p_time(self) -> float:
        return self.p2p + self.p2p_bytes / self.p2p_bandwidth

    def __post_init__(self) -> None:
        for name in ("f", "i", "w"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                _check(f"costs.{name}", value, above=0.0)
                continue
            if not value:
                raise ValueError(f"costs.{name} is an empty list: give one time a stage, or one number")
            for stage, one in enumerate(value):
                _check(f"costs.{name}[{stage}]", one, above=0.0)
        if self.fb is not None:
            _check("costs.fb", self.fb, above=0.0)
        _check("costs.p2p_bandwidth", self.p2p_bandwidth, above=0.0, finite=False)
        for name in ("p2p", "p2p_bytes", "optimizer", "jitter", "kept_after_i"):
            _check(f"costs.{name}", getattr(self, name))
        if self.kept_after_i > 1:
            raise ValueError(f"costs.kept_after_i = {self.kept_after_i}: it is a share, so at most 1")
        if self.send_when not in SEND_WHEN:
            raise ValueError(f"costs.send_when = {self.send_when!r}: choose one of {', '.join(SEND_WHEN)}")
        for rank, factor in self.slow.items():
            if not isinstance(rank, int) or rank < 0:
                raise ValueError(f"costs.slow names rank {rank}: ranks are whole numbers from 0")
            _check(f"costs.slow[{rank}]", factor, above=0.0)


def _check(name: str, value: Any, above: float | None = None, finite: bool = True) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or (finite and math.isinf(value)):
        raise ValueError(f"{name} = {value!r}: it must be a {'finite ' if finite else ''}number")
    if above is not None and value <= above:
        raise ValueError(f"{name} = {value!r}: it must be above {above:g}")
    if above is None and value < 0:
        raise ValueError(f"{name} = {value!r}: it must not be negative")
    if value and not math.isinf(value) and not 1e-100 < value < 1e100:
        raise ValueError(f"{name} = {value!r}: choose a unit in which it is between 1e-100 and 1e100")


def stage_times(schedule: Schedule, costs: Costs) -> np.ndarray:
    """[op, stage]: the time of every F, B, I and W by itself."""
    rows = []
    for name in ("f", "i", "w"):
        value = getattr(costs, name)
        if isinstance(value, list | tuple):
            if len(value) != schedule.num_stages:
                raise ValueError(
                    f"costs.{name} lists {len(value)} stages, but {schedule.name} on {schedule.num_ranks} ranks has "
                    f"{schedule.num_stages}: give one time a stage, or one number"
                )
            rows.append(np.array(value, dtype=np.float64))
        else:
            rows.append(np.full(schedule.num_stages, value * schedule.num_ranks / schedule.num_stages))
    f, i, w = rows
    return np.stack((f, i + w, i, w))


def slot_times(schedule: Schedule, costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    """(duration_S, ready_A): how long every slot takes, and when after its start each result leaves."""
    _, slot_S1, actions_A3 = schedule.columns
    stage_A, op_A, _ = actions_A3.T
    times = stage_times(schedule, costs)
    time_A = times[op_A, stage_A]
    first, size_S = slot_S1[:-1], np.diff(slot_S1)
    duration_S = np.add.reduceat(time_A, first)
    pairs = size_S == 2
    whole = times[:2].sum() / schedule.num_ranks  # F + I + W of 1/PP of the model
    if costs.fb is not None:
        duration_S[pairs] = duration_S[pairs] * costs.fb / whole
    if costs.send_when == "slot_end":
        return duration_S, np.repeat(duration_S, size_S)
    ready_A = np.where(op_A == Op.B, times[Op.I, stage_A], time_A)
    second = first[pairs] + 1
    ready_A[second] += time_A[second - 1]
    if costs.fb is not None:
        ready_A[np.repeat(pairs, size_S)] *= costs.fb / whole
    return duration_S, ready_A


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    *,
    seed: int = 0,
    slots: tuple[np.ndarray, np.ndarray] | None = None,
) -> Timeline:
    """The step of this schedule under these costs. `seed` is that of `costs.jitter`. slots: (duration_S, ready_A) in
    place of those of `slot_times`, where stages differ more than `Costs` can say.

    Raises ScheduleError for a schedule that cannot run, ValueError for costs that do not fit it.
    """
    costs = costs or Costs()
    check_slots(schedule)
    rank_R1, slot_S1, actions_A3 = schedule.columns
    rank_A = schedule.rank_A
    duration_S, ready_A = slots or slot_times(schedule, costs)
    duration_S, ready_A = _disturb(schedule, costs, seed, duration_S, ready_A)
    start_S, leaves_A, waited_S, next_R = replay(schedule, duration_S, ready_A, costs.p2p_time)
    if (next_R != rank_R1[1:]).any():
        validate(schedule)
        raise AssertionError("a schedule that deadlocks must not pass validation")
    size_S = np.diff(slot_S1)
    slot_of_A = np.repeat(np.arange(len(size_S)), size_S)
    stage_A, op_A, mb_A = actions_A3.T
    return Timeline(
        num_ranks=schedule.num_ranks,
        rank_A=rank_A,
        slot_A=slot_of_A - rank_R1[rank_A],
        stage_A=stage_A,
        op_A=op_A,
        mb_A=mb_A,
        start_A=start_S[slot_of_A],
        end_A=(start_S + duration_S)[slot_of_A],
        ready_A=leaves_A,
        waited_A=waited_S[slot_of_A],
        sent_A=_sent(schedule, costs.p2p_bytes),
        optimizer=costs.optimizer,
        activation=schedule.num_ranks / schedule.num_stages,
        kept_after_i=costs.kept_after_i,
    )


def _sent(schedule: Schedule, num_bytes: float) -> np.ndarray:
    """sent_A: `num_bytes` of every result that another rank needs."""
    rank_A, sent_A = schedule.rank_A, np.zeros(len(schedule.rank_A), dtype=np.int64)
    if num_bytes:
        for need_A in link(schedule).T:
            sent_A[need_A[(need_A >= 0) & (rank_A[need_A] != rank_A)]] = num_bytes
    return sent_A


def _disturb(
    schedule: Schedule, costs: Costs, seed: int, duration_S: np.ndarray, ready_A: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same times with slow ranks and jitter."""
    if not costs.slow and not costs.jitter:
        return duration_S, ready_A
    rank_R1, slot_S1, _ = schedule.columns
    factor_R = np.ones(schedule.num_ranks)
    for rank, factor in costs.slow.items():
        if not 0 <= rank < schedule.num_ranks:
            raise ValueError(
                f"costs.slow names rank {rank}, but {schedule.name} has ranks 0 to {schedule.num_ranks - 1}"
            )
        factor_R[rank] = factor
    factor_S = np.repeat(factor_R, np.diff(rank_R1))
    if costs.jitter:
        sigma = math.sqrt(math.log1p(costs.jitter**2))
        factor_S = factor_S * np.random.default_rng(seed).lognormal(-(sigma**2) / 2, sigma, len(factor_S))
    return duration_S * factor_S, ready_A * np.repeat(factor_S, np.diff(slot_S1))


def step_time_quantiles(
    schedule: Schedule,
    costs: Costs,
    *,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    num_runs: int = 100,
    seed: int = 0,
    slots: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[float]:
    """Quantiles of the step time over `num_runs` runs with jitter, seeds `seed`, `seed` + 1, ..."""
    if num_runs < 1:
        raise ValueError(f"num_runs = {num_runs}: at least one run")
    times = [simulate(schedule, costs, seed=seed + run, slots=slots).step_time for run in range(num_runs)]
    return np.quantile(times, quantiles).tolist()
