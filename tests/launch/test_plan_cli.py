"""The command line of the planner: what it prints, what it writes, what it refuses."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf.schema import register
from launch import plan as cli
from launch.checked_mesh import check_batches
from launch.plan_report import eval_samples, line_of, sparkline
from launch.validate import config_of
from parallel.pipeline.schedules import SCHEDULES
from parallel.plan.layout import Layout

Run = Callable[..., tuple[str, str]]
SMALL = ("model=debug", "cluster=laptop", "train.global_batch_size=16", "data.sequence_length=256", "train.tokens=1e8")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `plan.py` with these words in an empty folder; returns (what it printed, what it refused)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert code == (2 if said.err else 0)
        return said.out, said.err

    return run


def test_it_prints_the_plan_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    printed, refused = run(*SMALL, "exact=20", "memory=true")
    assert refused == ""
    assert re.search(r"[\d,]+ legal layouts, [\d,]+ fit 4 GB, 20 of them replayed", printed)
    assert re.search(r"winner fits: [\d.]+ of 4 GB \([\d.]+%\) on the fullest rank, [\d.]+ of them margin", printed)
    for part in ("one word away from the winner", "Pareto front", "GPU-hours", "activations over the step"):
        assert part in printed
    assert "note: kernel rates were measured on H800 and are scaled to CPU by its peaks" in printed
    assert "beside" not in printed  # V3's own layout, which nobody named, does not suit four ranks
    assert list(tmp_path.iterdir()) == []


def test_a_layout_beside_the_winner_is_placed_or_refused(run: Run) -> None:
    told = ("parallel.pp=2", "parallel.ep=1", "parallel.dispatcher=auto", "precision=bf16", "parallel.schedule=1f1b")
    beside = "beside={pp: 2, ep: 1, schedule: 1f1b, dispatcher: auto, precision: bf16}"
    assert "beside" not in run(*SMALL, *told, "beside=null")[0]
    printed, refused = run(*SMALL, *told, beside)
    assert refused == ""
    assert re.search(r"beside \(ep=1 .* schedule=1f1b .*\): row \d+ of", printed), printed
    assert "beside fits: " in printed
    assert re.search(
        r"beside \(.* pp=3 .*\): not legal here, pp=3 does not divide", run(*SMALL, *told, "beside.pp=3")[0]
    )


def test_files_hold_every_row_and_lines_that_pretrain_composes(run: Run, tmp_path: Path) -> None:
    assert run(*SMALL, "exact=40", "out=plan")[1] == ""
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    rows = list(csv.DictReader((tmp_path / "plan/plan.csv").open()))
    assert len(plan["rows"]) == len(rows) == 40
    assert [row["line"] for row in rows] == [row["line"] for row in plan["rows"]]
    assert "<table>" in (tmp_path / "plan/plan.html").read_text()
    register()
    composed = 0
    for row in plan["rows"]:
        assert sum(row["terms"].values()) == pytest.approx(row["step_time"])
        words = row["line"].split()
        with initialize_config_module("conf", version_base="1.3"):
            config = OmegaConf.to_object(compose("pretrain", words))
        assert config.train.global_batch_size == 16  # type: ignore[union-attr]
        composed += 1
    assert composed >= 5


def test_a_line_trains_on_the_ranks_of_its_plan() -> None:
    """Evaluation too, whose batch no word of a layout names."""
    told = config_of("model=debug", "train.global_batch_size=1152")
    register()
    with initialize_config_module("conf", version_base="1.3"):
        assert compose("pretrain").train.eval_samples == eval_samples()
        for world, schedule, microbatch_size in product((4, 48), SCHEDULES, (1, 3)):
            layout = Layout(world, 2, 2, 1, schedule, "local", microbatch_size=microbatch_size)
            line = line_of(told, "debug", layout)
            assert ("train.eval_samples=" in line) == bool(eval_samples() % layout.least_batch)
            config = OmegaConf.to_object(compose("pretrain", line.split()))
            check_batches(config.train, config.parallel.make_schedule, layout.dp)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("precision=bf16", "parallel.ep=3"), "ep=3 does not divide .* parallel.ep=2 or parallel.ep=4"),
        (("parallel.schedule=2f2b",), "parallel.schedule=2f2b: expected one of gpipe"),
        (("precision=fp32",), "precision=fp32: expected one of bf16, fp8"),
        (("train.global_batch_size=17", "parallel.pp=2"), "global_batch_size=17 does not divide .* parallel.pp=4"),
        (("parallel.pp=3",), "pp=3 does not divide world=4: .* parallel.pp=2 or parallel.pp=4"),
        (("cluster.memory_gb=0.01",), "none of .* layouts fits 0.01 GB"),
        (("parallel.schedul=3",), "parallel.schedul: no such option; did you mean parallel.schedule"),
        (("exact=0",), "exact=0: must be at least 1"),
        (("worlds=0",), r"worlds=0: numbers of ranks, 1 or more each, as in worlds=\[256,512\]"),
        (("worlds=[4,-8]",), r"worlds=\[4, -8\]: numbers of ranks"),
        (("train.tokens=-1",), "train.tokens=-1.0: must be at least 1"),
        (("train.tokens=inf",), "train.tokens=inf: must be at least 1, and finite"),
        (("train.microbatch_size=0",), "train.microbatch_size=0: must be at least 1"),
        (("train.ramp_from=17",), "train.ramp_from=17 is above train.global_batch_size=16, where the ramp ends"),
        (("data.sequence_length=0",), "data.sequence_length=0: must be at least 1"),
        (("imbalance=nan",), "imbalance=nan: a factor on times"),
        (("beside={schedule:2f2b}",), "beside.schedule=2f2b: expected one of gpipe"),
        (("beside={stages:2}",), "beside.stages: no such option"),
        (("cluster.restart_s=-5",), "cluster.restart_s=-5.0 must be at least 0"),
        (("cluster.mtbf_hours=1e-6",), "4 ranks fail every 0.0009 s, .* so that no run would end: raise it"),
        (("doubt.network=[0,1]",), r"doubt.network=\[0.0, 1.0\]: expected \[least, most\], from 0.01 up"),
        (("out=",), "out= is empty: name a folder"),
        ((f"out={__file__}",), "test_plan_cli.py is a file: name a folder"),
    ],
)
def test_wrong_input_ends_in_one_line(run: Run, words: tuple[str, ...], line: str) -> None:
    printed, refused = run(*SMALL, *words)
    assert printed == ""
    assert re.search(line, refused), refused
    assert "\n" not in refused.strip()


def test_a_sparkline_shows_the_most_of_each_part() -> None:
    seconds = np.arange(8.0)
    assert sparkline(seconds, np.array([0, 1, 2, 3, 4, 5, 6, 7.0]), width=7) == "▂▃▄▅▆▇█"
    assert sparkline(seconds, np.array([7, 0, 0, 0, 0, 0, 0, 0.0]), width=7)[0] == "█"


def test_the_planner_imports_no_torch() -> None:
    check = "import sys, launch.plan, launch.validate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).resolve().parents[2])
