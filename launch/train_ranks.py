"""One run of a sweep over launch/pretrain.py: starts its ranks here, waits, and says how it went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from conf.schema import Config
from launch.errors import TRACES
from launch.sweep import job_number

SHOWN = ("loss", "eval_nats_per_byte", "step_time", "tokens_per_second", "bubble", "peak_memory_gb")
SCRIPT = Path(__file__).with_name("pretrain.py")


def train_ranks(config: Config) -> dict[str, Any]:
    """Trains in run.dir/<number>, on run.ranks processes; returns the last figures of its metrics.

    Raises RuntimeError with the run's own line where it fails, and where run.dir/<number> holds another run.
    """
    parallel, overrides = config.parallel, HydraConfig.get().overrides.task
    num_ranks = config.run.ranks or parallel.pp * parallel.ep
    folder = Path(config.run.dir) / f"{job_number():03d}"
    words = [word for word in overrides if not word.startswith(("run.dir=", "run.ranks="))]
    words.append(f"run.dir={folder}")
    check_same_run(folder, words)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"),
        *(str(SCRIPT), *words),
    ]
    environment = ({"OMP_NUM_THREADS": "1"} if num_ranks > 1 else {}) | os.environ
    environment["HYDRA_FULL_ERROR"] = "1" if TRACES else "0"  # here it is 1, while `one_line_errors` lasts
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        line = said[0].removeprefix("error: ") if said else " ".join(done.stderr.split()[-20:])
        raise RuntimeError(f"{folder}: {line}")
    with (folder / "metrics.jsonl").open() as lines:
        last = json.loads(deque(lines, maxlen=1)[0])
    figures = {name: float(f"{last[name]:.4g}") for name in SHOWN if last.get(name) is not None}  # not finite: null
    return {"run": folder.name, "ranks": num_ranks} | figures


def check_same_run(folder: Path, words: list[str]) -> None:
    """Raises RuntimeError where `folder` holds a run that was started with other words: this one would go on from it,
    or pass its figures for its own.
    """
    config = folder / "config.yaml"
    head = config.read_text().splitlines()[:2] if config.exists() else []
    before = head[-1].removeprefix("# overrides: ") if head else None
    if before not in (None, " ".join(words)):
        raise RuntimeError(f"{folder} holds another run ({before}): choose another run.dir")
