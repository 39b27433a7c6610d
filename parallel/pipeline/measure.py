"""What really ran, as the same Timeline that the simulator makes - and the costs that make the simulator agree with it.

    timeline = measured(executor, group, offset)                 # of the step that has just run, on every rank
    simulated = simulate(schedule, calibrated(timeline))
    differences(timeline, simulated)                             # a line an action: later why, longer by how much

Every rank has its own clock. On one machine all read the same; between machines the difference to the first rank is
taken from the fastest of a few round trips, as NTP does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from itertools import groupby
from statistics import fmean, median

import torch
import torch.distributed as dist

from parallel.mesh import Group
from parallel.pipeline.actions import Action, Op, Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.simulate import Costs
from parallel.pipeline.timeline import Span, Timeline

_ROUND_TRIPS = 8
_LEAST = 1e-6  # milliseconds; costs must be above 0


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


def bubble_fraction(executor: Executor, group: Group, offset: float = 0.0) -> float:
    """The idle share of all ranks' time in the step that has just run. Collective over `group`."""
    slots = {span.slot: (span.start, span.end) for span in executor.spans}.values()
    busy = sum(end - start for start, end in slots)
    first, last = min(start for start, _ in slots) + offset, max(end for _, end in slots) + offset
    mine = torch.tensor([first, last, busy], dtype=torch.float64)
    rows = [torch.zeros_like(mine) for _ in group.ranks]
    if group.size > 1:
        dist.all_gather(rows, mine, group=group.pg)
    else:
        rows = [mine]
    first_R, last_R, busy_R = torch.stack(rows, 1)
    return 1 - float(busy_R.mean() / (last_R.max() - first_R.min()))


def measured(executor: Executor, group: Group, offset: float = 0.0) -> Timeline:
    """The timeline, in milliseconds, of the step that has just run; on every rank. Collective over `group`."""
    schedule = executor.schedule
    counts = [sum(map(len, program)) for program in schedule.programs]
    rows = torch.zeros(max(counts), 11, dtype=torch.float64)
    for row, span in zip(rows, executor.spans, strict=False):
        times = (1e3 * (time + offset) for time in (span.start, span.end, span.ready))
        waited_for = span.waited_for or (-1, 0, 0)
        row.copy_(torch.tensor([span.slot, *span.action, *times, *waited_for, span.sent], dtype=torch.float64))
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
    slot, stage, op, mb = map(int, row[:4])
    start, end, ready = row[4:7]
    from_stage, from_op, from_mb, sent = map(int, row[7:])
    waited_for = Action(from_stage, Op(from_op), from_mb) if from_stage >= 0 else None
    return Span(rank, slot, Action(stage, Op(op), mb), start, end, ready, waited_for, sent)


def calibrated(timeline: Timeline) -> Costs:
    """Costs by stage from a measured step: mean times of each stage's F, I and W where they ran alone.

    A full B is I until its result left and W from there on; where the two were one (the first stage has nobody to hurry
    for), they share it as they do on the other stages. An op that a stage only ran in pairs takes the mean of the other
    stages', or a third of a pair if it never ran alone. fb is the mean time of the pairs over that of their parts.
    p2p is the median time from leaving to starting, where the receiver already stood still when the result left.
    """
    slots: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in (span for row in timeline.spans for span in row):
        slots[span.rank, span.slot].append(span)
    pairs = [slot for slot in slots.values() if len(slot) == 2]
    num_stages = 1 + int(timeline.stage_A.max())
    alone: dict[tuple[Op, int], list[float]] = defaultdict(list)
    for (span,) in (slot for slot in slots.values() if len(slot) == 1):
        stage, op, _ = span.action
        if op is Op.B and span.ready < span.end:
            alone[Op.I, stage].append(span.ready - span.start)
            alone[Op.W, stage].append(span.end - span.ready)
        else:
            alone[op, stage].append(span.end - span.start)
    time = {key: fmean(samples) for key, samples in alone.items()}
    pair = fmean([slot[0].end - slot[0].start for slot in pairs]) if pairs else 3 * _LEAST

    def mean_of(op: Op) -> float:
        known = [time[op, stage] for stage in range(num_stages) if (op, stage) in time]
        return fmean(known) if known else pair / 3

    share = mean_of(Op.I) / (mean_of(Op.I) + mean_of(Op.W))
    columns: dict[Op, list[float]] = {Op.F: [], Op.I: [], Op.W: []}
    for stage in range(num_stages):
        whole = time.get((Op.B, stage))
        for op, column in columns.items():
            of_whole = None if whole is None else whole * (share if op is Op.I else 1 - share)
            fallback = mean_of(op) if of_whole is None or op is Op.F else of_whole
            column.append(max(time.get((op, stage), fallback), _LEAST))
    f, i, w = columns.values()
    fb = None
    if pairs:
        parts = [_alone(span.action, f, i, w) for slot in pairs for span in slot]
        fb = pair * len(pairs) / sum(parts) * sum(f + i + w) / timeline.num_ranks
    return Costs(f=f, i=i, w=w, fb=fb, p2p=_p2p_time(timeline))


