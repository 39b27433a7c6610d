"""Whom the ranks of a run waited for: a line at the end, and an incident where one rank is slow for long."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from parallel.straggler import PHASES

SLOW = 1 / 3  # of a step's time, spent waiting for one rank
FOR_LONG = 10  # steps in a row


class Waits:
    """Adds up the stragglers of a run's records (parallel/straggler.py)."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()  # by straggler, as all below
        self._seconds: dict[int, float] = defaultdict(float)
        self._phases: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
        self._total = 0.0
        self._slow: tuple[int, int] = (-1, 0)  # a rank, and for how many steps in a row it has been slow

    def add(self, record: Mapping[str, float]) -> str | None:
        """Counts a step; returns a line about its straggler in the step in which that has been slow for long."""
        rank, wait = int(record["straggler_rank"]), record["straggler_wait"]
        self._steps[rank] += 1
        self._seconds[rank] += wait
        self._total += record["step_time"]
        for phase in PHASES:
            self._phases[rank][phase] += record[f"straggler_wait_{phase}"]
        is_slow = wait > SLOW * record["step_time"]
        self._slow = (rank, 1 + self._slow[1] * (self._slow[0] == rank)) if is_slow else (-1, 0)
        if self._slow != (rank, FOR_LONG):
            return None
        return (
            f"rank {rank} is slow: for {FOR_LONG} steps the others have waited for it, {wait:.3g} s of "
            f"{record['step_time']:.3g} s in the last, most of it in {self._worst_phase(rank)}: a slow machine, or an "
            "uneven share of the work"
        )

    def summary(self) -> str:
        """The rank that was waited for longest, over all steps counted; '' where there were none or one rank."""
        if not self._total or not any(self._seconds.values()):
            return ""
        rank = max(self._seconds, key=lambda rank: self._seconds[rank])
        return (
            f"rank {rank} in {self._steps[rank]} of {self._steps.total()} steps, {self._seconds[rank]:.3g} s of "
            f"{self._total:.3g} s, most of it in {self._worst_phase(rank)}"
        )

    def _worst_phase(self, rank: int) -> str:
        seconds = self._phases[rank]
        return max(seconds, key=lambda phase: seconds[phase])
