"""DeepSeekMoE: which experts a token goes to, and the experts.

The router scores every expert, keeps the best groups (a group is a node, so a token travels to few nodes), then the
best experts of those groups. Since V3 a bias per expert takes part in that choice and in nothing else: the weight a
chosen expert gets is its raw score. After each step the bias of an overloaded expert goes down by gamma and that of
an underloaded one up (`updated_bias`), which balances load without a loss that would pull at the model; a tiny
sequence-wise balance loss remains against extremes. V3 report, section 2.1.2, equations 12 to 20; auxiliary-loss-free
balancing: arXiv 2408.15664.

Rows travel through a `TokenDispatcher` (model/dispatch.py), the hole that expert parallelism fills. No token is ever
dropped.

Shapes: B batch, L length, T = B L tokens, D model, E experts, K experts per token, R rows received here, F expert
hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infra.fp8.linear import LinearProduct
from model.config import ModelConfig
from model.dispatch import LocalDispatcher, Routed, TokenDispatcher
from model.linear import Region, WeightGrad, at_once, plain, run_region
from model.mlp import MLP
from model.norm import accumulation_dtype

__all__ = [
    "MLP",
    "Experts",
    "MoE",
    "Routed",
    "Router",
    "Routing",
    "TokenDispatcher",
    "sequence_balance_loss",
    "updated_bias",
]


class Routing(NamedTuple):
    """A router's decision. `balance_loss` is the sum over sequences of equation 17 without alpha."""

    topk_idx_TK: Tensor
    topk_weights_TK: Tensor
    balance_loss: Tensor
    load_E: Tensor


class _WideLinear(torch.autograd.Function):
    """x W^T in a wider dtype than theirs, of which the backward keeps nothing that is wide."""

    @staticmethod
    def forward(ctx, x, weight, dtype):
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = (dy @ weight.to(dy.dtype)).to(x.dtype)
        dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2).to(dy.dtype)
        return dx, dweight.to(weight.dtype), None


