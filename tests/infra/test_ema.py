"""The average behind the step: the same numbers as a plain loop, whatever the timing."""

import threading

import pytest
import torch

from infra.ema import Ema


def test_the_average_is_that_of_a_plain_loop() -> None:
    sources = [torch.randn(1000), torch.randn(3, 5)]
    ema = Ema(sources, decay=0.9)
    expected = [s.clone() for s in sources]
    for step in range(100):
        ema.before_step()
        for source in sources:
            source.add_(torch.randn(source.shape, generator=torch.Generator().manual_seed(step)))
        ema.update()
        decay = min(0.9, (2 + step) / (11 + step))
        for average, source in zip(expected, sources, strict=True):
            average += (1 - decay) * (source - average)
    for average, right in zip(ema.averages, expected, strict=True):
        torch.testing.assert_close(average, right)


def test_little_is_left_of_what_was_there_before_the_first_step() -> None:
    source = torch.ones(1, dtype=torch.float64)
    ema = Ema([source], decay=0.999)
    source.zero_()
    for _ in range(20):
        ema.update()
    assert 0 < ema.averages[0].item() < 1e-5  # without a warm-up it would be 0.98


def test_before_step_waits_for_a_slow_reader() -> None:
    """Without it, the next step's parameters would leak into this step's average."""
    source = torch.zeros(10)
    ema, may_read = Ema([source], decay=0.1), threading.Event()
    average = ema._average

    def slowly(decay: float, event: None) -> None:
        may_read.wait(10)
        average(decay, event)

    ema._average = slowly  # type: ignore[method-assign]
    source.fill_(2.0)
    ema.update()  # returns although the reader has not begun
    threading.Timer(0.05, may_read.set).start()
    ema.before_step()
    source.fill_(100.0)
    torch.testing.assert_close(ema.averages[0], torch.full((10,), 1.8))


def test_loaded_values_are_averaged_further() -> None:
    source = torch.ones(4)
    ema = Ema([source], decay=0.5)
    ema.averages[0].copy_(torch.full((4,), 3.0))
    ema.num_updates = 100
    ema.update()
    assert ema.averages[0].tolist() == [2.0] * 4
    assert source.tolist() == [1.0] * 4  # never written


def test_an_error_in_the_thread_is_raised() -> None:
    source = torch.ones(4)
    ema = Ema([source], decay=0.5)
    ema._averages[0] = torch.ones(5)
    ema.update()
    with pytest.raises(RuntimeError, match="must match"):
        ema.wait()


def test_a_wrong_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay=1: .* in \[0, 1\)"):
        Ema([torch.ones(1)], decay=1)


@pytest.mark.gpu
def test_on_a_gpu_the_copy_is_ordered_before_the_next_step() -> None:
    source = torch.zeros(1 << 24, device="cuda")
    ema = Ema([source], decay=0.5)
    expected = torch.zeros(1 << 24)
    ema.num_updates = 100
    for step in range(5):
        ema.before_step()
        source.fill_(float(step))
        ema.update()
        expected += 0.5 * (step - expected)
    assert torch.equal(ema.averages[0], expected)
