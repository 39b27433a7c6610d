"""The matrix products everything here is made of, by the fastest way the machine offers.

On a CPU that is oneDNN. torch takes it by itself in bfloat16, but in float32 it calls MKL, which on a processor it does
not know reaches less than half the speed; so float32 products go to oneDNN by name. oneDNN compiles a kernel for each
new shape (most of a millisecond) and an expert's number of tokens is new every step: rows are therefore rounded up, so
that few shapes exist. On a CPU a grouped product is one product per group whoever writes the loop
(torch's own grouped matmul too); on an accelerator it is one kernel. Many small experts in bfloat16 are cheaper as one
batched product, each expert's rows padded to the longest's.

Shapes: M, K, N sides of a product; R rows, sorted by expert; E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND = {torch.float32: 8, torch.bfloat16: 32}  # rows of a group are rounded up to a multiple of this
BATCH_ROUND = 16  # the same, for the rows of a batched product
SMALL = 64  # mean rows of an expert up to which a batched product is tried
WASTE = 3  # and how many times the rows it may pad them to
LARGE = 3_000_000  # multiply-adds from which oneDNN pays in float32, in spite of its overhead per call


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ONEDNN = _has_onednn()


def _by_name(operand: Tensor, multiply_adds: int) -> bool:
    """Whether a product of this size goes to oneDNN by name."""
    return ONEDNN and operand.is_cpu and operand.dtype == torch.float32 and multiply_adds >= LARGE


def mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b for two matrices of one dtype, of any strides: (M, N)."""
    if _by_name(a_MK, a_MK.numel() * b_KN.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
    return torch.mm(a_MK, b_KN)


def add_mm_(into_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Adds a @ b to `into`, whose dtype may be wider."""
    if into_MN.dtype == a_MK.dtype and not _by_name(a_MK, a_MK.numel() * b_KN.shape[1]):
        return into_MN.addmm_(a_MK, b_KN)
    return into_MN.add_(mm(a_MK, b_KN))


def _takes_grouped_kernel(*operands: Tensor) -> bool:
    """torch's grouped matmul has no float64 and wants rows (or columns) that start at multiples of 16 bytes."""
    return all(t.dtype != torch.float64 and t.numel() and t.shape[-1] * t.itemsize % 16 == 0 for t in operands)


def _ends(num_tokens_per_expert_E: Tensor) -> Tensor:
    return num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)


def _rounded(x_RK: Tensor, start: int, size: int) -> tuple[int, int]:
    """The window of rounded size that holds rows [start, start + size) of x, reaching into the neighbours' rows."""
    unit, R = ROUND[x_RK.dtype], x_RK.shape[0]
    rounded = min(-(-size // unit) * unit, R)
    return min(start, R - rounded), rounded


class _Batch(NamedTuple):
    """Where the rows of E experts stand when each expert has P of them: row r at slot_R[r] of E P."""

    slot_R: Tensor
    row_EP: Tensor  # the row in each slot; where an expert has no more, rows of the next one

    def fill(self, x_RK: Tensor) -> Tensor:
        """(E, P, K), with foreign rows behind an expert's own: their products are not looked at."""
        return x_RK.index_select(0, self.row_EP.flatten()).view(*self.row_EP.shape, -1)

    def pad(self, x_RK: Tensor) -> Tensor:
        """(E, P, K), with zeros behind an expert's own rows."""
        x = x_RK.new_zeros(self.row_EP.numel(), x_RK.shape[1])
        return x.index_copy_(0, self.slot_R, x_RK).view(*self.row_EP.shape, -1)

    def own(self, y_EPN: Tensor) -> Tensor:
        """(R, N), the rows themselves."""
        return y_EPN.flatten(0, 1).index_select(0, self.slot_R)


def _batch(x_RK: Tensor, num_tokens_per_expert_E: Tensor) -> _Batch | None:
    """How to run small experts as one batched product of P rows each; None where that does not pay."""
    R, E = x_RK.shape[0], len(num_tokens_per_expert_E)
    if not x_RK.is_cpu or x_RK.dtype != torch.bfloat16 or not 0 < R <= SMALL * E:
        return None
    P = -(-int(num_tokens_per_expert_E.max()) // BATCH_ROUND) * BATCH_ROUND
    if E * P > WASTE * R:
        return None
    starts_E = num_tokens_per_expert_E.cumsum(0) - num_tokens_per_expert_E
    shift_E = torch.arange(E) * P - starts_E
    slot_R = torch.arange(R) + shift_E.repeat_interleave(num_tokens_per_expert_E)
    return _Batch(slot_R, (starts_E[:, None] + torch.arange(P)).clamp_(max=R - 1))


def grouped_mm(x_RK: Tensor, weight_EKN: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    """Rows of expert e times matrix e: the rows are sorted by expert, and an expert may have none.

    Args:
        x_RK: rows; weight_EKN: one matrix per expert, any strides; num_tokens_per_expert_E: int64, sums to R.
    Returns: (R, N).
    """
    R, (E, K, N) = x_RK.shape[0], weight_EKN.shape
    if batch := _batch(x_RK, num_tokens_per_expert_E):
        return batch.own(torch.bmm(batch.fill(x_RK), weight_EKN))
    by_name = _by_name(x_RK, R * K * N // max(1, E))
    if not by_name and _takes_grouped_kernel(x_RK, weight_EKN, weight_EKN.mT):
        return F.grouped_mm(x_RK, weight_EKN, offs=_ends(num_tokens_per_expert_E))
    y_RN = x_RK.new_empty(R, N)
    start = 0
    for size, weight_KN in zip(num_tokens_per_expert_E.tolist(), weight_EKN, strict=True):
        rows = slice(start, start + size)
        if not by_name:
            torch.mm(x_RK[rows], weight_KN, out=y_RN[rows])
        elif size:
            first, rounded = _rounded(x_RK, start, size)
            y_RN[rows] = mm(x_RK[first : first + rounded], weight_KN)[start - first : start - first + size]
        start += size
    return y_RN


def grouped_outer(
    dy_RN: Tensor, x_RK: Tensor, num_tokens_per_expert_E: Tensor, into_ENK: Tensor | None = None
) -> Tensor:
    """dy_e^T x_e of every expert e, zeros for one without rows: (E, N, K); or that added to `into_ENK`."""
    if not x_RK.is_cpu and _takes_grouped_kernel(dy_RN, x_RK):
        grad_ENK = F.grouped_mm(dy_RN.t(), x_RK, offs=_ends(num_tokens_per_expert_E))
        return grad_ENK if into_ENK is None else into_ENK.add_(grad_ENK)
    if batch := _batch(x_RK, num_tokens_per_expert_E):
        dy_ENP, x_EPK = batch.pad(dy_RN).mT, batch.fill(x_RK)
        if into_ENK is not None and into_ENK.dtype == x_RK.dtype:
            return into_ENK.baddbmm_(dy_ENP, x_EPK)
        grad_ENK = torch.bmm(dy_ENP, x_EPK)
        return grad_ENK if into_ENK is None else into_ENK.add_(grad_ENK)
    sizes = num_tokens_per_expert_E.tolist()
    shape = len(sizes), dy_RN.shape[1], x_RK.shape[1]
    grad_ENK = dy_RN.new_zeros(shape) if into_ENK is None else into_ENK
    start = 0
    for size, dy, x, grad_NK in zip(sizes, dy_RN.split(sizes), x_RK.split(sizes), grad_ENK, strict=True):
        if size and x.is_cpu and (x.dtype == torch.bfloat16 or _by_name(x, size * grad_NK.numel())):
            first, rounded = _rounded(x_RK, start, size)  # zero rows leave the product as it is
            dy = F.pad(dy, (0, 0, start - first, first + rounded - start - size))
            x = x_RK[first : first + rounded]
        if size:
            add_mm_(grad_NK, dy.t(), x)
        start += size
    return grad_ENK
