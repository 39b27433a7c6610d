"""Expert parallelism in two verbs: `dispatch` sends tokens to their experts, `combine` brings the sums back.

Dispatch is linear in the rows it moves: x_RD = P x_TD, where P has one 1 in each of its R lines, one line for each
pair of a token and one of its experts. Combine is the transpose, P^T y_RD: a token's result is the sum over its
copies. The routing weight is applied where the expert is, `y_RD = weights_R * expert(x_RD)`, so that partial sums may
be added up on the way home. Hence the backward of dispatch is a combine, the backward of combine is a dispatch, and
neither saves an activation.

A dispatcher provides four raw verbs, one for each direction of each verb. They know no autograd, start at once on a
lane of their own, and return a `Pending`, so that an executor may compute between the start and the wait. What moves
where is exchanged in the first one and kept in the handle; the other three send rows only. `dispatch` and `combine`
are the raw verbs with autograd laid on top: once, here, for all dispatchers.

Letters: T tokens of this rank, K experts a token, R rows received by this rank's experts, D model, E experts of this
rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.dispatch import Routed
from parallel.expert import DISPATCH_DTYPES
from parallel.expert.lane import Pending
from parallel.expert.permutation import balanced_topk_idx
from parallel.expert.traffic import Traffic
from parallel.expert.travel import TravelTimes
from parallel.mesh import Mesh


@dataclass
class DispatchConfig:
    """What a dispatcher needs to know of the model, and its options.

    n_routed_experts, n_group, topk_group: as published; dispatch_dtype: payload of dispatch, one of `DISPATCH_DTYPES`;
    force_balance: ignore the router and spread the tokens evenly - for benchmarks only, label their figures.
    """

    n_routed_experts: int
    n_group: int = 1
    topk_group: int = 1
    dispatch_dtype: str = "native"
    force_balance: bool = False

    def __post_init__(self) -> None:
        if self.dispatch_dtype not in DISPATCH_DTYPES:
            raise ValueError(f"dispatch_dtype={self.dispatch_dtype!r} is not one of {', '.join(DISPATCH_DTYPES)}")

    def routing(self, topk_idx_TK: Tensor) -> Tensor:
        """The router's choice, or the balanced one in its place. Raises ValueError for an expert that is not."""
        if self.force_balance:
            return balanced_topk_idx(topk_idx_TK, self.n_routed_experts, self.n_group, self.topk_group)
        if topk_idx_TK.numel() and not 0 <= int(topk_idx_TK.min()) <= int(topk_idx_TK.max()) < self.n_routed_experts:
            raise ValueError(
                f"topk_idx holds experts {int(topk_idx_TK.min())} to {int(topk_idx_TK.max())}, "
                f"but n_routed_experts={self.n_routed_experts}"
            )
        return topk_idx_TK


class Dispatcher(ABC):
    """The verbs. Holds no state between steps but what `traffic` has counted and `times` has noted."""

    def __init__(self, mesh: Mesh, config: DispatchConfig):
        mesh.config.check_experts(config.n_routed_experts, config.n_group)
        self.mesh = mesh
        self.config = config
        self.traffic = Traffic()
        self.times = TravelTimes()

    @abstractmethod
    def start_dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Pending[Routed]:
        """Sends tokens out. Like all four, every rank of the ep group starts it, in the same order, also with T = 0."""

    @abstractmethod
    def start_dispatch_backward(self, gx_RD: Tensor, gw_R: Tensor, handle: Any) -> Pending[tuple[Tensor, Tensor]]:
        """The gradients of the tokens [T, D] and of the routing weights [T, K]."""

    @abstractmethod
    def start_combine(self, y_RD: Tensor, handle: Any) -> Pending[Tensor]:
        """The sum over each token's copies [T, D]."""

    @abstractmethod
    def start_combine_backward(self, gy_TD: Tensor, handle: Any) -> Pending[Tensor]:
        """The gradient of the experts' rows [R, D]."""

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Routed:
        """`start_dispatch`, waited for, with autograd in the tokens and the routing weights."""
        return Routed(*_Dispatch.apply(x_TD, topk_weights_TK, topk_idx_TK, self))

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        """`start_combine`, waited for, with autograd in the rows."""
        return _Combine.apply(y_RD, handle, self)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, topk_weights_TK: Tensor, topk_idx_TK: Tensor, dispatcher: Dispatcher) -> tuple:
        routed = dispatcher.start_dispatch(x_TD, topk_idx_TK, topk_weights_TK).wait()
        ctx.dispatcher, ctx.handle = dispatcher, routed.handle
        ctx.mark_non_differentiable(routed.num_tokens_per_expert_E)
        return tuple(routed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        gx_TD, gw_TK = ctx.dispatcher.start_dispatch_backward(grads[0], grads[1], ctx.handle).wait()
        return gx_TD, gw_TK, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, handle: Any, dispatcher: Dispatcher) -> Tensor:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        return dispatcher.start_combine(y_RD, handle).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return ctx.dispatcher.start_combine_backward(grads[0], ctx.handle).wait(), None, None