class Router(nn.Module):
    """Scores, groups, top-k: V3's sigmoid with bias (noaux_tc), V2's softmax (greedy, group_limited_greedy)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.e_score_correction_bias: Tensor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """As ever, but the bias never goes below float32: 1 + gamma is 1 in bfloat16, and it would stop moving."""
        bias = getattr(self, "e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.itemsize < 4:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def scores(self, x: Tensor) -> Tensor:
        """Affinities (..., E), in float32 at least: the gate stays out of low precision (V3 report, 3.3.1)."""
        dtype = accumulation_dtype(x)
        logits = _WideLinear.apply(x, self.weight, dtype)
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    @torch.no_grad()
    def select(self, scores_TE: Tensor) -> Tensor:
        """The experts of each token, (T, K): the best of the best groups, by biased score."""
        config = self.config
        T, E = scores_TE.shape
        choice_TE = scores_TE + self.e_score_correction_bias if config.topk_method == "noaux_tc" else scores_TE
        if config.topk_group < config.n_group:
            groups = choice_TE.view(T, config.n_group, E // config.n_group)
            if config.topk_method == "noaux_tc":
                group_scores = groups.topk(2, dim=-1).values.sum(-1)
            else:
                group_scores = groups.amax(-1)
            rejected = group_scores.topk(
                config.n_group - config.topk_group, dim=-1, largest=False, sorted=False
            ).indices
            # -inf, not 0: a biased score may be negative, and 0 would then beat it
            choice_TE = groups.scatter(1, rejected[..., None].expand(-1, -1, groups.shape[2]), -torch.inf).view(T, E)
        return choice_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    def forward(self, x_BLD: Tensor) -> Routing:
        config = self.config
        scores_BLE = self.scores(x_BLD)
        scores_TE = scores_BLE.flatten(0, 1)
        topk_idx_TK = self.select(scores_TE)
        weights_TK = scores_TE.gather(1, topk_idx_TK)  # raw: the bias never reaches the gate value
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * config.routed_scaling_factor
        balance_loss = scores_BLE.new_zeros(())
        if config.aux_loss_alpha and config.seq_aux:
            # V3 counts the best experts by raw score (equation 18), V2 those a token goes to
            counted_TK = topk_idx_TK
            if config.topk_method == "noaux_tc":
                counted_TK = scores_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
            balance_loss = sequence_balance_loss(scores_BLE, counted_TK.unflatten(0, scores_BLE.shape[:2]))
        ones = torch.ones_like(topk_idx_TK).flatten()
        load_E = ones.new_zeros(config.n_routed_experts).scatter_add_(0, topk_idx_TK.flatten(), ones)
        return Routing(topk_idx_TK, weights_TK, balance_loss, load_E)


def sequence_balance_loss(scores_BLE: Tensor, counted_BLK: Tensor) -> Tensor:
    """Sum over the B sequences of sum_i f_i P_i (V3 report, equations 17 to 20, without alpha).

    f_i is how often expert i is among a token's `counted_BLK` and P_i its mean share of the scores, both over one
    sequence. Balanced, a sequence's value is 1. A sum, so that it adds up over microbatches.

    Args:
        counted_BLK: int64; in V3 the K best experts by raw score - no bias, no groups -, in V2 (paper, equations 23 to
            25, and the published code) those that the token goes to.
    """
    B, L, E = scores_BLE.shape
    if L == 0:
        return scores_BLE.sum()  # nothing to balance, and no mean to take
    with torch.no_grad():
        counted = counted_BLK.flatten(1)
        f_BE = scores_BLE.new_zeros(B, E).scatter_add_(1, counted, scores_BLE.new_ones(()).expand_as(counted))
        f_BE *= E / counted.shape[1]
    P_BE = (scores_BLE / scores_BLE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * P_BE).sum()


def updated_bias(bias_E: Tensor, load_E: Tensor, gamma: float) -> Tensor:
    """The routing bias after a step: up by gamma where the load was below the mean, down where above.

    Algorithm 1 of arXiv 2408.15664.

    Args:
        bias_E: any number of leading dims; load_E: tokens each expert got in the whole global batch; gamma: 0.001 in
        V3,
            0 over its last 500B tokens.
    """
    load = load_E.to(bias_E.dtype)
    return bias_E + gamma * torch.sign(load.mean(-1, keepdim=True) - load)


class _WeightedSwiGLU(torch.autograd.Function):
    """weight * silu(gate) * up; gate and up are the two halves of one tensor's last dim."""

    @staticmethod
    def forward(ctx, gate_up_RF, weights_R):
        ctx.save_for_backward(gate_up_RF, weights_R)
        gate, up = gate_up_RF.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weights_R[:, None].to(up.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RF):
        gate_up, weights_R = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        dweights = (dy_RF * silu).mul_(up).sum(-1, dtype=accumulation_dtype(dy_RF)).to(weights_R.dtype)
        dy_RF = dy_RF * weights_R[:, None].to(dy_RF.dtype)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(dy_RF, silu, out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dy_RF.mul_(up), gate))
        return dgate_up, dweights


class Experts(nn.Module):
    """The routed experts that live here, as two stacked parameters and one grouped computation.

    `gate_up_proj` is (E, 2F, D), gate above up; `down_proj` is (E, D, F). E may be a slice of the model's experts.
    """

    def __init__(self, config: ModelConfig, num_local_experts: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden, inner))
        self.weight_grad: WeightGrad = at_once
        self.gate_up_product: LinearProduct = plain
        self.down_product: LinearProduct = plain
        self.region: Region = run_region

    def forward(self, x_RD: Tensor, weights_R: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Row r's expert output times its routing weight: (R, D). The weight goes in where a row is narrowest."""
        gate_up = self.gate_up_product(x_RD, self.gate_up_proj, self.weight_grad, num_tokens_per_expert_E)
        inner = self.region(_WeightedSwiGLU.apply, gate_up, weights_R)
        return self.down_product(inner, self.down_proj, self.weight_grad, num_tokens_per_expert_E)


class MoE(nn.Module):
    """The feed-forward layer of a MoE block: router, routed experts behind a dispatcher, shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config, config.n_routed_experts)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.dispatcher: TokenDispatcher = LocalDispatcher(config.n_routed_experts)
