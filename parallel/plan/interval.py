"""Between what and what a step lies: every term that no table settles, moved through its range. No torch.

    uneven stages    layers, heads and MTP do not divide evenly; known, so its cost is told and not doubted
    expert load      rows of the most loaded rank over the mean
    slow rank        one pipeline rank computes so much longer; the one that hurts most
    jitter           relative standard deviation of every slot, drawn anew: from the 5 % to the 95 % quantile
    kernels          all computing, against the rates of the tables (or of measured layers)
    network          all that travels between ranks

Each term alone gives the seconds that it moves the step by; all at their favourable and all at their adverse ends give
the interval. The term that moves it most is the one to measure first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf, log1p, sqrt

import numpy as np

from parallel.plan.layout import Layout
from parallel.plan.step import StepModel

DRAWS = 12


@dataclass
class Ranges:
    """[least, most] of each term. expert_load: excess of the most loaded rank; None: from 0 to twice the known one.

    kernels, network: factors on times. The defaults are assumptions: kernels by what the published profile's phases
    differ from their sums (docs/validation.md), a few per cent of jitter, as clusters have it.
    """

    expert_load: list[float] | None = None
    slow_rank: list[float] = field(default_factory=lambda: [1.0, 1.03])
    jitter: list[float] = field(default_factory=lambda: [0.0, 0.05])
    kernels: list[float] = field(default_factory=lambda: [0.97, 1.08])
    network: list[float] = field(default_factory=lambda: [0.95, 1.15])

    def __post_init__(self) -> None:
        for name, least in (("expert_load", 0), ("slow_rank", 1), ("jitter", 0), ("kernels", 0.01), ("network", 0.01)):
            ends = getattr(self, name)
            if ends is not None and (len(ends) != 2 or not least <= ends[0] <= ends[1] < inf):
                raise ValueError(f"doubt.{name}={ends}: expected [least, most], from {least:g} up, as in [1.0, 1.05]")


@dataclass(frozen=True)
class Interval:
    """Seconds of a step. moved: by each term alone, (at its least, at its most) less `middle`."""

    low: float
    middle: float
    high: float
    uneven_stages: float
    moved: dict[str, tuple[float, float]]

    @property
    def largest(self) -> str:
        """The term that moves the step most."""
        return max(self.moved, key=lambda name: self.moved[name][1] - self.moved[name][0])


def interval(step: StepModel, layout: Layout, global_batch_size: int, ranges: Ranges, seed: int = 0) -> Interval:
    """Of one layout, by replaying its schedule under each end of each range."""
    load = ranges.expert_load or [0.0, 2 * step.load_excess(layout.ep)]
    known = {"expert load": load, "kernels": ranges.kernels, "network": ranges.network}
    middle = step.simulate(layout, global_batch_size).total

    def total(model: StepModel, factors: Sequence[np.ndarray] = ()) -> float:
        reduce_and_update = sum(model.optimizer(layout))
        lengths = [model.replayed(layout, global_batch_size, one)[2].max() for one in factors or (None,)]
        return float(np.mean(lengths)) + reduce_and_update

    moved = {
        name: (total(_moved(step, name, ends[0])) - middle, total(_moved(step, name, ends[1])) - middle)
        for name, ends in known.items()
    }
    slow = [_slow(step, layout, global_batch_size, end) for end in ranges.slow_rank]
    moved["slow rank"] = tuple(total(step, [one]) - middle for one in slow)  # type: ignore[assignment]
    draws = _draws(len(slow[0]), ranges.jitter, seed)
    lengths = [[total(step, [one]) for one in some] for some in draws]
    moved["jitter"] = (float(np.quantile(lengths[0], 0.05)) - middle, float(np.quantile(lengths[1], 0.95)) - middle)
    favourable, adverse = step, step
    for name, ends in known.items():
        favourable, adverse = _moved(favourable, name, ends[0]), _moved(adverse, name, ends[1])
    low = float(np.quantile([total(favourable, [slow[0] * one]) for one in draws[0]], 0.05))
    high = float(np.quantile([total(adverse, [slow[1] * one]) for one in draws[1]], 0.95))
    return Interval(low, middle, high, middle - total(replace(step, even_stages=True)), moved)


def _moved(step: StepModel, term: str, value: float) -> StepModel:
    """The same model with one term elsewhere; a model is cheap, its cache starts anew."""
    cluster = step.cluster
    if term == "expert load":
        return replace(step, cluster=replace(cluster, expert_imbalance=value), expert_load=None)
    if term == "kernels":
        return replace(step, slower=step.slower * value)
    rates = ("node_gbs", "network_gbs", "p2p_gbs", "reduce_gbs")
    latencies = ("node_latency_us", "network_latency_us")
    changed = {name: getattr(cluster, name) / value for name in rates}
    changed |= {name: getattr(cluster, name) * value for name in latencies}
    return replace(step, cluster=replace(cluster, **changed), travels=step.travels * value)


def _slow(step: StepModel, layout: Layout, global_batch_size: int, factor: float) -> np.ndarray:
    """Factors of all slots: those of the rank that computes longest take `factor` as long."""
    schedule, start_S, end_S = step.replayed(layout, global_batch_size)
    rank_R1 = schedule.columns.rank_R1
    busy = np.add.reduceat(end_S - start_S, rank_R1[:-1])
    factor_S = np.ones(len(start_S))
    worst = int(busy.argmax())
    factor_S[rank_R1[worst] : rank_R1[worst + 1]] = factor
    return factor_S


def _draws(num_slots: int, jitter: Sequence[float], seed: int) -> list[list[np.ndarray]]:
    """For each end, `DRAWS` times a factor of mean 1 for every slot; one draw where nothing is random."""
    result = []
    for end in jitter:
        sigma, random = sqrt(log1p(end**2)), np.random.default_rng(seed)
        count = DRAWS if end else 1
        result.append([random.lognormal(-(sigma**2) / 2, sigma, num_slots) for _ in range(count)])
    return result
