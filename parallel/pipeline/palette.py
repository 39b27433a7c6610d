"""Colours and words for the actions of a timeline: the same in the terminal, the pictures and the page.

The hue says the op (from a palette that colour-blind readers can tell apart), the tint says the *lane*: the route of
the microbatch where a schedule has several (DualPipe: downward full, upward light), else which of its rank's stages it
runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.pipeline.actions import Op
from parallel.pipeline.timeline import Timeline

HUES = {Op.F: "#2f6db5", Op.B: "#e08e12", Op.I: "#c9512f", Op.W: "#23936b"}
COMMUNICATION, OPTIMIZER = "#7d5fb2", "#9aa1b1"
WORDS = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}
DARK, LIGHT = "#1f2430", "#ffffff"


@dataclass(frozen=True)
class Lanes:
    """Which lane each action of a timeline is in (`lane_A`), and what the lanes are called; one lane needs no name."""

    lane_A: np.ndarray
    names: tuple[str, ...]

    @staticmethod
    def of(timeline: Timeline) -> Lanes:
        """Microbatches that enter at the same rank share a route; with one route, a rank's stages are the lanes."""
        enters = (timeline.op_A == Op.F) & (timeline.stage_A == 0)
        first_ranks = np.unique(timeline.rank_A[enters])
        if len(first_ranks) > 1:
            rank_of_mb = np.zeros(int(timeline.mb_A.max(initial=0)) + 1, dtype=np.int64)
            rank_of_mb[timeline.mb_A[enters]] = timeline.rank_A[enters]
            names = ("downward", "upward") if len(first_ranks) == 2 else tuple(f"from rank {r}" for r in first_ranks)
            return Lanes(np.searchsorted(first_ranks, rank_of_mb[timeline.mb_A]), names)
        lane_A = np.zeros(len(timeline.rank_A), dtype=np.int64)
        for rank in range(timeline.num_ranks):
            rows = timeline.rank_A == rank
            lane_A[rows] = np.unique(timeline.stage_A[rows], return_inverse=True)[1]
        num_lanes = int(lane_A.max(initial=0)) + 1
        return Lanes(lane_A, tuple(f"stage {k + 1} of its rank" for k in range(num_lanes)) if num_lanes > 1 else ("",))

    def word(self, op: Op, lane: int) -> str:
        """As in "forward, upward"."""
        return ", ".join(part for part in (WORDS.get(op, op.name), self.names[lane]) if part)

    def colour(self, op: Op, lane: int) -> str:
        """`#rrggbb`: later lanes are lighter."""
        hue = HUES.get(op, COMMUNICATION)
        white = 0.56 * lane / (len(self.names) - 1) if len(self.names) > 1 else 0.0
        return "#" + "".join(f"{round(c + (255 - c) * white):02x}" for c in bytes.fromhex(hue[1:]))


def ink_on(colour: str) -> str:
    """The text colour that reads well on `colour`."""
    red, green, blue = bytes.fromhex(colour[1:])
    return LIGHT if 0.299 * red + 0.587 * green + 0.114 * blue < 150 else DARK


def halves(timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """For each action of an overlapped pair, 0 for the upper and 1 for the lower, and the row of the other; else -1."""
    rank_A, slot_A = timeline.rank_A, timeline.slot_A
    new = np.ones(len(rank_A) + 1, dtype=bool)
    new[1:-1] = (rank_A[1:] != rank_A[:-1]) | (slot_A[1:] != slot_A[:-1])
    first = np.flatnonzero(new)
    first = first[:-1][np.diff(first) == 2]
    half_A, partner_A = np.full(len(rank_A), -1), np.full(len(rank_A), -1)
    half_A[first], half_A[first + 1] = 0, 1
    partner_A[first], partner_A[first + 1] = first + 1, first
    return half_A, partner_A


def facts(timeline: Timeline, unit: str = "") -> list[tuple[str, str]]:
    """What the head of a picture or page says: step time, bubble, peak of the live activations."""
    peak = max((timeline.peak_memory(rank) for rank in range(timeline.num_ranks)), default=0.0)
    return [
        ("step time", f"{timeline.step_time:.6g} {unit}".strip()),
        ("bubble", f"{100 * timeline.bubble_fraction:.1f} %"),
        ("peak activations", f"{peak:.4g}"),
    ]
