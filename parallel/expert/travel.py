"""How long communication travelled, and how long it kept its caller waiting.

A lane notes from when to when each task ran; whoever waits for a result notes from when to when it stood still.
*Exposed* is the time in both at once, the rest is *hidden* behind computing. A task runs from its first exchange to its
last, so its time also has the wait for ranks that join late. Times are those of the host: on CUDA, where a task has
ended for the host once it is queued, there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]  # from, to: seconds of `perf_counter`
KINDS = ("dispatch", "combine")


class TravelTimes:
    """What was noted since the last `take`. `waits` are those of one thread, so they come in order; so do `travels`."""

    def __init__(self) -> None:
        self.travels: list[tuple[str, Interval]] = []
        self.waits: list[Interval] = []

    def take(self, within: Sequence[Interval] | None = None) -> dict[str, float]:
        """Seconds by kind, `comm_time_dispatch` and `comm_exposed_dispatch`; counting starts anew.

        within: count only what lies in these intervals, given in order.
        """
        figures = {}
        for kind in KINDS:
            travels = [interval for each, interval in self.travels if each == kind]
            if within is not None:
                travels = intersection(travels, within)
            figures[f"comm_time_{kind}"] = _length(travels)
            figures[f"comm_exposed_{kind}"] = _length(intersection(travels, self.waits))
        self.__init__()  # type: ignore[misc]
        return figures


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What lies in both of two lists of intervals, each in order and without overlaps."""
    result, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            result.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return result


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
