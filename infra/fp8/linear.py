"""A linear layer in FP8: the three products with their casts, as one autograd function whose weight gradient can wait.

    forward     x --1x128--> q_x;  W --128x128--> q_W;         fprop  y  = q_x q_W^T
    backward    dy --1x128--> q_dy;                            dgrad  dx = q_dy q_W
                dy --128x1--> q_dyT;  q_x --128x1--> q_xT;     wgrad  dW = q_dyT q_xT^T

Between forward and backward the layer keeps its input as it was quantised for fprop: one byte a value and a scale
factor for each 128, or 12 bits (E5M6) where the recipe says so. wgrad sums over tokens, so its tiles lie along the
tokens: the kept input is dequantised, transposed and quantised again, and the output gradient is cast a second time
from its own dtype. Weights are cast in the forward and again in the backward, which costs less than keeping a copy for
every microbatch in flight.

A tensor may say more of itself, in two attributes:

    x.quantized     the `Quantized` that its values came from, when it was dispatched in FP8, in tiles of 1x128 with
                    powers of two: where the recipe asks for these it is the operand, and what is kept of an input
    x.again()       computes its values anew, where something else is kept that they follow from: nothing of x is kept

Inputs have either; gradients that combine's backward dispatches, the first.

The weight gradient is offered to the hole `weight_grad(weight, compute)`; `compute()` adds it in FP32 to
`weight.main_grad` where there is one and returns None, and otherwise returns it. A deferred `compute` keeps the FP8
operands of wgrad, two bytes for each pair of values, and no high-precision tensor.

Letters: T tokens, R rows of all experts, E experts, K input features, N output features.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infra.fp8.gemm import GEMMS, Gemm
from infra.fp8.quantize import (
    E5M6,
    Quantized,
    cast,
    cast_e5m6,
    dequantize_e5m6,
    transpose_blocks,
    transpose_cast,
)
from infra.fp8.recipe import TILE_1X128, Block, LayerRecipe, Recipe, layer_recipe

Compute = Callable[[], Tensor | None]
WeightGrad = Callable[[Tensor, Compute], Tensor | None]
Again = Callable[[], Tensor]


class LinearProduct(Protocol):
    """What a linear layer calls: differentiable, with the weight gradient offered to `weight_grad`.

    x: (..., K) and weight: (N, K) -> (..., N). With `num_tokens_per_expert_E` (int64, sums to R): x: (R, K) sorted by
    expert
    and weight: (E, N, K) -> (R, N).
    """

    def __call__(
        self, x: Tensor, weight: Tensor, weight_grad: WeightGrad, num_tokens_per_expert_E: Tensor | None = None
    ) -> Tensor: ...


class LastCast:
    """Casts, and remembers the last one while its input lives: layers that share an input cast and keep it once."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._cast: Quantized | None = None

    @torch.no_grad()
    def __call__(self, source: Tensor | Again, block: Block, power_of_two: bool) -> Quantized:
        """Of a tensor, or of what a function gives."""
        key = (id(source), source._version if isinstance(source, Tensor) else 0, block, power_of_two)
        if self._cast is None or self._key != key:
            x = source if isinstance(source, Tensor) else source()
            self._cast = cast(x.reshape(-1, x.shape[-1]), block, power_of_two)
            self._key = key
            self._input = weakref.ref(source, self._forget)  # another source may get the same id later
        return self._cast

    def _forget(self, gone: weakref.ref[Any]) -> None:
        if gone is self._input:
            self._cast = None


def _as_it_came(x: Tensor, block: Block, power_of_two: bool) -> Quantized | None:
    """`x.quantized`, if it is what a cast for this operand would make."""
    return getattr(x, "quantized", None) if block == TILE_1X128 and power_of_two else None


