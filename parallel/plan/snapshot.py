"""A rank's memory over a step, in the form that torch's memory viewer reads (torch.cuda.memory._snapshot). No torch.

States, buffers and workspace are blocks that are there from the start; each microbatch's activations are a block from
its F to its I or B, and a smaller one from I to W. Times are those of the replayed schedule, addresses those of an
allocator that takes the first gap that is wide enough.
"""

from __future__ import annotations

from bisect import insort
from typing import Any

from parallel.pipeline.actions import Action, Op
from parallel.plan.layout import Layout
from parallel.plan.memory import MemoryModel


class _Addresses:
    """First fit, in an address space without end."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int]] = []  # (from, to), in order

    def take(self, size: int) -> int:
        start = 0
        for low, high in self.taken:
            if low - start >= size:
                break
            start = high
        insort(self.taken, (start, start + size))
        return start

    def release(self, start: int, size: int) -> None:
        self.taken.remove((start, start + size))


def snapshot(memory: MemoryModel, layout: Layout, global_batch_size: int, pp_rank: int) -> dict[str, Any]:
    """Of one pipeline rank: {"segments", "device_traces", "allocator_settings"}."""
    states = memory.rank(layout, global_batch_size, pp_rank)
    schedule, start_S, end_S = memory.step.replayed(layout, global_batch_size)
    first = int(schedule.columns.rank_R1[pp_rank])
    size = memory.stage_bytes(layout)
    addresses, trace, blocks = _Addresses(), list[dict[str, Any]](), dict[str, tuple[int, int]]()
    origin = 1 << 40  # viewers take address 0 for none

    def event(action: str, name: str, seconds: float) -> None:
        start, num_bytes = blocks[name]
        trace.append(
            {
                "action": action, "addr": origin + start, "size": num_bytes, "stream": 0, "device": 0,
                "time_us": round(1e6 * seconds), "frames": _frames(name),
            }
        )  # fmt: skip

    def allocate(name: str, num_bytes: float, seconds: float) -> None:
        if round(num_bytes) > 0:
            blocks[name] = addresses.take(round(num_bytes)), round(num_bytes)
            event("alloc", name, seconds)

    def free(name: str, seconds: float) -> None:
        if name in blocks:
            event("free_requested", name, seconds)
            event("free_completed", name, seconds)
            addresses.release(*blocks.pop(name))

    for name in ("weights", "gradients", "optimizer", "buffers", "workspace"):
        allocate(name, getattr(states, name), 0.0)
    for k, slot in enumerate(schedule.programs[pp_rank], start=first):
        for stage, op, mb in slot:
            began, ended = float(start_S[k]), float(end_S[k])
            kept, late = f"activations of {Action(stage, Op.F, mb)}", f"operands of {Action(stage, Op.W, mb)}"
            if op is Op.F:
                allocate(kept, size.forward_S[stage], began)
            elif op is Op.W:
                free(late, ended)
            else:
                free(kept, ended)
                if op is Op.I:
                    allocate(late, size.late_S[stage], ended)
    most = max(one["addr"] + one["size"] for one in trace) - origin
    active: list[dict[str, Any]] = [
        {"address": origin + start, "size": num_bytes, "requested_size": num_bytes, "state": "active_allocated",
         "frames": _frames(name)}
        for name, (start, num_bytes) in sorted(blocks.items(), key=lambda item: item[1])
    ]  # fmt: skip
    held = sum(block["size"] for block in active)
    segment = {
        "address": origin, "total_size": most, "allocated_size": held, "active_size": held, "requested_size": held,
        "stream": 0, "device": 0, "segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False,
        "frames": [], "blocks": _with_gaps(active, origin, most),
    }  # fmt: skip
    return {"segments": [segment], "device_traces": [trace], "allocator_settings": {}}


def _frames(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "filename": "plan", "line": 0}]


def _with_gaps(active: list[dict[str, Any]], origin: int, total: int) -> list[dict[str, Any]]:
    """A segment's blocks without holes: what is free between those in use is named so."""
    blocks, at = [], origin
    for block in [*active, {"address": origin + total, "size": 0}]:
        if block["address"] > at:
            gap = block["address"] - at
            blocks.append({"address": at, "size": gap, "requested_size": 0, "state": "inactive", "frames": []})
        if block["size"]:
            blocks.append(block)
        at = block["address"] + block["size"]
    return blocks
