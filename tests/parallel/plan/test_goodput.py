"""Checkpoint intervals and bills, against brute force."""

from math import exp, factorial, sqrt

import numpy as np
import pytest

from infra.hardware import ClusterConfig
from parallel.plan.goodput import best_interval, expected_time, goodput, spares, work_hours


def lived_through(work: float, interval: float, save: float, restart: float, mtbf: float, seed: int) -> float:
    """The slow twin: one run, failure by failure; a restart may fail too."""
    rng = np.random.default_rng(seed)
    now = done = 0.0
    while done < work:
        fails_after = rng.exponential(mtbf)
        if fails_after > interval + save:
            now, done = now + interval + save, done + interval
            continue
        now += fails_after
        while (down := rng.exponential(mtbf)) < restart:
            now += down
        now += restart
    return now


def test_expected_time_is_the_mean_of_many_lives() -> None:
    args = (4000.0, 40.0, 3.0, 15.0, 200.0)
    lives = [lived_through(*args, seed=seed) for seed in range(600)]
    error = np.std(lives) / sqrt(len(lives))
    assert expected_time(*args) == pytest.approx(np.mean(lives), abs=4 * error)
    assert error < 0.01 * np.mean(lives)


@pytest.mark.parametrize(("save", "mtbf"), [(2.0, 90_000.0), (30.0, 600.0), (500.0, 700.0)])
def test_the_best_interval_is_the_best_of_many(save: float, mtbf: float) -> None:
    best = best_interval(save, mtbf)
    at_best = expected_time(1e5, best, save, 60.0, mtbf)
    assert all(at_best <= expected_time(1e5, best * factor, save, 60.0, mtbf) for factor in np.geomspace(0.2, 5, 60))


def test_short_saves_give_youngs_interval() -> None:
    assert best_interval(1.0, 1e7) == pytest.approx(sqrt(2 * 1.0 * 1e7), rel=1e-3)


def test_a_save_that_takes_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="save=0"):
        best_interval(0.0, 100.0)


@pytest.mark.parametrize("mean", [0.01, 1.0, 4.2])
def test_spares_are_a_poisson_quantile(mean: float) -> None:
    count = spares(mean)

    def at_most(n: int) -> float:
        return sum(exp(-mean) * mean**k / factorial(k) for k in range(n + 1))

    assert at_most(count) >= 0.99
    assert count == 0 or at_most(count - 1) < 0.99


def test_a_batch_ramp_takes_every_token_once() -> None:
    """With a step time proportional to the batch, a ramp changes nothing; with a constant one it costs steps."""
    same = work_hours(1e9, 1000, 500, lambda size: size / 100)
    assert work_hours(1e9, 1000, 500, lambda size: size / 100, 100, 4e8) == pytest.approx(same)
    assert work_hours(1e9, 1000, 500, lambda size: 5.0, 100, 4e8) > same


def test_the_bill_counts_spares_and_failures() -> None:
    cluster = ClusterConfig(num_ranks=2048, mtbf_hours=50_000, storage_gbs=10, dollars_per_hour=2)
    bill = goodput(cluster, 2048, 1300.0, 5.4e12)
    assert bill.hours > bill.useful_hours
    assert bill.share == bill.useful_hours / bill.hours
    assert bill.failures == pytest.approx(bill.hours * 2048 / 50_000)
    assert bill.dollars == pytest.approx(2 * bill.hours * (2048 + 8 * bill.spare_nodes))
    assert bill.days == bill.hours / 24
