"""Where a run stands, from its folder alone: the run may be going on, be over, or be dead.

python launch/status.py runs/first
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from infra import checkpoint, incidents, run_lock
from infra.metrics import FILE, loss_text, read_records
from infra.wording import counted, duration
from launch.waits import Waits
from parallel.config import shown_layout

LATELY = 50  # steps that the rate and the waits are taken from
SHOWN = 8  # incidents, the last ones
SILENT = 60.0  # seconds, and as many steps' time as a hang takes: then nobody is at work any more


def figures(folder: Path, now: float) -> dict[str, Any]:
    """What a run folder tells at the time `now`. Raises ValueError where it is none.

    step, steps; state; step_time, tokens_per_second, left (seconds), of the last steps; the last `record`; `checkpoint`
    (step, bytes, age) or None; `waits`, whom the ranks waited for lately; `incidents`, all of them.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        steps, hang = int(config["train"]["steps"]), config.get("hang", {})
    except FileNotFoundError:
        what = "has no config.yaml" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} is no run folder: it {what}; name the run.dir of launch/pretrain.py") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{folder / 'config.yaml'} is not a run's configuration: it has no train.steps") from None
    records = read_records(folder)
    last: dict[str, Any] = records[-1] if records else {"step": 0}
    lately = records[-LATELY:]
    step_time = median(record["step_time"] for record in lately) if lately else None
    silence = now - (folder / FILE).stat().st_mtime if records else None
    held = run_lock.is_held(folder)
    if last["step"] >= steps and not held:
        state = "finished"
    elif held is False:
        state = "stopped"
    elif silence is None or step_time is None:
        state = "no step is done yet"
    elif silence < max(SILENT, hang.get("factor", 10.0) * step_time):
        state = "running"
    else:
        state = f"silent for {duration(silence)}: {'hung' if held else 'stopped, dead or hung'}"
    waits = Waits()
    for record in lately:
        if "straggler_rank" in record:
            waits.add(record)
    return {
        "parallel": config.get("parallel", {}),
        "step": last["step"],
        "steps": steps,
        "state": state,
        "step_time": step_time,
        "tokens_per_second": median(record["tokens_per_second"] for record in lately) if lately else None,
        "left": step_time * max(0, steps - last["step"]) if step_time else None,
        "record": last,
        "checkpoint": _last_checkpoint(folder / "checkpoints", now),
        "waits": waits.summary(),
        "incidents": incidents.read(folder),
    }


def _last_checkpoint(root: Path, now: float) -> dict[str, Any] | None:
    for folder in reversed(checkpoint.folders(root)):
        try:
            checkpoint.Checkpoint(folder)  # the index is read and checked; the tensors are not
            size = sum(file.stat().st_size for file in folder.iterdir())
            age = now - folder.stat().st_mtime
        except (checkpoint.CheckpointError, OSError):  # damaged, or pruned by the run meanwhile
            continue
        return {"step": checkpoint.step_of(folder), "bytes": size, "age": age}
    return None


def shown(folder: Path, found: dict[str, Any]) -> RenderableType:
    """The figures for the terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    step, steps, record = found["step"], found["steps"], found["record"]
    good = found["state"] in ("running", "finished")
    table.add_row("run", f"{folder}  ({shown_layout(found['parallel'])})")
    table.add_row("state", Text(found["state"], style="green" if good else "yellow"))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=steps, completed=min(step, steps), width=40), f"step {step}/{steps}")
    table.add_row("progress", bar)
    if found["step_time"]:
        table.add_row("rate", f"{found['tokens_per_second']:,.0f} tokens/s, {found['step_time']:.3g} s a step")
    if found["left"]:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + found["left"]))
        table.add_row("left", f"{duration(found['left'])} of steps" + f", to {end}" * (found["state"] == "running"))
    if "loss" in record:
        table.add_row("loss", loss_text(record))
    if record.get("skipped_steps"):
        table.add_row("skipped", f"{counted(record['skipped_steps'], 'step')} whose numbers were not finite")
    table.add_row("checkpoint", _saved(found["checkpoint"], step))
    if found["waits"]:
        table.add_row("waited for", found["waits"])
    counts = Counter(incident["kind"] for incident in found["incidents"])
    kinds = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.most_common())
    table.add_row("incidents", kinds or "none")
    lines = Table.grid(padding=(0, 2))
    for incident in found["incidents"][-SHOWN:]:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(incident["time"]))
        lines.add_row(f"  {when}", f"step {incident['step']}", incident["kind"].replace("_", " "), str(incident["why"]))
    return Group(table, lines)


def _saved(saved: dict[str, Any] | None, step: int) -> str:
    if saved is None:
        return "none yet"
    behind = f", {counted(step - saved['step'], 'step')} behind" if step > saved["step"] else ""
    return f"step {saved['step']}, {duration(max(0.0, saved['age']))} ago, {saved['bytes'] / 1e6:,.1f} MB{behind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the run folder: run.dir of launch/pretrain.py")
    folder = parser.parse_args().run
    try:
        found = figures(folder, time.time())
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    Console(highlight=False, markup=False).print(shown(folder, found))


if __name__ == "__main__":
    main()
