"""How unevenly a run's experts were loaded, from the histograms that it left in run.dir/tensorboard."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PREFIX = "expert_load/"


def read_expert_load(run: Path) -> np.ndarray:
    """Rows of each expert, [layers x logged steps, experts], of the later half of the steps: routers settle first.

    Raises ValueError in one line where the run left none.
    """
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    folder = run / "tensorboard"
    if not folder.is_dir():
        raise ValueError(f"expert_load={run}: {folder} does not exist; name the run.dir of a run that was trained")
    events = EventAccumulator(str(folder), size_guidance={HISTOGRAMS: 0}).Reload()
    rows = []
    for tag in events.Tags()["histograms"]:
        if tag.startswith(PREFIX):
            logged = events.Histograms(tag)
            rows += [event.histogram_value.bucket for event in logged[len(logged) // 2 :]]
    if not rows:
        raise ValueError(f"expert_load={run}: {folder} holds no histograms {PREFIX}layer_*: the model has no experts")
    load = np.array(rows)
    return load[load.sum(1) > 0]
