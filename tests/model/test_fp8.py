"""What waits for the backward in FP8: each against plain autograd over what should come back."""

import pytest
import torch

from infra.fp8.gemm import ReferenceGemm
from infra.fp8.linear import Fp8Linear, LastCast
from infra.fp8.quantize import dequantize, tile_cast
from infra.fp8.recipe import RECIPES, layer_recipe
from model.fp8 import kept_in_fp8
from model.linear import at_once
from model.mlp import swiglu
from model.moe import _WeightedSwiGLU


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def linear(name="model.layers.1.mlp.down_proj"):
    recipe = RECIPES["deepseek_v3"]
    return Fp8Linear(recipe, layer_recipe(recipe, name), ReferenceGemm(recipe))


def saved_bytes(fn):
    """Of what autograd is asked to keep, each storage once."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    return sum(sizes.values()), result


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_and_its_reader_see_the_inputs_that_come_back(weighted):
    rows, width = 40, 192
    inputs = (
        [normal(rows, 2 * width), torch.rand(rows)] if weighted else [normal(rows, width), normal(rows, width, seed=1)]
    )
    fn = _WeightedSwiGLU.apply if weighted else swiglu
    weight = torch.nn.Parameter(normal(64, width, seed=2))
    product, dy = linear(), normal(rows, 64, seed=3)

    leaves = [x.clone().requires_grad_() for x in inputs]
    out = product(kept_in_fp8(fn, *leaves), weight, at_once)
    out.backward(dy)
    got = [*(leaf.grad for leaf in leaves), weight.grad]

    weight.grad = None
    exact = fn(*inputs)
    back = [dequantize(tile_cast(x), x.dtype) if x.dim() > 1 else x.clone() for x in inputs]
    twins = [x.requires_grad_() for x in back]
    again = fn(*twins)
    product(again, weight, at_once).backward(dy)
    assert torch.equal(out, product(exact, weight, at_once)), "the forward sees the inputs as they are"
    assert not torch.equal(exact, again), "and the cast is not nothing"
    for one, twin in zip(got, [*(x.grad for x in twins), weight.grad], strict=True):
        assert torch.equal(one, twin)


def test_what_can_be_computed_again_is_not_kept():
    x, weight, dy = (
        normal(40, 256).requires_grad_(),
        torch.nn.Parameter(normal(64, 256, seed=1)),
        normal(40, 64, seed=2),
    )
    product = linear()
    kept, out = saved_bytes(lambda: product(x, weight, at_once))
    out.backward(dy)
    expected, weight.grad = weight.grad, None
    assert kept == 40 * 256 + 40 * 2 * 4
    x.again = lambda: x.detach().clone()
    kept, out = saved_bytes(lambda: product(x, weight, at_once))
    assert kept == 0
    out.backward(dy)
    assert torch.equal(weight.grad, expected)


def test_rows_that_came_in_fp8_are_the_operand():
    x, weight = normal(40, 256), normal(64, 256, seed=1)
    other = normal(40, 256, seed=9)
    product = linear("model.layers.1.mlp.experts.gate_up_proj")
    expected = product(other, weight, at_once)
    plain = product(x, weight, at_once)
    x.quantized = tile_cast(other, power_of_two=True)
    assert torch.equal(product(x, weight, at_once), expected)
    _, out = saved_bytes(lambda: product(x.requires_grad_(), torch.nn.Parameter(weight), at_once))
    assert any(t.data_ptr() == x.quantized.q.data_ptr() for t in out.grad_fn.saved_tensors if t is not None)
    x.quantized = tile_cast(x.detach(), power_of_two=True)
    assert torch.equal(product(x, weight, at_once), plain), "a cast would have made the same"
    wants_fp32 = linear()
    assert not torch.equal(wants_fp32.operand(x).sf, x.quantized.sf), "nor is it the operand of who wants another"


@pytest.mark.parametrize("name", ["experts.down_proj", "shared_experts.down_proj"])
def test_a_gradient_that_came_in_fp8_is_cast_no_more(name):
    x, weight, dy = normal(40, 256).requires_grad_(), normal(64, 256, seed=1), normal(40, 64, seed=2)
    product = linear(f"model.layers.1.mlp.{name}")
    dy = dequantize(tile_cast(dy, power_of_two=True), dy.dtype)

    def gradient(of):
        dy.quantized = tile_cast(of, power_of_two=True)
        return torch.autograd.grad(product(x, weight, at_once), x, dy)[0]

    expected = torch.autograd.grad(product(x, weight, at_once), x, dy.clone())[0]
    assert torch.equal(gradient(dy), expected), "casting it again would have given the same values"
    is_read = not torch.equal(gradient(-dy), expected)
    assert is_read == (name == "experts.down_proj"), "by who asks for powers of two alone"


def test_an_input_that_layers_share_is_cast_once():
    casts, recipe = LastCast(), RECIPES["deepseek_v3"]
    layer = layer_recipe(recipe, "model.layers.0.mlp.up_proj")
    first, second = (Fp8Linear(recipe, layer, ReferenceGemm(recipe), casts) for _ in range(2))
    x = normal(40, 256).requires_grad_()
    weights = [torch.nn.Parameter(normal(64, 256, seed=i)) for i in (1, 2)]
    kept, outputs = saved_bytes(lambda: [first(x, weights[0], at_once), second(x, weights[1], at_once)])
    assert kept == 40 * 256 + 40 * 2 * 4
    before = first.operand(x)
    with torch.no_grad():
        x.mul_(2)
    assert not torch.equal(first.operand(x).sf, before.sf), "a value that has changed is cast anew"
    outputs = x = None
    assert outputs is x
    assert casts._cast is None, "and nothing outlives its input"
