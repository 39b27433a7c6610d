"""Whole layers of a model as a cluster ran them: rows of `ClusterConfig.measured`, and stages made of them. No torch.

Kernel tables predict any model; these rows hold one, at the microbatch, precision, recomputation and expert parallelism
that they name, with everything that no table knows: Python, small kernels, an allocator, a network stack.
`launch/calibrate.py` writes them. A row is a dict:

    of       what was measured, in words (`key`)
    seconds  dense, moe: {f, i, w: [attend, experts], dispatch, combine, dispatch_back, combine_back: exposed journeys}
             first, last: [F, I, W] of what the first and the last stage do besides their layers
             pair: of a MoE layer's F laid over another microbatch's backward
    bytes    dense, moe, first, last: [kept from F to I, kept from I to W, rise of F, of I, of W, of B in one piece]
             border: of what one stage hands another; ahead: receives posted at once; window: sends kept until they end

A *rise* is how far live bytes climb above where an action began. Rises of the ends are those of a whole stage: of the
embedding with one layer, of one layer with the head and MTP.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from infra.hardware import ClusterConfig
from model.config import ModelConfig
from parallel.pipeline.actions import Op, Schedule
from parallel.pipeline.passes import lower, posted_receives
from parallel.plan.layout import Layout

# What shapes a layer; the rest of a model's config says how many there are, or how it is trained.
SHAPES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "q_lora_rank"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts"),
    *("num_experts_per_tok", "n_group", "topk_group", "num_nextn_predict_layers"),
)
PARTS = ("dense", "moe", "first", "last")


def key(model: ModelConfig, layout: Layout, sequence_length: int) -> str:
    """What a row holds, and which row a layout asks for."""
    shapes = asdict(model)
    words = {name: shapes[name] for name in SHAPES} | {
        "sequence_length": sequence_length,
        "microbatch_size": layout.microbatch_size,
        "precision": layout.precision,
        "recompute": layout.recompute,
        "ep": layout.ep,
        "dispatcher": layout.dispatcher,
    }
    return " ".join(f"{name}={value}" for name, value in words.items())


def row_for(model: ModelConfig, cluster: ClusterConfig, layout: Layout, sequence_length: int) -> dict[str, Any] | None:
    """The row that covers this layout; None where none was measured."""
    if not cluster.measured:
        return None
    wanted = key(model, layout, sequence_length)
    return next((row for row in cluster.measured if row["of"] == wanted), None)


class StageBytes(NamedTuple):
    """Bytes of every stage: kept from F to I, from I to W, and the rise of F, B, I and W above what was kept before."""

    forward_S: np.ndarray
    late_S: np.ndarray
    rise_OS: np.ndarray


def stage_bytes(row: dict[str, Any], split: list[list[int]], first_k_dense_replace: int, depths: int) -> StageBytes:
    """split: the layers of each stage."""
    table = {part: np.array(row["bytes"].get(part) or [0.0] * 6) for part in PARTS}
    forward_S, late_S, rise_OS = np.zeros(len(split)), np.zeros(len(split)), np.zeros((4, len(split)))
    for s, layers in enumerate(split):
        pieces = [table["dense" if n < first_k_dense_replace else "moe"] for n in layers]
        if s == len(split) - 1:  # the end was measured with one layer and those of MTP
            with_end = pieces[-1 - depths :]
            tail = sum(with_end) + table["last"]
            tail[2:] = table["last"][2:]
            pieces[-1 - depths :] = [tail]
        if s == 0:
            pieces[0] = np.concatenate((pieces[0][:2] + table["first"][:2], np.maximum(pieces[0], table["first"])[2:]))
        forward_S[s], late_S[s] = sum(pieces)[:2]  # type: ignore[index]
        rise_f = _highest([(piece[0], piece[2]) for piece in pieces])
        rise_i = _highest([(piece[1] - piece[0], piece[3]) for piece in reversed(pieces)])
        rise_w = max(piece[4] for piece in pieces)
        whole = _highest([(-piece[0], piece[5]) for piece in reversed(pieces)])
        rise_b = max(rise_i, late_S[s] - forward_S[s] + rise_w) if s else whole  # nobody waits for stage 0's gradient
        rise_OS[:, s] = rise_f, rise_b, rise_i, rise_w
    return StageBytes(forward_S, late_S, rise_OS)


def in_flight(schedule: Schedule, rank: int, ahead: int, window: int) -> np.ndarray:
    """Tensors between stages that a rank holds in each of its actions: receives posted `ahead`, in the order and at the
    slots in which the executor posts them, and the last `window` sent to each neighbour."""
    program = lower(schedule).programs[rank]
    slots = [slot for slot in program if slot[0].op <= Op.W]
    read = 0
    sent: dict[int, int] = {}
    held = []
    for posted, slot in zip(posted_receives(program, ahead), slots, strict=True):
        for stage, op, mb in slot:
            if op is not Op.W:
                step = 1 if op is Op.F else -1
                source, reader = stage - step, stage + step
                # what this action reads counts among its own bytes
                read += 0 <= source < schedule.num_stages and schedule.rank_of(source, mb) != rank
                if 0 <= reader < schedule.num_stages and (to := schedule.rank_of(reader, mb)) != rank:
                    sent[to] = sent.get(to, 0) + 1
            held.append(posted - read + sum(min(window, count) for count in sent.values()))
    return np.array(held)


def _highest(steps: list[tuple[float, float]]) -> float:
    """The highest climb of pieces in turn, each of which rises and then leaves (what stays, its rise)."""
    at = most = 0.0
    for stays, rise in steps:
        at, most = at + stays, max(most, at + rise)
    return most
