"""Grouped products by every way they take, against one product per expert."""

import pytest
import torch

from model import matmul
from model.matmul import grouped_mm, grouped_outer

COUNTS = {
    "even": [3, 3, 3, 3],
    "uneven, one empty": [7, 0, 1, 4],
    "all on one": [12, 0, 0, 0],
    "none": [0, 0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("waste", [0, 100], ids=["one by one", "one batch"])
def test_small_experts_in_bfloat16(monkeypatch, counts, waste):
    """To BF16 rounding of the sums; the float64 twins of the layers stand in test_linear.py."""
    monkeypatch.setattr(matmul, "WASTE", waste)
    counts_E = torch.tensor(counts)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 16, generator=generator).bfloat16()
    dy = torch.randn(sum(counts), 8, generator=generator).bfloat16()
    weight = torch.randn(4, 16, 8, generator=generator).bfloat16()
    y, grad = grouped_mm(x, weight, counts_E), grouped_outer(dy, x, counts_E)
    start = 0
    for e, size in enumerate(counts):
        rows = slice(start, start + size)
        torch.testing.assert_close(y[rows], x[rows] @ weight[e], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grad[e], dy[rows].t() @ x[rows], rtol=2e-2, atol=2e-2)
        start += size
    for dtype in (torch.float32, torch.bfloat16):
        into = grouped_outer(dy, x, counts_E, into_ENK=torch.ones(4, 8, 16, dtype=dtype))
        torch.testing.assert_close(into.float(), 1 + grad.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_rounded_experts_in_float32(monkeypatch, counts):
    """Products by name, whose rows are rounded up into the neighbours', against the same in float64."""
    monkeypatch.setattr(matmul, "LARGE", 0)
    counts_E = torch.tensor([9 * count for count in counts])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(int(counts_E.sum()), 16, generator=generator)
    dy = torch.randn(len(x), 8, generator=generator)
    weight = torch.randn(4, 16, 8, generator=generator)
    y, grad = grouped_mm(x, weight, counts_E), grouped_outer(dy, x, counts_E)
    for e, (x_e, dy_e, y_e) in enumerate(zip(*(t.split(counts_E.tolist()) for t in (x, dy, y)), strict=True)):
        torch.testing.assert_close(y_e.double(), x_e.double() @ weight[e].double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(grad[e].double(), dy_e.double().t() @ x_e.double(), rtol=0, atol=2e-5)
