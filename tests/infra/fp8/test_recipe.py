"""The recipe is data: which layers, which scale factors."""

import subprocess
import sys

import pytest

from infra.fp8.recipe import RECIPES, Recipe, layer_recipe

V3 = RECIPES["deepseek_v3"]


def test_no_torch() -> None:
    code = "import sys, infra.fp8.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens",
        "lm_head",
        "model.layers.3.mlp.gate",
        "model.layers.3.mlp.gate.weight",
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.kv_a_layernorm",
        "model.norm",
    ],
)
def test_layers_kept_in_high_precision(name: str) -> None:
    assert layer_recipe(V3, name) is None


@pytest.mark.parametrize(
    ("name", "input_power_of_two", "gradient_power_of_two", "cache"),
    [
        ("model.layers.3.self_attn.q_a_proj", False, False, "fp8"),
        ("model.layers.3.self_attn.kv_b_proj.weight", False, False, "fp8"),
        ("model.layers.3.self_attn.o_proj", True, False, "e5m6"),
        ("model.layers.3.mlp.experts.gate_up_proj", True, False, "fp8"),
        ("model.layers.3.mlp.experts.17.up_proj", True, False, "fp8"),
        ("model.layers.3.mlp.experts.down_proj", False, True, "fp8"),
        ("model.layers.3.mlp.shared_experts.gate_proj", False, False, "fp8"),
        ("model.layers.0.mlp.down_proj", False, False, "fp8"),
        ("model.layers.61.eh_proj", False, False, "fp8"),
    ],
)
def test_forced_powers_of_two(name: str, input_power_of_two: bool, gradient_power_of_two: bool, cache: str) -> None:
    layer = layer_recipe(V3, name)
    assert layer is not None
    assert (layer.input_power_of_two, layer.gradient_power_of_two, layer.cache) == (
        input_power_of_two,
        gradient_power_of_two,
        cache,
    )


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="after a multiple of 32"):
        Recipe(promote_every=48)
    with pytest.raises(ValueError, match="2 to 24"):
        Recipe(accumulator_bits=40)
