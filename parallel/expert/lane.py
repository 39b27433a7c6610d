"""One lane of communication beside the computing: tasks run in order on a thread of their own.

Whoever starts a task gets a `Pending` and waits for it where its result is first used, so that a chain of exchanges -
count, send, forward inside the node - travels while the caller computes. One lane a dispatcher, first in first out:
the ranks of a group start the same tasks in the same order, so their collectives always match. On CUDA the lane has
its own stream.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter
from typing import Any, Generic, TypeVar

import torch

from parallel.expert.travel import TravelTimes

T = TypeVar("T")


class Pending(Generic[T]):
    """A result on its way. `wait()` returns it, or raises what its task raised; it may be called more than once."""

    def __init__(self, wait: Callable[[], T]):
        self.wait = wait


def _cuda_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_cuda else []
    return [t for item in value for t in _cuda_tensors(item)] if isinstance(value, tuple) else []


class Lane:
    """Runs tasks one after another, without autograd, on a daemon thread: it keeps no rank from giving up.

    times: where it is noted how long tasks ran, and how long their results were waited for.
    """

    def __init__(self, times: TravelTimes | None = None) -> None:
        self._times = times or TravelTimes()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None

    def start(self, task: Callable[..., T], *args: torch.Tensor, kind: str = "") -> Pending[T]:
        """Starts `task(*args)` after all tasks started before it; `kind` is what its time is counted as."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dispatch lane", daemon=True)
            self._thread.start()
        future: Future[tuple[T, torch.cuda.Event | None]] = Future()
        on_cuda = any(t.is_cuda for t in args)
        self._tasks.put((future, kind, task, args, torch.cuda.current_stream().record_event() if on_cuda else None))

        def wait() -> T:
            if not future.done():
                began = perf_counter()
                future.exception()  # waits, and raises nothing yet
                self._times.waits.append((began, perf_counter()))
            result, done = future.result()
            if done is not None:
                stream = torch.cuda.current_stream()
                stream.wait_event(done)
                for tensor in _cuda_tensors(result):
                    tensor.record_stream(stream)  # made on the lane's stream, used on this one
            return result

        return Pending(wait)

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                future, kind, task, args, inputs_ready = self._tasks.get()
                began = perf_counter()
                try:
                    if inputs_ready is None:
                        result: tuple[Any, torch.cuda.Event | None] = task(*args), None
                        self._times.travels.append((kind, (began, perf_counter())))
                    else:
                        result = self._on_stream(task, args, inputs_ready)
                    future.set_result(result)
                    del result
                except BaseException as error:  # raised where the result is waited for
                    future.set_exception(error)
                del future, task, args  # keep no tensor alive while idle

    def _on_stream(self, task: Callable, args: tuple, inputs_ready: torch.cuda.Event) -> tuple[Any, torch.cuda.Event]:
        device = args[0].device
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            self._stream.wait_event(inputs_ready)
            result = task(*args)
            for tensor in args:
                tensor.record_stream(self._stream)
            return result, self._stream.record_event()
