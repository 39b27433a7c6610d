"""The batch file of a run: what it holds, that bash reads it, that sbatch gets it - and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm

LINE = "model=debug parallel.pp=2 parallel.schedule=dualpipe train.steps=5"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `slurm.py` with these words in an empty folder; returns (what it printed, what it refused)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["slurm.py", *words])
        code = 0
        try:
            slurm.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert code == (2 if said.err else 0)
        return said.out, said.err

    return run


def options_of(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.partition("=")[::2] for line in lines)


def test_the_file_holds_the_line_and_bash_reads_it(run, tmp_path: Path) -> None:
    words = ("ranks_per_node=4", "partition=gpu", "sbatch.qos=high", "time=7-00:00:00")
    printed, refused = run(f"line=launch/pretrain.py {LINE} run.dir=elsewhere", "nodes=2", "run.dir=runs/a", *words)
    assert refused == ""
    assert "2 nodes of 4 ranks" in printed
    path = tmp_path / "runs/a/job.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    options = options_of(path.read_text())
    assert options["nodes"] == "2"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "4"
    assert (options["partition"], options["qos"], options["time"]) == ("gpu", "high", "7-00:00:00")
    assert options["output"] == f"{tmp_path}/runs/a/slurm-%j.log"
    lines = (tmp_path / "runs/a/config.line").read_text().split()
    assert lines == [*LINE.split(), f"run.dir={tmp_path}/runs/a"]  # its own run.dir, not the line's


def test_what_srun_would_start_is_the_line(run, tmp_path: Path) -> None:
    """With a fake srun and scontrol (of more nodes than a pipe holds), the file starts launch/pretrain.py of the
    snapshot with the very words."""
    nasty = "data.path='a $(touch pwned); `id` * b'"
    assert run(f'line={LINE} "{nasty}"', "nodes=1", "ranks_per_node=2", "run.dir=r", "gpus=false")[1] == ""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$MASTER_ADDR" "$MASTER_PORT" "$@"\n')
    (fake / "scontrol").write_text("#!/bin/bash\necho first\nseq -f node%.0f 100000\n")
    for name in ("srun", "scontrol"):
        (fake / name).chmod(0o755)
    env = {"PATH": f"{fake}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "x"}
    done = subprocess.run(["bash", "r/job.sbatch"], env=env, capture_output=True, text=True, check=True)
    place, address, port, *words = done.stdout.splitlines()
    assert (Path(place).parent, address, port) == (tmp_path / "r/code", "first", "23456")
    assert words[:3] == ["--kill-on-bad-exit=1", sys.executable, "launch/pretrain.py"]
    assert words[3:] == [*LINE.split(), nasty, f"run.dir={tmp_path}/r"]
    assert not list(tmp_path.rglob("pwned"))


def test_the_code_is_that_of_this_moment(run, tmp_path: Path) -> None:
    run(f"line={LINE}", "nodes=1", "run.dir=r")
    (code,) = (tmp_path / "r/code").iterdir()
    for name in ("launch/pretrain.py", "conf/pretrain.yaml", "parallel/plan/step.py"):
        assert (code / name).read_bytes() == (slurm.ROOT / name).read_bytes()
    assert not (code / ".git").exists()


def test_code_that_changed_leaves_that_of_a_running_job_alone(run, tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "root"
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "a.py").write_text("one")
    monkeypatch.setattr(slurm, "ROOT", root)
    assert run(f"line={LINE}", "nodes=1", "run.dir=r")[1] == ""
    (first,) = (tmp_path / "r/code").iterdir()
    written = (first / "a.py").stat()
    run(f"line={LINE}", "nodes=1", "run.dir=r")  # the same code again: nothing is written
    assert list((tmp_path / "r/code").iterdir()) == [first]
    assert (first / "a.py").stat() == written
    (root / "a.py").write_text("two")
    assert run(f"line={LINE}", "nodes=1", "run.dir=r")[1] == ""
    (second,) = set((tmp_path / "r/code").iterdir()) - {first}
    assert [(code / "a.py").read_text() for code in (first, second)] == ["one", "two"]
    assert f"cd {second}\n" in (tmp_path / "r/job.sbatch").read_text()


def test_large_files_that_git_does_not_track_stay_and_are_named(run, tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "root"
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "new.py").write_text("x" * 1000)
    for name in ("tracked.bin", "data.bin"):
        (root / name).write_bytes(bytes(2_000_000))
    subprocess.run(["git", "-C", str(root), "add", "tracked.bin"], check=True)
    monkeypatch.setattr(slurm, "ROOT", root)
    printed, refused = run(f"line={LINE}", "nodes=1", "run.dir=r")
    assert refused == ""
    (code,) = (tmp_path / "r/code").iterdir()
    assert {path.name for path in code.iterdir()} == {"new.py", "tracked.bin"}
    assert "r/job.sbatch: 1 node of 8 ranks\n2 files of code, 2.0 MB, in" in printed
    assert "; left out, as git does not track them: data.bin (2.0 MB)\n" in printed


def test_a_run_folder_is_no_part_of_the_code_it_takes_along(run, tmp_path: Path, monkeypatch) -> None:
    """Else each submission would copy the copy before, and the checkpoints."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("runs/\n")
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    assert "run.dir=mine is part of the code" in run(f"line={LINE}", "nodes=1", "run.dir=mine")[1]
    assert run(f"line={LINE}", "nodes=1", "run.dir=runs/mine")[1] == ""
    assert not (tmp_path / "mine/code").exists()
    assert len(list((tmp_path / "runs/mine/code").glob("*/.gitignore"))) == 1


