"""Sweeps: rows that jobs leave, the one table of the end, jobs in processes of their own, ranks of training runs."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.summary import as_html, show_table
from launch.sweep import show_rows
from launch.train_ranks import check_same_run
from tests.launch.runs import small_data

ROOT = Path(__file__).resolve().parents[2]
PLAN = ("model=debug", "cluster=laptop", "train.global_batch_size=16", "data.sequence_length=256", "train.tokens=1e8")


def run(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=110)


def test_the_table_is_sorted_and_leaves_out_what_never_changes(tmp_path: Path) -> None:
    rows = [
        {"a": "1", "same": "x", "time": 2.0, "share": 0.5},
        {"a": "2", "same": "x", "time": None, "share": None, "note": "refused"},
        {"a": "3", "same": "x", "time": 1.0, "share": 0.25},
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_rows(rows, str(tmp_path), "three", ("time",), ("share", "time"), (), (), console)
    written = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["a"] for row in written] == ["3", "1", "2"]
    assert list(written[0]) == ["a", "time", "share", "note"]
    shown = console.export_text().splitlines()
    assert [line.split() for line in shown if "(1)" in line] == [["2", "-", "-", "(1)"], ["(1)", "refused"]]
    page = (tmp_path / "summary.html").read_text()
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert data["axes"] == [2, 1]
    assert [row[0][0] for row in data["rows"]] == ["3", "1", "2"]
    assert r'.join("\n")' in page  # and no broken string


def test_a_page_without_a_plot_has_no_axes() -> None:
    page = as_html([{"a": 1.0}], "one")
    assert '"axes": null' in page


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    check_same_run(tmp_path, ["train.seed=1"])
    (tmp_path / "config.yaml").write_text("# revision: abc\n# overrides: train.seed=1 run.dir=r/000\ntrain: {}\n")
    check_same_run(tmp_path, ["train.seed=1", "run.dir=r/000"])
    with pytest.raises(RuntimeError, match=r"holds another run \(train.seed=1 run.dir=r/000\): choose another run.dir"):
        check_same_run(tmp_path, ["train.seed=2", "run.dir=r/000"])


def test_a_narrow_terminal_gets_the_columns_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = [{"row": n, "time_s": 1.0 / n, "spare_share": 0.5, "layout": "pp16 ep64 dualpipe two_hop"} for n in (1, 2)]

    def lines(width: int, terminal: bool = True) -> list[str]:
        file = open("/dev/null", "w")  # noqa: SIM115
        console = Console(width=width, record=True, file=file, force_terminal=terminal)
        show_table(console, rows, ("spare_share",))
        return [line.rstrip() for line in console.export_text().splitlines() if line.strip()]

    wide, narrow, least = lines(60), lines(36), lines(10)
    assert wide[-1] == "   2   0.5    0.5  pp16 ep64 dualpipe two_hop"
    assert narrow[-3:] == ["   2   0.5  pp16 ep64 dualpipe", "            two_hop", "too wide for here: spare share"]
    assert any("1.0  pp16 ep64 dualpipe" in line for line in least)  # wider than the terminal: nothing is lost
    assert lines(10, terminal=False) == wide
    monkeypatch.setenv("COLUMNS", "36")
    assert lines(36, terminal=False) == narrow


@pytest.mark.slow
def test_plans_are_swept_in_processes_and_what_cannot_be_says_why(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib"] if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") else []
    done = run(tmp_path, "plan.py", "-m", *launcher, *PLAN, "parallel.pp=1,2,3,0", "exact=5", "out=o")
    assert "(1) pp=3 does not divide world=4" in done.stdout
    assert "(2) parallel.pp=0: must be at least 1" in done.stdout
    assert done.stderr.strip() == "error: 2 of 4 plans could not be: the table says why"
    rows = {row["parallel.pp"]: row for row in csv.DictReader((tmp_path / "o/summary.csv").open())}
    assert rows["3"]["note"].startswith("pp=3 does not divide")
    for pp in "12":
        assert float(rows[pp]["from_s"]) <= float(rows[pp]["step_s"]) <= float(rows[pp]["to_s"])
        assert f"parallel.pp={pp}" in rows[pp]["line"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["summary.csv", "summary.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.slow
def test_training_runs_are_swept_with_their_ranks(tmp_path: Path) -> None:
    words = (
        "train.steps=2", "train.global_batch_size=4", "train.microbatch_size=1", "train.eval_samples=4",
        "data.sequence_length=24", f"data.path={small_data(tmp_path)}", "parallel.pp=1,2,5",
    )  # fmt: skip
    done = run(tmp_path, "pretrain.py", "-m", *words, "parallel.schedule=1f1b", "run.dir=r")
    rows = {row["parallel.pp"]: row for row in csv.DictReader((tmp_path / "r/summary.csv").open())}
    assert {pp: rows[pp]["ranks"] for pp in "12"} == {"1": "1", "2": "2"}
    assert float(rows["1"]["loss"]) == pytest.approx(
        float(rows["2"]["loss"]), rel=1e-3
    )  # one curve, whatever the layout
    assert "4 layers" in rows["5"]["note"]  # five stages, which a run's own line refuses
    assert f"(1) {rows['5']['note']}" in done.stdout
    assert {path.name for path in (tmp_path / "r").iterdir() if path.is_dir()} >= {"000", "001"}
    again = run(tmp_path, "pretrain.py", "-m", *words[:-1], "parallel.pp=1,4", "parallel.schedule=1f1b", "run.dir=r")
    assert "r/001 holds another run" in again.stdout
    assert "r/000 holds" not in again.stdout


@pytest.mark.slow
def test_a_sweep_is_not_for_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "-m", "train.seed=0,1"]
    env = {"RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stderr.strip() == "error: a sweep (-m) starts the ranks of its runs itself: use python, not torchrun"
