"""Where a run stands, from its folder alone: live, over, dead, empty, damaged, and no run at all."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from rich.console import Console

from infra import checkpoint, incidents
from launch import status
from parallel.straggler import PHASES

NOW = 2_000_000_000.0


def a_run(folder: Path, steps: int, done: int, age: float = 1.0) -> Path:
    """As launch/pretrain.py would leave it, the last record `age` seconds old."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\nparallel: {{pp: 2, schedule: dualpipe}}\n")
    waits = {"straggler_rank": 3, "straggler_wait": 0.5, **{f"straggler_wait_{phase}": 0.0 for phase in PHASES}}
    waits["straggler_wait_load"] = 0.5
    lines = [
        {"step": n, "loss": 9.0 / n, "step_time": 2.0, "tokens_per_second": 500.0, "skipped_steps": 1, **waits}
        for n in range(1, done + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (NOW - age, NOW - age))
    return folder


def text(folder: Path) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(status.shown(folder, status.figures(folder, NOW)))
    return console.export_text()


def test_a_run_that_is_going_on(tmp_path):
    run = a_run(tmp_path / "run", steps=100, done=60)
    checkpoint.save(run / "checkpoints", 50, {"a": torch.ones(1000)}, {}, keep=1)
    incidents.note(run, "skipped_step", 7, "loss nan")
    incidents.note(run, "rollback", 30, "loss 9 is a spike: back to step 20")
    incidents.note(run, "skipped_step", 31, "loss inf")
    found = status.figures(run, NOW)
    assert (found["step"], found["steps"], found["state"]) == (60, 100, "running")
    assert (found["step_time"], found["tokens_per_second"], found["left"]) == (2.0, 500.0, 80.0)
    assert found["checkpoint"]["step"] == 50
    shown = text(run)
    for words in (
        *("step 60/100", "500 tokens/s, 2 s a step", "0:01:20 of steps", "0.1500", "1 step whose", "10 steps behind"),
        *(
            "2 skipped step, 1 rollback",
            "back to step 20",
            "rank 3 in 50 of 50 steps, 25 s of 100 s, most of it in load",
        ),
        *("pp=2 schedule=dualpipe",),
    ):
        assert words in shown


def test_the_command_prints_it(tmp_path, monkeypatch, capsys):
    run = a_run(tmp_path / "run", steps=100, done=60)
    incidents.note(run, "hang", 7, "in [/attend] of [red]")  # no markup
    monkeypatch.setattr(sys, "argv", ["status.py", str(run)])
    status.main()
    shown = capsys.readouterr().out
    assert "step 60/100" in shown
    assert "in [/attend] of [red]" in shown


def test_a_run_that_is_over_and_one_that_is_dead(tmp_path):
    assert status.figures(a_run(tmp_path / "over", 10, 10, age=1e6), NOW)["state"] == "finished"
    assert "silent for 0:16:40" in status.figures(a_run(tmp_path / "dead", 10, 9, age=1000), NOW)["state"]


def test_the_lock_of_a_run_tells_whether_it_is_at_work(tmp_path):
    run = a_run(tmp_path / "run", steps=100, done=60)
    beyond = a_run(tmp_path / "beyond", steps=2, done=8)
    script = "import sys; from pathlib import Path; from infra.run_lock import locked\n"
    script += "with locked(Path(sys.argv[1])), locked(Path(sys.argv[2])): print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", script, run, beyond], stdin=PIPE, stdout=PIPE, text=True)
    try:
        assert holder.stdout.readline() == "\n"
        assert status.figures(run, NOW)["state"] == status.figures(beyond, NOW)["state"] == "running"
        assert "0:01:20 of steps, to " in text(run)
        assert status.figures(run, NOW + 1000)["state"].endswith(": hung")
    finally:
        holder.kill()
        holder.communicate()
    assert status.figures(run, NOW)["state"] == "stopped"
    assert "0:01:20 of steps\n" in re.sub(" +\n", "\n", text(run))
    assert (status.figures(beyond, NOW)["state"], status.figures(beyond, NOW)["left"]) == ("finished", 0)
    (run / "lock").write_text("process 1 on another-host\n")  # whose locks this one may not see
    assert status.figures(run, NOW)["state"] == "running"
    assert "silent" in status.figures(run, NOW + 1000)["state"]


def test_a_run_without_a_step(tmp_path):
    run = a_run(tmp_path / "run", 10, 0)
    assert status.figures(run, NOW)["state"] == "no step is done yet"
    assert "none yet" in text(run)


def test_what_is_damaged_is_passed_over(tmp_path):
    run = a_run(tmp_path / "run", 10, 6)
    for step in (2, 4):
        checkpoint.save(run / "checkpoints", step, {"a": torch.ones(3)}, {}, keep=2)
    (run / "checkpoints" / "step_4" / "index.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "lo')
    found = status.figures(run, NOW)
    assert (found["step"], found["checkpoint"]["step"]) == (6, 2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "has no config.yaml"),
        ("[1, 2", "no train.steps"),
        ("model: {}", "no train.steps"),
        ("7", "no train.steps"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, monkeypatch, capsys, config, words):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    monkeypatch.setattr(sys, "argv", ["status.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        status.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert len(message.splitlines()) == 1


def test_a_folder_that_does_not_exist_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["status.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        status.main()
    assert "does not exist" in capsys.readouterr().err
