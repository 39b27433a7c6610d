"""What a model is, as numbers: the keys of the published config.json, and the arithmetic that follows from them.

`ModelConfig` carries DeepSeek's own spelling, so a downloaded config.json and a line of ours say the same thing. From
it follow, without building anything: how many parameters each part has, how many of them a token activates, how many
floating-point operations a token of training costs, and how many bytes of cache a token of inference keeps.

A FLOP count follows the convention that reproduces the published 250 GFLOP per token (ISCA paper, Table 2): six per
activated matrix parameter of the main model (two forward, four backward; the input embedding is a look-up and costs
nothing, multi-token prediction is left out) plus three times the attention core's forward,
2 * length * heads * (qk head dim + v head dim) a layer - halved where the causal half alone is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

SCORING_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


@dataclass(unsafe_hash=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071) on the decoupled rotary dims; V3 report, section 4.3."""

    type: str = "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        if self.type != "yarn":
            raise ValueError(
                f"rope_scaling.type is '{self.type}'; only 'yarn' is known (or rope_scaling=null for none)"
            )
        if self.factor < 1:
            raise ValueError(
                f"rope_scaling.factor is {self.factor}; it stretches the context, so it must be at least 1"
            )


class Part(NamedTuple):
    """One part of the model: its parameters, those a token activates, and its training FLOPs per token."""

    num_params: int
    num_activated_params: int
    flops_per_token: int
    flops_per_token_causal: int


