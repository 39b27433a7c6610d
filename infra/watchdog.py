"""Ends a process that makes no progress any more, so that a hang becomes an exit which a launcher can act on.

A rank that waits in a collective for one that hangs can raise nothing: a thread beside it watches how long the thing
at hand has been going on. How long that may take is learnt: `factor` times as long as things of its kind usually took,
on the slowest rank - each rank tells the others what it measured when they talk anyway, so that all have one patience
and none gives up before another.
Time counts only while this process runs: one that was stopped as a whole, or a machine that slept, has not hung. (Code
that never lets go of the interpreter's lock escapes; waiting for gloo, for NCCL and for files does let go.) [no torch]
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from types import FrameType, TracebackType

EXIT_CODE = 75  # "try again", as sendmail has it
KINDS = ("a step", "an evaluation", "a checkpoint", "a rollback")  # whose durations are learnt
_REMEMBERED = 32  # durations of each kind


@dataclass
class HangConfig:
    """A run hangs when something takes `factor` times as long as it usually does, and at least `least` seconds.

    first: the least for a kind of thing that has not been done before, or that waits for disks. factor=0: a run never
    hangs.
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

    on_hang: called once, in the watching thread, with a line that says what takes how long, and the seconds that this
    was allowed; ends the process.
    """

    def __init__(self, config: HangConfig, on_hang: Callable[[str, float], None]):
        self._config, self._on_hang = config, on_hang
        self._usual: dict[str, deque[float]] = {kind: deque(maxlen=_REMEMBERED) for kind in KINDS}
        self._took = dict.fromkeys(KINDS, 0.0)  # here, since the ranks last told each other
        # What, since when, whether it waits for disks; replaced as a whole, as another thread reads it.
        self._doing = ("the start", time.monotonic(), False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def doing(self, what: str, on_disk: bool = False) -> None:
        """Says what goes on from now on, and so that what went on before has come to its end.

        on_disk: it may wait for a disk, which can be slow today though it never was.
        """
        before, since, _ = self._doing
        now = time.monotonic()
        if before in KINDS:
            self._took[before] = max(self._took[before], now - since)
        self._doing = (what, now, on_disk)

    def took(self) -> list[float]:
        """Seconds that each of `KINDS` took here since `learn`; 0 for what was not done."""
        return list(self._took.values())

    def learn(self, seconds: Sequence[float]) -> None:
        """What the ranks agree that each of `KINDS` took: the longest of what they say in `took`."""
        for kind, longest in zip(KINDS, seconds, strict=True):
            if longest:
                self._usual[kind].append(longest)
        self._took = dict.fromkeys(KINDS, 0.0)

    def usual(self, what: str) -> float | None:
        """Seconds that this has usually taken so far; None if it has not been done."""
        known = tuple(self._usual.get(what, ()))
        return median(known) if known else None

    def allowed(self, what: str, on_disk: bool = False) -> float:
        """Seconds that this may take."""
        usual, config = self.usual(what), self._config
        if usual is None:
            return config.first
        return max(config.first if on_disk else config.least, config.factor * usual)

    def _watch(self) -> None:
        tick = min(1.0, max(self._config.least / 10, 0.01))
        doing, lived, before = self._doing, 0.0, time.monotonic()
        while not self._stop.wait(tick):
            now, current = time.monotonic(), self._doing
            lived = lived + min(now - before, 2 * tick) if current is doing else 0.0
            before, doing = now, current
            what, _, on_disk = doing
            allowed = self.allowed(what, on_disk)
            if lived > allowed:
                usual = self.usual(what)
                usually = "" if usual is None else f", which usually takes {usual:.3g} s"
                self._on_hang(f"no progress for {lived:.0f} s in {what}{usually}", allowed)
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
