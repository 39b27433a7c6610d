"""Which losses are spikes, and which data stands for which after some is left out."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.spike import LossHistory, SpikeConfig, limit, pass_over


def test_the_limit_is_the_median_and_robust_deviations():
    losses = [2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.2, 1.8, 2.1, 99.0]  # median 2.05, deviations 0.05 to 0.25, and 97
    expected = np.median(losses) + 10 * 1.4826 * np.median(np.abs(np.array(losses) - np.median(losses)))
    assert limit(losses, SpikeConfig(10.0, window=10, skip=1)) == pytest.approx(expected)
    assert expected < 6  # which the outlier among them has not moved


def test_an_even_loss_makes_no_spike_of_a_wobble():
    assert limit([2.0] * 10, SpikeConfig(10.0, window=10, skip=1)) == pytest.approx(2.2)


def test_too_few_losses_judge_nothing_and_zero_turns_it_off():
    assert limit([2.0] * 4, SpikeConfig(10.0, window=10, skip=1)) == float("inf")
    assert limit([2.0] * 5, SpikeConfig(10.0, window=10, skip=1)) < float("inf")
    assert limit([2.0] * 10, SpikeConfig(0.0, window=10, skip=1)) == float("inf")


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=5))
def test_passing_over_is_counting_what_is_not_left_out(gaps):
    windows, at = [], 0
    for gap, length in gaps:
        windows.append((at + gap, at + gap + length))
        at += gap + length
    kept = [i for i in range(at + 50) if not any(start <= i < end for start, end in windows)]
    assert pass_over(np.arange(len(kept)), windows).tolist() == kept


def _run(history: LossHistory, losses: dict[int, float], steps: range) -> list[int]:
    """The steps of 4 samples whose losses, given by their first global sample (else 2), are spikes."""
    spikes = []
    for step in steps:
        first = int(pass_over(np.array(4 * step), history.left_out))
        history.add(losses.get(first, 2.0), 4 * step, 4 * step + 4)
        if history.has_spiked:
            spikes.append(step)
    return spikes


def test_a_spike_is_seen_and_its_window_is_the_last_steps():
    history = LossHistory(SpikeConfig(10.0, window=8, skip=3))
    assert _run(history, {40: 3.0}, range(11)) == [10]
    assert history.suspect == (32, 44)


def test_after_left_out_data_judging_starts_anew():
    history = LossHistory(SpikeConfig(10.0, window=8, skip=2))
    history.left_out = [(36, 44)]
    assert _run(history, {44: 9.0, 48: 9.0}, range(20)) == []  # 44 follows the window, and nothing is known yet
    assert _run(history, {100: 9.0}, range(20, 30)) == [23]
    assert history.suspect[0] > 44


def test_a_history_goes_through_json():
    history = LossHistory(SpikeConfig(10.0, window=8, skip=2))
    history.left_out = [(4, 8)]
    _run(history, {}, range(6))
    again = LossHistory(history.config)
    again.load(json.loads(json.dumps(history.state())))
    assert (again.left_out, again.state()) == (history.left_out, history.state())
    assert _run(again, {48: 4.0}, range(6, 12)) == _run(history, {48: 4.0}, range(6, 12)) == [11]


@pytest.mark.parametrize("wrong", [{"threshold": -1}, {"threshold": float("nan")}, {"window": 4}, {"skip": 40}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"spike.{next(iter(wrong))}="):
        SpikeConfig(**wrong)
