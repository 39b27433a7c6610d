"""When something happened on a device: `mark` now, ask for `seconds` later.

On a CPU a mark is the time. Work on a GPU runs after the call that asked for it, so there a mark is an event in its
stream. The device is waited for before a step and where the times are read, never between two actions.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Protocol

import torch


class Clock(Protocol):
    def begin(self) -> None:
        """Before the marks of a step."""
        ...

    def mark(self) -> Any: ...

    def seconds(self, mark: Any) -> float:
        """The time of a mark, of the host's `perf_counter`."""
        ...


class HostClock:
    mark = staticmethod(perf_counter)

    def begin(self) -> None: ...

    def seconds(self, mark: float) -> float:
        return mark


class DeviceClock:
    """Marks in the current CUDA stream. They count from `begin`, for events are told apart in single precision."""

    def begin(self) -> None:
        torch.cuda.synchronize()
        self._host_time, self._origin = perf_counter(), self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        mark.synchronize()
        return self._host_time + self._origin.elapsed_time(mark) / 1e3


def clock_of(device: torch.device) -> Clock:
    return DeviceClock() if device.type == "cuda" else HostClock()
