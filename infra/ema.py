"""An exponential moving average of the parameters in CPU memory, updated behind the training step.

V3 keeps one to judge the model as it would be after learning-rate decay (report, section 3.2.3), and it costs neither
device memory nor time: after the optimizer's step a thread averages while the next step computes.

    optimizer.step()          sources: the flat master weights of the buckets
    ema.update()              returns at once
    ... the next step's forwards and backwards ...
    ema.before_step()         the sources are about to change: they must have been read by now
    optimizer.step()

From a GPU the sources travel on a side stream into pinned memory, and the thread averages once they have arrived. On a
CPU the thread reads them in place. Either way each average is `average += (1 - decay) (source - average)` in FP32 on
the same numbers, so the result does not depend on timing.

What was there before the first step is no model: with a decay of 0.999 it would still be nine tenths of the average
after 100 steps. So the n-th update keeps `min(decay, (1 + n) / (10 + n))` of the average, as TensorFlow's
ExponentialMovingAverage does with `num_updates`: the average reaches back over a tenth of the steps so far, until
`decay` says less.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Ema:
    """Averages of `sources`, which all live on one device; starts from their present values.

    sources: tensors of any shape, FP32 or wider; none: there is nothing to average, and nothing is done.
    decay: the share of the old average that a step keeps in the end, in [0, 1). num_updates: how many were averaged.
    """

    def __init__(self, sources: Sequence[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: the share of the old average that a step keeps is in [0, 1), say 0.999")
        self.decay, self.num_updates = decay, 0
        self.sources = [source.detach() for source in sources]
        self._averages = [source.to("cpu", copy=True) for source in self.sources]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._arrived = self.sources
        if any(source.is_cuda for source in self.sources):
            self._stream = torch.cuda.Stream()
            self._arrived = [torch.empty_like(average, pin_memory=True) for average in self._averages]

    def update(self) -> None:
        """Starts averaging the sources as they are now. Waits first if the last update is not finished."""
        self.wait()
        if not self.sources:
            return
        event = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for arrived, source in zip(self._arrived, self.sources, strict=True):
                    arrived.copy_(source, non_blocking=True)
                event = self._stream.record_event()
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self._pending = self._thread.submit(self._average, decay, event)

    def _average(self, decay: float, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        for average, value in zip(self._averages, self._arrived, strict=True):
            average.lerp_(value, 1 - decay)

    def before_step(self) -> None:
        """Call before the sources change: on a CPU waits for the average, on a GPU orders the change after the copy."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            self.wait()

    def wait(self) -> None:
        """Returns once the averages are finished; raises what went wrong in the thread, if anything did."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restart(self) -> None:
        """Starts anew from the sources as they are now."""
        for average, source in zip(self.averages, self.sources, strict=True):
            average.copy_(source)
        self.num_updates = 0

    @property
    def averages(self) -> list[Tensor]:
        """The finished averages, in the order of the sources, on the CPU: to save, or to copy loaded values into."""
        self.wait()
        return self._averages
