"""Stages without a model: each action sleeps, or multiplies matrices, for as long as the costs say.

With them any schedule runs on any few ranks, CPU or GPU, sending real tensors: the way to try a schedule, and to
measure what the executor itself costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from parallel.pipeline.executor import Phases
from parallel.pipeline.p2p import Spec

Work = Callable[[float], None]  # keeps this rank's processor or device busy for so many seconds


def sleep(seconds: float) -> None:
    """Leaves the processor to others, as a device that computes by itself does."""
    time.sleep(seconds)


def matmul_work(device: torch.device, size: int = 256) -> Work:
    """Work that multiplies `size` x `size` matrices on `device`; how many a second is measured once, here."""
    a = torch.randn(size, size, device=device)

    def run(times: int) -> None:
        for _ in range(times):
            torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # not the device: receives posted early are under way

    run(50)
    start = time.perf_counter()
    run(200)
    per_second = 200 / (time.perf_counter() - start)
    return lambda seconds: run(max(1, round(seconds * per_second)))


class SyntheticStage:
    """A stage whose F, I and W take `f`, `i` and `w` seconds of `work`, and which hands on a tensor like `output`."""

    def __init__(self, f: float, i: float, w: float, output: Spec, device: torch.device, work: Work = sleep):
        self.f, self.i, self.w, self.work, self.output = f, i, w, work, output
        self._tensor = torch.zeros(output.shape, dtype=output.dtype, device=device)

    def forward(self, mb: int, x: Tensor | None) -> Phases:
        self.work(self.f)
        yield "forward"
        return self._tensor

    def backward(self, mb: int, grad: Tensor | None, split: bool) -> Phases:
        self.work(self.i if split else self.i + self.w)
        yield "backward"
        return self._tensor

    def weight_grad(self, mb: int) -> None:
        self.work(self.w)
