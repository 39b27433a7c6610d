"""How long a layer takes: every kernel of its forward, input gradient and weight gradient, and its journeys. No torch.

A layer is two computations and two journeys each way (V3 report, figure 4):

    forward    attend -> dispatch -> experts -> combine
    backward   dispatch' (a combine's kernel) and combine' (a dispatch's) run the other way round

Alone, everything follows in turn, on all SMs. In an overlapped pair of a forward and a backward the journeys run
beside the computing, in two segments with a barrier after each, as in the published order:

    experts(B) experts(W) experts(F)   beside   dispatch(F) dispatch(B)
    attend(B)  attend(W)  attend(F)    beside   combine(F)  send  combine(B)

A segment takes as long as the slower of its two sides, and computing is slower by num_sms / (num_sms - comm_sms):
where the journeys hide, a pair takes the sum of its computing on the SMs that are left.

Rates come from the cluster's tables (infra/hardware.py). What is counted here are shapes, FLOPs and bytes; memory-bound
kernels are counted by the bytes of the operands they read and write, each kernel unfused from its neighbours but for
the fusions that the published profile shows (SwiGLU with its cast, forward with backward of SwiGLU).

Letters: T tokens, D model, N heads, R rows received, F expert hidden. Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import comb

from infra.hardware import DTYPE_BYTES, ClusterConfig
from model.config import ModelConfig
from parallel.plan.layout import Layout

Times = tuple[float, float, float]  # forward (or fprop), input gradient (dgrad), weight gradient (wgrad)
SCALED = 1 + 4 / 128  # bytes of an FP8 value with its share of an FP32 scale factor


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one microbatch, alone. Computing: [attend, experts] each of f, i, w; journeys by their names.

    hidden: the share of its journeys that a pair hid where one was measured (ranks that share cores with their own
    communication hide less); None: as the two segments say.
    """

    f: tuple[float, float]
    i: tuple[float, float]
    w: tuple[float, float]
    dispatch: float = 0.0
    combine: float = 0.0
    dispatch_back: float = 0.0
    combine_back: float = 0.0
    hidden: float | None = None

    @property
    def forward(self) -> float:
        return sum(self.f) + self.dispatch + self.combine

    @property
    def input_grad(self) -> float:
        return sum(self.i) + self.dispatch_back + self.combine_back

    @property
    def weight_grad(self) -> float:
        return sum(self.w)

    def scaled(self, factor: float) -> LayerTimes:
        """With all computing `factor` as long."""
        f, i, w = ((factor * attend, factor * experts) for attend, experts in (self.f, self.i, self.w))
        return replace(self, f=f, i=i, w=w)


def pair_time(forward: LayerTimes, backward: LayerTimes, contention: float, send: float, split: bool) -> float:
    """Of an overlapped pair of layers (F&B, or F&I where `split`); `send` is a pipeline transfer among its journeys."""
    alone = forward.forward + backward.input_grad + (0.0 if split else backward.weight_grad)
    if not forward.dispatch or not backward.dispatch:  # nothing travels: computing in turn on all SMs
        return alone
    if forward.hidden is not None:
        travel = forward.dispatch + forward.combine + backward.dispatch_back + backward.combine_back
        return alone - forward.hidden * travel + max(0.0, 1 - forward.hidden) * send
    attend, experts = (contention * (forward.f[k] + backward.i[k] + (0.0 if split else backward.w[k])) for k in (0, 1))
    return max(experts, forward.dispatch + backward.dispatch_back) + max(
        attend, forward.combine + backward.combine_back + send
    )


