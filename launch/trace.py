"""What a step really did, as files: DIR/measured.json timeline.html timeline.png trace.json.

The page lays the measured step over the simulated one and says of every action what is different and why; the JSON
holds the spans and the costs that follow from them, for `launch/simulate.py measure=...`. Times are milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.files import save
from launch.summary import shape_of
from parallel.mesh import Group
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.measure import calibrated, differences, measured
from parallel.pipeline.render import chrome_trace, html, picture
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.timeline import Timeline


def write_trace(folder: Path, executor: Executor, group: Group, offset: float) -> None:
    """Writes the step that this pipeline has just run, over its simulation with its own mean costs.

    Collective over `group`, the ranks of the pipeline, of which the first writes. offset: this rank's, of
    `measure.clock_offset`.
    """
    timeline = measured(executor, group, offset)
    if group.rank == 0:
        costs = calibrated(timeline)
        simulated = simulate(executor.schedule, costs)
        write_comparison(folder, executor.schedule, costs, timeline, ("simulated with its mean times", simulated))


def write_comparison(
    folder: Path, schedule: Schedule, costs: Costs, timeline: Timeline, simulated: tuple[str, Timeline]
) -> None:
    """The files of a measured `timeline` and of what was simulated, under its name. costs: those measured."""
    title = shape_of(schedule)
    panels = [("measured", timeline), simulated]
    page = html(panels, title=title, unit="ms", notes=differences(timeline, simulated[1]))
    save(folder / "timeline.html", page)
    save(folder / "timeline.png", picture(timeline, title=f"{title}, measured", unit="ms"))
    trace = chrome_trace(timeline, schedule, p2p=costs.p2p, microseconds=1e3, title=title)
    save(folder / "trace.json", json.dumps(trace))
    save(folder / "measured.json", json.dumps(_as_data(schedule, costs, timeline)))


def _as_data(schedule: Schedule, costs: Costs, timeline: Timeline) -> dict[str, Any]:
    spans = [
        (s.rank, s.slot, str(s.action), s.start, s.end, s.ready, str(s.waited_for) if s.waited_for else None, s.sent)
        for row in timeline.spans
        for s in row
    ]
    return {
        "schedule": schedule.name,
        "pp": schedule.num_ranks,
        "num_microbatches": schedule.num_microbatches,
        "unit": "ms",
        "costs": {name: value for name, value in asdict(costs).items() if name in ("f", "i", "w", "fb", "p2p")},
        "columns": ["rank", "slot", "action", "start", "end", "ready", "waited_for", "sent"],
        "spans": spans,
    }


def read_costs(folder: Path) -> tuple[Costs, int]:
    """The costs by stage, in ms, that a run measured, and over how many pipeline ranks."""
    found = read_measured(folder)
    return Costs(**found["costs"]), found["pp"]


def read_measured(folder: Path) -> dict[str, Any]:
    """measured.json of a run. Raises ValueError in one line where the run left none."""
    path = folder / "trace" / "measured.json"
    if not path.exists():
        raise ValueError(
            f"{folder} holds no measured step (trace/measured.json): a run with parallel.pp above 1 and run.trace=true "
            "writes one"
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