class Fp8Linear:
    """One layer's products in FP8, through a `Gemm` back end. casts: shared by layers that may have the same input."""

    def __init__(self, recipe: Recipe, layer: LayerRecipe, gemm: Gemm, casts: LastCast | None = None) -> None:
        self.recipe, self.layer, self.gemm, self.casts = recipe, layer, gemm, casts or LastCast()

    def __call__(
        self, x: Tensor, weight: Tensor, weight_grad: WeightGrad, num_tokens_per_expert_E: Tensor | None = None
    ) -> Tensor:
        again: Again | None = getattr(x, "again", None)
        return _Fp8LinearFunction.apply(x, self.operand(x), again, weight, num_tokens_per_expert_E, weight_grad, self)

    def operand(self, x: Tensor) -> Quantized:
        """x of fprop, [T, K]."""
        block, power_of_two = self.recipe.activation, self.layer.input_power_of_two
        return _as_it_came(x, block, power_of_two) or self.casts(x, block, power_of_two)

    def gradient_operand(self, dy: Tensor) -> Quantized:
        """dy of dgrad, [T, N]."""
        block, power_of_two = self.recipe.gradient, self.layer.gradient_power_of_two
        return _as_it_came(dy, block, power_of_two) or cast(dy.reshape(-1, dy.shape[-1]), block, power_of_two)

    def keep_input(self, x_TK: Tensor, q_TK: Quantized) -> Quantized | E5M6:
        return cast_e5m6(x_TK) if self.layer.cache == "e5m6" else q_TK

    def input_again(self, again: Again) -> Quantized | E5M6:
        """What `keep_input` would have kept."""
        if self.layer.cache == "e5m6":
            x = again()
            return cast_e5m6(x.reshape(-1, x.shape[-1]))
        return self.casts(again, self.recipe.activation, self.layer.input_power_of_two)

    def input_for_wgrad(self, kept: list[Tensor], cols: int, num_tokens_per_expert_E: Tensor | None) -> Quantized:
        """The kept input as (K, R'), in tiles along the rows."""
        x_TK = dequantize_e5m6(E5M6(*kept), cols) if self.layer.cache == "e5m6" else Quantized(*kept)
        return transpose_cast(x_TK, num_tokens_per_expert_E, self.recipe.activation, self.layer.input_power_of_two)


class _Fp8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q_TK: Quantized,
        again: Again | None,
        weight: Tensor,
        counts_E: Tensor | None,
        weight_grad: WeightGrad,
        linear: Fp8Linear,
    ):
        recipe, gemm = linear.recipe, linear.gemm
        q_weight = cast(weight, recipe.weight, recipe.power_of_two)
        kept = () if again else linear.keep_input(x.reshape(-1, x.shape[-1]), q_TK)
        ctx.save_for_backward(counts_E, *kept)
        ctx.again, ctx.x_shape, ctx.x_dtype = again, x.shape, x.dtype
        ctx.weight, ctx.weight_grad, ctx.linear = weight, weight_grad, linear
        if counts_E is not None:
            return gemm.grouped_by_rows(q_TK, q_weight, counts_E, x.dtype)
        return gemm.dense(q_TK, q_weight, x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        (counts_E, *kept), weight, linear = ctx.saved_tensors, ctx.weight, ctx.linear
        recipe, layer, gemm = linear.recipe, linear.layer, linear.gemm
        dy_TN = dy.reshape(-1, dy.shape[-1])

        dx = None
        if ctx.needs_input_grad[0]:
            q_TN = linear.gradient_operand(dy)
            q_weight = transpose_blocks(cast(weight, recipe.weight, recipe.power_of_two))
            if counts_E is not None:
                dx = gemm.grouped_by_rows(q_TN, q_weight, counts_E, ctx.x_dtype)
            else:
                dx = gemm.dense(q_TN, q_weight, ctx.x_dtype).view(ctx.x_shape)
        if not ctx.needs_input_grad[3]:
            return dx, None, None, None, None, None, None
        if ctx.again is not None:
            kept = list(linear.input_again(ctx.again))

        dy_NT = transpose_cast(dy_TN, counts_E, recipe.gradient, layer.gradient_power_of_two)
        cols = ctx.x_shape[-1]

        def compute() -> Tensor | None:
            x_KT = linear.input_for_wgrad(kept, cols, counts_E)
            if counts_E is not None:
                grad = gemm.grouped_by_k(dy_NT, x_KT, counts_E, torch.float32)
            else:
                grad = gemm.dense(dy_NT, x_KT, torch.float32)
            main_grad = getattr(weight, "main_grad", None)
            if main_grad is None:
                return grad.to(weight.dtype)
            main_grad.add_(grad)
            return None

        return dx, None, None, ctx.weight_grad(weight, compute), None, None, None


def make_linear(backend: str, recipe: Recipe, name: str, casts: LastCast | None = None) -> LinearProduct | None:
    """The FP8 product for the layer called `name`, or None where the recipe keeps that layer in high precision.

    casts: give layers that may get the same input one between them.
    Raises ValueError with the reason if the back end cannot run here, ImportError with the line that installs what is
    missing.
    """
    layer = layer_recipe(recipe, name)
    if layer is None:
        return None
    if backend == "te":
        from infra.fp8.te import TransformerEngineLinear

        return TransformerEngineLinear(recipe)
    return Fp8Linear(recipe, layer, GEMMS[backend](recipe), casts)


BACKENDS = (*GEMMS, "te")
