"""Checkpoints that are written beside the training, which stands still only while its state is copied.

A thread on every rank runs the very `checkpoint.save` that a waiting run would, on the copy, in a process group of its
own: so a checkpoint is whole or absent as before, fails on all ranks or none, and older ones go once it is whole. One
save is under way at a time. The copies stay allocated, as pages that are there already are copied into eight times as
fast: the price is a rank's share of the state once more in host memory (`checkpoint.asynchronous=false` does without).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infra import checkpoint

_PATIENCE = timedelta(days=1)  # the ranks of a save wait for the slowest disk; a rank that dies ends the wait


class Saver:
    """Saves the state of one run. Making one is collective over the world, and so is `save`."""

    def __init__(self) -> None:
        self._group = dist.new_group(timeout=_PATIENCE, backend="gloo") if dist.is_initialized() else None
        self._copies: dict[str, Tensor] = {}
        self._under_way: Future[Path] | None = None

    def save(
        self, root: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int, wait: bool
    ) -> None:
        """As `checkpoint.save`; unless it is to `wait`, returns once the tensors are copied.

        Waits for the save before, and so raises what became of it.
        """
        self.wait()
        if wait:
            checkpoint.save(root, step, tensors, meta, keep, self._group)
            return
        copies = self._copied(tensors)
        under_way: Future[Path] = Future()

        def write() -> None:
            try:
                under_way.set_result(checkpoint.save(root, step, copies, meta, keep, self._group))
            except BaseException as error:  # raised where it is waited for
                under_way.set_exception(error)

        self._under_way = under_way
        threading.Thread(target=write, name="checkpoint", daemon=True).start()  # it keeps no rank from giving up

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes room for copies before the first save, which would stand still several times as long without."""
        self._copies = {key: _room_for(tensor).zero_() for key, tensor in tensors.items()}

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has come to an error, which `wait` raises; on other ranks it may be about to."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def wait(self) -> None:
        """Returns once what was saved is whole and named. Raises OSError on all ranks where one could not write."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for key, tensor in tensors.items():
            copy = self._copies.get(key)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = _room_for(tensor)
            copies[key] = copy.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        self._copies = copies
        return copies


def _room_for(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
