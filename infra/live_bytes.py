"""How many bytes of tensors are alive, and the most that ever were: on any device, without an allocator's rounding.

Every storage that an operation makes is counted once, until the last tensor that sees it is gone. Scratch space inside
a kernel is not seen, and neither is what was made before counting began. Slow: for measurements, not for training.
"""

from __future__ import annotations

import weakref
from threading import RLock
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes:
    """Counts while one of its modes is entered; a thread enters a mode of its own.

    with (live := LiveBytes()).counting(): ...
    live.now, live.peak
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}  # by the address of the storage
        self._lock = RLock()  # a collection may call `_gone` while `add` holds it, on the same thread

    def counting(self) -> TorchDispatchMode:
        return _Mode(self)

    def restart_peak(self) -> None:
        self.peak = self.now

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._alive or tensor.is_meta or not size:
                return
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        with self._lock:
            if self._alive.pop(key, None) is not None:
                self.now -= size


class _Mode(TorchDispatchMode):
    def __init__(self, live: LiveBytes):
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                self.live.add(leaf)  # neither a view of what was there nor that, changed in place
        return out
