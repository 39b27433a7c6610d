"""From a step time to days and dollars: failures, checkpoints, restarts, spares and a growing batch. No torch.

Failures are exponential, of all ranks together one in mtbf / ranks hours. A run that saves every `interval` seconds,
each save taking `save` seconds, and that loses `restart` seconds and the work since its last save at each failure,
takes (J. T. Daly, "A higher order estimate of the optimum checkpoint interval", 2006, equation 13)

    M exp(restart / M) (exp((interval + save) / M) - 1) work / interval,        M the mean time between failures

which has one minimum; `best_interval` finds it. For short saves it is close to Young's sqrt(2 save M).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, expm1, sqrt

from infra.hardware import ClusterConfig

HOUR = 3600.0


def expected_time(work: float, interval: float, save: float, restart: float, mtbf: float) -> float:
    """Seconds, on average, until `work` seconds of work are done and saved."""
    return mtbf * exp(restart / mtbf) * expm1((interval + save) / mtbf) * work / interval


def best_interval(save: float, mtbf: float) -> float:
    """Seconds of work between saves that make `expected_time` least."""
    if save <= 0:
        raise ValueError(f"save={save}: a checkpoint takes some time, or the best interval is none at all")
    low, high = 1e-3 * sqrt(2 * save * mtbf), 10 * sqrt(2 * save * mtbf) + save
    for _ in range(200):  # the derivative's sign: (1 - x / M) exp((x + save) / M) - 1, which falls with x
        middle = (low + high) / 2
        rising = (1 - middle / mtbf) * exp((middle + save) / mtbf) - 1 < 0
        low, high = (low, middle) if rising else (middle, high)
    return (low + high) / 2


def spares(failures_per_repair: float, confidence: float = 0.99) -> int:
    """Nodes to hold ready, so that with this probability one is there when a node fails: a Poisson quantile."""
    term = total = exp(-failures_per_repair)
    count = 0
    while total < confidence:
        count += 1
        term *= failures_per_repair / count
        total += term
    return count


@dataclass(frozen=True)
class Goodput:
    """A run's bill. Hours are wall-clock; `share` is the useful share of them; dollars include the spares."""

    useful_hours: float
    hours: float
    interval_s: float
    save_s: float
    failures: float
    spare_nodes: int
    gpu_hours: float
    dollars: float

    @property
    def days(self) -> float:
        return self.hours / 24

    @property
    def share(self) -> float:
        return self.useful_hours / self.hours


def work_hours(
    tokens: float,
    sequence_length: int,
    global_batch_size: int,
    step_seconds: Callable[[int], float],
    ramp_from: int | None = None,
    ramp_tokens: float = 0.0,
    num_sizes: int = 8,
    multiple_of: int = 1,
) -> float:
    """Hours of steps for so many tokens; the batch grows linearly with the tokens seen over the first `ramp_tokens`.

    step_seconds: of a step of so many sequences; asked for `num_sizes` sizes of the ramp.
    """
    seconds = 0.0
    if ramp_from and ramp_tokens:
        for k in range(num_sizes):
            middle = ramp_from + (global_batch_size - ramp_from) * (k + 0.5) / num_sizes
            size = max(multiple_of, round(middle / multiple_of) * multiple_of)
            seconds += ramp_tokens / num_sizes / (size * sequence_length) * step_seconds(size)
    rest = tokens - (ramp_tokens if ramp_from else 0.0)
    return (seconds + rest / (global_batch_size * sequence_length) * step_seconds(global_batch_size)) / HOUR


def goodput(
    cluster: ClusterConfig, world: int, useful_hours: float, checkpoint_bytes: float, repair_hours: float = 24.0
) -> Goodput:
    """The bill of a run that needs `useful_hours` of steps; every node writes its part of a checkpoint at once. Raises
    ValueError where failures come so often that it would never end."""
    nodes = max(1, world // cluster.ranks_per_node)
    mtbf = cluster.mtbf_hours * HOUR / world
    save = checkpoint_bytes / (nodes * 1e9 * cluster.storage_gbs)
    try:
        interval = best_interval(save, mtbf)
        hours = expected_time(useful_hours * HOUR, interval, save, cluster.restart_s, mtbf) / HOUR
    except OverflowError:
        raise ValueError(
            f"cluster.mtbf_hours={cluster.mtbf_hours:g}: {world} ranks fail every {mtbf:.2g} s, but a checkpoint takes "
            f"{save:.2g} s and a restart {cluster.restart_s:g} s, so that no run would end: raise it"
        ) from None
    spare_nodes = spares(repair_hours * HOUR / mtbf)
    gpu_hours = hours * world
    paid = hours * (world + spare_nodes * min(world, cluster.ranks_per_node))
    return Goodput(
        useful_hours, hours, interval, save, hours * HOUR / mtbf, spare_nodes, gpu_hours,
        paid * cluster.dollars_per_hour,
    )  # fmt: skip
