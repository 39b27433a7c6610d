"""What a rank does when it hangs: says where it stands in its program, leaves a note in the run folder, and exits."""

from __future__ import annotations

import os
import sys
import threading

from infra import incidents
from infra.watchdog import EXIT_CODE, Watchdog, where_main_thread_is
from launch.trainer import Trainer

# For the others to say where they stand, before the end of this rank ends them: seconds, or a share of what was
# allowed. Their patience is the same, but they look only now and then, and count less where they run less.
LEAST, SHARE = 3.0, 0.1


def watchdog(trainer: Trainer) -> Watchdog:
    """Watches this rank of a run; every rank that waits for the one that hangs then speaks and ends likewise."""
    rank, run = trainer.world.rank, trainer.config.run.dir

    def end(why: str, allowed: float) -> None:
        wait = max(LEAST, SHARE * allowed)
        threading.Timer(wait, os._exit, (EXIT_CODE,)).start()  # whatever becomes of the lines below
        position = trainer.position()
        sys.stderr.write(f"rank {rank} hangs: {why}\n{position}\nits main thread: {where_main_thread_is()}\n")
        sys.stderr.flush()
        incidents.note(run, "hang", trainer.step, f"rank {rank}: {why}", rank=rank, position=position)

    return Watchdog(trainer.config.hang, end)
