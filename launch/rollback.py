"""After a loss spike: back to a checkpoint from before the data that it is laid to, and on without that data.

What is left out stands in run.dir/left_out.json and in every later checkpoint: a run that is killed at any moment and
started again leaves out the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from infra import checkpoint, incidents
from infra.spike import Window, pass_over
from launch.files import save
from launch.trainer import Trainer

FILE = "left_out.json"


def roll_back(trainer: Trainer, loss: float) -> bool:
    """Goes back behind a spike of `loss` in the last step; False where no checkpoint is old enough. Collective.

    The checkpoints made since are removed: they have learnt from the data that is now left out.
    """
    folder, losses = Path(trainer.config.run.dir), trainer.losses
    start, end = losses.suspect
    all_left_out = [*losses.left_out, (start, end)]
    trainer.saver.wait()
    target = _step_before(folder / "checkpoints", start, losses.left_out)
    if trainer.world.is_main:
        what = f"loss {loss:.4g} is a spike"
        if target < 0:
            why = f"{what}, but no checkpoint is from before its data: going on (checkpoint.every makes some)"
            incidents.note(folder, "spike", trainer.step, why, loss=loss)
        else:
            for newer in checkpoint.folders(folder / "checkpoints"):
                if checkpoint.step_of(newer) > target:
                    shutil.rmtree(newer)
            save(folder / FILE, json.dumps(all_left_out))
            why = f"{what}: back to step {target}, and on without samples {start} to {end - 1}"
            incidents.note(folder, "rollback", trainer.step, why, loss=loss, to=target, left_out=[start, end])
    if target < 0:
        losses.forget()
        return False
    trainer.load(folder / "checkpoints" / f"step_{target}")
    losses.left_out = all_left_out
    return True


def left_out(folder: Path) -> list[Window]:
    """The data that the run in `folder` leaves out."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        return [(int(start), int(end)) for start, end in json.loads(file.read_text())]
    except (ValueError, TypeError):
        raise ValueError(f"{file} is damaged: it should be a list of pairs, such as [[320, 384]]") from None


def _step_before(checkpoints: Path, start: int, earlier: list[Window]) -> int:
    """The step of the newest whole checkpoint that has not seen global sample `start`, or -1. Collective."""
    for saved in checkpoint.whole(checkpoints):
        if pass_over(np.array(saved.meta["samples"]), earlier) <= start:
            return saved.meta["step"]
    return -1
