"""Matrix multiplications whose weight gradient can wait.

A backward is two computations: the input gradient, which the stage before is waiting for, and the weight gradient,
which nobody waits for until the optimizer steps. Zero-bubble schedules run the second later. So the layers here
compute the input gradient at once and offer the weight gradient to a hole, `weight_grad(param, compute)`; whoever
fills the hole decides when `compute()` runs. Unfilled, it runs at once.

`compute()` adds the gradient to `param.main_grad` where the parameter has one (a tensor of its shape, FP32 or wider:
V3 accumulates gradients in FP32, report section 3.3.3) and returns None; otherwise it returns the gradient, which
autograd then puts into `.grad` as ever. A deferred closure keeps the layer's input and output gradient, and nothing
else.

Shapes: T tokens, R rows received by the experts here, E experts here, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infra.fp8.linear import LinearProduct
from model.matmul import add_mm_, grouped_mm, grouped_outer, mm

Compute = Callable[[], Tensor | None]
WeightGrad = Callable[[Tensor, Compute], Tensor | None]
Region = Callable[..., Any]  # region(fn, *inputs) -> fn(*inputs)


def run_region(fn: Callable[..., Any], *inputs: Tensor) -> Any:
    """The default filling of the hole `region`: a piece that may be computed again in the backward is just computed."""
    return fn(*inputs)


def at_once(param: Tensor, compute: Compute) -> Tensor | None:
    """The default filling of the hole: the weight gradient is computed in the backward, as autograd would."""
    return compute()


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, weight_grad):
        ctx.save_for_backward(x)
        ctx.weight, ctx.weight_grad = weight, weight_grad  # the parameter itself: its main_grad and identity are needed
        return mm(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,), weight = ctx.saved_tensors, ctx.weight
        # detached: a deferred weight gradient must not hold the graph that x came from, and the gradients in it
        dy_TN, x_TK = dy.flatten(0, -2), x.detach().flatten(0, -2)
        dx = mm(dy_TN, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None

        def compute() -> Tensor | None:
            if not hasattr(weight, "main_grad"):
                return mm(dy_TN.t(), x_TK)
            add_mm_(weight.main_grad, dy_TN.t(), x_TK)
            return None

        return dx, ctx.weight_grad(weight, compute), None


class Linear(nn.Module):
    """y = x W^T, no bias. `weight` is (out_features, in_features); `init_parameter_` gives its first values.

    `product` is a hole: what multiplies (model/fp8.py fills it with FP8).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_grad: WeightGrad = at_once
        self.product: LinearProduct = plain

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return self.product(x, self.weight, self.weight_grad)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


class _GroupedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RK, weight_ENK, num_tokens_per_expert_E, weight_grad):
        ctx.save_for_backward(x_RK, num_tokens_per_expert_E)
        ctx.weight, ctx.weight_grad = weight_ENK, weight_grad
        return grouped_mm(x_RK, weight_ENK.transpose(1, 2), num_tokens_per_expert_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RN):
        (x_RK, counts_E), weight_ENK = ctx.saved_tensors, ctx.weight
        dy_RN, x_RK = dy_RN.contiguous(), x_RK.detach()  # see _LinearFunction
        dx_RK = grouped_mm(dy_RN, weight_ENK, counts_E) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx_RK, None, None, None

        def compute() -> Tensor | None:
            main_grad = getattr(weight_ENK, "main_grad", None)
            grad = grouped_outer(dy_RN, x_RK, counts_E, into_ENK=main_grad)
            return grad if main_grad is None else None

        return dx_RK, ctx.weight_grad(weight_ENK, compute), None, None


def plain(x: Tensor, weight: Tensor, weight_grad: WeightGrad, num_tokens_per_expert_E: Tensor | None = None) -> Tensor:
    """The product in the dtype of its operands: (..., K) and (N, K) -> (..., N).

    With `num_tokens_per_expert_E` (int64, sums to R) there is one matrix per expert, and the rows are sorted by expert:
    (R, K) and (E, N, K) -> (R, N).
    """
    if num_tokens_per_expert_E is None:
        return _LinearFunction.apply(x, weight, weight_grad)
    return _GroupedLinearFunction.apply(x, weight, num_tokens_per_expert_E, weight_grad)
