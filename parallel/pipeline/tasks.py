"""One rank's lowered program, tied together: every action knows what it reads, and who reads its result.

Tied once, so that a step looks nothing up: what it has to do between two computations is in plain sight here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from parallel.pipeline.actions import Action, Op, Program, Schedule, carried_by, channel_of, depends_on
from parallel.pipeline.p2p import Spec
from parallel.pipeline.passes import posted_receives


@dataclass(eq=False, slots=True)
class Task:
    """A compute action of this rank. What it reads and what it makes pass through here in every step."""

    action: Action
    stage: Any  # the executor's PipelineStage
    source: Action | None = None  # of another rank, which makes what this one reads
    x: Tensor | None = None  # what it reads: made on this rank, or on its way
    arrival: dist.Work | None = None  # of `x` from another rank
    reader: Task | None = None  # of its result, on this rank
    dst: int | None = None  # or the rank that its result goes to
    sent: Spec | None = None  # as what that rank expects it
    result: Tensor | None = None  # until the order of that channel lets it go


class Receive(NamedTuple):
    reader: Task
    src: int
    spec: Spec


class Tied(NamedTuple):
    """slots: those that compute, each with how many of `receives` are posted before it (`posted_receives`).
    channels: by rank, whose results go there, in lowered order."""

    slots: list[tuple[int, tuple[Task, ...]]]
    receives: list[Receive]
    channels: dict[int, list[Task]]


def tie(
    schedule: Schedule, lowered: Program, stages: Mapping[int, Any], inputs: Mapping[int, Spec], ahead: int
) -> Tied:
    """stages: this rank's PipelineStages, by index. inputs: what arrives for each of them from the stage before.
    ahead: receives that are posted at once."""
    tasks = {a: Task(a, stages[a.stage]) for slot in lowered for a in slot if a.op <= Op.W}
    reading: dict[Action, Task] = {}
    for action, task in tasks.items():
        source = next((d for d in depends_on(action, schedule) if d.stage != action.stage), None)
        if source in tasks:
            tasks[source].reader = task
        elif source is not None:
            task.source, reading[source] = source, task
    receives: list[Receive] = []
    channels: dict[int, list[Task]] = defaultdict(list)
    for slot in lowered:
        for message in slot:
            if message.op <= Op.W:
                continue
            made, (src, dst) = carried_by(message, schedule), channel_of(message, schedule)
            if message.op in (Op.SEND_F, Op.SEND_B):
                tasks[made].dst = dst
                tasks[made].sent = stages[made.stage].output if made.op is Op.F else inputs[made.stage]
                channels[dst].append(tasks[made])
            else:
                spec = inputs[message.stage] if message.op is Op.RECV_F else stages[message.stage].output
                receives.append(Receive(reading[made], src, spec))
    slots = [tuple(tasks[action] for action in slot) for slot in lowered if slot[0].op <= Op.W]
    return Tied(list(zip(posted_receives(lowered, ahead), slots, strict=True)), receives, channels)
