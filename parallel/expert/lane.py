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
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Pending(Generic[T]):
    """A result on its way. `wait()` returns it, or raises what its task raised; it may be called more than once."""

    def __init__(self) -> None:
        self._future: Future[T] = Future()
        self._done: torch.cuda.Event | None = None

    @classmethod
    def ready(cls, value: T) -> Pending[T]:
        """A result that is already there."""
        pending: Pending[T] = cls()
        pending._future.set_result(value)
        return pending

    def wait(self) -> T:
        value = self._future.result()
        if self._done is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            for tensor in _cuda_tensors(value):
                tensor.record_stream(stream)  # allocated on the lane's stream, used on this one
        return value


def _cuda_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_cuda else []
    return [t for item in value for t in _cuda_tensors(item)] if isinstance(value, tuple) else []


class Lane:
    """Runs tasks one after another, without autograd, on a daemon thread: it keeps no rank from giving up."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None

    def start(self, task: Callable[..., T], *args: Any) -> Pending[T]:
        """Starts `task(*args)` after all tasks started before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dispatch lane", daemon=True)
            self._thread.start()
        pending: Pending[T] = Pending()
        inputs = _cuda_tensors(args)
        device = inputs[0].device if inputs else None
        self._tasks.put((pending, task, args, device, torch.cuda.current_stream().record_event() if inputs else None))
        return pending

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                pending, task, args, device, inputs_ready = self._tasks.get()
                try:
                    if inputs_ready is None:
                        result = task(*args)
                    else:
                        self._stream = self._stream or torch.cuda.Stream(device)
                        with torch.cuda.stream(self._stream):
                            self._stream.wait_event(inputs_ready)
                            result = task(*args)
                            for tensor in _cuda_tensors(args):
                                tensor.record_stream(self._stream)
                            pending._done = self._stream.record_event()
                    pending._future.set_result(result)
                except BaseException as error:  # raised where the result is waited for
                    pending._future.set_exception(error)
                pending = task = args = result = None  # keep no tensor alive while idle
