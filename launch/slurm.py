"""Writes the sbatch file of a multi-node run, with the code and the config of this moment beside it; submits it.

    python launch/slurm.py line='model=671b parallel.pp=16 ...' nodes=256 run.dir=/shared/runs/v3
    python launch/slurm.py plan=plans/h100 line='data.path=/shared/data' run.dir=/shared/runs/a submit=true

line: overrides of launch/pretrain.py, as launch/plan.py prints them. plan: its plan.json, or the folder of that, of
which `row` (1: the winner) is taken, with its number of ranks; a line then adds words, such as the data, or has the
last word on those of the plan. In run.dir, which all nodes must see:

    job.sbatch      srun starts a process a rank; run it again with sbatch: the run goes on where it was
    code/HASH/      every file of this repository that git tracks, as it is now, committed or not, and new ones that
                    git neither tracks nor ignores, up to 1 MB each (larger ones are named: `git add` takes them
                    along); a job keeps the one that it was written with, whatever is prepared here later
    config.line     the overrides, one a line; run.dir is added

Every word goes into the batch file through shlex.quote. Python, nodes, account and partition are yours to
name; what else sbatch takes goes into `sbatch={qos: high, ...}`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.filesize import decimal

from conf.schema import Config, register
from infra.wording import counted
from launch.checked_mesh import checked_mesh
from launch.errors import one_line_errors
from launch.files import save
from parallel.config import check_at_least

ROOT = Path(__file__).resolve().parents[1]
_TEXT = ("line=", "plan=", "run.dir=", "name=", "time=", "python=")
MOST_NODES = 100_000
MOST_NEW = 1_000_000  # bytes of a file that git does not track: a larger one is data that lies about, not code


@dataclass
class RunDir:
    dir: str = "???"


@dataclass
class SlurmConfig:
    """nodes: null takes as many as the plan's ranks fill. gpus: whether ranks have one each."""

    line: str | None = None
    plan: str | None = None
    row: int = 1
    run: RunDir = field(default_factory=RunDir)
    nodes: int | None = None
    ranks_per_node: int = 8
    gpus: bool = True
    cpus_per_rank: int = 8
    name: str = "braid"
    account: str | None = None
    partition: str | None = None
    time: str = "24:00:00"
    sbatch: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    submit: bool = False

    def __post_init__(self) -> None:
        if self.line is None and self.plan is None:
            raise ValueError("name line='model=... parallel.pp=...', or plan=DIR, or both")
        for name in ("ranks_per_node", "cpus_per_rank", "row"):
            check_at_least(name, getattr(self, name))
        if self.nodes is not None and not 1 <= self.nodes <= MOST_NODES:
            raise ValueError(f"nodes={self.nodes}: must be between 1 and {MOST_NODES:,}")
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise ValueError(f"time={self.time}: write it as Slurm does, 24:00:00 or 7-00:00:00")
        words = {"name": self.name, "account": self.account, "partition": self.partition}
        words |= {f"sbatch.{name}": value for name, value in self.sbatch.items()}
        for name, value in words.items():
            if value is not None and not re.fullmatch(r"[\w.,:=@%+-]+", str(value)):
                raise ValueError(f"{name}={value}: sbatch options are letters, digits and . , : = @ % + - _")
        if not self.run.dir:
            raise ValueError("run.dir= is empty: name a folder, such as runs/first")
        if not re.fullmatch(r"[\w/.+@-]+", str(folder := Path(self.run.dir).resolve())):
            only = "letters, digits and / . + @ - _ only"
            raise ValueError(f"run.dir={str(folder)!r}: sbatch and Hydra read it, so {only}")
        for option in self.sbatch:
            if not re.fullmatch(r"[a-z][a-z-]*", option):
                raise ValueError(f"sbatch.{option}: no long option of sbatch, such as qos or mail-type")


def chosen_line(config: SlurmConfig) -> tuple[list[str], int | None]:
    """(overrides of launch/pretrain.py, ranks where a plan says so)"""
    try:
        added = shlex.split(config.line or "")
    except ValueError as error:
        raise ValueError(f"line={config.line}: not the words of a shell ({error})") from None
    added = added[added[:1] == ["launch/pretrain.py"] :]  # as launch/plan.py prints the line
    if config.plan is None:
        return added, None
    path = Path(config.plan)
    path = path / "plan.json" if path.is_dir() else path
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        lines = [(str(row["line"]), int(row["ranks"])) for row in rows]
    except (ValueError, KeyError, TypeError):  # no JSON, or another's
        raise ValueError(f"plan={path} is not a plan.json of launch/plan.py (out=DIR writes one)") from None
    if not 1 <= config.row <= len(lines):
        raise ValueError(f"row={config.row}: {path} has {len(lines)} rows")
    line, ranks = lines[config.row - 1]
    return [*shlex.split(line), *added], ranks


def checked_words(config: SlurmConfig, words: list[str], world: int) -> list[str]:
    """The words with run.dir. Raises what launch/pretrain.py would refuse on `world` ranks - mesh, experts, batches,
    stages - now rather than when the job starts."""
    words = [word for word in words if not word.startswith("run.dir=")]
    words.append(f"run.dir={Path(config.run.dir).resolve()}")
    register()
    with initialize_config_module("conf", version_base="1.3"):
        run = cast(Config, OmegaConf.to_object(compose("pretrain", words)))
    try:
        checked_mesh(run, world)
    except ValueError as error:
        raise ValueError(f"{error} (on {world} ranks)") from None
    return words


