"""Every way to look at a timeline, simulated or measured.

    text(timeline, width)                  a grid for the terminal (a rich Text; `.plain` without colours), and
    key(timeline)                          what its letters mean
    picture(timeline, "png")               PNG, SVG, PDF                                                   picture.py
    html([(title, timeline), ...])         one page, zoom and hover; several timelines share the zoom      page.py
    chrome_trace(timeline, schedule)       for Perfetto and the analysers of torch.profiler's traces       trace.py

In the grid a cell is as wide as its action is long. Capital letters are the first route (or the first of a rank's
stages), small letters the others: ``F7&b13`` overlaps a downward forward with an upward backward.
"""

from __future__ import annotations

import math

import numpy as np
from rich.text import Text

from parallel.pipeline.actions import OPS
from parallel.pipeline.page import html
from parallel.pipeline.palette import WORDS, Lanes, facts, halves, ink_on
from parallel.pipeline.picture import picture
from parallel.pipeline.timeline import Span, Timeline
from parallel.pipeline.trace import chrome_trace

__all__ = ["chrome_trace", "facts", "html", "key", "picture", "text"]

_MAX_BLOCKS = 4
_IDLE, _IDLE_STYLE = "·", "dim"


def text(timeline: Timeline, width: int = 120) -> Text:
    """The grid: one line a rank, in at most four blocks of `width` columns, one below the other.

    A step too long for that is drawn in one block, where letters stand for ops and & for overlapped pairs.
    """
    slots = _slots(timeline)
    gutter = len(f"rank {timeline.num_ranks - 1}  ")
    room = max(width - gutter, 20)
    lengths = [
        (len("&".join(label for label, _ in parts)) + 1, end - start)
        for row in slots
        for start, end, parts in row
        if end > start
    ]
    scale = max((columns / duration for columns, duration in lengths), default=1.0)
    named = math.ceil(timeline.pipeline_time * scale) <= _MAX_BLOCKS * room
    if not named:
        scale = room / timeline.pipeline_time
    rows = [_row(row, scale, timeline.pipeline_time, named) for row in slots]
    lines: list[Text] = []
    for first in range(0, max(map(len, rows), default=0), room):
        if first:
            lines.append(Text())
        last = min(first + room, len(rows[0]))
        times = f"{first / scale:<12.6g}{last / scale:>{max(last - first - 12, 1)}.6g}"
        lines.append(Text(f"{'time':<{gutter}}{times}", "dim"))
        for rank, row in enumerate(rows):
            lines.append(Text.assemble((f"rank {rank}".ljust(gutter), "bold"), *row[first:last]))
    return Text("\n", no_wrap=True).join(lines)


def key(timeline: Timeline) -> str:
    """What the letters of `text` mean, in one line."""
    later = Lanes.of(timeline).names[1:]
    parts = [", ".join(f"{OPS[op].name} {WORDS[OPS[op]]}" for op in np.unique(timeline.op_A).tolist())]
    if later:
        parts.append(f"small letters: {later[0] if len(later) == 1 else 'later stages of a rank'}")
    if (halves(timeline)[0] >= 0).any():
        parts.append("&: overlapped")
    return "; ".join(parts)


def _slots(timeline: Timeline) -> list[list[tuple[float, float, list[tuple[str, str]]]]]:
    """For each rank its slots: start, end, and (label, colour) of each action."""
    lanes = Lanes.of(timeline)
    lane_of_row = iter(lanes.lane_A.tolist())
    result = []
    for spans in timeline.spans:
        row: list[tuple[float, float, list[tuple[str, str]]]] = []
        before: Span | None = None
        for span in spans:
            lane = next(lane_of_row)
            op = span.action.op
            name = op.name if lane == 0 else op.name.lower()
            part = (f"{name}{span.action.mb}", lanes.colour(op, lane))
            if before is not None and before.slot == span.slot:
                row[-1][2].append(part)
            else:
                row.append((span.start, span.end, [part]))
            before = span
        result.append(row)
    return result


def _row(
    slots: list[tuple[float, float, list[tuple[str, str]]]], scale: float, end_of_step: float, named: bool
) -> list[tuple[str, str]]:
    """One character and its style for each column."""
    cells = [(_IDLE, _IDLE_STYLE)] * max(math.ceil(end_of_step * scale - 1e-9), 1)
    for start, end, parts in slots:
        first = min(round(start * scale), len(cells) - 1)
        columns = max(round(end * scale) - first, 1)
        label = "&".join(name for name, _ in parts) if named else ("&" if len(parts) > 1 else parts[0][0][0]) * columns
        border = len(parts[0][0]) + 1 if named else columns // len(parts)  # where the second action's colour begins
        for k, character in enumerate(label[:columns].ljust(columns)):
            colour = parts[min(k >= border, len(parts) - 1)][1]
            if first + k < len(cells):
                cells[first + k] = (character, f"{ink_on(colour)} on {colour}")
    return cells
