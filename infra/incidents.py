"""What went wrong in a run: one JSON object a line, in run.dir/incidents.jsonl.

    {"time": 1790000000.0, "kind": "skipped_step", "step": 17, "why": "loss nan, gradient norm inf"}

metrics.jsonl tells of the run as if it had never been interrupted; this file tells of the interruptions. A line is
appended in one write, so any rank may note something at any time; a line that a kill cut short is passed over.
[no torch]
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "incidents.jsonl"


def note(folder: str | Path, kind: str, step: int, why: str, **facts: Any) -> None:
    """Appends one incident. step: steps done when it happened; why: one line for people; facts: JSON values."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": round(time.time(), 3), "kind": kind, "step": step, "why": why, **facts})
    with (Path(folder) / FILE).open("a+b", buffering=0) as lines:
        if end := lines.seek(0, os.SEEK_END):
            lines.seek(end - 1)
        was_cut = bool(end) and lines.read(1) != b"\n"
        lines.write(b"\n" * was_cut + line.encode() + b"\n")  # to the end, wherever one has read


def read(folder: str | Path) -> list[dict[str, Any]]:
    """All incidents of a run, in the order in which they were noted; none where there is no file."""
    try:
        lines = (Path(folder) / FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            incident = json.loads(line)
        except ValueError:
            continue
        if isinstance(incident, dict) and {"time", "kind", "step", "why"} <= set(incident):
            found.append(incident)
    return found