def code_files() -> tuple[list[str], list[str]]:
    """(files to take along, files left out): what git tracks, and what is new to it, neither tracked nor ignored, but
    for new files above `MOST_NEW`. Raises ValueError outside a repository."""

    def listed(*options: str) -> list[str]:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{ROOT} is no git repository: its code cannot be snapshotted")
        return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]

    new = listed("--others", "--exclude-standard")
    large = [name for name in new if (ROOT / name).stat().st_size > MOST_NEW]
    return sorted({*listed("--cached"), *new} - {*large}), large


def snapshot_code(folder: Path) -> tuple[Path, str]:
    """Copies `code_files` into a folder in `folder` that is named by what they hold; returns it, and what was taken,
    in words. What is there already is left alone: a run may be at work with it. Raises ValueError where git would
    track the copy."""
    ignored = ["git", "-C", str(ROOT), "check-ignore", "-q", str(folder.resolve())]
    if folder.resolve().is_relative_to(ROOT) and subprocess.run(ignored).returncode:
        raise ValueError(
            f"run.dir={folder.parent} is part of the code that a run takes along: use runs/NAME, or a folder elsewhere"
        )
    names, large = code_files()
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}\0".encode())
    target = folder / digest.hexdigest()[:12]
    if not target.exists():
        partial = folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, partial / name)
        partial.rename(target)
    said = f"{counted(len(names), 'file')} of code, {_size(names)}, in {target}"
    if large:
        said += f"; left out, as git does not track them: {', '.join(f'{name} ({_size([name])})' for name in large)}"
    return target, said


def _size(names: list[str]) -> str:
    return decimal(sum((ROOT / name).stat().st_size for name in names))


def batch_file(config: SlurmConfig, nodes: int, words: list[str], code: Path) -> str:
    """The text of job.sbatch, which runs the `code` of a snapshot."""
    folder = Path(config.run.dir).resolve()
    options: dict[str, Any] = {
        "job-name": config.name,
        "nodes": nodes,
        "ntasks-per-node": config.ranks_per_node,
        **({"gpus-per-node": config.ranks_per_node} if config.gpus else {}),
        "cpus-per-task": config.cpus_per_rank,
        "time": config.time,
        "signal": "TERM@300",  # a run that is told to end saves its last whole step
        "requeue": None,
        **({"account": config.account} if config.account else {}),
        **({"partition": config.partition} if config.partition else {}),
        **config.sbatch,
    }
    head = "\n".join(f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items())
    command = " \\\n    ".join([shlex.quote("launch/pretrain.py"), *map(shlex.quote, words)])
    return f"""#!/bin/bash
# Written by launch/slurm.py. Submitted again, the run goes on from its newest checkpoint.
{head}
#SBATCH --output={folder / "slurm-%j.log"}

set -euo pipefail
cd {shlex.quote(str(code.resolve()))}
export PYTHONPATH=$PWD
export OMP_NUM_THREADS={1 if config.gpus else config.cpus_per_rank}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${{hosts%%$'\\n'*}}  # no `| head`: it ends the pipe early, and pipefail takes that for a failure
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
exec srun --kill-on-bad-exit=1 {shlex.quote(config.python)} {command}
"""


def prepare(config: SlurmConfig) -> tuple[Path, int, str]:
    """Writes everything; returns (the batch file, nodes, what code was taken)."""
    words, ranks = chosen_line(config)
    if config.nodes is None and ranks is None:
        raise ValueError("nodes= is missing: a line does not say how many ranks it is for (a plan does)")
    per_node = config.ranks_per_node
    if config.nodes is None and (ranks or 0) % per_node:
        raise ValueError(f"{ranks} ranks do not fill nodes of ranks_per_node={per_node}: name the machine's own")
    nodes = config.nodes or (ranks or 0) // per_node
    if ranks is not None and nodes * per_node != ranks:
        have = f"nodes={nodes} of ranks_per_node={per_node} are {nodes * per_node} ranks"
        raise ValueError(f"{have}, but the plan has {ranks}")
    words = checked_words(config, words, nodes * per_node)
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        code, taken = snapshot_code(folder / "code")
        save(folder / "config.line", "\n".join(words) + "\n")
        save(folder / "job.sbatch", batch_file(config, nodes, words, code))
    except OSError as error:
        raise ValueError(f"run.dir={folder} cannot be written ({error.strerror}): choose another folder") from None
    return folder / "job.sbatch", nodes, taken


def submit(path: Path) -> str:
    """Hands the file to sbatch; returns what it said. Raises ValueError in one line where it refuses."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch not found: submit on a login node of the cluster, or leave out submit=true")
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refused {path}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()


@one_line_errors()
def main() -> None:
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word}: not of the form option=value (quote a line with spaces: 'line=...')")
    merged = OmegaConf.merge(
        OmegaConf.structured(SlurmConfig),
        OmegaConf.from_dotlist([word for word in words if not word.startswith(_TEXT)]),
    )
    for name, _, value in (word.partition("=") for word in words if word.startswith(_TEXT)):
        OmegaConf.update(merged, name, value)  # whatever signs it holds
    config = OmegaConf.to_object(merged)
    assert isinstance(config, SlurmConfig)
    path, nodes, taken = prepare(config)
    print(f"{path}: {counted(nodes, 'node')} of {counted(config.ranks_per_node, 'rank')}")
    print(taken)
    print(submit(path) if config.submit else f"submit it with: sbatch {shlex.quote(str(path))}")


if __name__ == "__main__":
    main()