class Kernels:
    """Seconds of the kernels of one microbatch of a layout. load: rows of the most loaded rank over the mean."""

    def __init__(
        self, model: ModelConfig, cluster: ClusterConfig, layout: Layout, sequence_length: int, load: float = 1.0
    ):
        self.model, self.cluster, self.layout = model, cluster, layout
        self.length = sequence_length
        self.tokens = sequence_length * layout.microbatch_size
        self.rows = self.tokens * model.num_experts_per_tok  # R, balanced
        self.experts = model.n_routed_experts // layout.ep  # here
        self.fp8 = layout.precision == "fp8"
        self.dtype = layout.precision
        self.wide = DTYPE_BYTES["fp32" if layout.precision == "fp32" else "bf16"]  # bytes of an activation
        self.value = SCALED if self.fp8 else self.wide  # and of a linear layer's operand
        self.load = load

    def linear(self, features_in: int, features_out: int) -> Times:
        """fprop, dgrad and wgrad of a linear layer over T tokens."""
        T, matmul = self.tokens, self.cluster.matmul
        return (
            matmul("dense", T, features_out, features_in, self.dtype),
            matmul("dense", T, features_in, features_out, self.dtype),
            matmul("wgrad", features_in, features_out, T, self.dtype),
        )

    def grouped(self, features_in: int, features_out: int) -> Times:
        """The same of the routed experts here, on the most loaded rank."""
        R, groups, matmul = self.rows, self.experts, self.cluster.matmul
        each = max(1, R // groups)
        return (
            self.load * matmul("grouped", R, features_out, features_in, self.dtype, groups),
            self.load * matmul("grouped", R, features_in, features_out, self.dtype, groups),
            self.load * groups * matmul("wgrad", features_in, features_out, each, self.dtype),
        )

    def stream(self, *parts: tuple[float, float]) -> float:
        """Seconds of memory-bound kernels, from (values, bytes read and written for each)."""
        return sum(self.cluster.stream(values * num_bytes) for values, num_bytes in parts)

    def casts(self, values: float, times: int = 1) -> float:
        """Seconds of quantising values to FP8 (read BF16, write FP8), `times` times; nothing in BF16."""
        return times * self.stream((values, 2 + SCALED)) if self.fp8 else 0.0

    def attend(self) -> Times:
        """(F, I, W) of norms, projections, attention core, output projection, second norm and router."""
        m, T = self.model, self.tokens
        D, heads = m.hidden_size, m.num_attention_heads
        queries, keys = heads * m.qk_head_dim, heads * (m.qk_nope_head_dim + m.v_head_dim)
        out, rope = heads * m.v_head_dim, heads * m.qk_rope_head_dim
        latents = (m.q_lora_rank or 0) + m.kv_lora_rank + m.qk_rope_head_dim
        down_out = latents if m.q_lora_rank else latents + queries
        down = self.linear(D, down_out)
        q_up = self.linear(m.q_lora_rank, queries) if m.q_lora_rank else (0.0, 0.0, 0.0)
        kv_up = self.linear(m.kv_lora_rank, keys)
        project = self.linear(out, D)
        core = T * self.length * heads * (m.qk_head_dim + m.v_head_dim)  # FLOPs, the causal half
        core_f, core_b = self.cluster.attention(core, False), self.cluster.attention(2.5 * core, True)
        if m.n_routed_experts:
            gate = self.cluster.matmul("dense", T, m.n_routed_experts, D, "fp32")  # kept out of low precision
        norms = self.stream((T * D, 4), (T * latents, 4))
        heads_f = self.stream((T * rope, 4), (T * queries, 4))  # rotate the queries; assemble the keys
        up_f = q_up[0] + kv_up[0] + heads_f + self.casts(T * latents)
        f = (
            norms + self.casts(T * D) + down[0] + up_f + core_f
            + (self.stream((T * out, 2 + 1.5)) + self.casts(T * out) if self.fp8 else 0.0)  # E5M6, and the operand
            + project[0] + self.stream((T * D, 6), (T * D, 4)) + gate  # residual, second norm, router
        )  # fmt: skip
        again = 0.0
        if self.layout.recompute == "selective":
            again = self.stream((T * D, 4), (T * latents, 4)) + up_f
        elif self.layout.recompute == "full":
            again = f
        i = (
            again + project[1] + core_b + q_up[1] + kv_up[1] + down[1] + 2 * gate
            + self.casts(T * D, 2) + self.casts(T * queries, 2) + self.casts(T * keys, 2) + self.casts(T * latents, 2)
            + (self.stream((T * out, 1.5 + SCALED)) if self.fp8 else 0.0)  # the kept E5M6, turned for wgrad
            + self.stream((T * out, 4), (T * queries, 6), (T * rope, 4), (T * (queries + keys), 2))  # core's ends
            + self.stream((T * D, 12), (T * latents, 6), (T * D, 6))  # both norms, the residual
        )  # fmt: skip
        w = down[2] + q_up[2] + kv_up[2] + project[2] + (self.stream((T * D, 2 * SCALED)) if self.fp8 else 0.0)
        return f, i, w

    def mlp(self, inner: int, grouped: bool) -> Times:
        """(F, I, W) of a SwiGLU feed-forward layer: dense or shared over T tokens, routed over R rows."""
        D = self.model.hidden_size
        rows = self.rows * self.load if grouped else self.tokens
        up = self.grouped(D, 2 * inner) if grouped else self.linear(D, 2 * inner)
        down = self.grouped(inner, D) if grouped else self.linear(inner, D)
        kept = SCALED if self.fp8 else 0.0  # what waits for the backward is written as FP8
        f = up[0] + down[0] + self.stream((rows * 2 * inner, 2 + kept), (rows * inner, self.value))
        i = down[1] + up[1] + self.stream((rows * 2 * inner, self.value + 2), (rows * inner, 2 + self.value))
        if self.layout.recompute == "full":
            i += up[0] + self.stream((rows * 2 * inner, 2))
        if self.fp8:  # casts of the gradient both ways, operands of wgrad turned
            i += self.casts(rows * 2 * inner, 2) + self.stream((rows * D, 4 * SCALED), (rows * inner, 2 * SCALED))
        if grouped:  # rows put in the experts' order, and summed over the experts here, both ways
            moved = self.cluster.permute(rows * D * (2 * self.value + 4))
            f, i = f + moved, i + moved
        return f, i, up[2] + down[2]

    def layer(self, is_moe: bool) -> LayerTimes:
        attend = self.attend()
        if not is_moe:
            dense = self.mlp(self.model.intermediate_size, grouped=False)
            return LayerTimes(*_beside(attend, dense))
        routed = self.mlp(self.model.moe_intermediate_size, grouped=True)
        shared = self.mlp(self.model.n_shared_experts * self.model.moe_intermediate_size, grouped=False)
        experts = (routed[0] + shared[0], routed[1] + shared[1], routed[2] + shared[2])
        f, i, w = _beside(attend, experts)
        return LayerTimes(f, i, w, **self.journeys())

    def journeys(self) -> dict[str, float]:
        """The four all-to-alls of a layer by their names; dispatched rows travel in the operands' precision."""
        wide, narrow = self.journey(self.wide), self.journey(self.value)
        return {"dispatch": narrow, "combine": wide, "dispatch_back": wide, "combine_back": narrow}

    def journey(self, bytes_per_value: float) -> float:
        """Seconds of one all-to-all: over the network once a node (two_hop) or once an expert (all_to_all), then inside
        the node once a rank or once an expert. What a token has to send to its own rank or node does not travel."""
        mesh, m = self.layout.mesh, self.model
        if mesh.ep == 1:
            return 0.0
        row, T = m.hidden_size * bytes_per_value, self.tokens * self.load
        two_hop = self.layout.dispatcher != "all_to_all"
        pairs = m.num_experts_per_tok
        inside = T * row * (ranks_reached(m, mesh.ep) if two_hop else pairs) * (1 - 1 / mesh.ep_per_node)
        inside = inside / (1e9 * self.cluster.node_gbs) + 1e-6 * self.cluster.node_latency_us
        if mesh.ep_nodes == 1:
            return inside
        between = T * row * (nodes_reached(m, mesh.ep_nodes) if two_hop else pairs) * (1 - 1 / mesh.ep_nodes)
        between = between / (1e9 * self.cluster.network_gbs) + 1e-6 * self.cluster.network_latency_us
        return max(between, inside) if mesh.ep_per_node > 1 else between  # both hops run at once, chunk after chunk

    def head(self) -> Times:
        """(F, I, W) of the output head in BF16 with its loss."""
        T, D, V, matmul = self.tokens, self.model.hidden_size, self.model.vocab_size, self.cluster.matmul
        loss = self.stream((T * V, 4))
        return (
            matmul("dense", T, V, D, "bf16") + loss,
            matmul("dense", T, D, V, "bf16") + loss,
            matmul("wgrad", D, V, T, "bf16"),
        )

    def embedding(self) -> float:
        return self.stream((self.tokens * self.model.hidden_size, 4))

    def join(self) -> Times:
        """(F, I, W) of what makes the input of a depth of multi-token prediction."""
        f, i, w = self.linear(2 * self.model.hidden_size, self.model.hidden_size)
        around = self.stream((2 * self.tokens * self.model.hidden_size, 6))
        return f + around, i + around, w

    def send(self, dp: int) -> float:
        """Seconds of handing a microbatch to the next stage, which is dp ranks away."""
        across = dp >= self.layout.mesh.node_size
        rate = self.cluster.network_gbs if across else self.cluster.p2p_gbs or self.cluster.node_gbs
        latency = self.cluster.network_latency_us if across else self.cluster.node_latency_us
        return self.tokens * self.model.hidden_size * self.wide / (1e9 * rate) + 1e-6 * latency


def _beside(attend: Times, experts: Times) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """[attend, experts] of f, of i and of w."""
    return (attend[0], experts[0]), (attend[1], experts[1]), (attend[2], experts[2])


def _drawn(boxes: int, each: int, draws: int) -> float:
    """How many of `boxes` boxes of `each` balls are met by so many draws without replacement, on average."""
    return boxes * (1 - comb((boxes - 1) * each, draws) / comb(boxes * each, draws)) if boxes > 1 else 1.0


def nodes_reached(model: ModelConfig, nodes: int) -> float:
    """Nodes that a token's experts lie on, on average, when routing is uniform within its topk_group groups."""
    if model.n_group == 1:  # no limit
        return _drawn(nodes, model.n_routed_experts // nodes, model.num_experts_per_tok)
    groups = _drawn(model.topk_group, model.n_routed_experts // model.n_group, model.num_experts_per_tok)
    each = model.n_group // nodes if model.n_group % nodes == 0 else 1
    if each == 1 or nodes == 1:
        return min(groups, nodes)
    low = int(groups)
    return _drawn(nodes, each, low) + (groups - low) * (_drawn(nodes, each, low + 1) - _drawn(nodes, each, low))


def ranks_reached(model: ModelConfig, ranks: int) -> float:
    """Ranks that a token's experts lie on, on average; groups keep them within a part of the ranks."""
    within = max(1, ranks * model.topk_group // model.n_group)
    return _drawn(within, model.n_routed_experts * model.topk_group // model.n_group // within,
                  model.num_experts_per_tok)  # fmt: skip
