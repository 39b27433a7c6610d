"""What every rank holds, and when: states that stay, activations that come and go with the schedule. No torch.

Activations are counted tensor by tensor (`kept`): what the backward of one layer needs of one token, under a recompute
setting and a precision. V3 (report, sections 3.2.3 and 3.3.3) keeps inputs of linear layers in FP8, the one after
attention in 12 bits (E5M6), SwiGLU's inputs in FP8, and computes norms, up-projections of attention and SwiGLU again:
that is `selective` with fp8. `full` keeps a layer's input, and what came from other ranks, and computes the rest again.

When an activation lives is the schedule's affair: from its F to its B, or part of it to its W where the backward is
split. The order of a rank's program alone decides the peak, so nothing is timed here.

Estimates, and named so: `workspace` (temporaries of the layer at hand), `buffers` (of dispatch and combine) and
`margin` (context, communicators, fragmentation). Where the cluster measured this very layer (parallel/plan/measured.py)
its bytes are taken instead; workspace and buffers are then how far the measured phases rose. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from model.config import ModelConfig
from parallel.config import RECOMPUTES
from parallel.pipeline.actions import Op, Schedule
from parallel.pipeline.passes import PAIRABLE
from parallel.plan.cost import SCALED
from parallel.plan.counts import StateBytes, state_bytes
from parallel.plan.layout import Layout
from parallel.plan.measured import StageBytes, in_flight, stage_bytes
from parallel.plan.step import StepModel

E5M6 = 1.5 + 4 / 128
# CUDA context, NCCL's and NVSHMEM's own buffers: an assumption. A context alone takes 0.3 GB since kernels are loaded
# when first used (pytorch issue 107667). Each communicator may take more: RCCL's were measured at 1.1 GB for the first
# and 0.7 for every other (LUMI-AI-Guide issue 111). What a run with many needs beyond this has to come out of what a
# device holds above its name: torch sees 79.1 GiB, 84.9 GB, of an "80 GB" H100.
CONTEXT = 2.0e9
FRAGMENTATION = 0.03  # of all else that the allocator hands out: an assumption
STEADY = 4  # times pp microbatches: where every schedule but gpipe has reached its peak


class Kept(NamedTuple):
    """A tensor that waits for the backward: bytes a token."""

    name: str
    bytes_per_token: float


def kept(model: ModelConfig, precision: str, recompute: str, is_moe: bool) -> list[Kept]:
    """What one layer keeps of one token between its forward and its backward."""
    m, D, K = model, model.hidden_size, model.num_experts_per_tok
    heads, fp8 = m.num_attention_heads, precision == "fp8"
    operand = SCALED if fp8 else 2.0
    inner = m.moe_intermediate_size
    rows = [Kept("layer input", 2 * D)]
    if is_moe:
        # Dispatch and experts are phases of their own: the second norm's output waits for the router and the shared
        # expert, whatever is recomputed. Rows are found again by indices of 8 bytes.
        rows += [Kept("rows received", operand * K * D), Kept("routing", 28.0 * K + 8), Kept("experts' input", 2 * D)]
    if recompute == "full":
        return rows
    rows += [
        Kept("compressed queries", 2.0 * (m.q_lora_rank or 0)),
        Kept("compressed keys and values", 2.0 * (m.kv_lora_rank + m.qk_rope_head_dim)),
        Kept("attention output", (E5M6 if fp8 else 2.0) * heads * m.v_head_dim),
        Kept("softmax statistics", 4.0 * heads),
        Kept("residual", 2 * D),
    ]
    if is_moe:
        rows.append(Kept("router's choice", 4.0 * m.n_routed_experts + 12.0 * K))
        rows.append(Kept("experts' SwiGLU input", operand * K * 2 * inner))
        rows.append(Kept("shared SwiGLU input", operand * m.n_shared_experts * 2 * inner))
        rows.append(Kept("shared expert's operand", operand * D if fp8 else 0.0))
    else:
        rows.append(Kept("SwiGLU input", operand * 2 * m.intermediate_size))
    if recompute == "none":
        norms = D * (1 if is_moe else 2) + (m.q_lora_rank or 0) + m.kv_lora_rank
        rows.append(Kept("norm outputs", operand * norms))
        rows.append(Kept("queries, keys, values", 2.0 * heads * (2 * m.qk_head_dim + m.v_head_dim)))
        if not fp8:  # FP8 keeps SwiGLU's inputs, and computes its output again from them
            width = (K + m.n_shared_experts) * inner if is_moe else m.intermediate_size
            rows.append(Kept("SwiGLU output", 2.0 * width))
    return rows


def kept_for_weights(model: ModelConfig, precision: str, is_moe: bool) -> float:
    """Bytes a token that wait from I to W: inputs and output gradients of all linear layers. What `selective` and
    `full` compute again has been by then, so they are the same under every recomputation."""
    m, D, heads, inner = model, model.hidden_size, model.num_attention_heads, model.moe_intermediate_size
    q, kv = m.q_lora_rank or 0, m.kv_lora_rank
    operand = SCALED if precision == "fp8" else 2.0
    attention_out = heads * m.v_head_dim
    up = heads * (m.qk_head_dim + m.qk_nope_head_dim + m.v_head_dim)
    values = (D + q + kv) + (q + kv + m.qk_rope_head_dim + up + D)  # inputs without o_proj's; gradients
    if is_moe:
        copies = m.num_experts_per_tok + m.n_shared_experts
        values += copies * (D + inner) + copies * (2 * inner + D)
    else:
        values += (D + m.intermediate_size) + (2 * m.intermediate_size + D)
    return operand * values + (E5M6 if precision == "fp8" else 2.0) * attention_out


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at its fullest moment; `host` is on its node's memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    workspace: float
    margin: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")

    def as_gb(self) -> dict[str, float]:
        return {name: value / 1e9 for name, value in asdict(self).items()}


@dataclass
class MemoryModel:
    """Memory of the layouts that `step` times; what layouts share is computed once. ema: kept, in host memory."""

    step: StepModel
    ema: bool = True

    def stage_bytes(self, layout: Layout) -> StageBytes:
        """What a microbatch keeps on each stage from F to I or B, and what of it (with gradients) from I to W; rises
        are 0 where nothing was measured."""
        split = self.step.split(layout.num_stages)
        if row := self.step.measured(layout):
            model = self.step.model
            return stage_bytes(row, split, model.first_k_dense_replace, model.num_nextn_predict_layers)
        model, tokens = self.step.model, self.step.sequence_length * layout.microbatch_size
        forward, late = [], []
        for is_moe in (False, True):
            tensors = kept(model, layout.precision, layout.recompute, is_moe)
            forward.append(tokens * sum(t.bytes_per_token for t in tensors))
            late.append(tokens * kept_for_weights(model, layout.precision, is_moe))
        is_moe_of = [[int(n >= model.first_k_dense_replace) for n in layers] for layers in split]
        forward_S, late_S = (np.array([sum(table[k] for k in s) for s in is_moe_of]) for table in (forward, late))
        # The last stage: what the heads' norms and losses keep, and what joins a depth to the one before (2D -> D).
        depths, operand = model.num_nextn_predict_layers, SCALED if layout.precision == "fp8" else 2.0
        forward_S[-1] += tokens * model.hidden_size * (4.0 * (1 + depths) + depths * (4.0 + 2 * operand))
        late_S[-1] += tokens * model.hidden_size * depths * 3 * operand
        return StageBytes(forward_S, late_S, np.zeros((4, len(split))))

    def activations(self, layout: Layout, global_batch_size: int) -> np.ndarray:
        """[pipeline rank, 2]: the most bytes of activations held between actions, and within them."""
        M = layout.num_microbatches(global_batch_size)
        if layout.schedule != "gpipe":
            M = min(M, STEADY * layout.pp + M % 2)
        key = (
            "activations", layout.schedule, layout.pp, M, layout.precision, layout.recompute, layout.microbatch_size,
            layout.pairs, *((layout.ep, layout.dispatcher) if self.step.cluster.measured else ()),
        )  # fmt: skip
        cache = self.step.cache
        if key not in cache:
            schedule = layout.make_schedule(M)
            size = self.stage_bytes(layout)
            held, rise = curves(schedule, size.forward_S, size.late_S), rises(schedule, size.rise_OS)
            if self.step.measured(layout) and layout.pairs:
                held = map(np.subtract, held, half_of_pairs(schedule, size.forward_S))
                rise = map(np.subtract, rise, freed_before_heads(schedule, size.forward_S, size.late_S))
            cache[key] = np.array(list(map(_peaks, held, rise, self._between(layout, schedule))))
        return cache[key]

    def _between(self, layout: Layout, schedule: Schedule) -> list[np.ndarray | float]:
        """Bytes of what is under way between stages, in every action of each rank; 0 where no layer was measured."""
        row = self.step.measured(layout)
        if row is None or layout.pp == 1 or not row["bytes"].get("border"):
            return [0.0] * layout.pp
        border, ahead, window = (row["bytes"][name] for name in ("border", "ahead", "window"))
        return [border * in_flight(schedule, rank, ahead, window) for rank in range(layout.pp)]

    def states(self, layout: Layout) -> list[StateBytes]:
        """Of every pipeline rank: what stays."""
        key = (
            "states", layout.world, layout.pp, layout.ep, layout.schedule, layout.precision, layout.zero_stage, self.ema
        )  # fmt: skip
        cache = self.step.cache
        if key not in cache:
            cache[key] = [
                state_bytes(groups, layout.precision, layout.zero_stage, self.step.moments, self.ema)
                for groups in self.step.groups(layout)
            ]
        return cache[key]

    def rank(self, layout: Layout, global_batch_size: int, pp_rank: int) -> RankMemory:
        """Of one pipeline rank."""
        states = self.states(layout)[pp_rank]
        held, most = map(float, self.activations(layout, global_batch_size)[pp_rank])
        if self.step.measured(layout):
            buffers, workspace = 0.0, most - held
        else:
            buffers, workspace = self._buffers(layout), self._workspace(layout)
        known = states.total + held + buffers + workspace
        context = CONTEXT if self.step.cluster.comm_sms else 0.0  # a CPU has no multiprocessors to lend
        return RankMemory(
            states.weights, states.gradients, states.optimizer, held, buffers, workspace,
            context + FRAGMENTATION * known, states.ema_host,
        )  # fmt: skip

    def fullest_rank(self, layout: Layout, global_batch_size: int) -> int:
        """The pipeline rank that holds most; all else is the same on every rank."""
        held = self.activations(layout, global_batch_size)[:, 1].tolist()
        totals = [states.total + one for states, one in zip(self.states(layout), held, strict=True)]
        return totals.index(max(totals))

    def fullest(self, layout: Layout, global_batch_size: int) -> RankMemory:
        return self.rank(layout, global_batch_size, self.fullest_rank(layout, global_batch_size))

    def over_time(self, layout: Layout, global_batch_size: int, pp_rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, bytes): from each moment of a step on, so many bytes of activations on a pipeline rank."""
        schedule, start_S, end_S = self.step.replayed(layout, global_batch_size)
        rank_R1, slot_S1, actions_A3 = schedule.columns
        slots = slice(rank_R1[pp_rank], rank_R1[pp_rank + 1])
        rows = slice(slot_S1[slots.start], slot_S1[slots.stop])
        sizes = np.diff(slot_S1)[slots]
        is_forward = actions_A3[rows, 1] == Op.F
        seconds = np.where(is_forward, np.repeat(start_S[slots], sizes), np.repeat(end_S[slots], sizes))
        forward_S, late_S, _ = self.stage_bytes(layout)
        held = list(curves(schedule, forward_S, late_S))[pp_rank]
        order = np.argsort(seconds, kind="stable")
        return seconds[order], np.cumsum(np.diff(held, prepend=0.0)[order])

    def _buffers(self, layout: Layout) -> float:
        """Rows under way: received ones and those to combine, of both microbatches of a pair."""
        if layout.ep == 1:
            return 0.0
        model = self.step.model
        rows = self.step.sequence_length * layout.microbatch_size * model.num_experts_per_tok
        operand = SCALED if layout.precision == "fp8" else 2.0
        microbatches = 2 if layout.pairs else 1
        return microbatches * rows * model.hidden_size * (operand + 2.0)

    def _workspace(self, layout: Layout) -> float:
        """Temporaries of the layer at hand: what recomputing makes, its gradient, and a chunk of logits."""
        model, tokens = self.step.model, self.step.sequence_length * layout.microbatch_size
        key = "workspace"
        if key not in self.step.cache:
            self.step.cache[key] = sum(t.bytes_per_token for t in kept(model, "bf16", "none", True))
        whole = self.step.cache[key]
        return tokens * whole + 4.0 * 2**24


