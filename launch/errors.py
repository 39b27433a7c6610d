"""Wrong input ends in one line on stderr that says where, what, and what would be right - not in a stack trace.

    @one_line_errors()                                     # what Hydra refuses: unknown options, wrong types
    @hydra.main("pkg://conf", "simulate", version_base="1.3")
    @one_line_errors()                                     # what our own checks refuse
    def main(config: DictConfig) -> None: ...

It stands twice because Hydra prints a line of its own for whatever escapes the inner function. An error that neither
Hydra nor this repository raised on purpose is a bug and keeps its trace; HYDRA_FULL_ERROR=1 shows every trace. Warnings
are one line as well, without the place in the code.
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
import warnings
from contextlib import ContextDecorator, suppress
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

SECONDS_FOR_RANK_0 = 5

# What gloo and NCCL say when the rank at the other end is gone.
_LOST = re.compile(r"Connection (reset|closed|refused)[^.\n]*|Broken pipe|Socket closed|[Tt]imed out waiting[^.\n]*")
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
        if isinstance(error, Exception) and not TRACES and (line := explain(error)) is not None:
            _tell_torchrun(line)
            _give_way()
            print(f"error: {line}", file=sys.stderr, flush=True)
            on_the_way = isinstance(error, RuntimeError) or type(error) is OSError  # as is what says no space is left
            sys.exit(1 if on_the_way else 2)


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """In place of warnings.formatwarning."""
    return f"warning: {_one_line(str(message))}\n"


def _tell_torchrun(line: str) -> None:
    """Lets torchrun's own report, which is long and comes last, end in the reason."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):  # a full disk may be what there is to tell
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")


def _give_way() -> None:
    """Lets rank 0 speak first: what is wrong with the input is wrong on every rank, and the launcher ends the
    others."""
    ranks = (os.environ.get(name) for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))
    if next((rank for rank in ranks if rank is not None), "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)


def explain(error: Exception) -> str | None:
    """One line for an error about the input; None for an error nobody raised on purpose."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(_explain_option(error))
    if isinstance(error, OSError) and error.filename is not None:
        return _one_line(f"{error.filename}: {error.strerror}")
    if isinstance(error, ValueError | ImportError | RuntimeError) and _raised_here(error):
        return str(error).partition("\n")[0]  # what follows the first line is for those who ask, as a schedule's grid
    if isinstance(error, RuntimeError) and (lost := _LOST.search(str(error))):
        return f"another rank has ended ({lost[0]}): it says why, above or in its own log"
    return None


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
