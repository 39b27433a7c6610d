"""The GPU back ends without a GPU: stand-ins for the libraries check every layout that these document, and multiply.

They prove that what is handed over is what is meant - padding, strides, groups, the order of deferred gradients - and
nothing
about the libraries themselves: that is for the tests marked `gpu`.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import infra.fp8.te as te_backend
from infra.fp8 import gemm_cuda
from infra.fp8.gemm import GEMMS, ReferenceGemm
from infra.fp8.linear import make_linear
from infra.fp8.quantize import Quantized, block_cast, tile_cast, transpose_cast
from infra.fp8.recipe import RECIPES, Recipe

LAYER = "model.layers.1.self_attn.q_a_proj"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fake_scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, output_dtype) -> Tensor:
    """torch.nn.functional.scaled_mm, with the checks of ATen/native/cuda/ScaledBlas.cpp."""
    (M, K), N = a.shape, b.shape[1]
    assert b.shape[0] == K
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert K % 16 == N % 16 == 0
    assert output_dtype in (torch.bfloat16, torch.float32)
    k = -(-K // 128)
    assert recipe_a == F.ScalingType.BlockWise1x128
    assert scale_a.shape == (M, k)
    assert scale_a.stride(0) == 1
    assert scale_a.stride(1) == M or k == 1
    if recipe_b == F.ScalingType.BlockWise128x128:
        rounded = k + -k % 4
        assert scale_b.shape == (rounded, -(-N // 128))
        assert scale_b.stride(0) == 1
        assert scale_b.stride(1) == rounded or scale_b.shape[1] == 1
        sf_b = scale_b[:k].t().contiguous()
    else:
        assert scale_b.shape == (N, k)
        assert scale_b.stride(0) == 1
        assert scale_b.stride(1) == N or k == 1
        sf_b = scale_b.contiguous()
    x, y = Quantized(a, scale_a.contiguous()), Quantized(b.t(), sf_b)
    return ReferenceGemm(Recipe()).dense(x, y, output_dtype)


def fake_deep_gemm() -> ModuleType:
    """DeepGEMM's SM90 functions, with its documented layouts."""
    reference = ReferenceGemm(Recipe())

    def fp8_gemm_nt(a: Any, b: Any, d: Tensor, c: Tensor | None = None, *, recipe: tuple[int, int, int]) -> None:
        (M, K), N = a[0].shape, b[0].shape[0]
        assert K % 128 == 0
        assert a[1].shape == (M, K // 128)
        assert b[1].shape == (N if recipe[1] == 1 else -(-N // 128), K // 128)
        assert d.dtype == (torch.float32 if recipe[1] == 1 else torch.bfloat16)
        product = reference.dense(Quantized(*a), Quantized(*b), torch.float32)
        d.copy_(product if c is None else product + c)

    def m_grouped_fp8_gemm_nt_contiguous(a: Any, b: Any, d: Tensor, layout: Tensor) -> None:
        assert layout.dtype == torch.int32
        assert len(layout) == len(a[0]) == len(d)
        assert len(layout) % 128 == 0
        d.fill_(torch.nan)  # rows of no expert are not written
        for block in range(0, len(layout), 128):
            experts = {e for e in layout[block : block + 128].tolist() if e >= 0}
            assert len(experts) == 1  # a block of rows belongs to one expert
            (e,) = experts
            x = Quantized(a[0][block : block + 128], a[1][block : block + 128])
            d[block : block + 128] = reference.dense(x, Quantized(b[0][e], b[1][e]), torch.bfloat16)

    def k_grouped_fp8_gemm_nt_contiguous(
        a: Any, b: Any, d: Tensor, ks: list[int], ks_tensor: Tensor, c: Tensor, recipe: tuple[int, int, int]
    ) -> None:
        assert recipe == (1, 1, 128)
        assert ks_tensor.dtype == torch.int32
        assert ks_tensor.tolist() == ks
        start = 0
        for e, k in enumerate(ks):
            assert k % 128 == 0

            def matrix(x: Any, rows: int, start: int = start, k: int = k) -> Quantized:
                assert x[1].shape == (rows, sum(ks) // 128)
                q = x[0][start * rows : (start + k) * rows].view(rows, k)
                return Quantized(q, x[1][:, start // 128 : (start + k) // 128].contiguous())

            product = reference.dense(matrix(a, d.shape[1]), matrix(b, d.shape[2]), torch.float32)
            d[e] = c[e] + product
            start += k

    module = ModuleType("deep_gemm")
    for function in (fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, k_grouped_fp8_gemm_nt_contiguous):
        setattr(module, function.__name__, function)
    module.get_mk_alignment_for_contiguous_layout = lambda: 128  # type: ignore[attr-defined]
    return module


@pytest.fixture
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_cuda, "_require_hopper", lambda *_: None)
    monkeypatch.setattr(F, "scaled_mm", fake_scaled_mm)
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm())


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("backend", ["scaled_mm", "deep_gemm"])
@pytest.mark.parametrize("shape", [(256, 512, 384), (100, 70, 200), (3, 300, 1000), (0, 16, 128)])
def test_dense(backend: str, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    for b_cast, dtype in ((block_cast, torch.bfloat16), (tile_cast, torch.float32)):
        a, b = tile_cast(normal(M, K)), b_cast(normal(N, K, seed=1))
        expected = ReferenceGemm(Recipe()).dense(a, b, torch.float32)
        d = GEMMS[backend](Recipe()).dense(a, b, dtype)
        assert d.dtype == dtype
        torch.testing.assert_close(d.float(), expected, rtol=5e-3, atol=1e-2)


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("backend", ["scaled_mm", "deep_gemm"])
@pytest.mark.parametrize("counts", [[3, 0, 200, 61, 128], [0, 0], [256], [1]])
def test_grouped(backend: str, counts: list[int]) -> None:
    counts_E = torch.tensor(counts)
    R, E, N, K = sum(counts), len(counts), 70, 200
    x, dy = normal(R, K), normal(R, N, seed=2)
    a, b = tile_cast(x), block_cast(normal(E, N, K, seed=1))
    dy_NR, x_KR = transpose_cast(dy, counts_E), transpose_cast(x, counts_E)
    reference, gemm = ReferenceGemm(Recipe()), GEMMS[backend](Recipe())
    y = gemm.grouped_by_rows(a, b, counts_E, torch.bfloat16)
    torch.testing.assert_close(
        y.float(), reference.grouped_by_rows(a, b, counts_E, torch.float32), rtol=5e-3, atol=1e-2
    )
    dw = gemm.grouped_by_k(dy_NR, x_KR, counts_E, torch.float32)
    torch.testing.assert_close(dw, reference.grouped_by_k(dy_NR, x_KR, counts_E, torch.float32), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("backend", ["scaled_mm", "deep_gemm"])
def test_recipes_without_kernels_are_refused(backend: str) -> None:
    for recipe, reason in (("tensor_scales", "1x128 tiles and 128x128"), ("hopper", "as the hardware does")):
        with pytest.raises(ValueError, match=reason):
            GEMMS[backend](RECIPES[recipe])


class FakeModule(torch.nn.Module):
    """te.Linear and te.GroupedLinear with delay_wgrad_compute and fuse_wgrad_accumulation: plain products, a queue."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        assert options["delay_wgrad_compute"]
        assert options["fuse_wgrad_accumulation"]
        assert not options["bias"]
        self.num_gemms = sizes[0] if len(sizes) == 3 else None
        self.queue: list[tuple[Tensor, Tensor, list[int]]] = []

    def forward(self, x: Tensor, m_splits: list[int] | None = None) -> Tensor:
        assert x.dim() == 2
        assert x.shape[0] % (128 if m_splits is None else 16) == 0
        splits, weights = [x.shape[0]], [self.weight] if m_splits is None else []
        if m_splits is not None:
            assert all(m % 16 == 0 for m in m_splits)
            splits, weights = m_splits, [getattr(self, f"weight{e}") for e in range(self.num_gemms or 0)]
        y = torch.cat([x_e @ w.detach().t() for x_e, w in zip(x.split(splits), weights, strict=True)])
        y.register_hook(lambda dy: self.queue.append((dy, x.detach(), splits)))
        self.weights = weights
        return y

    def backward_dw(self) -> None:
        dy, x, splits = self.queue.pop(0)
        for w, dy_e, x_e in zip(self.weights, dy.split(splits), x.split(splits), strict=True):
            w.main_grad.add_(dy_e.t() @ x_e)


@pytest.mark.parametrize("counts", [None, torch.tensor([5, 0, 130, 65])])
def test_transformer_engine_defers_into_main_grad(monkeypatch: pytest.MonkeyPatch, counts: Tensor | None) -> None:
    from contextlib import nullcontext

    te = SimpleNamespace(Linear=FakeModule, GroupedLinear=FakeModule, autocast=lambda **_: nullcontext())
    monkeypatch.setattr(te_backend, "_load", lambda recipe: (te, None))
    linear = make_linear("te", Recipe(), LAYER)
    assert linear is not None
    shape, waiting = (256, 128) if counts is None else (4, 256, 128), []
    weight = torch.nn.Parameter(normal(*shape, seed=9))
    with pytest.raises(ValueError, match="this weight has none"):
        linear(normal(200, 128), weight, lambda w, compute: compute(), counts)
    weight.main_grad = torch.zeros(shape)  # type: ignore[attr-defined]
    expected, splits = torch.zeros(shape), [200] if counts is None else counts.tolist()
    for microbatch in range(3):
        x, dy = normal(200, 128, seed=microbatch).requires_grad_(), normal(200, 256, seed=20 + microbatch)
        y = linear(x, weight, lambda w, compute: waiting.append(compute), counts)
        y.backward(dy)
        matrices = weight.detach().view(-1, 256, 128)
        for m, dw, x_e, dy_e, y_e, dx_e in zip(
            matrices,
            expected.view(-1, 256, 128),
            x.detach().split(splits),
            dy.split(splits),
            y.detach().split(splits),
            x.grad.split(splits),  # type: ignore[union-attr]
            strict=True,
        ):
            torch.testing.assert_close(y_e, x_e @ m.t())
            torch.testing.assert_close(dx_e, dy_e @ m)
            dw += dy_e.t() @ x_e
    assert (weight.main_grad == 0).all()  # type: ignore[attr-defined]
    assert len(waiting) == 3
    linear(normal(200, 128), weight, lambda w, compute: waiting.append(compute), counts).sum().backward()
    assert len(waiting) == 4  # an input that needs no gradient costs the weight none
    waiting.pop()
    for compute in waiting:
        assert compute() is None
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]
