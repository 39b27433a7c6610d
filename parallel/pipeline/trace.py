"""A timeline as a trace for Perfetto, chrome://tracing and the analysers of torch.profiler's traces.

The file has the profiler's own form: a process a rank, a thread a stream, complete events of ``cat: kernel`` in
microseconds, `distributedInfo` at the top. Transfers are kernels named as NCCL's are, on streams of their own, so that
analysers count them as communication; flow arrows lead from each transfer to the action that needed it, and a counter
shows the activations that a rank holds. Transfers that fly at once have a stream each: viewers drop events that overlap
on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from parallel.pipeline.actions import Op, Schedule, depends_on
from parallel.pipeline.palette import WORDS
from parallel.pipeline.timeline import Span, Timeline

COMPUTE_STREAM, COMMUNICATION_STREAM = 7, 20
NCCL_KERNEL = "ncclDevKernel_SendRecv"
Event = dict[str, Any]


def chrome_trace(
    timeline: Timeline, schedule: Schedule, *, p2p: float = 0.0, microseconds: float = 1000.0, title: str = ""
) -> dict[str, Any]:
    """The trace, ready for `json.dump`.

    p2p is how long a transfer takes, in the unit of the timeline; `microseconds` how many of them that unit has: 1000
    where it is milliseconds (or nothing in particular), 1e6 for a measured run.
    """
    correlation = count(1)
    events: list[Event] = []
    span_of = {span.action: span for rank in timeline.spans for span in rank}
    for span in span_of.values():
        events.append(_computing(span, next(correlation), microseconds))
    transfers = [
        (span_of[need], span)
        for span in span_of.values()
        for need in depends_on(span.action, schedule)
        if need in span_of and span_of[need].rank != span.rank
    ]
    free_at: list[list[float]] = [[0.0] for _ in range(timeline.num_ranks)]  # of the communication streams of each rank
    for source, target in sorted(transfers, key=lambda pair: pair[0].ready):
        ends = free_at[source.rank]
        stream = next((k for k, end in enumerate(ends) if end <= source.ready), len(ends))
        ends[stream : stream + 1] = [source.ready + p2p]
        events += _transfer(source, target, p2p, COMMUNICATION_STREAM + stream, next(correlation), microseconds)
    for rank in range(timeline.num_ranks):
        events += _names(rank, len(free_at[rank]))
        events += _memory(timeline, rank, microseconds)
        if timeline.optimizer:
            start, duration = timeline.pipeline_time * microseconds, timeline.optimizer * microseconds
            events.append(_kernel("optimizer", rank, COMPUTE_STREAM, start, duration, next(correlation)))
    return {
        "schemaVersion": 1,
        "deviceProperties": [],
        "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": timeline.num_ranks},
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 0,
        "traceName": title or schedule.name,
        "traceEvents": events,
    }


def _names(rank: int, num_communication_streams: int) -> Iterator[Event]:
    def metadata(kind: str, stream: int, **args: object) -> Event:
        return {"ph": "M", "name": kind, "pid": rank, "tid": stream, "ts": 0, "args": args}

    yield metadata("process_name", 0, name="python")
    yield metadata("process_labels", 0, labels=f"rank {rank}")
    yield metadata("process_sort_index", 0, sort_index=rank)
    sending = range(COMMUNICATION_STREAM, COMMUNICATION_STREAM + num_communication_streams)
    for stream, what in ((COMPUTE_STREAM, "computing"), *((stream, "sending") for stream in sending)):
        yield metadata("thread_name", stream, name=f"stream {stream} {what}")
        yield metadata("thread_sort_index", stream, sort_index=stream)


def _kernel(
    name: str, rank: int, stream: int, start: float, duration: float, correlation: int, **args: object
) -> Event:
    shared = {"device": rank, "stream": stream, "correlation": correlation, "External id": correlation}
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "pid": rank,
        "tid": stream,
        "ts": start,
        "dur": duration,
        "args": shared | args,
    }


def _computing(span: Span, correlation: int, microseconds: float) -> Event:
    """The event of one action; the two of an overlapped pair have the same times, and viewers nest them."""
    stage, op, mb = span.action
    words = {"op": WORDS.get(op, op.name), "stage": stage, "microbatch": mb, "slot": span.slot}
    if span.waited_for is not None:
        words["waited for"] = str(span.waited_for)
    start, duration = span.start * microseconds, (span.end - span.start) * microseconds
    return _kernel(str(span.action), span.rank, COMPUTE_STREAM, start, duration, correlation, **words)


def _transfer(source: Span, target: Span, p2p: float, stream: int, flow: int, microseconds: float) -> Iterator[Event]:
    """The send of `source`'s result to the rank of `target`, and the arrow over it."""
    leaves, arrives = source.ready * microseconds, (source.ready + p2p) * microseconds
    op = Op.SEND_F if source.action.op is Op.F else Op.SEND_B
    words = {"message": f"{source.action.stage}{op}{source.action.mb}", "Group size": 2, "to rank": target.rank}
    if source.sent:
        words["bytes"] = source.sent
    yield _kernel(NCCL_KERNEL, source.rank, stream, leaves, arrives - leaves, flow, **words)
    arrow = {"cat": "send", "name": "send", "id": flow}
    yield {**arrow, "ph": "s", "pid": source.rank, "tid": stream, "ts": leaves}
    yield {**arrow, "ph": "f", "bp": "e", "pid": target.rank, "tid": COMPUTE_STREAM, "ts": target.start * microseconds}


def _memory(timeline: Timeline, rank: int, microseconds: float) -> Iterator[Event]:
    times, live = timeline.memory_curve(rank)
    for time, value in zip(times.tolist(), live.tolist(), strict=True):
        yield {
            "ph": "C",
            "name": "live activations",
            "pid": rank,
            "tid": 0,
            "ts": time * microseconds,
            "args": {"microbatches": value},
        }
