"""SwiGLU feed-forward layers: down(silu(gate(x)) * up(x)), the dense layers' and the shared expert's.

What is kept for the backward is the input of the activation, not its output, which is recomputed (V3 report, 3.2.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.linear import Linear, Region, run_region


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, same shapes."""
    return _SwiGLUFunction.apply(gate, up)


class MLP(nn.Module):
    """The feed-forward layer of a dense block, and the shared expert of a MoE block."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.region: Region = run_region

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        return self.down_proj(self.region(swiglu, self.gate_proj(x), self.up_proj(x)))
