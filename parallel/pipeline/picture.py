"""A picture of a timeline for a paper or a README: PNG, SVG or PDF.

One row a rank; the colour says op and route (palette.py), an overlapped pair is a cell cut in two; microbatch numbers
stand in the cells that are wide enough. Below, what each rank's activations take.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from parallel.pipeline.actions import Op
from parallel.pipeline.palette import DARK, OPTIMIZER, Lanes, facts, halves, ink_on
from parallel.pipeline.timeline import Timeline

_NAMED = 12  # ranks whose memory curves are named one by one; of more, three
_INCHES = 17.0
_IDLE, _SOFT, _LINE = "#f1f2f5", "#687083", "#e2e5eb"


def picture(timeline: Timeline, format: str = "png", *, title: str = "", unit: str = "") -> bytes:
    """The picture as the bytes of a file; `format` is png, svg or pdf."""
    grid_inches = min(0.34, 8.0 / max(timeline.num_ranks, 1)) * timeline.num_ranks
    figure = Figure(figsize=(_INCHES, grid_inches + 3.0), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    cells, memory = figure.subplots(2, 1, sharex=True, height_ratios=[grid_inches, 1.5])
    head = "   ".join(f"{name} {value}" for name, value in facts(timeline, unit))
    figure.suptitle(f"{title}   {head}".strip(), x=0.01, ha="left", fontsize=12, color=DARK, fontweight="bold")
    looks = _draw_cells(cells, timeline)
    _draw_memory(memory, timeline)
    memory.set_xlabel(f"time ({unit})" if unit else "time, in the unit of the costs", color=_SOFT)
    memory.set_xlim(0, timeline.step_time or 1.0)
    handles = [Patch(facecolor=colour, label=word) for word, colour in looks.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=9, frameon=False, fontsize=8.5, columnspacing=1.4)
    file = BytesIO()
    figure.savefig(file, format=format)
    return file.getvalue()


def _draw_cells(axes, timeline: Timeline) -> dict[str, str]:
    """Draws the rows; returns the colour of each word of the legend."""
    lanes = Lanes.of(timeline)
    num_ranks = timeline.num_ranks
    axes.set_ylim(num_ranks, 0)
    share_R = timeline.bubble_R / (timeline.pipeline_time or 1.0)
    axes.set_yticks(np.arange(num_ranks) + 0.5, [f"rank {r}   {100 * share_R[r]:.1f} %" for r in range(num_ranks)])
    axes.tick_params(length=0, labelsize=9, labelcolor=DARK, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.barh(np.arange(num_ranks) + 0.5, timeline.pipeline_time, height=0.92, color=_IDLE)
    half_A, _ = halves(timeline)
    top_A = timeline.rank_A + np.where(half_A == 1, 0.5, 0.04)
    bottom_A = timeline.rank_A + np.where(half_A == 0, 0.5, 0.96)
    corners_A42 = np.stack(
        [
            np.stack((x, y), axis=-1)
            for x, y in (
                (timeline.start_A, top_A),
                (timeline.end_A, top_A),
                (timeline.end_A, bottom_A),
                (timeline.start_A, bottom_A),
            )
        ],
        axis=1,
    )
    looks: dict[str, str] = {}
    for op, lane in sorted(set(zip(timeline.op_A.tolist(), lanes.lane_A.tolist(), strict=True))):
        rows = (timeline.op_A == op) & (lanes.lane_A == lane)
        colour = lanes.colour(Op(op), lane)
        looks[lanes.word(Op(op), lane)] = colour
        # Cells narrower than their white border are drawn without one.
        border = 0.8 if _points(timeline, np.median((timeline.end_A - timeline.start_A)[rows])) > 4 else 0.0
        axes.add_collection(PolyCollection(corners_A42[rows], facecolors=colour, edgecolors="white", linewidths=border))
    _write_numbers(axes, timeline, lanes, (top_A + bottom_A) / 2)
    if timeline.optimizer:
        axes.barh(
            np.arange(num_ranks) + 0.5, timeline.optimizer, left=timeline.pipeline_time, height=0.92, color=OPTIMIZER
        )
        looks["optimizer"] = OPTIMIZER
    return looks


def _points(timeline: Timeline, time: float) -> float:
    """How wide `time` is on paper, in points."""
    return time / (timeline.step_time or 1.0) * (_INCHES - 1.4) * 72


def _write_numbers(axes, timeline: Timeline, lanes: Lanes, middle_A: np.ndarray) -> None:
    digits = len(str(int(timeline.mb_A.max(initial=0))))
    size = 7.5 if timeline.num_ranks <= 24 else 5.0
    rows = np.flatnonzero(_points(timeline, 1.0) * (timeline.end_A - timeline.start_A) > digits * size * 0.6 + 2)
    for row in rows.tolist():
        colour = lanes.colour(Op(timeline.op_A[row]), int(lanes.lane_A[row]))
        axes.text(
            (timeline.start_A[row] + timeline.end_A[row]) / 2,
            middle_A[row],
            str(timeline.mb_A[row]),
            ha="center",
            va="center_baseline",
            fontsize=size,
            color=ink_on(colour),
            clip_on=True,
        )


def _draw_memory(axes, timeline: Timeline) -> None:
    ranks = range(timeline.num_ranks)
    named = ranks if len(ranks) <= _NAMED else {0, len(ranks) // 2, len(ranks) - 1}
    for rank, colour in zip(ranks, colormaps["plasma"](np.linspace(0.05, 0.85, max(len(ranks), 1))), strict=False):
        times, live = timeline.memory_curve(rank)
        times, live = np.concatenate(([0.0], times, [timeline.step_time])), np.concatenate(([0.0], live, live[-1:]))
        axes.step(times, live, where="post", color=colour, lw=1.0, label=f"rank {rank}" if rank in named else None)
    axes.set_ylim(0, None)
    look = {"fontsize": 7.5, "labelcolor": _SOFT, "frameon": False, "handlelength": 1.2, "columnspacing": 1.0}
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=len(named), **look)
    axes.set_ylabel("live activations", color=_SOFT, fontsize=9)
    axes.grid(color=_LINE, lw=0.6)
    axes.tick_params(length=0, labelsize=9, labelcolor=_SOFT)
    for side in axes.spines.values():
        side.set_visible(False)
