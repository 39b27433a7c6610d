"""The schedules against the published figures, and scaled down to a run of 200 steps."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.lr import BatchRampConfig, LRConfig, batch_size, learning_rate, total_samples

TRILLION = 10**12
V3_STEPS = 240_000


def v3(tokens: float, step: int = 100_000) -> float:
    return learning_rate(LRConfig(), step, V3_STEPS, tokens / (14.8 * TRILLION))


def test_published_learning_rate() -> None:
    assert [v3(0, step) for step in (0, 999, 1999)] == pytest.approx([1.1e-7, 1.1e-4, 2.2e-4])
    assert v3(25e9, 2000) == v3(9.999 * TRILLION) == 2.2e-4
    assert v3(10 * TRILLION) == pytest.approx(2.2e-4)
    assert v3(12.15 * TRILLION) == pytest.approx((2.2e-4 + 2.2e-5) / 2)  # half of the 4.3T
    assert v3(14.299999 * TRILLION) == pytest.approx(2.2e-5, rel=1e-6)
    assert v3(14.3001 * TRILLION) == v3(14.6329 * TRILLION) == pytest.approx(2.2e-5)
    assert v3(14.6331 * TRILLION) == v3(14.8 * TRILLION) == pytest.approx(7.3e-6)


def test_200_steps_go_through_all_five_phases() -> None:
    config = LRConfig(peak=1.0)
    rates = [learning_rate(config, step, 200, step / 200) for step in range(200)]
    assert rates[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert set(rates[20:135]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(rates[135:195]))
    assert rates[194:198] == pytest.approx([0.1] * 4)
    assert rates[198:] == pytest.approx([7.3e-6 / 2.2e-4] * 2)


@given(num_steps=st.integers(1, 5000), peak=st.floats(1e-6, 1))
def test_any_run_stays_within_the_peak_and_rises_then_falls(num_steps: int, peak: float) -> None:
    rates = [learning_rate(LRConfig(peak=peak), step, num_steps, step / num_steps) for step in range(num_steps)]
    assert min(rates) > 0
    assert max(rates) <= peak
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_published_batch_ramp() -> None:
    total = round(14.8 * TRILLION / 4096)
    seen = [round(tokens / 4096) for tokens in (0, 234.5e9, 469e9, 14e12)]
    sizes = [batch_size(s, total, 15360, BatchRampConfig()) for s in seen]
    assert sizes[0] == 3072
    assert sizes[1] == pytest.approx(9216, abs=1)
    assert sizes[2:] == [15360, 15360]
    # The step count that these figures imply, and back.
    assert total_samples(242_782, 15360, BatchRampConfig()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("num_steps", "start", "end", "multiple_of"), [(200, 4, 16, 4), (1000, 32, 512, 8), (50, 8, 8, 8)]
)
def test_a_ramp_ends_where_it_planned_to(num_steps: int, start: int, end: int, multiple_of: int) -> None:
    ramp = BatchRampConfig(start=start, share=0.3, multiple_of=multiple_of)
    total = total_samples(num_steps, end, ramp)
    seen, sizes = 0, []
    for _ in range(num_steps):
        sizes.append(batch_size(seen, total, end, ramp))
        seen += sizes[-1]
    assert sizes == sorted(sizes)
    assert sizes[0] == start
    assert sizes[-1] == end
    assert all(size % multiple_of == 0 for size in sizes)
    assert seen == pytest.approx(total, rel=0.06)  # whole batches, rounded down


@pytest.mark.parametrize("ramp", [None, BatchRampConfig(start=0, multiple_of=3)])
def test_no_ramp_is_the_batch_itself(ramp: BatchRampConfig | None) -> None:
    assert total_samples(200, 16, ramp) == 3200
    assert batch_size(0, 3200, 16, ramp) == batch_size(3199, 3200, 16, ramp) == 16


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"peak": 0.0}, "peak=0.0"),
        ({"peak": float("nan")}, "peak=nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"constant_until": 0.99}, "constant_until=0.99"),
        ({"tail_ratio": 2.0}, "tail_ratio=2.0"),
    ],
)
def test_lr_config_refuses(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LRConfig(**wrong)  # type: ignore[arg-type]


def test_ramp_config_refuses() -> None:
    with pytest.raises(ValueError, match=r"start=6 .*multiple_of=4"):
        BatchRampConfig(start=6, multiple_of=4)
    with pytest.raises(ValueError, match=r"share=2"):
        BatchRampConfig(share=2)
    with pytest.raises(ValueError, match=r"global_batch_size=16 .*start=32"):
        total_samples(10, 16, BatchRampConfig(start=32))
