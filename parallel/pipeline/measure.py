"""What really ran, as the same Timeline that the simulator makes - and the costs that make the simulator agree with it.

Every rank has its own clock. On one machine all read the same; between machines the difference to the first rank is
taken from the fastest of a few round trips, as NTP does.
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch
import torch.distributed as dist

from parallel.mesh import Group
from parallel.pipeline.actions import Action, Op, Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.simulate import Costs
from parallel.pipeline.timeline import Span, Timeline

_ROUND_TRIPS = 8


def clock_offset(group: Group) -> float:
    """Seconds to add to this rank's `perf_counter` to read the clock of the group's first rank. Collective."""
    offset = 0.0
    now = torch.zeros(1, dtype=torch.float64)
    for other in range(1, group.size):
        best = float("inf")
        for _ in range(_ROUND_TRIPS):
            if group.rank == 0:
                dist.recv(now, group.ranks[other], group=group.pg)
                dist.send(torch.tensor([time.perf_counter()], dtype=torch.float64), group.ranks[other], group=group.pg)
            elif group.rank == other:
                start = time.perf_counter()
                dist.send(now, group.ranks[0], group=group.pg)
                dist.recv(now, group.ranks[0], group=group.pg)
                end = time.perf_counter()
                if end - start < best:
                    best, offset = end - start, now.item() - (start + end) / 2
    return offset


def measured(executor: Executor, group: Group, offset: float = 0.0) -> Timeline:
    """The timeline of the step that every rank of the pipeline has just run, on every rank. Collective over `group`."""
    schedule = executor.schedule
    counts = [sum(map(len, program)) for program in schedule.programs]
    rows = torch.zeros(max(counts), 9, dtype=torch.float64)
    for row, span in zip(rows, executor.spans, strict=False):
        waited = span.waited_for or (-1, 0, 0)
        times = (span.start + offset, span.end + offset, span.ready + offset)
        row.copy_(torch.tensor([span.slot, *span.action, *times, waited[0], waited[1]], dtype=torch.float64))
    gathered = [torch.zeros_like(rows) for _ in counts]
    if group.size > 1:
        dist.all_gather(gathered, rows, group=group.pg)
    else:
        gathered = [rows]
    spans = [
        _span(rank, row)
        for rank, (count, table) in enumerate(zip(counts, gathered, strict=True))
        for row in table[:count].tolist()
    ]
    return Timeline.from_spans(spans, activation=schedule.num_ranks / schedule.num_stages)


def _span(rank: int, row: list[float]) -> Span:
    slot, stage, op, mb, start, end, ready, from_stage, from_op = row
    waited_for = Action(int(from_stage), Op(int(from_op)), int(mb)) if from_stage >= 0 else None
    return Span(rank, int(slot), Action(int(stage), Op(int(op)), int(mb)), start, end, ready, waited_for)


def calibrated(timeline: Timeline, schedule: Schedule) -> Costs:
    """Costs by stage: the mean time of each stage's F, I and W in a measured step.

    Where a stage ran full B's, the input gradient is what had left when the result did.
    """
    times: dict[tuple[int, Op], list[float]] = defaultdict(list)
    for span in (span for row in timeline.spans for span in row):
        stage, op, _ = span.action
        if op is Op.B:
            times[stage, Op.I].append(span.ready - span.start)
            times[stage, Op.W].append(span.end - span.ready)
        else:
            times[stage, op].append(span.end - span.start)

    def mean(stage: int, op: Op) -> float:
        samples = times[stage, op]
        return max(sum(samples) / len(samples), 1e-9)

    f, i, w = ([mean(stage, op) for stage in range(schedule.num_stages)] for op in (Op.F, Op.I, Op.W))
    return Costs(f=f, i=i, w=w)
