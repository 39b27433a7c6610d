"""One run at a time in a run folder: a lock that the kernel holds for rank 0, and takes back however rank 0 ends.

    run.dir/lock    "process 4711 on node7", the last that held it

POSIX locks (lockf), as they are the ones that NFS carries between hosts and that no forked worker inherits. A process
loses its lock when it closes the file anywhere, so who holds it must not ask for the `holder`.
[no torch]
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "lock"
PATIENCE = 2.0  # seconds: those before may be ending just now
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of the run in `folder`. Raises ValueError, naming who is in there, or that it
    cannot be written. Where the file system has no locks, that is a warning."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / FILE).open("a+", errors="replace")  # "w" would wipe out the other's name
    except OSError as error:
        raise ValueError(f"run.dir={folder} cannot be written ({error.strerror}): choose another folder") from None
    with file:
        until = time.monotonic() + PATIENCE
        while not _taken(file.fileno(), folder):
            if time.monotonic() > until:
                file.seek(0)
                raise ValueError(
                    f"run.dir={folder} is in use by {file.read().strip() or 'another process'}: "
                    "wait for it, end it, or choose another run.dir"
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _taken(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        warnings.warn(f"run.dir={folder} cannot be locked ({error.strerror}): start no second run there", stacklevel=2)
    return True


def is_held(folder: Path) -> bool | None:
    """Whether a run is at work in `folder`; None where the lock cannot tell: there is none, it may not be read, or it
    is free here and was last held on another host, whose locks this one may not see."""
    try:
        with (folder / FILE).open(errors="replace") as file:
            host = file.read().strip().rpartition(" on ")[2]
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for an instant; `locked` is patient for longer
    except OSError as error:
        return True if error.errno in _TAKEN and error.filename is None else None
    return False if host == socket.gethostname() else None
