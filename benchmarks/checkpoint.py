"""How long a checkpoint keeps training waiting: written while it waits, and beside it.

Both save the same state in turn, each on to the disk (fsync) with checksums. `stall` is the time until training may go
on; `whole` until the checkpoint is there. `slower` is what else it costs: by how much a computing loop takes longer
while the checkpoint is being written beside it, against the same loop without.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch

from infra.saver import Saver


def state(megabytes: int, num_tensors: int = 200) -> dict[str, torch.Tensor]:
    """Random float32 tensors of so many megabytes together."""
    numel = megabytes * 10**6 // 4 // num_tensors
    return {f"master/tensor_{i}": torch.randn(numel) for i in range(num_tensors)}


def compute(seconds: float) -> int:
    """Multiplies matrices for so long; returns how many."""
    a, count, end = torch.randn(256, 256), 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tensors, saver = state(args.megabytes), Saver()
    root = Path(tempfile.mkdtemp(dir=args.folder))
    rows: list[dict[str, float]] = []
    saver.reserve(tensors)
    try:
        for step in range(args.rounds):
            began = time.perf_counter()
            saver.save(root, 2 * step, tensors, {}, keep=2, wait=True)
            waited = time.perf_counter() - began
            began = time.perf_counter()
            saver.save(root, 2 * step + 1, tensors, {}, keep=2, wait=False)
            stall = time.perf_counter() - began
            num_beside = compute(waited / 2)  # while it is written
            saver.wait()
            whole = time.perf_counter() - began
            num_alone = compute(waited / 2)
            rows.append({"waited": waited, "stall": stall, "whole": whole, "slower": num_alone / num_beside - 1})
    finally:
        shutil.rmtree(root)
    ratios = [row["stall"] / row["waited"] for row in rows]
    low, _, high = quantiles(ratios, n=4)
    print(f"{args.megabytes} MB, {args.rounds} rounds, medians in ms:")
    for name, meaning in (
        ("waited", "stall of a save that is waited for"),
        ("stall", "stall of a save beside the training"),
        ("whole", "the same until it is whole, training going on"),
    ):
        print(f"  {1e3 * median(row[name] for row in rows):8.1f}  {meaning}")
    print(f"stall beside / waited: {median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}); the first {ratios[0]:.3f}")
    print(f"computing meanwhile is slower by {median(row['slower'] for row in rows):.1%}")
    if args.out:
        hardware = {"cpu": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}
        figures = {"date": str(datetime.date.today()), "hardware": hardware, "rows": rows}
        args.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