def _alone(action: Action, f: list[float], i: list[float], w: list[float]) -> float:
    stage, op, _ = action
    return {Op.F: f[stage], Op.B: i[stage] + w[stage], Op.I: i[stage], Op.W: w[stage]}[op]


def _p2p_time(timeline: Timeline) -> float:
    source_of = {span.action: span for row in timeline.spans for span in row}
    times = []
    for row in timeline.spans:
        free = 0.0  # when the rank was through with its last slot
        for _, slot in groupby(row, key=lambda span: span.slot):
            span, *_ = slot
            source = source_of.get(span.waited_for) if span.waited_for else None
            if source and source.rank != span.rank and free <= source.ready:
                times.append(span.start - source.ready)
            free = span.end
    return max(median(times), 0.0) if times else 0.0


def per_rank(costs: Costs, num_ranks: int, pp: int) -> Costs:
    """Costs by stage of a pipeline of `num_ranks`, as those of 1/`pp` of the same model."""
    f, i, w = (sum(column) / pp for column in (costs.f, costs.i, costs.w))
    fb = None if costs.fb is None else costs.fb * num_ranks / pp
    return replace(costs, f=f, i=i, w=w, fb=fb)


def rescaled(costs: Costs, num_ranks: int, schedule: Schedule) -> Costs:
    """Costs by stage of a pipeline of `num_ranks`, for another schedule: by stage where that has as many ranks and
    stages, else the same model cut evenly."""
    same = (num_ranks, len(costs.f)) == (schedule.num_ranks, schedule.num_stages)
    return costs if same else per_rank(costs, num_ranks, schedule.num_ranks)


def differences(measured: Timeline, simulated: Timeline, least: float = 0.01) -> list[str]:
    """For each row of `measured`, what is different from the same action in `simulated`, and why; both in ms.

    Differences below `least` are none.
    """
    expected = {span.action: span for row in simulated.spans for span in row}
    actual = {span.action: span for row in measured.spans for span in row}
    result = []
    for row in measured.spans:
        before: Span | None = None
        for span in row:
            said = expected[span.action]
            reasons = []
            longer = (span.end - span.start) - (said.end - said.start)
            if abs(longer) >= least:
                reasons.append(f"computed {_by(longer, 'longer', 'shorter')} than the mean of its stage")
            late = span.start - said.start
            if abs(late) >= least:
                reasons.append(f"started {_by(late, 'later', 'earlier')}, {_why(span, before, actual, expected)}")
            result.append("; ".join(reasons) or "as simulated")
            before = span
    return result


def _why(span: Span, before: Span | None, actual: dict[Action, Span], expected: dict[Action, Span]) -> str:
    source = span.waited_for
    if source is None:
        return "when its rank was free" if before else "at the start of the step"
    left = actual[source].ready - expected[source].ready
    travelled = span.start - actual[source].ready
    return (
        f"having waited for rank {actual[source].rank}: {source} left {_by(left, 'late', 'early')} "
        f"and took {travelled:.3g} ms"
    )


def _by(time: float, more: str, less: str) -> str:
    return f"{abs(time):.3g} ms {more if time > 0 else less}"
