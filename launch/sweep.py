"""A sweep (-m): every job leaves one row, and who started the sweep shows and writes them all as one table.

    if is_asked(sys.argv): sweep(main, "out", ...)      # Hydra's main, once a job
    if is_sweep(): leave_row(...)                        # in a job

Jobs may run here one after another, as many local processes (hydra/launcher=joblib) or on a Slurm cluster
(hydra/launcher=submitit_slurm), so they meet in a folder: Hydra's sweep.dir. It lies beside what out= or run.dir= asks
for, which a cluster shares, and is gone at the end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from launch.errors import explain, one_line_errors
from launch.files import check_folder, save
from launch.summary import Row, as_csv, as_html, show_table

FOLDER = "BRAID_SWEEP"  # what `hydra.sweep.dir` is taken from: jobs inherit it
PLACES = ("out", "run.dir")
HIDDEN = ("note", "line")  # too long for a terminal


@contextmanager
def sweep_folder(out: str | None) -> Iterator[Path]:
    """A folder for the rows of a sweep, for as long as it lasts."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir=out) as folder:
        os.environ[FOLDER] = str(Path(folder).resolve())
        try:
            yield Path(folder)
        finally:
            del os.environ[FOLDER]


def is_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def swept_words() -> dict[str, str]:
    """What the command line says of this job: {option: value}."""
    words = (word.lstrip("+").split("=", 1) for word in HydraConfig.get().overrides.task)
    return {name: value for name, value in words if name not in PLACES}


def job_number() -> int:
    return int(HydraConfig.get().job.num)


def leave_row(row: Row) -> None:
    save(Path(HydraConfig.get().sweep.dir) / f"{job_number():06d}.json", json.dumps(row))


def row_or_note(make: Callable[[Any], dict[str, Any]], composed: DictConfig, known: Row) -> Row:
    """`known` and what `make` adds, given the composed configuration as an object. A job that cannot be does not end
    the others: its row says why, in `note`."""
    try:
        return known | make(OmegaConf.to_object(composed))
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        return known | {"note": line}


def left_rows(folder: Path) -> list[Row]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def is_asked(words: Sequence[str]) -> bool:
    """Whether a command line asks for a sweep."""
    return bool({"-m", "--multirun"} & set(words))


def sweep(
    main: Callable[[], None],
    place: str,
    title: str,
    *,
    by: Sequence[str],
    scatter: tuple[str, str],
    always: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Runs all jobs; shows one table, and writes it as summary.csv and summary.html to what `place=` names.

    by: the columns that sort the rows. always: those to show even if they never change. spare: those that a narrow
    terminal does without. scatter: the axes of the plot.
    """
    words = sys.argv[1:]
    out = next((word.partition("=")[2] for word in reversed(words) if word.startswith(f"{place}=")), None)
    with one_line_errors():
        if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("a sweep (-m) starts the ranks of its runs itself: use python, not torchrun")
        check_folder(place, out)
        with sweep_folder(out) as folder:
            main()
            rows = left_rows(folder)
        if rows:
            show_rows(rows, out, f"{len(rows)} {title}", by, scatter, always, spare, Console())
        if refused := sum(bool(row.get("note")) for row in rows):
            raise RuntimeError(f"{refused} of {len(rows)} {title} could not be: the table says why")


def show_rows(
    rows: list[Row],
    out: str | None,
    title: str,
    by: Sequence[str],
    scatter: tuple[str, str],
    always: Sequence[str],
    spare: Sequence[str],
    console: Console,
) -> None:
    """The one table, without columns that never change. Why a job could not be stands below, under its number."""
    last = float("inf")
    rows = sorted(rows, key=lambda row: tuple(last if row.get(name) is None else row[name] for name in by))
    names = list(dict.fromkeys(name for row in rows for name in row))
    results = {*always, *by, *scatter, *(["note"] if any(row.get("note") for row in rows) else [])}
    keys = [name for name in names if name in results or len({str(row.get(name)) for row in rows}) > 1]
    rows = [{key: row.get(key) for key in keys} for row in rows]
    notes = list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    shown = [{key: row[key] for key in keys if key not in HIDDEN} for row in rows]
    if notes:
        shown = [
            brief | {"note": f"({notes.index(row['note']) + 1})" if row.get("note") else ""}
            for brief, row in zip(shown, rows, strict=True)
        ]
    show_table(console, shown, spare)
    for number, note in enumerate(notes, start=1):
        console.print(f"({number}) {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        save(Path(out) / "summary.csv", as_csv(rows))
        save(Path(out) / "summary.html", as_html(rows, title, scatter if set(scatter) <= set(keys) else None))
        console.print(f"{out}: summary.csv summary.html", markup=False, highlight=False, soft_wrap=True)
