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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Compute = Callable[[], Tensor | None]
WeightGrad = Callable[[Tensor, Compute], Tensor | None]


def at_once(param: Tensor, compute: Compute) -> Tensor | None:
    """The default filling of the hole: the weight gradient is computed in the backward, as autograd would."""
    return compute()


def accumulate_or_return(param: Tensor, grad: Tensor) -> Tensor | None:
    """Adds `grad` to `param.main_grad` if there is one and returns None; else returns it, for autograd."""
    main_grad = getattr(param, "main_grad", None)
    if main_grad is None:
        return grad
    main_grad.add_(grad)
    return None


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, weight_grad):
        ctx.save_for_backward(x)
        ctx.weight, ctx.weight_grad = weight, weight_grad  # the parameter itself: its main_grad and identity are needed
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,), weight = ctx.saved_tensors, ctx.weight
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None

        def compute() -> Tensor | None:
            dy_TN, x_TK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            main_grad = getattr(weight, "main_grad", None)
            if main_grad is not None and main_grad.dtype == x.dtype:
                main_grad.addmm_(dy_TN.t(), x_TK)
                return None
            return accumulate_or_return(weight, dy_TN.t() @ x_TK)

        return dx, ctx.weight_grad(weight, compute), None


class Linear(nn.Module):
    """y = x W^T, no bias. `weight` is (out_features, in_features); `init_parameter_` gives its first values."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_grad: WeightGrad = at_once

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return _LinearFunction.apply(x, self.weight, self.weight_grad)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


def _is_grouped_mm_faster(x: Tensor) -> bool:
    """torch's grouped matmul has no float64 and, on a CPU in float32, loses to plain matmuls of each group."""
    return x.dtype == torch.bfloat16


def _ends(num_tokens_per_expert_E: Tensor) -> Tensor:
    return num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)


def grouped_mm(x_RK: Tensor, weight_EKN: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    """Rows of expert e times matrix e: the rows are sorted by expert, and an expert may have none.

    Args:
        x_RK: rows; weight_EKN: one matrix per expert, any strides; num_tokens_per_expert_E: int64, sums to R.
    Returns: (R, N).
    """
    if _is_grouped_mm_faster(x_RK) and x_RK.shape[0]:
        return F.grouped_mm(x_RK, weight_EKN, offs=_ends(num_tokens_per_expert_E))
    y_RN = x_RK.new_empty(x_RK.shape[0], weight_EKN.shape[2])
    sizes = num_tokens_per_expert_E.tolist()
    for x, weight, y in zip(x_RK.split(sizes), weight_EKN, y_RN.split(sizes), strict=True):
        torch.mm(x, weight, out=y)
    return y_RN


def grouped_outer(
    dy_RN: Tensor, x_RK: Tensor, num_tokens_per_expert_E: Tensor, into_ENK: Tensor | None = None
) -> Tensor:
    """dy_e^T x_e of every expert e, zeros for one without rows: (E, N, K); or that added to `into_ENK`."""
    if _is_grouped_mm_faster(x_RK) and x_RK.shape[0]:
        grad_ENK = F.grouped_mm(dy_RN.t(), x_RK, offs=_ends(num_tokens_per_expert_E))
        return grad_ENK if into_ENK is None else into_ENK.add_(grad_ENK)
    sizes = num_tokens_per_expert_E.tolist()
    is_new = into_ENK is None
    if into_ENK is None:
        into_ENK = dy_RN.new_empty(len(sizes), dy_RN.shape[1], x_RK.shape[1])
    for dy, x, grad in zip(dy_RN.split(sizes), x_RK.split(sizes), into_ENK, strict=True):
        if is_new:
            torch.mm(dy.t(), x, out=grad)
        elif grad.dtype == x.dtype:
            grad.addmm_(dy.t(), x)
        else:
            grad.add_(dy.t() @ x)
    return into_ENK


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
        dy_RN = dy_RN.contiguous()
        dx_RK = grouped_mm(dy_RN, weight_ENK, counts_E) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx_RK, None, None, None

        def compute() -> Tensor | None:
            main_grad = getattr(weight_ENK, "main_grad", None)
            grad = grouped_outer(dy_RN, x_RK, counts_E, into_ENK=main_grad)
            return grad if main_grad is None else None

        return dx_RK, ctx.weight_grad(weight_ENK, compute), None, None


def grouped_linear(
    x_RK: Tensor, weight_ENK: Tensor, num_tokens_per_expert_E: Tensor, weight_grad: WeightGrad
) -> Tensor:
    """One linear layer per expert over rows sorted by expert: (R, K) -> (R, N)."""
    return _GroupedLinearFunction.apply(x_RK, weight_ENK, num_tokens_per_expert_E, weight_grad)
