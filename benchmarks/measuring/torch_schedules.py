"""A step of one of torch's own pipeline schedules, and of one of ours, over modules of the benchmark's choosing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining

from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P
from parallel.pipeline.passes import lower

CPU = torch.device("cpu")

# name: (class, stages a rank, whether the second stage comes back to the rank it left from)
TORCH: dict[str, tuple[str, int, bool]] = {
    "torch GPipe": ("ScheduleGPipe", 1, False),
    "torch 1F1B": ("Schedule1F1B", 1, False),
    "torch Interleaved1F1B": ("ScheduleInterleaved1F1B", 2, False),
    "torch ZBVZeroBubble": ("ScheduleZBVZeroBubble", 2, True),
    "torch DualPipeV": ("ScheduleDualPipeV", 2, True),
}
LIKE = {  # the schedule of ours that has the ideal of torch's
    "torch GPipe": "gpipe",
    "torch 1F1B": "1f1b",
    "torch Interleaved1F1B": "interleaved_1f1b",
    "torch ZBVZeroBubble": "zbv",
    "torch DualPipeV": "dualpipev",
}


def torch_step(
    name: str, rank: int, pp: int, num_microbatches: int, module_of: Callable[[int, int], nn.Module], batch: Tensor
) -> Callable[[], None]:
    """A step of one of torch's schedules. module_of(stage, num_stages); the loss is the sum of the output.

    Raises ValueError where torch's schedule does not take this shape.
    """
    schedule_class, per_rank, folded = TORCH[name]
    num_stages = pp * per_rank
    held = [rank, num_stages - 1 - rank][:per_rank] if folded else [rank + k * pp for k in range(per_rank)]
    example = batch[: len(batch) // num_microbatches]
    stages = [
        pipelining.PipelineStage(
            module_of(s, num_stages), s, num_stages, CPU, input_args=example, output_args=example.clone()
        )
        for s in held
    ]
    make = getattr(pipelining, schedule_class, None) or getattr(pipelining.schedules, schedule_class)
    whole = make(
        stages if per_rank > 1 else stages[0], num_microbatches, loss_fn=lambda y, target: y.sum(), scale_grads=False
    )
    has_first, has_last = 0 in held, num_stages - 1 in held

    def step() -> None:
        arguments = (batch,) if has_first else ()
        whole.step(*arguments, target=batch if has_last else None)

    return step


def our_executor(schedule: Schedule, rank: int, stages: Mapping[int, Any], groups: tuple) -> Executor:
    p2p = P2P(range(schedule.num_ranks), rank, *groups, CPU)
    return Executor(schedule, lower(schedule).programs[rank], rank, stages, p2p)
