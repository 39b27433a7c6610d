"""Root-mean-square norm (arXiv 1910.07467), with a backward of its own.

The sum over features is taken in FP32 at least, whatever the dtype of the tensor; the backward keeps the input and one
number per row, where autograd would keep every intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 stays; everything narrower is summed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulation_dtype(x))
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd
        dweight = (dy * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        dnormed = dy * weight
        mean = (dnormed * normed).sum(-1, keepdim=True).div_(x.shape[-1])
        return dnormed.sub_(normed.mul_(mean)).mul_(rstd), dweight, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNormFunction.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