@dataclass
class ModelConfig:
    """The published keys of config.json. Defaults are DeepSeek-V3's 671B, with the training run's initialisation.

    Raises:
        ValueError: where two numbers disagree; the message names both and what would fix it.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432  # of a dense feed-forward layer
    moe_intermediate_size: int = 2048  # of one expert
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1  # the depth of multi-token prediction
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None  # MLA gives every head its own key: None, or equal to num_attention_heads
    # multi-head latent attention
    q_lora_rank: int | None = 1536  # None: queries are not compressed (V2-Lite)
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    # mixture of experts
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    n_group: int = 8
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    seq_aux: bool = True
    aux_loss_alpha: float = 0.0001  # weight of the sequence-wise balance loss, V3 report section 4.2
    # positions
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    # the rest
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006  # the training run's; the published file carries the library default 0.02
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_routing()
        self._check_fixed()

    def _check_sizes(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
            "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
            "num_experts_per_tok n_group topk_group max_position_embeddings"
        )
        for key in positive.split():
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"):
            if not 0 < getattr(self, key) < inf:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be above 0")
        if self.n_shared_experts < 0:
            raise ValueError(f"model.n_shared_experts is {self.n_shared_experts}; it must be at least 0")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"model.q_lora_rank is {self.q_lora_rank}; give a rank of at least 1, or null for no compression"
            )
        if self.num_nextn_predict_layers < 0:
            raise ValueError(
                f"model.num_nextn_predict_layers is {self.num_nextn_predict_layers}; 0 switches prediction off"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"model.qk_rope_head_dim is {self.qk_rope_head_dim}; rotary positions turn pairs: make it even"
            )
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"model.num_key_value_heads is {self.num_key_value_heads} but model.num_attention_heads is "
                f"{self.num_attention_heads}; latent attention gives each head its own key: make them equal"
            )
        if not 0 <= self.first_k_dense_replace < self.num_hidden_layers:
            raise ValueError(
                f"model.first_k_dense_replace is {self.first_k_dense_replace} but model.num_hidden_layers is "
                f"{self.num_hidden_layers}; one layer at least has experts: lower it to {self.num_hidden_layers - 1}"
            )

    def _check_routing(self) -> None:
        experts, groups, top_groups, top_k = (
            self.n_routed_experts,
            self.n_group,
            self.topk_group,
            self.num_experts_per_tok,
        )
        if experts % groups:
            raise ValueError(
                f"model.n_routed_experts {experts} does not divide into model.n_group {groups} groups; "
                f"take a number of groups that divides {experts}"
            )
        if top_groups > groups:
            raise ValueError(f"model.topk_group {top_groups} exceeds model.n_group {groups}; make it at most {groups}")
        reachable = experts // groups * top_groups
        if top_k > reachable:
            raise ValueError(
                f"model.num_experts_per_tok {top_k} exceeds the {reachable} experts of model.topk_group {top_groups} "
                f"groups of {experts // groups}; lower it to {reachable}, or raise topk_group"
            )
        if self.scoring_func not in SCORING_FUNCS:
            raise ValueError(f"model.scoring_func is '{self.scoring_func}'; known: {', '.join(SCORING_FUNCS)}")
        if self.topk_method not in TOPK_METHODS:
            raise ValueError(f"model.topk_method is '{self.topk_method}'; known: {', '.join(TOPK_METHODS)}")
        if self.topk_method == "noaux_tc" and experts // groups < 2:
            raise ValueError(
                f"model.topk_method noaux_tc ranks a group by its two best experts, but n_routed_experts {experts} / "
                f"n_group {groups} leaves {experts // groups}; lower n_group to at most {experts // 2}"
            )
        if self.topk_method == "greedy" and groups != 1:
            raise ValueError(
                f"model.topk_method greedy knows no groups, but n_group is {groups}; set n_group=1 topk_group=1"
            )

    def _check_fixed(self) -> None:
        """Keys the published files carry with one value only; another value would be another model."""
        only = dict(
            moe_layer_freq=1, hidden_act="silu", attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False
        )
        for key, value in only.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"model.{key} is {getattr(self, key)}; DeepSeek-V2 and V3 have {value}, the only one built"
                )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model; each depth of multi-token prediction has one more."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def attention_params(self) -> int:
        """Matrix parameters of one layer's attention (its two latent norms are counted with the norms)."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        q_in = self.q_lora_rank or hidden
        q_a = hidden * self.q_lora_rank if self.q_lora_rank else 0
        kv_a = hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_b = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q_a + q_in * heads * self.qk_head_dim + kv_a + kv_b + heads * self.v_head_dim * hidden

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def norm_params(self) -> int:
        """Norm weights of one layer."""
        return 2 * self.hidden_size + (self.q_lora_rank or 0) + self.kv_lora_rank

    def parts(self, sequence_length: int = 4096) -> dict[str, Part]:
        """The model taken apart. All but `mtp` add up to the main model, which is what the published counts are of.

        Args:
            sequence_length: the attention span whose cost is counted (V3 trained at 4096).
        """
        layers, moe_layers, top_k = self.num_hidden_layers, self.num_moe_layers, self.num_experts_per_tok
        embedding = self.vocab_size * self.hidden_size
        router = self.n_routed_experts * self.hidden_size
        routing_biases = self.n_routed_experts if self.topk_method == "noaux_tc" else 0
        shared = self.n_shared_experts * self.expert_params
        core = 3 * 2 * sequence_length * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)

        def matrices(num_params: int, activated: int | None = None, attention_layers: int = 0) -> Part:
            activated = num_params if activated is None else activated
            full = core * attention_layers
            return Part(num_params, activated, 6 * activated + full, 6 * activated + full // 2)

        def weights_only(num_params: int) -> Part:
            return Part(num_params, num_params, 0, 0)

        depths = self.num_nextn_predict_layers
        mtp = self.attention_params + router + shared + 2 * self.hidden_size * self.hidden_size
        mtp_norms = self.norm_params + 3 * self.hidden_size
        mtp_matrices = matrices(
            depths * (mtp + self.n_routed_experts * self.expert_params),
            depths * (mtp + top_k * self.expert_params),
            attention_layers=depths,
        )
        return {
            "embedding": weights_only(embedding),
            "attention": matrices(layers * self.attention_params, attention_layers=layers),
            "dense_ffn": matrices(self.first_k_dense_replace * 3 * self.hidden_size * self.intermediate_size),
            "router": matrices(moe_layers * router)._replace(num_params=moe_layers * (router + routing_biases)),
            "shared_experts": matrices(moe_layers * shared),
            "routed_experts": matrices(
                moe_layers * self.n_routed_experts * self.expert_params, moe_layers * top_k * self.expert_params
            ),
            "norms": Part(layers * self.norm_params + self.hidden_size, layers * self.norm_params, 0, 0),
            "head": matrices(embedding),
            "mtp": mtp_matrices._replace(
                num_params=mtp_matrices.num_params + depths * (mtp_norms + routing_biases),
                num_activated_params=mtp_matrices.num_activated_params + depths * mtp_norms,
            ),
        }

    def num_params(self) -> int:
        """Numbers stored for the main model (routing biases too), without multi-token prediction."""
        return sum(part.num_params for name, part in self.parts().items() if name != "mtp")

    def num_activated_params(self) -> int:
        """Parameters one token's way through the main model uses, with the input embedding and the head.

        By the convention of the figure usually quoted (37,552,275,456 for 671B) neither the routing biases, which only
        choose, nor the final norm count.
        """
        return sum(part.num_activated_params for name, part in self.parts().items() if name != "mtp")

    def flops_per_token(self, causal: bool, sequence_length: int = 4096) -> int:
        """Training FLOPs per token of the main model (see above); `causal` counts half of the attention."""
        parts = {name: part for name, part in self.parts(sequence_length).items() if name != "mtp"}
        return sum(part.flops_per_token_causal if causal else part.flops_per_token for part in parts.values())

    def kv_cache_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of latent cache a token keeps: the compressed key-value and the shared rotary key of every layer."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * self.num_hidden_layers * bytes_per_element
