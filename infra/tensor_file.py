"""Safetensors files as other files are: readable for whoever the umask admits, and an error says which file it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_UMASK = os.umask(0)  # the only way to read it is to set it, for all threads: once, at import
os.umask(_UMASK)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous CPU tensors to `file`, and on to the disk. Raises OSError, which names it, if it cannot."""
    try:
        save_file(dict(tensors), file, metadata=metadata)
        file.chmod(0o666 & ~_UMASK)  # safetensors itself makes it readable for its owner alone
        with file.open("rb") as written:
            os.fsync(written.fileno())
    except SafetensorError as error:  # a full disk, in other words
        raise OSError(None, f"cannot be written ({error})", str(file)) from None
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror or str(error), str(file)) from None
