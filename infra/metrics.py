"""One flat record a step, written three times: to the console, to metrics.jsonl, and to TensorBoard.

A record is a dict of numbers with `step` (steps done, from 1) among them. metrics.jsonl gets one JSON object a line,
there as soon as the step is done; a number that is not finite becomes null, which JSON can spell. On resume the lines
of steps that will be repeated are cut off, so the file ends as an unbroken run's would. The console shows one live
line, or where standard output is no terminal a plain line now and then. Only the main rank makes a `Metrics`.
[no torch, except TensorBoard's writer: imported late, it takes seconds]
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from infra.wording import duration

Record = Mapping[str, float]

FILE = "metrics.jsonl"


class Metrics:
    """The writer of one run; use it as a context manager.

    num_steps: of the whole run. done: steps done before (0, or the checkpoint's). log_every: steps between plain lines,
    and between histograms. Raises OSError with the file's name if a disk is full.
    """

    def __init__(
        self, folder: str | Path, num_steps: int, done: int = 0, log_every: int = 10, console: Console | None = None
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.num_steps, self.log_every = Path(folder), num_steps, log_every
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / FILE
        # `purge_step` makes TensorBoard forget the steps that will be repeated.
        self._new_tensorboard = partial(SummaryWriter, str(self.folder / "tensorboard"), flush_secs=10)
        self._open(done)
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._first: Record = {}
        self._last: Record = {}
        self._live = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._live.add_task("", total=num_steps, completed=done, loss="-", speed="-")
        self._live.start()

    def _open(self, done: int) -> None:
        keep_steps(self.path, done)
        self._lines = self.path.open("ab", buffering=0)
        self._tensorboard = self._new_tensorboard(purge_step=done + 1)
        self._done = self._done_before = done
        self._opened = time.monotonic()

    def go_back(self, step: int) -> None:
        """Forgets the steps after `step`, which will be repeated otherwise than they were."""
        self._lines.close()
        self._tensorboard.close()
        self._open(step)
        self._live.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """Prints a line above the live one."""
        self._console.print(line, markup=False)

    def write(self, record: Record, histograms: Mapping[str, Any] | None = None) -> None:
        """Write down one step.

        histograms: arrays or tensors by name, [n] each. Whole numbers are counts already, one bucket an index (tokens
        per expert); floating-point numbers are values to be counted (routing biases).
        """
        step = int(record["step"])
        self._append({k: v if math.isfinite(v) else None for k, v in record.items()})
        for name, value in record.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, step)
        if self._is_due(step):
            for name, values in (histograms or {}).items():
                self._add_histogram(name, np.asarray(values.tolist()), step)
        self._first, self._last, self._done = self._first or record, record, step
        self._show(record)

    def finish(self, also: Mapping[str, str | Path] | None = None) -> None:
        """The summary: how the run went and where everything lies; `also` names more places."""
        self.close()
        say = self._console.print
        how = "finished" if self._done >= self.num_steps else "stopped"
        say(f"{how} at step {self._done} of {self.num_steps} after {duration(time.monotonic() - self._started)}")
        if self._last:
            first = f"{_number(self._first, 'loss')} at step {self._first['step']}"
            say(f"  loss        {first}, now {loss_text(self._last)}")
        places = {"metrics": self.path, "tensorboard": f"tensorboard --logdir {self.folder / 'tensorboard'}"}
        for name, place in {**places, **(also or {})}.items():
            say(f"  {name:<11} {place}")

    def close(self) -> None:
        self._live.stop()
        self._lines.close()
        self._tensorboard.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_due(self, step: int) -> bool:
        return step % self.log_every == 0 or step in (self._done_before + 1, self.num_steps)

    def _append(self, record: Mapping[str, float | None]) -> None:
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._lines.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _add_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        if np.issubdtype(values.dtype, np.floating):
            self._tensorboard.add_histogram(name, values, step)
            return
        index = np.arange(len(values))
        moments = {"num": values.sum(), "sum": (index * values).sum(), "sum_squares": (index**2 * values).sum()}
        limits = (index + 1).tolist()
        self._tensorboard.add_histogram_raw(
            name,
            min=0,
            max=len(values),
            **moments,
            bucket_limits=limits,
            bucket_counts=values.tolist(),
            global_step=step,
        )

    def _show(self, record: Record) -> None:
        speed = f"{record.get('tokens_per_second', math.nan):,.0f}"
        self._live.update(self._task, completed=self._done, loss=_number(record, "loss"), speed=speed)
        held_out = any(name.startswith("eval_") for name in record)
        if held_out or (self._live.disable and self._is_due(self._done)):
            rate = (time.monotonic() - self._opened) / (self._done - self._done_before)
            left = duration(rate * (self.num_steps - self._done))
            self._console.print(
                f"step {self._done}/{self.num_steps}  loss {loss_text(self._last)}  {speed} tokens/s  left {left}"
            )


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records that a run has left in its folder, up to a line that a kill cut short; None is what is not finite."""
    found: list[dict[str, Any]] = []
    try:
        with (Path(folder) / FILE).open("rb") as lines:
            found.extend(map(json.loads, lines))
    except (FileNotFoundError, ValueError):
        pass
    return found


def keep_steps(path: Path, done: int) -> None:
    """Cut off the lines of metrics.jsonl from the first one after step `done` on, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > done:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
    os.truncate(path, kept)


def loss_text(record: Mapping[str, float | None]) -> str:
    """What a record says of the loss, in one unit where there are two figures: 5.61 (5.15 nats/byte, held out 5.11)."""
    units = {"nats_per_byte": "{} nats/byte", "eval_nats_per_byte": "held out {}"}
    known = [text.format(_number(record, key)) for key, text in units.items() if key in record]
    return _number(record, "loss") + (f" ({', '.join(known)})" if known else "")


def _number(record: Mapping[str, float | None], key: str) -> str:
    value = record.get(key)
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite"
