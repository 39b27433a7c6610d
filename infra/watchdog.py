"""Ends a process that makes no progress any more, so that a hang becomes an exit which a launcher can act on.

A rank that waits in a collective for one that hangs can raise nothing: a thread beside it watches how long the thing
at hand has been going on. How long that may take is learnt: `factor` times as long as things of its kind usually took.
Time counts only while this process runs: one that was stopped as a whole, or a machine that slept, has not hung. (Code
that never lets go of the interpreter's lock escapes; waiting for gloo, for NCCL and for files does let go.) [no torch]
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import FrameType, TracebackType

EXIT_CODE = 75  # "try again", as sendmail has it
_REMEMBERED = 32  # durations of each kind


@dataclass
class HangConfig:
    """A run hangs when something takes `factor` times as long as it usually does, and at least `least` seconds.

    first: seconds for a kind of thing that has not been done before. factor=0: a run never hangs.
    """

    factor: float = 10.0
    least: float = 60.0
    first: float = 600.0

    def __post_init__(self) -> None:
        for name in ("factor", "least", "first"):
            if not getattr(self, name) >= 0:  # nan is refused too
                raise ValueError(f"hang.{name}={getattr(self, name)} must be at least 0")


class Watchdog:
    """Watches the thread that makes it; use it as a context manager.

    on_hang: called once, in the watching thread, with a line that says what takes how long; ends the process.
    """

    def __init__(self, config: HangConfig, on_hang: Callable[[str], None]):
        self._config, self._on_hang = config, on_hang
        self._usual: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._what, self._since, self._lived = "the start", time.monotonic(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def doing(self, what: str) -> None:
        """Says what goes on from now on, and so that what went on before has come to its end."""
        now = time.monotonic()
        self._usual[self._what].append(now - self._since)
        self._what, self._since, self._lived = what, now, 0.0

    def allowed(self, what: str) -> float:
        """Seconds that this may take."""
        known = self._usual.get(what)
        return max(self._config.least, self._config.factor * median(known)) if known else self._config.first

    def _watch(self) -> None:
        tick = min(1.0, max(self._config.least / 10, 0.01))
        before = time.monotonic()
        while not self._stop.wait(tick):
            now = time.monotonic()
            self._lived += min(now - before, 2 * tick)
            before = now
            what = self._what
            if self._lived > self.allowed(what):
                known = self._usual.get(what)
                usually = f", which usually takes {median(known):.3g} s" if known else ""
                self._on_hang(f"no progress for {self._lived:.0f} s in {what}{usually}")
                return

    def __enter__(self) -> Watchdog:
        if self._config.factor:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()


def where_main_thread_is(depth: int = 3) -> str:
    """The innermost lines of code that the main thread is in, the last one first: `file.py:12 function`."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    places: list[str] = []
    while frame is not None and len(places) < depth:
        code = frame.f_code
        places.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(places)
