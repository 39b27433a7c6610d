"""Linear layers against autograd's own, and the hole for the weight gradient."""

import pytest
import torch

from model import matmul
from model.linear import Linear, plain
from model.matmul import grouped_mm, grouped_outer, mm

COUNTS = [[3, 0, 5, 2], [0, 0, 0, 0], [70, 0, 33, 1], [0, 0, 0, 10], [200, 90, 64, 32]]


def grouped(counts, dtype=torch.float64, features=(8, 16)):
    torch.manual_seed(0)
    K, N = features
    x = torch.randn(sum(counts), K, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), N, K, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.tensor(counts)


def one_by_one(x, weight, counts):
    return torch.cat([rows @ w.T for rows, w in zip(x.split(counts.tolist()), weight, strict=True)])


def test_linear_is_differentiable():
    layer = Linear(5, 3).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(layer(x), x @ layer.weight.T, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(layer, {"weight": w}, x), (x, layer.weight))


@pytest.mark.parametrize("counts", COUNTS[:2] + COUNTS[3:4])
def test_grouped_linear_is_differentiable(counts):
    x, weight, counts = grouped(counts, features=(3, 4))
    run = lambda x, weight: plain(x, weight, lambda param, compute: compute(), counts)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("features", [(8, 16), (7, 9)])  # the second is not aligned to 16 bytes
@pytest.mark.parametrize("large", [0, 3_000_000])
def test_grouped_products_are_those_of_each_group(counts, dtype, tolerance, features, large, monkeypatch):
    monkeypatch.setattr(matmul, "LARGE", large)  # 0: however small, by the way of the large ones
    x, weight, counts = (t.detach() for t in grouped(counts, dtype, features))
    y = grouped_mm(x, weight.mT, counts)
    exact = one_by_one(x.double(), weight.double(), counts)
    assert y.shape == exact.shape
    assert (y.double() - exact).norm() <= tolerance * exact.norm()
    back = grouped_mm(y, weight, counts)
    exact = one_by_one(y.double(), weight.double().mT, counts)
    assert (back.double() - exact).norm() <= tolerance * exact.norm()
    outer = grouped_outer(y, x, counts)
    split = zip(y.double().split(counts.tolist()), x.double().split(counts.tolist()), strict=True)
    exact = torch.stack([a.T @ b for a, b in split])
    assert (outer.double() - exact).norm() <= tolerance * exact.norm()
    into = torch.ones(exact.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert (grouped_outer(y, x, counts, into).double() - 1 - exact).norm() <= tolerance * (exact.norm() + 1)


@pytest.mark.parametrize("transpose", [(False, False), (True, False), (False, True), (True, True)])
def test_float32_products_are_exact_to_float32(transpose):
    torch.manual_seed(0)
    a, b = torch.randn(65, 33), torch.randn(33, 47)
    a = a.t().contiguous().t() if transpose[0] else a
    b = b.t().contiguous().t() if transpose[1] else b
    exact = a.double() @ b.double()
    assert (mm(a, b).double() - exact).norm() < 1e-6 * exact.norm()  # bfloat16 inside would give 1e-3


def test_main_grad_takes_the_gradient_and_autograd_gets_none():
    layer, twin = Linear(4, 3), Linear(4, 3)
    torch.nn.init.normal_(layer.weight)
    twin.load_state_dict(layer.state_dict())
    layer.weight.main_grad = torch.ones(3, 4, dtype=torch.float64)
    x = torch.randn(5, 4)
    for _ in range(2):
        layer(x).square().sum().backward()
        twin(x).square().sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(layer.weight.main_grad.float() - 1, twin.weight.grad, rtol=1e-5)


def test_a_put_off_weight_gradient_is_the_same_one():
    x, weight, counts = grouped([3, 0, 5, 2])
    plain(x, weight, lambda param, compute: compute(), counts).square().sum().backward()
    at_once, dx = weight.grad.clone(), x.grad.clone()
    weight.grad = x.grad = None
    put_off = []
    plain(x, weight, lambda param, compute: put_off.append((param, compute)), counts).square().sum().backward()
    assert weight.grad is None
    assert torch.equal(x.grad, dx)
    ((param, compute),) = put_off
    assert param is weight
    with torch.no_grad():
        assert torch.equal(compute(), at_once)
