"""The FP8 linear layer: its products, what it keeps, and a weight gradient that can wait."""

import pytest
import torch
from torch import Tensor

from infra.fp8.gemm import ReferenceGemm
from infra.fp8.linear import BACKENDS, Fp8Linear, make_linear
from infra.fp8.quantize import block_cast, cast_e5m6, dequantize, dequantize_e5m6, tile_cast, transpose_cast
from infra.fp8.recipe import RECIPES, Recipe, layer_recipe

COUNTS = torch.tensor([5, 0, 130, 65])
LAYER, OUTPUT = "model.layers.1.self_attn.q_a_proj", "model.layers.1.self_attn.o_proj"


def at_once(weight: Tensor, compute) -> Tensor | None:
    return compute()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, power_of_two: bool = False) -> Tensor:
    return dequantize(tile_cast(x, power_of_two))


def reference(name: str, recipe: str = "deepseek_v3") -> Fp8Linear:
    linear = make_linear("reference", RECIPES[recipe], name)
    assert isinstance(linear, Fp8Linear)
    return linear


@pytest.mark.parametrize("name", [LAYER, OUTPUT])
def test_the_three_products(name: str) -> None:
    x, weight, dy = normal(2, 75, 200).requires_grad_(), normal(140, 200, seed=1).requires_grad_(), normal(2, 75, 140)
    y = reference(name)(x, weight, at_once)
    y.backward(dy)
    pow2 = name == OUTPUT
    rows, dy_rows = x.detach().view(150, 200), dy.view(150, 140)
    w = dequantize(block_cast(weight.detach()))
    torch.testing.assert_close(y.view(150, 140), rounded(rows, pow2) @ w.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.view(150, 200), rounded(dy_rows) @ w, rtol=1e-5, atol=1e-4)
    kept = dequantize_e5m6(cast_e5m6(rows), 200) if pow2 else rounded(rows)
    dw = dequantize(transpose_cast(dy_rows)) @ dequantize(transpose_cast(kept, power_of_two=pow2)).t()
    torch.testing.assert_close(weight.grad, dw, rtol=1e-5, atol=1e-4)
    exact = dy_rows.double().t() @ rows.double()
    assert (weight.grad - exact).norm() < 0.06 * exact.norm()


def test_experts_are_linear_layers_of_their_own() -> None:
    R = int(COUNTS.sum())
    x, weight, dy = (
        normal(R, 200).requires_grad_(),
        normal(4, 140, 200, seed=1).requires_grad_(),
        normal(R, 140, seed=2),
    )
    linear = reference("model.layers.1.mlp.experts.down_proj")
    y = linear(x, weight, at_once, COUNTS)
    y.backward(dy)
    ends = COUNTS.cumsum(0).tolist()
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        x_e, weight_e = x.detach()[start:end].requires_grad_(), weight.detach()[e].requires_grad_()
        y_e = linear(x_e, weight_e, at_once)
        y_e.backward(dy[start:end])
        torch.testing.assert_close(y[start:end], y_e)
        torch.testing.assert_close(x.grad[start:end], x_e.grad)
        torch.testing.assert_close(weight.grad[e], weight_e.grad)
    assert (weight.grad[1] == 0).all()


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_a_weight_gradient_that_waits_is_the_same(counts: Tensor | None) -> None:
    shape = (140, 200) if counts is None else (4, 140, 200)
    linear, waiting = reference(LAYER), []

    def later(weight: Tensor, compute) -> None:
        waiting.append(compute)

    grads = []
    for hole in (at_once, later):
        weight = torch.nn.Parameter(normal(*shape, seed=1))
        weight.main_grad = torch.zeros(shape)
        for microbatch in range(3):
            x = normal(200, 200, seed=microbatch).requires_grad_()
            linear(x, weight, hole, counts).backward(normal(200, 140, seed=10 + microbatch))
        assert weight.grad is None
        if hole is later:
            assert (weight.main_grad == 0).all()
            while waiting:
                assert waiting.pop(0)() is None
        grads.append(weight.main_grad)
    assert torch.equal(*grads)
    assert grads[0].any()