def curves(schedule: Schedule, forward_S: np.ndarray, late_S: np.ndarray) -> Iterator[np.ndarray]:
    """Bytes held after every action of each rank's program. In a pair, F allocates before the backward frees."""
    return map(np.cumsum, _by_rank(schedule, _grown(schedule, forward_S, late_S)))


def rises(schedule: Schedule, rise_OS: np.ndarray) -> Iterator[np.ndarray]:
    """How far live bytes climb within every action of each rank's program. rise_OS: [op, stage]."""
    actions_A3 = schedule.columns.actions_A3
    return _by_rank(schedule, rise_OS[actions_A3[:, 1], actions_A3[:, 0]])


def _grown(schedule: Schedule, forward_S: np.ndarray, late_S: np.ndarray) -> np.ndarray:
    """By how much every action leaves more than it found."""
    actions_A3 = schedule.columns.actions_A3
    return np.stack((forward_S, -forward_S, late_S - forward_S, -late_S))[actions_A3[:, 1], actions_A3[:, 0]]


def _by_rank(schedule: Schedule, values_A: np.ndarray) -> Iterator[np.ndarray]:
    rank_R1, slot_S1, _ = schedule.columns
    for first, end in zip(slot_S1[rank_R1[:-1]], slot_S1[rank_R1[1:]], strict=True):
        yield values_A[first:end]