def test_signs_that_sbatch_would_misread_are_refused_in_the_whole_path(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "two words").mkdir()
    monkeypatch.chdir(tmp_path / "two words")
    assert "two words/r': sbatch and Hydra read it" in run(f"line={LINE}", "nodes=1", "run.dir=r")[1]


def test_a_plan_brings_its_line_and_its_ranks(run, tmp_path: Path) -> None:
    rows = [{"line": "model=debug", "ranks": 8}, {"line": f"{LINE} train.global_batch_size=64", "ranks": 16}]
    (tmp_path / "plan.json").write_text(json.dumps({"rows": rows}))
    assert run("plan=plan.json", "row=2", "run.dir=r")[1] == ""
    assert options_of((tmp_path / "r/job.sbatch").read_text())["nodes"] == "2"
    assert "parallel.pp=2" in (tmp_path / "r/config.line").read_text()
    assert run("plan=.", "row=2", "run.dir=r")[1] == ""  # the folder that plan.py wrote
    assert run("plan=.", "row=2", "line='data.path=/shared/data'", "run.dir=r")[1] == ""
    assert "data.path=/shared/data" in (tmp_path / "r/config.line").read_text().splitlines()
    (tmp_path / "other.json").write_text('{"rows": [{"ranks": 8}]}')
    assert "other.json is not a plan.json of launch/plan.py" in run("plan=other.json", "run.dir=r")[1]
    assert "row=3: plan.json has 2 rows" in run("plan=plan.json", "row=3", "run.dir=r")[1]
    assert (
        "16 ranks do not fill nodes of ranks_per_node=5"
        in run("plan=plan.json", "row=2", "run.dir=r", "ranks_per_node=5")[1]
    )
    assert (
        "nodes=4 of ranks_per_node=8 are 32 ranks, but the plan has 16"
        in run("plan=plan.json", "row=2", "run.dir=r", "nodes=4")[1]
    )


def test_it_is_submitted_once_written(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "sbatch not found" in run(f"line={LINE}", "nodes=1", "run.dir=r", "submit=true")[1]
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text('#!/bin/bash\n[ -f "$1" ] && bash -n "$1" && echo "Submitted batch job 7"\n')
    (fake / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    assert "Submitted batch job 7" in run(f"line={LINE}", "nodes=1", "run.dir=r", "submit=true")[0]
    (fake / "sbatch").write_text("#!/bin/bash\necho 'Invalid account' >&2\nexit 1\n")
    assert (
        "sbatch refused r/job.sbatch: Invalid account" in run(f"line={LINE}", "nodes=1", "run.dir=r", "submit=true")[1]
    )


def test_a_line_that_trains_is_not_refused(run) -> None:
    """Of pipelines of one rank too, which no plan would search; and a schedule that is searched for."""
    for schedule in ("zbv", "auto"):
        assert run(f"line=model=debug parallel.schedule={schedule}", "nodes=1", "run.dir=r")[1] == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "name line="),
        ([f"line={LINE}"], "nodes= is missing"),
        (["line=model=debug parallel.schedule=2f2b", "nodes=1"], "parallel.schedule=2f2b: expected one of"),
        (["line=model=debug parallel.nonsense=1", "nodes=1"], "nonsense"),
        ([f"line={LINE}", "nodes=1", "name=a b"], "name=a b: sbatch options are letters"),
        ([f"line={LINE}", "nodes=1", "sbatch.qos=a;b"], "sbatch.qos=a;b: sbatch options are letters"),
        ([f"line={LINE}", "nodes=1", "time=soon"], "time=soon: write it as Slurm does"),
        ([f"line={LINE}", "nodes=1", "run.dir=a b"], "/a b': sbatch and Hydra read it"),
        (["plan=none.json", "nodes=1"], "none.json: No such file"),
        ([f"plan={slurm.ROOT / 'README.md'}"], "README.md is not a plan.json of launch/plan.py"),
        ([f"line={LINE}", "nodes=1", "run.dir="], "run.dir= is empty: name a folder"),
        ([f"line={LINE}", "nodes=0"], "nodes=0: must be between 1 and 100,000"),
        (['line=model=debug "', "nodes=1"], "not the words of a shell (No closing quotation)"),
        (["nodes"], "nodes: not of the form option=value"),
        ([f"line={LINE} parallel.pp=3", "nodes=1"], "pp=3 does not divide world=8"),
        (["line=model=debug parallel.ep=3 parallel.dispatcher=two_hop", "nodes=1"], "ep=3 does not divide dp=8"),
        ([f"line={LINE} train.global_batch_size=9", "nodes=1"], "such as 16 (on 8 ranks)"),
        (["line=model=debug train.global_batch_size=128", "nodes=4"], "train.eval_samples=64 does not divide"),
        ([f"line={LINE} train.batch_ramp.start=3", "nodes=1"], "train.batch_ramp.start=3 does not divide"),
        (
            ["line=model=debug parallel.pp=8 parallel.schedule=zbv", "nodes=1"],
            "4 layers (model.num_hidden_layers) cannot fill 16 stages",
        ),
    ],
)
def test_wrong_input_ends_in_one_line(run, words: list[str], line: str) -> None:
    given = words if any(word.startswith("run.dir=") for word in words) else [*words, "run.dir=r"]
    refused = run(*given)[1]
    assert line in refused, refused
    assert "\n" not in refused.strip()