def kept_bytes(name: str) -> int:
    """What autograd holds between the forward and the backward."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x, weight = normal(256, 512).bfloat16().requires_grad_(), torch.nn.Parameter(normal(128, 512).bfloat16())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        reference(name)(x, weight, at_once)
    return sum(saved.values())


def test_the_input_waits_in_eight_or_twelve_bits() -> None:
    values, tiles = 256 * 512, 256 * 4
    assert kept_bytes(LAYER) == values + 4 * tiles
    assert kept_bytes(OUTPUT) == values * 12 // 8 + 4 * tiles


def test_bf16_in_bf16_out_and_fp32_weight_gradients() -> None:
    x, weight = normal(64, 256).bfloat16().requires_grad_(), torch.nn.Parameter(normal(128, 256, seed=1).bfloat16())
    weight.main_grad = torch.zeros(128, 256)
    y = reference(LAYER)(x, weight, at_once)
    y.backward(normal(64, 128, seed=2).bfloat16())
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert not torch.equal(weight.main_grad, weight.main_grad.bfloat16().float())  # FP32, never rounded to BF16


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_trains(recipe: str) -> None:
    """A regression whose loss all recipes bring down; only their precision differs."""
    linear = reference(LAYER, recipe)
    x, target = normal(128, 128), normal(128, 64, seed=1)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    losses = []
    for _ in range(30):
        loss = (linear(x, weight, at_once) - target).square().mean()
        (weight.grad,) = torch.autograd.grad(loss, weight)
        weight.data -= 6 * weight.grad
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_only_where_they_are_needed() -> None:
    x, weight = normal(10, 128), torch.nn.Parameter(normal(20, 128))
    reference(LAYER)(x, weight, at_once).sum().backward()
    assert weight.grad is not None
    frozen, x = weight.detach(), x.requires_grad_()
    reference(LAYER)(x, frozen, at_once).sum().backward()
    assert x.grad is not None


def test_high_precision_layers_have_no_fp8_product() -> None:
    for backend in BACKENDS:
        assert make_linear(backend, Recipe(), "lm_head") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_transformer_engine_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"precision\.backend=te needs an NVIDIA Hopper GPU.*sees no GPU"):
        make_linear("te", Recipe(power_of_two=True), LAYER)
    with pytest.raises(ValueError, match="V3's own recipe only"):
        make_linear("te", RECIPES["tensor_scales"], LAYER)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("counts", [None, torch.tensor([16, 0, 240, 128])])
def test_back_ends_agree_with_the_reference(backend: str, counts: Tensor | None) -> None:
    recipe = Recipe(power_of_two=True)
    results = []
    for name, device in (("reference", "cpu"), (backend, "cuda")):
        try:
            linear = make_linear(name, recipe, LAYER)
        except RuntimeError as error:
            pytest.skip(str(error))
        assert linear is not None
        shape = (256, 512) if counts is None else (4, 256, 512)
        weight = torch.nn.Parameter(normal(*shape, seed=1).bfloat16().to(device))
        weight.main_grad = torch.zeros(shape, device=device)
        x = normal(384, 512).bfloat16().to(device).requires_grad_()
        y = linear(x, weight, at_once, None if counts is None else counts.to(device))
        y.backward(normal(384, 256, seed=2).bfloat16().to(device))
        results.append([t.detach().float().cpu() for t in (y, x.grad, weight.main_grad)])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() < 5e-3 * expected.norm()


def test_the_reference_follows_the_recipe() -> None:
    """The same layer, another accumulator: the outputs differ, and by little."""
    x, weight = normal(64, 2048), normal(64, 2048, seed=1)
    layer = layer_recipe(RECIPES["deepseek_v3"], LAYER)
    assert layer is not None

    def output(recipe: str) -> Tensor:
        return Fp8Linear(RECIPES[recipe], layer, ReferenceGemm(RECIPES[recipe]))(x, weight, at_once)

    best = output("deepseek_v3")
    errors = {name: ((output(name) - best).norm() / best.norm()).item() for name in ("hopper", "no_promotion")}
    assert 0 < 10 * errors["hopper"] < errors["no_promotion"] < 0.01