def half_of_pairs(schedule: Schedule, forward_S: np.ndarray) -> Iterator[np.ndarray]:
    """What an F that is laid over a backward does not yet hold when that has let go of as much: half, at the row of F;
    0 in all others."""
    _, slot_S1, actions_A3 = schedule.columns
    half_A = np.zeros(len(actions_A3))
    pairs = slot_S1[:-1][np.diff(slot_S1) == 2]
    half_A[pairs] = forward_S[actions_A3[pairs, 0]] / 2
    return _by_rank(schedule, half_A)


def freed_before_heads(schedule: Schedule, forward_S: np.ndarray, late_S: np.ndarray) -> Iterator[np.ndarray]:
    """What a backward has let go of by the time when heads and loss, the last phases of the F beside it, climb highest:
    at the rows of such an F; 0 in all others."""
    _, slot_S1, actions_A3 = schedule.columns
    freed_A = np.zeros(len(actions_A3))
    pairs = slot_S1[:-1][np.diff(slot_S1) == 2]
    pairs = pairs[actions_A3[pairs, 0] == schedule.num_stages - 1]
    freed_A[pairs] = -_grown(schedule, forward_S, late_S)[pairs + 1]
    return _by_rank(schedule, freed_A)


def _peaks(held: np.ndarray, rise: np.ndarray, between: np.ndarray | float) -> tuple[float, float]:
    before = np.concatenate(([0.0], held[:-1]))
    return held.max(), float((np.maximum(held, before + rise) + between).max())


def smallest_change(memory: MemoryModel, layout: Layout, global_batch_size: int) -> tuple[Layout, RankMemory] | None:
    """The first single change that makes the layout fit, from what costs least time to what costs most; None: none."""
    limit = 1e9 * memory.step.cluster.memory_gb
    later = RECOMPUTES[RECOMPUTES.index(layout.recompute) + 1 :]
    changes = [{"zero_stage": 1}, *({"recompute": r} for r in later), {"precision": "fp8"}]
    changes += [{"overlap": False}] * (layout.pairs and layout.schedule in PAIRABLE)  # pairs hold more microbatches
    changes += [{"microbatch_size": b} for b in (4, 2, 1) if b < layout.microbatch_size]
    changes += [{"zero_stage": 1, "recompute": r} for r in later]
    for change in changes:
        other = replace(layout, **change)  # type: ignore[arg-type]
        if other == layout or (other.precision == "fp8" and not memory.step.cluster.fp8_tflops):
            continue
        fullest = memory.fullest(other, global_batch_size)
        if fullest.total <= limit:
            return other, fullest
    return None
