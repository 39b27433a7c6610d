"""Runs a benchmark as the ranks of an emulated cluster (launch/emulate.py: root, iproute2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def on_cluster(script: str, nodes: int, ranks_per_node: int, rate: float, words: Sequence[object]) -> Any:
    """Runs `script --rank WORDS...` on every rank and returns what `from_rank` wrote on rank 0. rate: bits a second."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank0.json"
        options = [f"nodes={nodes}", f"ranks_per_node={ranks_per_node}", f"link.rate={rate / 1e6:.0f}mbit"]
        command = [sys.executable, str(ROOT / "launch" / "emulate.py"), *options, "--", script]
        command += ["--out", str(out), "--rank", *map(str, words)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(out.read_text())


def from_rank(result: Any, out: Path) -> None:
    """Hands what a rank has measured to the process that waits in `on_cluster`."""
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(result))
