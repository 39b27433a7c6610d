"""The rank that all others wait for: which it is, how long they wait, and for what of its work.

In a step that ends with a sum over all ranks everybody waits for whoever has most to do. So each rank adds up its *own
time* - what it spent working, without what it stood still for others - by phase, and the straggler is the rank with
most of it. The others wait for what it has more than the median rank; a phase's part is what it has more of in that
phase. Own times come from the spans of the executor, which are noted in any case. An uneven split of layers makes a
straggler as well as a slow machine: the phase and other steps tell them apart.

On CUDA the kernels of a collective wait on the device, inside their action's span: there a slow rank of an
expert-parallel group also lengthens the actions of its group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.expert.travel import Interval, intersection
from parallel.pipeline.actions import Op
from parallel.pipeline.timeline import Span

# load: reading the batch; pair: overlapped F&B slots; update: of the step before, by the optimizer (under ZeRO with the
# all-gather of the weights, so that there all ranks are as slow as the slowest).
PHASES = ("load", "forward", "backward", "weight_grad", "pair", "update")
_PHASE = {Op.F: "forward", Op.B: "backward", Op.I: "backward", Op.W: "weight_grad"}


def own_times(spans: Sequence[Span], waits: Sequence[Interval], load: float, update: float) -> dict[str, float]:
    """Seconds of this rank's own work by phase of `PHASES`.

    spans: of a step, in order. waits: when this rank stood still for an exchange inside of them, in order.
    """
    times = dict.fromkeys(PHASES, 0.0) | {"load": load, "update": update}
    slots: dict[int, list[Span]] = {}
    for span in spans:
        slots.setdefault(span.slot, []).append(span)
    for slot in slots.values():
        first = slot[0]
        if len(slot) == 2:
            parts = [("pair", (first.start, first.end))]
        elif first.action.op is Op.B:  # a full B: its weight gradients come after its result has left
            parts = [("backward", (first.start, first.ready)), ("weight_grad", (first.ready, first.end))]
        else:
            parts = [(_PHASE[first.action.op], (first.start, first.end))]
        for phase, interval in parts:
            stood_still = sum(end - start for start, end in intersection([interval], waits))
            times[phase] += interval[1] - interval[0] - stood_still
    return times


def straggler(own_RP: Tensor) -> dict[str, float]:
    """For the step's record, from the own times of all ranks, [ranks, phases of `PHASES`]:

    `straggler_rank`; `straggler_wait`, the seconds it worked longer than the median rank; and of these, by phase,
    `straggler_wait_forward` and its kin (negative where it was faster). With an even number of ranks the median is the
    lower of the two in the middle.
    """
    own_R = own_RP.sum(1)
    rank = int(own_R.argmax())
    more_P = own_RP[rank] - own_RP.median(0).values
    figures = {"straggler_rank": rank, "straggler_wait": float(own_R[rank] - own_R.median())}
    return figures | {f"straggler_wait_{phase}": more for phase, more in zip(PHASES, more_P.tolist(), strict=True)}


def gathered(mine: Sequence[float], rank: int, num_ranks: int) -> Tensor:
    """The figures of all ranks, [ranks, figures]; collective over the world."""
    rows = torch.zeros(num_ranks, len(mine), dtype=torch.float64)
    rows[rank] = torch.tensor(mine, dtype=torch.float64)
    if num_ranks > 1:
        torch.distributed.all_reduce(rows)
    return rows
