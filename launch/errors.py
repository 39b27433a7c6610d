"""Wrong input ends in one line on stderr that says where, what, and what would be right - not in a stack trace.

    @one_line_errors()                                     # what Hydra refuses: unknown options, wrong types
    @hydra.main("pkg://conf", "simulate", version_base="1.3")
    @one_line_errors()                                     # what our own checks refuse
    def main(config: DictConfig) -> None: ...

It stands twice because Hydra prints a line of its own for whatever escapes the inner function. An error that neither
Hydra nor this repository raised on purpose is a bug and keeps its trace; HYDRA_FULL_ERROR=1 shows every trace. Warnings
are one line as well, without the place in the code.

Of several ranks, who speaks, and when:

    wrong input                     rank 0: `error: ...`; it is wrong on every rank, and the others wait to be ended
    a step of the pipeline fails    that rank, at once: the trace, `error: ...`, and the grid with the slot marked
    another rank is lost            every rank, at once: `world rank 5 ends: ... lost rank 6 ...`, and its row of the
                                    grid; one that waited would keep its connections open, and the next not notice

So `error:` marks causes, not consequences. torchrun's own report, which comes last, names the cause first as well.
"""

from __future__ import annotations

import difflib
import dis
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from contextlib import ContextDecorator, suppress
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from parallel.pipeline.validate import PipelineError

SECONDS_FOR_RANK_0 = 5

# What gloo and NCCL say when the rank at the other end is gone, and the place in their code that gloo puts before it.
_LOST = re.compile(
    r"(?:\[[^]\s]*:\d+\] )?(?:\w+ error \[[^]\s]*\]:\d+: )?"
    r"(Connection (?:reset|closed|refused)(?: by (?:remote )?peer)?|Broken pipe|Socket closed"
    r"|[Tt]imed out waiting[^.\n]*|remote process exit\w*)"
)
_ROOT = Path(__file__).resolve().parents[1]
TRACES = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the wish of whoever started this process
_OURS = {"conf", "infra", "launch", "model", "parallel"}
_RAISE = dis.opmap["RAISE_VARARGS"]


class one_line_errors(ContextDecorator):
    """Turns an error about the input into one line on stderr and exit code 2, and what went wrong on the way - a rank
    that is gone, a full disk - into one with exit code 1. Usable as a decorator.

    A class, as a task function that holds a generator could not be sent to the processes of a sweep.
    """

    def __enter__(self) -> None:
        self._before = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
        self._format = warnings.formatwarning
        if not TRACES:
            warnings.formatwarning = _warning_line

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        warnings.formatwarning = self._format
        if self._before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = self._before
        if not isinstance(error, Exception) or TRACES:
            return
        line = explain(error)
        if line is not None and not _is_lost(error) and not isinstance(error, PipelineError):
            _give_way()
        _tell_torchrun(error, line)
        if line is None:
            return
        sys.stderr.write(_to_print(error, line))
        sys.stderr.flush()
        on_the_way = isinstance(error, RuntimeError | ConnectionError) or type(error) is OSError  # as no space left
        _leave(1 if on_the_way else 2)


def _leave(code: int) -> NoReturn:
    """Ends one of several ranks at once: the interpreter takes seconds to clear up, with its connections open, and the
    next rank of a pipeline would notice only then. All that is to be closed well has been, on the error's way here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _to_print(error: Exception, line: str) -> str:
    """One text, as several ranks write to one place. A pipeline counts its own ranks: where there are several pipelines
    only the rank in the world says which one it was."""
    if _is_lost(error):
        where = [row for row in str(error).splitlines()[1:] if "[" in row]  # of the grid, this rank's own
        return "\n".join([f"world rank {_rank()} ends: {line}", *where, ""])
    if not isinstance(error, PipelineError):
        return f"error: {line}\n"
    cause = error.__cause__
    is_bug = isinstance(cause, ConnectionError) or (isinstance(cause, Exception) and explain(cause) is None)
    return f"{''.join(traceback.format_exception(cause)) if is_bug else ''}error: world rank {_rank()}: {error}\n"


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """In place of warnings.formatwarning."""
    return f"warning: {_one_line(str(message))}\n"


def _tell_torchrun(error: Exception, line: str | None) -> None:
    """Lets torchrun's own report, which is long and comes last, end in the reason. It takes the earliest failure for
    the cause, and counts whole seconds: a consequence is dated after its cause, which may have had no time to speak."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = line or _one_line(traceback.format_exception_only(error)[-1])
        report = {"message": message, "extraInfo": {"timestamp": str(int(time.time()) + _is_lost(error))}}
        with suppress(OSError):  # a full disk may be what there is to tell
            Path(file).write_text(json.dumps({"message": report}), encoding="utf-8")  # the form of torch's own


def _rank() -> str:
    """This process's rank, whichever launcher started it."""
    ranks = (os.environ.get(name) for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0")


def _give_way() -> None:
    """Lets rank 0 speak first: what is wrong with the input is wrong on every rank, and the launcher ends the
    others."""
    if _rank() != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)


def explain(error: Exception) -> str | None:
    """One line for an error that was raised on purpose, or as another rank is lost; None for any other."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(_explain_option(error))
    if isinstance(error, OSError) and error.filename is not None:
        return _one_line(f"{error.filename}: {error.strerror}")
    if isinstance(error, ValueError | ImportError | RuntimeError | ConnectionError) and _raised_here(error):
        first = str(error).partition("\n")[0]  # what follows is for those who ask, as a schedule's grid
        found = _LOST.search(first) if _is_lost(error) else None
        return f"{first[: found.start()]}{found[1]}" if found else first
    if _is_lost(error) and (found := _LOST.search(str(error))):
        return f"another rank has ended ({found[1]}): if it could, it says why, above or in its own log"
    return None


def _is_lost(error: BaseException | None) -> bool:
    """Whether `error` says no more than that another rank has ended."""
    if isinstance(error, PipelineError):
        return _is_lost(error.__cause__)
    is_ours = isinstance(error, ConnectionError) and _raised_here(error)  # others' are of pipes and files
    return (is_ours or isinstance(error, RuntimeError)) and bool(_LOST.search(str(error)))


def _explain_option(error: Exception) -> str:
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form option=value ({error.message.splitlines()[0]})"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: expected one of {', '.join(error.options)}"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return str(error)
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}= is missing: --help says what it takes"
    option, complaint = str(cause.full_key), str(cause.msg or cause).splitlines()[0]
    if isinstance(cause, AttributeError | KeyError):  # OmegaConf's errors for a key that is not there
        known = [str(key) for key in cause.parent_node or () if key != "hydra"]
        *parents, key = option.split(".")
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {'.'.join([*parents, near[0]])}?" if near else f"there are {', '.join(sorted(known))}"
        return f"{option}: no such option; {hint}"
    return f"{option}: {complaint}"


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` of this repository raised `error`; what a C function raises, as int("x"), is not meant."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    path = Path(code.co_filename)
    is_ours = path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _OURS
    return is_ours and code.co_code[place.tb_lasti] == _RAISE


def _one_line(text: str) -> str:
    return " ".join(text.split())
