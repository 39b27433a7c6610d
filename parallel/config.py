"""`ParallelConfig`: how a run is laid over its ranks. The words of the command line; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from parallel.expert import DISPATCH_DTYPES, DISPATCHERS, default_dispatcher
from parallel.pipeline.actions import Schedule
from parallel.pipeline.passes import PAIRABLE, in_turn, pair_up
from parallel.pipeline.schedules import SCHEDULES

SCHEDULE_NAMES = (*SCHEDULES, "auto")
RECOMPUTES = ("none", "selective", "full")
ZERO_BACKENDS = ("torch", "deepspeed")


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises ValueError with the choices when `value` is none of them."""
    if value not in choices:  # type: ignore[operator]
        raise ValueError(f"{name}={value}: expected one of {', '.join(map(str, choices))}")  # type: ignore[call-overload]


def check_at_least(name: str, value: float, least: int = 1) -> None:
    """Raises ValueError unless `value`, the option `name`, is a finite number of at least `least`."""
    if not least <= value < math.inf:  # nan is refused too
        raise ValueError(f"{name}={value}: must be at least {least}" + ("" if math.isfinite(value) else ", and finite"))


def check_divides(name: str, size: int, microbatch_size: int, dp: int) -> None:
    """Raises ValueError with the nearest size unless a batch of `size` sequences, the option `name`, is whole
    microbatches on each of `dp` pipelines."""
    unit = microbatch_size * dp
    if size % unit:
        raise ValueError(
            f"{name}={size} does not divide into microbatches of train.microbatch_size={microbatch_size} "
            f"on dp={dp} pipelines: use a multiple of {unit}, such as {max(1, size // unit) * unit}"
        )


@dataclass
class ParallelConfig:
    """The mesh and what runs on it; `dp = world / pp`, and `ep` divides dp.

    schedule: one of `SCHEDULE_NAMES`.
    dispatcher: how tokens reach their experts; `auto` is the `default_dispatcher` of ep.
    dispatch_dtype: what dispatched rows travel in, one of `DISPATCH_DTYPES`. Under recompute=full, rows
        that came in FP8 wait for the backward in FP8.
    force_balance: tokens are spread evenly, whatever the router says; for benchmarks, and labelled in the record.
    overlap: schedules have slots of two, whose phases interleave so that communication travels while the other
        microbatch computes; where experts are shared, 1f1b and zbv get such slots too, and hold more microbatches for
        it (`pair_up`). Off, every action has a slot of its own (`in_turn`).
    recompute: what the backward computes again instead of keeping it: `none`; `selective`, norms, the up-projections of
    attention and SwiGLU; `full`, every phase.
    zero_stage: 1 cuts FP32 master weights and moments into a part for each rank that holds a copy; 0 cuts nothing.
    zero_backend: who cuts, steps and gathers; one of `ZERO_BACKENDS`.
    layers_per_stage: layers of each stage, in order; None balances them by cost.
    ranks_per_node: ranks of one machine; routing groups are laid on nodes.
    """

    pp: int = 1
    ep: int = 1
    ranks_per_node: int = 8
    schedule: str = "1f1b"
    dispatcher: str = "auto"
    dispatch_dtype: str = "native"
    force_balance: bool = False
    overlap: bool = True
    recompute: str = "none"
    zero_stage: int = 0
    zero_backend: str = "torch"
    layers_per_stage: list[int] | None = None

    def __post_init__(self) -> None:
        check_choice("parallel.schedule", self.schedule, SCHEDULE_NAMES)
        check_choice("parallel.dispatcher", self.dispatcher, DISPATCHERS)
        check_choice("parallel.dispatch_dtype", self.dispatch_dtype, DISPATCH_DTYPES)
        check_choice("parallel.recompute", self.recompute, RECOMPUTES)
        check_choice("parallel.zero_stage", self.zero_stage, (0, 1))
        check_choice("parallel.zero_backend", self.zero_backend, ZERO_BACKENDS)
        if self.zero_backend != "torch" and not self.zero_stage:
            raise ValueError(
                f"parallel.zero_backend={self.zero_backend} shards optimizer states, but parallel.zero_stage=0 does "
                "not: use parallel.zero_stage=1"
            )
        if self.ep > 1 and self.dispatcher == "local":
            raise ValueError(
                f"parallel.dispatcher=local holds every expert on its rank, but parallel.ep={self.ep} shares them: "
                "use parallel.dispatcher=auto"
            )

    def make_schedule(self, num_microbatches: int) -> Schedule:
        """The schedule over `pp` ranks; under `overlap`, paired up where it can be and there is an all-to-all to hide;
        without, no slot holds more than one action.

        `auto` is searched for in the shape of a V, whose placement does not depend on the number of microbatches, for
        equal F, I and W, within the activations that DualPipe holds.
        """
        if self.schedule == "auto":
            schedule = _searched(self.pp, num_microbatches)
        else:
            schedule = SCHEDULES[self.schedule](self.pp, num_microbatches)
        if not self.overlap:
            return in_turn(schedule)
        return pair_up(schedule) if self.ep > 1 and self.schedule in PAIRABLE else schedule


@cache
def _searched(pp: int, num_microbatches: int) -> Schedule:
    from parallel.pipeline.auto import auto  # compiled code that only a search needs

    return auto(pp, num_microbatches, memory_limit=pp + 1, shape="v")


def shown_layout(parallel: Mapping[str, Any]) -> str:
    """The words of the command line that say most, from `parallel` of a config; what `auto` stands for."""
    words = {key: parallel[key] for key in ("pp", "ep", "schedule", "dispatcher") if key in parallel}
    if words.get("dispatcher") == "auto":
        words["dispatcher"] = default_dispatcher(words["ep"])
    return " ".join(f"{key}={value}" for key, value in words.items())
