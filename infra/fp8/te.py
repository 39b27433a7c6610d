"""Linear layers through Transformer Engine: its `Float8BlockScaling` recipe, with our parameters and our hole.

Not yet measured: written against the documented interface of Transformer Engine 2.20, tested by the tests marked `gpu`.

Transformer Engine owns casts, caches and products, so it is a back end of the whole layer rather than of a product. A
`te.Linear` is built when a weight is first seen and is given that very parameter. With `delay_wgrad_compute` its
backward computes dgrad only, and `backward_dw()` the oldest weight gradient still waiting: that is `compute()` for our
hole, so the weight gradients of one layer must run in the order of its input gradients, as every schedule here does.
`fuse_wgrad_accumulation` adds them to `weight.main_grad`; without it `backward_dw()` would overwrite `weight.grad` and
lose all microbatches but the last, so a weight without `main_grad` is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.fp8.quantize import align_groups, aligned_counts
from infra.fp8.recipe import Recipe

INSTALL = "make install-te (compiles transformer-engine[pytorch]>=2.9 against the installed CUDA build of torch)"
ROWS_DENSE, ROWS_GROUPED = 128, 16  # Transformer Engine's multiples


def _load(recipe: Recipe) -> tuple[Any, Any]:
    """The module and its recipe object. Raises ValueError with the reason and the install line."""
    if recipe not in (Recipe(), Recipe(power_of_two=True)):
        raise ValueError(
            f"precision.backend=te has V3's own recipe only, not {recipe}: precision.backend=reference has all"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"precision.backend=te needs an NVIDIA Hopper GPU, and torch {torch.__version__} sees no GPU; "
            "precision.backend=reference runs anywhere"
        )
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8BlockScaling
    except ImportError as error:
        raise ImportError(f"precision.backend=te: {error}; to install: {INSTALL}") from None
    available, reason = te.is_fp8_block_scaling_available(return_reason=True)
    if not available:
        raise ValueError(f"precision.backend=te: {reason}; precision.backend=reference runs anywhere")
    if not recipe.power_of_two:  # read when Float8BlockScaling is imported first; refuse rather than differ silently
        wanted = os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES")
        if wanted != "1":
            raise ValueError(
                "precision.backend=te uses powers of two for all scale factors unless the environment has "
                "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1: set it, or take the recipe power_of_two"
            )
    return te, Float8BlockScaling()


class _AfterInputGrad(torch.autograd.Function):
    """The identity, placed before a layer: its backward runs once the layer's input gradient is there, and calls
    `then`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor):
        ctx.then()
        return dx, None


class TransformerEngineLinear:
    """A `LinearProduct` (see linear.py); the module is kept for the one weight it is called with."""

    def __init__(self, recipe: Recipe) -> None:
        self.te, self.te_recipe = _load(recipe)
        self.module: Any = None

    def _build(self, weight: Tensor) -> Any:
        if not hasattr(weight, "main_grad"):
            raise ValueError(
                "precision.backend=te adds weight gradients to weight.main_grad, and this weight has none: "
                "allocate the optimizer's buckets before the first forward"
            )
        N, K = weight.shape[-2:]
        if N % 128 or K % 128:
            raise ValueError(
                f"precision.backend=te needs multiples of 128, and this layer maps {K} features to {N}: "
                "choose sizes that are, or precision.backend=reference"
            )
        options = {
            "bias": False,
            "params_dtype": weight.dtype,
            "device": weight.device,
            "fuse_wgrad_accumulation": True,
            "delay_wgrad_compute": True,
        }
        if weight.dim() == 2:
            module = self.te.Linear(K, N, **options)
            module.weight = weight
            return module
        module = self.te.GroupedLinear(weight.shape[0], K, N, **options)
        for e in range(weight.shape[0]):
            one = torch.nn.Parameter(weight.data[e])  # a view: the optimizer's update is seen here
            one.main_grad = weight.main_grad[e]  # type: ignore[attr-defined]
            setattr(module, f"weight{e}", one)
        return module

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        weight_grad: Callable[[Tensor, Callable[[], Tensor | None]], Tensor | None],
        num_tokens_per_expert_E: Tensor | None = None,
    ) -> Tensor:
        if self.module is None:
            self.module = self._build(weight)
        if weight.requires_grad and not x.requires_grad:
            x = x.detach().requires_grad_()  # so that the backward comes by and offers the weight gradient
        x = _AfterInputGrad.apply(x, lambda: weight_grad(weight, self.module.backward_dw))
        with self.te.autocast(enabled=True, recipe=self.te_recipe):
            if num_tokens_per_expert_E is None:
                x_TK = x.reshape(-1, x.shape[-1])
                y_TN = self.module(F.pad(x_TK, (0, 0, 0, -x_TK.shape[0] % ROWS_DENSE)))
                return y_TN[: x_TK.shape[0]].view(*x.shape[:-1], -1)
            padded = aligned_counts(num_tokens_per_expert_E, ROWS_GROUPED)
            y = self.module(align_groups(x, num_tokens_per_expert_E, ROWS_GROUPED), padded.tolist())
        groups = zip(y.split(padded.tolist()), num_tokens_per_expert_E.tolist(), strict=True)
        return torch.cat([piece[:count] for piece, count in groups])
