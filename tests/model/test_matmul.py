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
    into = torch.ones(4, 8, 16)
    torch.testing.assert_close(grouped_outer(dy, x, counts_E, into_ENK=into), 1 + grad.float(), rtol=2e-2, atol=2e-2)
