"""FP8 for a model: fills the `product` holes of the layers that the recipe does not keep high (V3 report, section 3.3).

Embedding, head, router, norms and the attention core stay as they are; every other matrix multiplies in FP8, forward
and backward, whatever the layout: the layers cannot tell.

SwiGLU keeps its inputs in FP8, and its output is computed again from those (section 3.3.3), whatever is recomputed
besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infra.fp8.linear import LastCast, make_linear
from infra.fp8.quantize import Quantized, dequantize, tile_cast
from infra.fp8.recipe import RECIPES
from model.linear import Linear, plain
from model.mlp import MLP
from model.moe import Experts


def use_fp8(module: nn.Module, name: str, backend: str, recipe: str) -> None:
    """Fills the holes in `module`, whose whole-model name is `name`.

    backend: one of `infra.fp8.linear.BACKENDS`. recipe: one of `RECIPES`.
    Raises RuntimeError with the reason and the line that helps where the back end cannot run.
    """
    casts = LastCast()
    for path, layer in module.named_modules(prefix=name):
        if isinstance(layer, Linear):
            layer.product = make_linear(backend, RECIPES[recipe], path, casts) or plain
        elif isinstance(layer, Experts):
            layer.gate_up_product = make_linear(backend, RECIPES[recipe], f"{path}.gate_up_proj", casts) or plain
            layer.down_product = make_linear(backend, RECIPES[recipe], f"{path}.down_proj", casts) or plain
        if isinstance(layer, MLP | Experts):
            layer.region = kept_in_fp8


def kept_in_fp8(fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """fn(*inputs), whose backward - and that of who reads the output - sees the inputs as they come back from FP8.

    Matrices are kept in tiles of 1x128; what has one number a row is kept as it is. A filling of the hole `region`.
    """
    if not torch.is_grad_enabled():
        return fn(*inputs)
    piece = _Piece(fn, inputs)
    output = _KeptInFp8.apply(piece, *inputs)
    output.again = piece.output
    return output


class _Piece:
    """One call of a function, its inputs in FP8; the function runs again once, for whoever asks first."""

    def __init__(self, fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.fn = fn
        self.kept = [tile_cast(x.detach()) if x.dim() > 1 else x.detach() for x in inputs]
        self.dtypes = [x.dtype for x in inputs]
        self._again: tuple[list[Tensor], Tensor] | None = None

    def run(self) -> tuple[list[Tensor], Tensor]:
        """The inputs, as leaves, and the output."""
        if self._again is None:
            with torch.enable_grad():
                values = (
                    dequantize(x, dtype) if isinstance(x, Quantized) else x.detach()
                    for x, dtype in zip(self.kept, self.dtypes, strict=True)
                )
                leaves = [value.requires_grad_() for value in values]
                self._again = leaves, self.fn(*leaves)
        return self._again

    def release(self) -> None:
        """Lets go of everything, after the backward: the reader of the output still holds on to this."""
        self.kept, self._again = [], None

    def output(self) -> Tensor:
        return self.run()[1].detach()


class _KeptInFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: _Piece, *inputs: Tensor) -> Tensor:
        ctx.piece = piece
        return piece.fn(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        leaves, output = ctx.piece.run()
        grads = torch.autograd.grad(output, leaves, dy)
        ctx.piece.release()
        return None, *grads
