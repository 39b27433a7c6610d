"""One layer of the model, in named phases.

A MoE block's forward is the plain composition `attend -> dispatch -> experts -> combine`; a pipeline may cut the
graph between phases and lay two microbatches' phases over each other, so that rows travel while the other microbatch
computes. Nothing is kept between phases but what they hand on, and nothing is counted on the side: loads and balance
losses are outputs, so computing a block twice counts nothing twice. A dense block has no communication and is one
phase.

Shapes: B batch, L length, T = B L tokens, D model, K experts per token, R rows received here, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from model.attention import MLA, LatentCache
from model.config import ModelConfig
from model.linear import Region, run_region
from model.mlp import MLP
from model.moe import MoE, Routed
from model.norm import RMSNorm


class Attended(NamedTuple):
    """What attention and router hand on. The first four may carry gradients; the counts do not."""

    h_BLD: Tensor  # the residual stream
    x_TD: Tensor  # normed, for the experts
    topk_weights_TK: Tensor
    balance_loss: Tensor
    topk_idx_TK: Tensor
    load_E: Tensor


class BlockOutput(NamedTuple):
    """A block's output; the last two are None for a dense block."""

    h_BLD: Tensor
    balance_loss: Tensor | None
    load_E: Tensor | None


class Block(nn.Module):
    """One layer. Dense blocks are one phase, `forward`; MoE blocks compose theirs there."""

    def __init__(self, config: ModelConfig, is_moe: bool) -> None:
        super().__init__()
        self.is_moe = is_moe
        self.self_attn = MLA(config)
        self.mlp: Any = MoE(config) if is_moe else MLP(config.hidden_size, config.intermediate_size)
        self.region: Region = run_region
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attend(self, x_BLD: Tensor, document_ids_BL: Tensor | None = None) -> Attended:
        """Attention, and where each token goes next."""
        return self._route(self._attention(x_BLD, document_ids_BL))

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Routed:
        """Takes tokens to their experts."""
        return self.mlp.dispatcher.dispatch(x_TD, topk_idx_TK, topk_weights_TK)

    def experts(self, x_RD: Tensor, weights_R: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """The routed experts here, over the rows received: (R, D)."""
        return self.mlp.experts(x_RD, weights_R, num_tokens_per_expert_E)

    def shared_expert(self, x_TD: Tensor) -> Tensor:
        """The shared expert, over this block's own tokens: it needs nobody's rows, so it can run while rows travel."""
        return self.mlp.shared_experts(x_TD)

    def combine(self, h_BLD: Tensor, y_RD: Tensor, shared_TD: Tensor, handle: Any) -> Tensor:
        """Brings the experts' outputs back and closes the residual: (B, L, D)."""
        return h_BLD + (self.mlp.dispatcher.combine(y_RD, handle) + shared_TD).view_as(h_BLD)

    def forward(self, x_BLD: Tensor, document_ids_BL: Tensor | None = None) -> BlockOutput:
        if self.is_moe:
            return self._moe(self.attend(x_BLD, document_ids_BL))
        return self._dense(self._attention(x_BLD, document_ids_BL))

    def decode(self, x_BLD: Tensor, cache: LatentCache) -> Tensor:
        """The block over new tokens only, with what came before in `cache`."""
        h_BLD = x_BLD + self.self_attn.decode(self.input_layernorm(x_BLD), cache)
        return (self._moe(self._route(h_BLD)) if self.is_moe else self._dense(h_BLD)).h_BLD

    def _attention(self, x_BLD: Tensor, document_ids_BL: Tensor | None) -> Tensor:
        return x_BLD + self.self_attn(self.region(self.input_layernorm, x_BLD), document_ids_BL)

    def _route(self, h_BLD: Tensor) -> Attended:
        x_BLD = self.post_attention_layernorm(h_BLD)
        routing = self.mlp.gate(x_BLD)
        return Attended(
            h_BLD,
            x_BLD.flatten(0, 1),
            routing.topk_weights_TK,
            routing.balance_loss,
            routing.topk_idx_TK,
            routing.load_E,
        )

    def _dense(self, h_BLD: Tensor) -> BlockOutput:
        return BlockOutput(h_BLD + self.mlp(self.region(self.post_attention_layernorm, h_BLD)), None, None)

    def _moe(self, attended: Attended) -> BlockOutput:
        routed = self.dispatch(attended.x_TD, attended.topk_idx_TK, attended.topk_weights_TK)
        shared_TD = self.shared_expert(attended.x_TD)
        y_RD = self.experts(routed.x_RD, routed.weights_R, routed.num_tokens_per_expert_E)
        h_BLD = self.combine(attended.h_BLD, y_RD, shared_TD, routed.handle)
        return BlockOutput(h_BLD, attended.balance_loss, attended.load_E)
