"""How tokens reach their experts: the two verbs of a dispatcher, and the local one, for whom to dispatch is to sort.

With all experts here, each token's row is copied once per chosen expert and the copies are sorted by expert; combine
adds a token's copies up again. The two are each other's backward: the gradient of a gather is the sum over copies,
the gradient of that sum is the gather - which is why expert parallelism needs two verbs only.

Shapes: T tokens, K experts per token, R = T K rows, D model, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Routed(NamedTuple):
    """What a dispatch delivers: the rows for the experts here, sorted by expert, and combine's way back."""

    x_RD: Tensor
    weights_R: Tensor
    num_tokens_per_expert_E: Tensor  # int64, of the experts here
    handle: Any


class TokenDispatcher(Protocol):
    """Takes tokens to their experts and outputs back. Both verbs are differentiable, each the other's backward."""

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Routed:
        """Sends a copy of each token to each of its experts."""
        ...

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        """Sums each token's copies (the routing weight is already in them): (T, D)."""
        ...


class LocalHandle(NamedTuple):
    """Where the rows went: row r is a copy of token token_R[r]; token t's copies are the rows row_TK[t]."""

    token_R: Tensor
    row_TK: Tensor


def _copies(x_TD: Tensor, handle: LocalHandle) -> Tensor:
    return x_TD.index_select(0, handle.token_R)


def _sum_of_copies(y_RD: Tensor, handle: LocalHandle) -> Tensor:
    return F.embedding_bag(handle.row_TK, y_RD, mode="sum")  # gathers and sums in one pass


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, handle):
        ctx.handle = handle
        return _copies(x_TD, handle)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD):
        return _sum_of_copies(dx_RD, ctx.handle), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, handle):
        ctx.handle = handle
        return _sum_of_copies(y_RD, handle)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        return _copies(dy_TD, ctx.handle), None


class LocalDispatcher:
    """Satisfies `model.moe.TokenDispatcher` where all `num_experts` experts are here."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Routed:
        T, K = topk_idx_TK.shape
        expert_R, order_R = topk_idx_TK.flatten().sort(stable=True)
        row_TK = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(T * K).to(order_R.device)).view(T, K)
        handle = LocalHandle(order_R // K, row_TK)
        counts_E = expert_R.new_zeros(self.num_experts).scatter_add_(0, expert_R, torch.ones_like(expert_R))
        return Routed(_Dispatch.apply(x_TD, handle), topk_weights_TK.flatten()[order_R], counts_E, handle)

    def combine(self, y_RD: Tensor, handle: LocalHandle) -> Tensor:
        return _Combine.apply(y_RD, handle)
