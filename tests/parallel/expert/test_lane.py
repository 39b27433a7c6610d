"""The lane: in order, beside the caller, errors where they are waited for, nothing kept alive."""

import gc
import threading
import weakref

import pytest
import torch

from parallel.expert.lane import Lane


def test_tasks_run_in_order_beside_the_caller():
    lane, seen, gate = Lane(), [], threading.Event()
    first = lane.start(lambda: (gate.wait(10), seen.append("first"))[1])
    second = lane.start(lambda: seen.append("second"))
    assert seen == []  # the caller was not held up
    gate.set()
    second.wait()
    first.wait()
    assert seen == ["first", "second"]


def test_an_error_is_raised_at_every_wait_and_stops_nothing():
    lane = Lane()
    bad, good = lane.start(lambda: 1 // 0), lane.start(lambda: 7)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            bad.wait()
    assert good.wait() == 7


def test_results_have_no_autograd():
    x = torch.ones(3, requires_grad=True)
    assert not Lane().start(lambda t: 2 * t, x).wait().requires_grad


def test_an_idle_lane_keeps_no_tensor_alive():
    lane, x = Lane(), torch.ones(3)
    dead = weakref.ref(x)
    lane.start(lambda t: None, x).wait()
    lane.start(lambda: None).wait()
    del x
    gc.collect()
    assert dead() is None
