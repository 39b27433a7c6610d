"""Which batches a run can take: whole microbatches on every pipeline, and enough of them for its schedule."""

from __future__ import annotations

from collections.abc import Callable

from conf.schema import TrainConfig
from parallel.config import check_divides
from parallel.pipeline.actions import Schedule

_MANY = 1 << 10  # microbatches: more than any schedule needs


def check_batches(train: TrainConfig, make_schedule: Callable[[int], Schedule], dp: int) -> None:
    """Raises ValueError naming the option whose batch does not divide, or is too small for the schedule."""
    sizes = {"train.global_batch_size": train.global_batch_size, "train.eval_samples": train.eval_samples}
    if train.batch_ramp.start:
        sizes["train.batch_ramp.start"] = train.batch_ramp.start
        sizes["train.batch_ramp.multiple_of"] = train.batch_ramp.multiple_of
    unit = train.microbatch_size * dp
    for name, size in sizes.items():
        check_divides(name, size, train.microbatch_size, dp)
        if size and not name.endswith("multiple_of"):
            try:
                make_schedule(size // unit)
            except ValueError as error:
                make_schedule(_MANY)  # a schedule that suits no batch says so by itself
                raise ValueError(
                    f"{error} ({name}={size} makes {size // unit} microbatches of train.microbatch_size="
                    f"{train.microbatch_size} on each of dp={dp} pipelines)"
                ) from None
