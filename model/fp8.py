"""FP8 for a model: fills the `product` holes of the layers that the recipe does not keep high (V3 report, section 3.3).

Embedding, head, router, norms and the attention core stay as they are; every other matrix multiplies in FP8, forward
and backward, whatever the layout: the layers cannot tell.
"""

from __future__ import annotations

from torch import nn

from infra.fp8.linear import make_linear
from infra.fp8.recipe import RECIPES
from model.linear import Linear, plain
from model.moe import Experts


def use_fp8(module: nn.Module, name: str, backend: str, recipe: str) -> None:
    """Fills the holes in `module`, whose whole-model name is `name`.

    backend: one of `infra.fp8.linear.BACKENDS`. recipe: one of `RECIPES`.
    Raises RuntimeError with the reason and the line that helps where the back end cannot run.
    """
    for path, layer in module.named_modules(prefix=name):
        if isinstance(layer, Linear):
            layer.product = make_linear(backend, RECIPES[recipe], path) or plain
        elif isinstance(layer, Experts):
            layer.gate_up_product = make_linear(backend, RECIPES[recipe], f"{path}.gate_up_proj") or plain
            layer.down_product = make_linear(backend, RECIPES[recipe], f"{path}.down_proj") or plain
