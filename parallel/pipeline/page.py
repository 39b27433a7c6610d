"""One self-contained HTML page of one or several timelines: zoom, pan, hover an action to see what it waited for.

    Path("timeline.html").write_text(html([("predicted", predicted), ("measured", measured)]))

The page (page.html beside this file) draws on a canvas and asks the network for nothing; this module only fills in its
data. Timelines lie below each other and share the zoom.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.pipeline.palette import OPTIMIZER, Lanes, facts, halves, ink_on
from parallel.pipeline.timeline import COOL_DOWN, WARM_UP, Timeline

_TEMPLATE = Path(__file__).with_name("page.html")
_BUSY, _WARM_UP, _COOL_DOWN, _WAITING = "#8fa3bf", "#f0c27b", "#e8a3a3", ("#b94a62", "#8d5a97", "#5b6abf", "#a8743a")


def html(
    timelines: Sequence[tuple[str, Timeline]],
    *,
    title: str = "Pipeline timeline",
    unit: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The page. `timelines` are (title, timeline) from top to bottom; `unit` stands behind every time, say "ms".

    notes: what else to say of each action of the first timeline, one line a row.
    """
    legend: dict[str, str] = {}
    panels = [_panel(name, timeline, unit, legend) for name, timeline in timelines]
    if panels:
        panels[0]["notes"] = list(notes)
    if any(timeline.optimizer for _, timeline in timelines):
        legend["optimizer"] = OPTIMIZER
    data = {"title": title, "legend": list(legend.items()), "optimizer": OPTIMIZER, "timelines": panels}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no title can end the script element
    return _TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text)


def _panel(title: str, timeline: Timeline, unit: str, legend: dict[str, str]) -> dict[str, Any]:
    lanes = Lanes.of(timeline)
    spans = [span for rank in timeline.spans for span in rank]
    looks = list(zip((span.action.op for span in spans), lanes.lane_A.tolist(), strict=True))
    palette = sorted(set(looks))
    legend.update({lanes.word(op, lane): lanes.colour(op, lane) for op, lane in palette})
    bubbles = [{bubble.end: bubble for bubble in timeline.bubbles(rank)} for rank in range(timeline.num_ranks)]
    before = [bubbles[span.rank].get(span.start) for span in spans]
    half, partner = halves(timeline)
    columns = {
        "rank": [span.rank for span in spans],
        "start": [span.start for span in spans],
        "end": [span.end for span in spans],
        "ready": [span.ready for span in spans],
        "name": [str(span.action) for span in spans],
        "stage": [span.action.stage for span in spans],
        "mb": [span.action.mb for span in spans],
        "look": [palette.index(look) for look in looks],
        "half": half.tolist(),
        "partner": partner.tolist(),
        "wait": [bubble.end - bubble.start if bubble else 0 for bubble in before],
        "why": [bubble.cause if bubble else "" for bubble in before],
        "cause": timeline.waited_A.tolist(),
        "sent": timeline.sent_A.tolist(),
    }
    curves = [timeline.memory_curve(rank) for rank in range(timeline.num_ranks)]
    return {
        "title": title,
        "unit": unit,
        "ranks": timeline.num_ranks,
        "pipeline": timeline.pipeline_time,
        "end": timeline.step_time,
        "peak": max((timeline.peak_memory(rank) for rank in range(timeline.num_ranks)), default=0.0),
        "bubble": (timeline.bubble_R / (timeline.pipeline_time or 1.0)).tolist(),
        "facts": facts(timeline, unit),
        "looks": [[lanes.word(*look), lanes.colour(*look), ink_on(lanes.colour(*look))] for look in palette],
        "spans": columns,
        "memory": [{"time": times.tolist(), "live": live.tolist()} for times, live in curves],
        "where": [_where(timeline, rank) for rank in range(timeline.num_ranks)],
    }


def _where(timeline: Timeline, rank: int) -> list[tuple[str, float, str]]:
    """(what, how long, colour) of each part of the rank's step."""
    parts = [("busy", float(timeline.busy_R[rank]), _BUSY)]
    fixed = {WARM_UP: _WARM_UP, COOL_DOWN: _COOL_DOWN}
    for k, (cause, time) in enumerate(timeline.bubble_by_cause(rank).items()):
        if time > 0:
            parts.append((cause, time, fixed.get(cause, _WAITING[k % len(_WAITING)])))
    if timeline.optimizer:
        parts.append(("optimizer", timeline.optimizer, OPTIMIZER))
    return parts
