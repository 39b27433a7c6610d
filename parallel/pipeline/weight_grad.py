"""The split of a backward into input gradients (I) and weight gradients (W).

A linear layer's backward computes its input gradient and hands its weight gradient, as a closure over the two tensors
it needs, to the hole `weight_grad` (model/linear.py). `WeightGrads` fills that hole for all layers of one stage: while
a backward is being split it keeps the closures, by microbatch; W then runs them. Nothing else is kept: no graph, no
second pass of autograd.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.linear import Compute


class WeightGrads:
    """The weight gradients that one stage has put off, by microbatch, oldest first."""

    def __init__(self) -> None:
        self._deferred: dict[int, deque[Compute]] = defaultdict(deque)
        self._mb: int | None = None

    def __call__(self, param: Tensor, compute: Compute) -> Tensor | None:
        """Called by a layer's backward: computes at once, or later where the backward is being split."""
        if self._mb is None:
            return compute()
        self._deferred[self._mb].append(compute)
        return None

    @contextmanager
    def deferred(self, mb: int) -> Iterator[None]:
        """What is handed over in this block waits for `run(mb)`."""
        self._mb = mb
        try:
            yield
        finally:
            self._mb = None

    @torch.no_grad()
    def run(self, mb: int) -> None:
        """W of microbatch `mb`: computes all that was put off, and frees it piece by piece."""
        queue = self._deferred.pop(mb, deque())
        while queue:
            queue.popleft()()
