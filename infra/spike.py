"""Loss spikes: when a loss is one, and which data is passed over after it.

A loss is a spike when it lies far above the median of those before it, in robust standard deviations: 1.4826 times the
median distance from that median, which no single outlier moves, and at least a hundredth of the median, so that a
very even loss does not make every wobble a spike. What helped others (PaLM, section 5.1) was to go back to well before
the spike and to leave out the data around it. The same data did no harm to other states of the model; so it is not
looked for what is wrong with it, and training goes on with what comes after it.

Leaving data out changes nothing but which samples come next: steps, batch sizes and the learning rate follow the
number of samples trained on, as without a spike. [no torch]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

LEAST_DEVIATION = 0.01  # of the median

Window = tuple[int, int]  # global samples, from and to


@dataclass
class SpikeConfig:
    """threshold: robust standard deviations above the median of the last losses (0: no loss is a spike).

    window: losses to judge by; half of them have to be there. skip: steps whose data is left out, the spike's the last.
    """

    threshold: float = 10.0
    window: int = 64
    skip: int = 8

    def __post_init__(self) -> None:
        if not self.threshold >= 0:  # nan is refused too
            raise ValueError(f"spike.threshold={self.threshold} must be at least 0")
        if self.window < 8:
            raise ValueError(f"spike.window={self.window} losses cannot tell what is usual: use at least 8")
        if not 1 <= self.skip <= self.window // 2:
            raise ValueError(f"spike.skip={self.skip} must lie between 1 and half of spike.window={self.window}")


def limit(losses: Sequence[float], config: SpikeConfig) -> float:
    """The loss above which one that follows `losses` is a spike; infinity where there are too few to say."""
    recent = losses[-config.window :]
    if not config.threshold or len(recent) < config.window // 2:
        return float("inf")
    usual = median(recent)
    deviation = 1.4826 * median(abs(loss - usual) for loss in recent)
    return usual + config.threshold * max(deviation, LEAST_DEVIATION * abs(usual))


def pass_over(samples: np.ndarray, left_out: Sequence[Window]) -> np.ndarray:
    """The global samples that stand for the `samples` of a run that leaves windows out.

    left_out: in order, without overlaps, numbered as in the data.
    """
    for start, end in left_out:
        samples = np.where(samples >= start, samples + (end - start), samples)
    return samples


class LossHistory:
    """What a run remembers to judge its next loss by.

    has_spiked: whether the last loss was a spike. left_out: the data passed over after those before. suspect: the data
    of the last `skip` steps.
    """

    def __init__(self, config: SpikeConfig):
        self.config = config
        self.has_spiked = False
        self.left_out: list[Window] = []
        self.suspect: Window = (0, 0)
        self._losses: list[tuple[int, float]] = []  # with the first global sample of their steps

    def add(self, loss: float, first: int, end: int) -> None:
        """Judges the loss of a step on the samples `first` to `end` of the run, as counted without what is left out.

        Right after left-out data nothing is judged, until there are losses enough that came after it: so no data is
        left out twice, and a loss that is high for another reason becomes the usual one.
        """
        first, last = pass_over(np.array([first, end - 1]), self.left_out).tolist()
        if self._losses and any(self._losses[-1][0] < start <= first for start, _ in self.left_out):
            self.forget()
        self.has_spiked = loss > limit([loss for _, loss in self._losses], self.config)
        self._losses = [*self._losses, (first, loss)][-self.config.window :]
        self.suspect = (self._losses[-self.config.skip :][0][0], last + 1)

    def forget(self) -> None:
        """Starts judging anew."""
        self._losses = []

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"losses": self._losses, "left_out": self.left_out}

    def load(self, state: dict[str, Any]) -> None:
        self._losses = [(first, loss) for first, loss in state["losses"]]
        self.left_out = [(start, end) for start, end in state["left_out"]]
        self.has_spiked = False
