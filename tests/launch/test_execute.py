"""launch/simulate.py execute=true: a schedule that runs for real on a few ranks, without a model."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from parallel.pipeline.passes import in_turn
from parallel.pipeline.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("work", ["sleep", pytest.param("matmul", marks=pytest.mark.slow)])
def test_what_ran_is_laid_over_what_was_simulated(tmp_path: Path, work: str) -> None:
    words = f"execute=true parallel.schedule=dualpipe parallel.pp=2 num_microbatches=4 work={work} out={tmp_path}"
    costs = "costs.f=20 costs.i=30 costs.w=10 costs.p2p_bytes=4096"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, str(ROOT / "launch/simulate.py"), *words.split(), *costs.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "dualpipe, executed: measured" in done.stdout
    measured = json.loads((tmp_path / "measured.json").read_text())
    rows = [dict(zip(measured["columns"], span, strict=True)) for span in measured["spans"]]
    schedule = in_turn(SCHEDULES["dualpipe"](2, 4))
    for rank, program in enumerate(schedule.programs):
        mine = [row for row in rows if row["rank"] == rank]
        assert [row["action"] for row in mine] == [str(action) for (action,) in program]
        assert all(row["end"] <= after["start"] for row, after in pairwise(mine)), "pairs run in turn"
        for row, (action,) in zip(mine, program, strict=True):
            least = {"F": 20, "B": 40, "I": 30, "W": 10}[action.op.name]
            assert work == "matmul" or row["end"] - row["start"] >= least
            crosses = action.op.name != "W" and (action.stage == 0) == (action.op.name == "F")
            assert row["sent"] == (4096 if crosses else 0)
    page = (tmp_path / "timeline.html").read_text()
    assert "shorter than the mean" not in page or work == "matmul", "sleeps only overshoot"
