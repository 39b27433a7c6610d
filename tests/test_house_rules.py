"""Rules of the house that a linter cannot know."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN_IMPORTS = ("torch.distributed", "deepspeed", "mpi4py", "transformer_engine", "parallel", "conf", "launch")
FORBIDDEN_NAMES = {"rank", "world_size", "mesh", "process_group", "local_rank", "cuda", "is_cuda", "get_rank"}


def offences(source: str) -> list[str]:
    """What of `source` speaks of ranks, meshes, process groups or a particular device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(FORBIDDEN_IMPORTS)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(FORBIDDEN_IMPORTS):
            names = [node.module or ""]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            names = [node.id]
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_NAMES | {"distributed"}:
            names = [node.attr]
        elif isinstance(node, ast.arg) and node.arg in FORBIDDEN_NAMES:
            names = [node.arg]
        found += [f"line {getattr(node, 'lineno', '?')}: {name}" for name in names]
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "model").rglob("*.py")), ids=lambda f: f.name)
def test_the_model_knows_no_ranks_and_no_devices(file):
    assert offences(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["import torch.distributed as dist", "from parallel.mesh import Mesh", "x.cuda()", "def f(rank): ...", "mesh = 1"],
)
def test_the_rule_can_fail(source):
    assert offences(source)


def test_no_grab_bags():
    bags = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}
    assert not [f for f in ROOT.glob("*/**/*.py") if f.name in bags and ".venv" not in f.parts]


def test_schedules_simulator_and_configs_import_no_torch():
    modules = [
        "conf.schema",
        "launch.simulate",
        "launch.pretrain",
        "model.config",
        "parallel.config",
        "parallel.pipeline.passes",
        "parallel.pipeline.render",
        "parallel.pipeline.schedules",
        "parallel.pipeline.simulate",
        "parallel.pipeline.split",
    ]
    check = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
