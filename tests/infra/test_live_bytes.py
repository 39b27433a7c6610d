"""Bytes of live tensors, against what a few lines of torch make."""

import threading

import torch

from infra.live_bytes import LiveBytes


def test_it_counts_what_is_made_and_gone() -> None:
    live = LiveBytes()
    with live.counting():
        a = torch.zeros(1000, dtype=torch.float32)
        b = a + 1
        assert live.now == 8000
        del a
        assert (live.now, live.peak) == (4000, 8000)
    b = b * 2  # not counted: made outside; and the counted one is gone
    assert live.now == 0


def test_views_and_changes_in_place_are_nothing_new() -> None:
    old = torch.zeros(1000)
    live = LiveBytes()
    with live.counting():
        old.add_(1)
        part = old[:10]
        new = torch.ones(10)
        same = new.view(2, 5)
    assert live.now == new.nbytes
    del new
    assert live.now == same.nbytes
    del same, part
    assert live.now == 0


def test_it_sees_what_autograd_keeps_and_makes() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    live = LiveBytes()
    with live.counting():
        hidden = (weight @ weight).exp()  # exp keeps its output
        kept = live.now
        loss = hidden.sum()
        del hidden
        assert live.now == kept + loss.nbytes == weight.nbytes + loss.nbytes  # of the product nothing is left
        loss.backward()
        assert live.peak > kept
    assert weight.grad is not None


def test_a_thread_counts_with_a_mode_of_its_own() -> None:
    live, made = LiveBytes(), []

    def work() -> None:
        made.append(torch.zeros(50))
        with live.counting():
            made.append(torch.zeros(25))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert live.now == 100
