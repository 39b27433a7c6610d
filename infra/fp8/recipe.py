"""What is computed in FP8, and how: DeepSeek-V3's recipe as data (report, section 3.3 and appendix B).

Every linear layer computes three products, `fprop`, `dgrad` and `wgrad`, and all three take E4M3 operands. An E4M3
value has three mantissa bits and reaches from 2^-9 to 448, so a tensor is cut into pieces that each have a scale factor
of their own:

    operand               piece      why
    activations, their    1 x 128    a token's outliers cost only that token's 128 channels; for wgrad, where tokens are
    gradients                        summed over, the pieces lie along the tokens instead (128 x 1)
    weights               128 x 128  the same pieces serve fprop and, transposed, dgrad

Scale factors are FP32, measured anew each time, and powers of two where a tensor is quantised twice: then the second
quantisation only moves the exponent. Products are summed over 128 along K in the tensor core, and these sums in FP32
("promotion"), because Hopper's tensor core keeps about 14 bits of a running sum.

The other recipes here are worse on purpose: they reproduce the published negative results.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 128
Block = tuple[int, int]  # rows and columns that share a scale factor
TILE_1X128: Block = (1, TILE)
BLOCK_128X128: Block = (TILE, TILE)
WHOLE_TENSOR: Block = (0, 0)

# Last words of module names, as in the published checkpoints.
HIGH_PRECISION = ("embed_tokens", "lm_head", "gate", "core_attention")
ATTENTION_OUTPUT = ("o_proj",)
EXPERTS_UP = ("gate_up_proj", "gate_proj", "up_proj")
EXPERTS_DOWN = ("down_proj",)


@dataclass(frozen=True)
class Recipe:
    """How operands are cast and products summed.

    activation, gradient, weight: the pieces that share a scale factor.
    power_of_two: every scale factor is a power of two, not only those that must be.
    accumulator_bits: significand bits of the tensor core's running sum, for the `reference` back end (None: FP32, 24).
    promote_every: products along K between two promotions to FP32 (None: never).
    """

    activation: Block = TILE_1X128
    gradient: Block = TILE_1X128
    weight: Block = BLOCK_128X128
    power_of_two: bool = False
    accumulator_bits: int | None = None
    promote_every: int | None = TILE

    def __post_init__(self) -> None:
        if self.accumulator_bits is not None and not 2 <= self.accumulator_bits <= 24:
            raise ValueError(
                f"accumulator_bits={self.accumulator_bits}: an FP32 register holds 2 to 24 significand bits"
            )
        if self.promote_every is not None and (self.promote_every < 32 or self.promote_every % 32):
            raise ValueError(
                f"promote_every={self.promote_every}: a tensor core instruction sums 32 products, so promotion comes "
                "after a multiple of 32"
            )


RECIPES = {
    "deepseek_v3": Recipe(),
    "power_of_two": Recipe(power_of_two=True),
    "hopper": Recipe(accumulator_bits=14),  # V3's recipe with the accumulator V3 had
    "no_promotion": Recipe(accumulator_bits=14, promote_every=None),
    "tensor_scales": Recipe(activation=WHOLE_TENSOR, gradient=WHOLE_TENSOR, weight=WHOLE_TENSOR),
    "block_gradients": Recipe(gradient=BLOCK_128X128),  # diverged in V3's 16B run (appendix B.2)
}


@dataclass(frozen=True)
class LayerRecipe:
    """What one linear layer does: how its input and output gradient are scaled, and in which format the input waits."""

    input_power_of_two: bool
    gradient_power_of_two: bool
    cache: str  # "fp8": the operand of fprop itself; "e5m6": 12 bits a value, for the input of the attention output


def layer_recipe(recipe: Recipe, name: str) -> LayerRecipe | None:
    """The part of the recipe for the layer called `name` ("model.layers.3.self_attn.o_proj"); None: not in FP8.

    Powers of two are forced (report, sections 3.3.2 and 3.3.3) for the input of the projection after attention, which
    waits as E5M6 and is quantised again in the backward; for the input of the experts' up-projection, which is
    dispatched in FP8; and for the gradient that comes back to the experts' down-projection, which is too.
    """
    words = name.split(".")
    if words[-1] == "weight":
        words.pop()
    last = words[-1]
    if last in HIGH_PRECISION or last.endswith(("norm", "layernorm")):
        return None
    is_routed = "experts" in words
    after_attention = last in ATTENTION_OUTPUT
    return LayerRecipe(
        input_power_of_two=recipe.power_of_two or after_attention or (is_routed and last in EXPERTS_UP),
        gradient_power_of_two=recipe.power_of_two or (is_routed and last in EXPERTS_DOWN),
        cache="e5m6" if after_attention else "fp8",
    )
