"""How the learning rate and the batch size move during training, as pure functions of what has been seen (V3, 4.2).

V3 trained on 14.8T tokens: the rate rises from 0 to 2.2e-4 over 2000 steps, stays until 10T tokens, falls along a
cosine to 2.2e-5 over 4.3T, stays for 333B, and ends with 7.3e-6 for 167B; the batch grows from 3072 to 15360 sequences
over the first 469B tokens. Here all borders are *shares* of the run, so a run of 200 steps goes through the same five
phases. [no torch]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, log, pi


@dataclass
class LRConfig:
    """`peak` alone scales the whole schedule; `*_until` are shares of the run's tokens."""

    peak: float = 2.2e-4
    warmup_steps: int = 2000  # but at most `warmup_share` of the run's steps
    warmup_share: float = 0.1
    constant_until: float = 10 / 14.8
    cosine_until: float = 14.3 / 14.8
    tail_until: float = (14.3 + 0.333) / 14.8
    tail_ratio: float = 0.1  # of the peak: where the cosine ends, and the first tail
    last_ratio: float = 7.3e-6 / 2.2e-4  # of the peak: the last tail

    def __post_init__(self) -> None:
        if not 0 < self.peak < float("inf"):  # nan is refused too
            raise ValueError(f"optim.lr.peak={self.peak} must be above 0 and finite")
        if self.warmup_steps < 0 or not 0 <= self.warmup_share <= 1:
            raise ValueError(
                f"optim.lr.warmup_steps={self.warmup_steps} must be at least 0 and "
                f"optim.lr.warmup_share={self.warmup_share} between 0 and 1"
            )
        if not 0 <= self.constant_until <= self.cosine_until <= self.tail_until <= 1:
            raise ValueError(
                f"optim.lr: constant_until={self.constant_until:.4g}, cosine_until={self.cosine_until:.4g}, "
                f"tail_until={self.tail_until:.4g} must rise from 0 to 1"
            )
        if not (0 <= self.tail_ratio <= 1 and 0 <= self.last_ratio <= 1):
            raise ValueError(
                f"optim.lr.tail_ratio={self.tail_ratio} and optim.lr.last_ratio={self.last_ratio} "
                "must lie between 0 and 1"
            )


@dataclass
class BatchRampConfig:
    """The batch grows linearly with the samples seen, from `start` sequences to train.global_batch_size, over the first
    `share` of the run; always a multiple of `multiple_of`, so that every step divides into microbatches. `start=0`: no
    ramp."""

    start: int = 3072
    share: float = 0.469 / 14.8
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or self.start < 0 or self.start % self.multiple_of:
            raise ValueError(
                f"train.batch_ramp.start={self.start} must be a positive multiple of "
                f"train.batch_ramp.multiple_of={self.multiple_of}, or 0 for no ramp"
            )
        if not 0 <= self.share <= 1:
            raise ValueError(f"train.batch_ramp.share={self.share} must lie between 0 and 1")


def learning_rate(config: LRConfig, step: int, num_steps: int, share: float) -> float:
    """The rate of step `step` (from 0) of `num_steps`, when `share` of the run's tokens were seen before it."""
    warmup = min(config.warmup_steps, int(config.warmup_share * num_steps))
    if step < warmup:
        return config.peak * ((step + 1) / warmup)  # the first step already moves
    if share < config.constant_until:
        return config.peak
    if share < config.cosine_until:
        progress = (share - config.constant_until) / (config.cosine_until - config.constant_until)
        return config.peak * (config.tail_ratio + (1 - config.tail_ratio) * (1 + cos(pi * progress)) / 2)
    return config.peak * (config.tail_ratio if share < config.tail_until else config.last_ratio)


def check_ramp(global_batch_size: int, ramp: BatchRampConfig | None) -> None:
    """ValueError if the ramp does not lead up to the global batch."""
    if ramp and ramp.start and (ramp.start > global_batch_size or global_batch_size % ramp.multiple_of):
        raise ValueError(
            f"train.global_batch_size={global_batch_size} must be at least train.batch_ramp.start={ramp.start} and a "
            f"multiple of train.batch_ramp.multiple_of={ramp.multiple_of}"
        )


def total_samples(num_steps: int, global_batch_size: int, ramp: BatchRampConfig | None = None) -> int:
    """Sequences of a run of `num_steps`: what `share` is a share of. Exact without a ramp.

    With a ramp from b to B over the share s of S samples, the steps are the integral of d(samples) / batch:
    S (s ln(B / b) / (B - b) + (1 - s) / B); the real batches are whole numbers, so the run ends a few samples off S.
    """
    check_ramp(global_batch_size, ramp)
    if ramp is None or ramp.start in (0, global_batch_size):
        return num_steps * global_batch_size
    start, end = ramp.start, global_batch_size
    return round(num_steps / (ramp.share * log(end / start) / (end - start) + (1 - ramp.share) / end))


def batch_size(seen: int, total: int, global_batch_size: int, ramp: BatchRampConfig | None = None) -> int:
    """Sequences in the step that begins when `seen` of `total` sequences were seen."""
    if ramp is None or not ramp.start or seen >= ramp.share * total:
        return global_batch_size
    grown = ramp.start + (global_batch_size - ramp.start) * seen / (ramp.share * total)
    return round(grown / ramp.multiple_of) * ramp.multiple_of
