"""When everything happened: the spans of a step, simulated or measured, and what follows from them.

A `Timeline` is a table with one row an action, sorted by rank, then by slot: columns are arrays, so that a simulation
of half a million actions stays cheap. `spans` gives the same rows as objects, and `Timeline.from_spans` makes the
table from them: that is how a measured run becomes one. Times are in the unit of the costs (ms, where measured).

Idle time is split by cause. Before its first backward a rank waits because the pipeline *fills* (warm-up), after its
last forward because it *drains* (cool-down); between the two it waits for a result of another rank, which is named.

Shape letters: A actions, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from parallel.pipeline.actions import OPS, Action, Op

WARM_UP, COOL_DOWN, WAITING = "warm-up", "cool-down", "waiting"


class Span(NamedTuple):
    """One action as it ran on `rank` in slot `slot` of its program, from `start` to `end`.

    Both actions of an overlapped pair carry the times of the pair. `ready` is when the result left (before `end` where
    a slot sends its results as they come); `waited_for` the action whose result came last and kept the rank idle
    before this slot, None where the rank went straight on. `sent`: bytes of the result that left for another rank.
    """

    rank: int
    slot: int
    action: Action
    start: float
    end: float
    ready: float
    waited_for: Action | None = None
    sent: int = 0


class Bubble(NamedTuple):
    """Idle time of `rank`, by cause: warm-up, cool-down or waiting, for `waited_for` of `for_rank` if known."""

    rank: int
    start: float
    end: float
    cause: str
    waited_for: Action | None
    for_rank: int | None


@dataclass(frozen=True, eq=False)
class Timeline:
    """One row an action, sorted by rank, then slot; `waited_A` is the row of the action waited for, -1 for none.

    `activation` is what one forward keeps, in activations of one microbatch of 1/PP of the model: 1/v where a rank
    holds v stages of a route. `kept_after_i` is the share of it that is held between I and W. `optimizer` is the time
    from the end of the last slot of all ranks to the end of the step.
    """

    num_ranks: int
    rank_A: np.ndarray
    slot_A: np.ndarray
    stage_A: np.ndarray
    op_A: np.ndarray
    mb_A: np.ndarray
    start_A: np.ndarray
    end_A: np.ndarray
    ready_A: np.ndarray
    waited_A: np.ndarray
    sent_A: np.ndarray
    optimizer: float = 0.0
    activation: float = 1.0
    kept_after_i: float = 1.0

    @staticmethod
    def from_spans(
        spans: Iterable[Span], *, optimizer: float = 0.0, activation: float = 1.0, kept_after_i: float = 1.0
    ) -> Timeline:
        """The timeline of these spans, in any order; time 0 is the earliest start."""
        rows = sorted(spans, key=lambda span: (span.rank, span.slot, span.action.op))
        row_of = {span.action: row for row, span in enumerate(rows)}
        origin = min((span.start for span in rows), default=0.0)
        ints = np.array([(s.rank, s.slot, *s.action, s.sent) for s in rows], dtype=np.int64).reshape(-1, 6)
        times = np.array([(s.start, s.end, s.ready) for s in rows], dtype=np.float64).reshape(-1, 3) - origin
        waited = np.array([row_of.get(s.waited_for, -1) if s.waited_for else -1 for s in rows], dtype=np.int64)
        num_ranks = rows[-1].rank + 1 if rows else 0
        rank_A, slot_A, stage_A, op_A, mb_A, sent_A = ints.T
        start_A, end_A, ready_A = times.T
        return Timeline(
            num_ranks,
            rank_A,
            slot_A,
            stage_A,
            op_A,
            mb_A,
            start_A,
            end_A,
            ready_A,
            waited,
            sent_A,
            optimizer,
            activation,
            kept_after_i,
        )

    def _rows(self, rank: int) -> slice:
        first, end = np.searchsorted(self.rank_A, (rank, rank + 1))
        return slice(int(first), int(end))

    def _action(self, row: int) -> Action:
        return Action(int(self.stage_A[row]), Op(int(self.op_A[row])), int(self.mb_A[row]))

    @cached_property
    def spans(self) -> list[list[Span]]:
        """The rows as objects, one list a rank."""
        actions = [Action(s, OPS[o], m) for s, o, m in _rows_of(self.stage_A, self.op_A, self.mb_A)]
        result: list[list[Span]] = [[] for _ in range(self.num_ranks)]
        columns = _rows_of(self.rank_A, self.slot_A, self.start_A, self.end_A, self.ready_A, self.waited_A, self.sent_A)
        for action, (rank, slot, start, end, ready, waited, sent) in zip(actions, columns, strict=True):
            waited_for = actions[waited] if waited >= 0 else None
            result[rank].append(Span(rank, slot, action, start, end, ready, waited_for, sent))
        return result

    @cached_property
    def pipeline_time(self) -> float:
        """From the start to the end of the last slot of all ranks."""
        return float(self.end_A.max(initial=0.0))

    @property
    def step_time(self) -> float:
        """`pipeline_time` and the optimizer after it."""
        return self.pipeline_time + self.optimizer

    @cached_property
    def _slots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First row, start and end of every slot."""
        new = np.empty(len(self.rank_A), dtype=bool)
        new[:1] = True
        new[1:] = (self.slot_A[1:] != self.slot_A[:-1]) | (self.rank_A[1:] != self.rank_A[:-1])
        first = np.flatnonzero(new)
        if not len(first):
            return first, np.empty(0), np.empty(0)
        return first, np.minimum.reduceat(self.start_A, first), np.maximum.reduceat(self.end_A, first)

    @cached_property
    def busy_R(self) -> np.ndarray:
        """The time each rank computes; a pair counts once."""
        first, start, end = self._slots
        return np.bincount(self.rank_A[first], weights=end - start, minlength=self.num_ranks)

    @cached_property
    def bubble_R(self) -> np.ndarray:
        """The time each rank idles, from the start of the step to the end of the last slot of all ranks."""
        return self.pipeline_time - self.busy_R

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time, the optimizer left out."""
        return float(self.bubble_R.sum() / (self.pipeline_time * self.num_ranks)) if self.pipeline_time else 0.0

    def bubbles(self, rank: int) -> list[Bubble]:
        """Every idle interval of `rank`, in order, with its cause."""
        rows = self._rows(rank)
        first, start, end = (
            column[(self._slots[0] >= rows.start) & (self._slots[0] < rows.stop)] for column in self._slots
        )
        if not len(first):
            return [Bubble(rank, 0.0, self.pipeline_time, WAITING, None, None)] if self.pipeline_time else []
        op = self.op_A[rows]
        forward_ends, backward_starts = self.end_A[rows][op == Op.F], self.start_A[rows][(op == Op.B) | (op == Op.I)]
        filled = backward_starts.min(initial=np.inf)
        drained = forward_ends.max(initial=-np.inf)
        free_at = np.concatenate(([0.0], np.maximum.accumulate(end)))
        result = []
        noise = 1e-12 * self.pipeline_time
        for k in np.flatnonzero(start > free_at[:-1] + noise).tolist():
            cause = WARM_UP if start[k] <= filled else COOL_DOWN if free_at[k] >= drained else WAITING
            waited = int(self.waited_A[first[k]])
            action, for_rank = (self._action(waited), int(self.rank_A[waited])) if waited >= 0 else (None, None)
            result.append(Bubble(rank, float(free_at[k]), float(start[k]), cause, action, for_rank))
        if free_at[-1] < self.pipeline_time - noise:
            result.append(Bubble(rank, float(free_at[-1]), self.pipeline_time, COOL_DOWN, None, None))
        return result

    def bubble_by_cause(self, rank: int) -> dict[str, float]:
        """`bubble_R[rank]` in parts: warm-up, cool-down, and "waiting for rank 3" for each rank that held it up."""
        result = {WARM_UP: 0.0, COOL_DOWN: 0.0}
        for bubble in self.bubbles(rank):
            cause = bubble.cause
            if cause == WAITING:
                cause = f"waiting for rank {bubble.for_rank}" if bubble.for_rank is not None else "unexplained"
            result[cause] = result.get(cause, 0.0) + bubble.end - bubble.start
        return result

    def memory_curve(self, rank: int, *, count: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(times, values): from each time on, `rank` holds so many activations of a microbatch of 1/PP of the model.

        F allocates when it starts; I frees its share and B or W the rest when they end; what ends makes room for what
        starts at that moment. With `count`, values are the number of live (stage, microbatch) instead: from F until B
        or W.
        """
        rows = self._rows(rank)
        op = self.op_A[rows]
        kept = 1.0 if count else self.kept_after_i
        freed = np.select([op == Op.B, op == Op.I, op == Op.W], [1.0, 1.0 - kept, kept], 0.0)
        frees, starts = freed > 0, op == Op.F
        times = np.concatenate((self.end_A[rows][frees], self.start_A[rows][starts]))
        deltas = np.concatenate((-freed[frees], np.ones(np.count_nonzero(starts))))
        order = np.argsort(times, kind="stable")  # ends come first in `times`, and stay first at equal times
        values = np.cumsum(deltas[order])
        return times[order], values if count else values * self.activation

    def peak_memory(self, rank: int) -> float:
        """The most that `memory_curve` reaches."""
        return float(self.memory_curve(rank)[1].max(initial=0.0))

    def peak_live(self, rank: int) -> int:
        """The most (stage, microbatch) whose activations `rank` holds at once: the published "PP + 1" of DualPipe."""
        return int(self.memory_curve(rank, count=True)[1].max(initial=0.0))


def _rows_of(*columns: np.ndarray) -> Iterable[tuple]:
    return zip(*(column.tolist() for column in columns), strict=True)
