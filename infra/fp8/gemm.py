"""Matrix products of FP8 operands: one interface, a back end by name, and the reference that all must agree with.

A linear layer needs three products, and each is "rows of a times rows of b", both contiguous along the dimension that
is summed over, as Hopper's FP8 tensor cores want them:

    dense            d_MN  = a_MK b_NK^T           fprop, dgrad and wgrad of one matrix
    grouped_by_rows  d_RN  = a_RK b_e^T            fprop and dgrad of experts: rows are sorted by expert
    grouped_by_k     d_EMN = a_e b_e^T             wgrad of experts: columns of a and b are sorted by expert, and each
                                                   expert's start at a multiple of 128 (`quantize.transpose_cast`)

`reference` multiplies the very E4M3 values and runs anywhere. Products of E4M3 values are exact in FP32; their sum is
rounded to FP32 as it grows, with an error of at most K 2^-24 of the sum of their magnitudes. It can also model Hopper's
tensor core: an instruction sums 32 products, and the running sum keeps 14 significand bits, the rest cut off. The model
cuts after each instruction; the bits that hardware loses inside one are not modelled.

Letters: M, N rows of a and b; K summed over; R rows of all experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from infra.fp8.quantize import Quantized, aligned_counts, columns_of, dequantize, rows_of
from infra.fp8.recipe import Recipe

INSTRUCTION_K = 32  # products along K in one FP8 tensor core instruction


class Gemm(Protocol):
    """The three products. Outputs are `dtype`, sums FP32. `num_tokens_per_expert_E` is int64; an expert may have no
    rows.
    """

    def dense(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor: ...

    def grouped_by_rows(
        self, a_RK: Quantized, b_ENK: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor: ...

    def grouped_by_k(
        self, a_MR: Quantized, b_NR: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor: ...


def limited_sum(a_MK: Tensor, b_NK: Tensor, bits: int, promote_every: int | None) -> Tensor:
    """FP32 a b^T with a running sum of `bits` significand bits, promoted to FP32 every `promote_every` products along
    K.
    """
    dropped = -(1 << (24 - bits))  # a mask: cuts an FP32 number to `bits` bits, towards zero
    total = a_MK.new_zeros(a_MK.shape[0], b_NK.shape[0])
    running = torch.zeros_like(total)
    num_instructions = -(-a_MK.shape[1] // INSTRUCTION_K)
    for i, (a, b) in enumerate(zip(a_MK.split(INSTRUCTION_K, 1), b_NK.split(INSTRUCTION_K, 1), strict=True), start=1):
        running.addmm_(a, b.t())
        running.view(torch.int32).bitwise_and_(dropped)
        if i == num_instructions or (promote_every and i * INSTRUCTION_K % promote_every == 0):
            total += running
            running.zero_()
    return total


class ReferenceGemm:
    """Real E4M3 values, exact products, FP32 sums - or the sums of a tensor core with `recipe.accumulator_bits`.

    An operand exists in FP32 for as long as the product of one matrix, or of one expert, takes.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.bits, self.promote_every = recipe.accumulator_bits, recipe.promote_every

    def _product(self, a: Quantized, b: Quantized) -> Tensor:
        a_MK, b_NK = dequantize(a), dequantize(b)
        if self.bits is None:
            return a_MK @ b_NK.t()
        return limited_sum(a_MK, b_NK, self.bits, self.promote_every)

    def dense(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        return self._product(a, b).to(dtype)

    def grouped_by_rows(
        self, a_RK: Quantized, b_ENK: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor:
        sizes = num_tokens_per_expert_E.tolist()
        if sum(sizes) != len(a_RK.q):
            raise ValueError(f"num_tokens_per_expert_E={sizes} sums to {sum(sizes)}, but there are {len(a_RK.q)} rows")
        d_RN = a_RK.q.new_empty(a_RK.q.shape[0], b_ENK.q.shape[1], dtype=dtype)
        start = 0
        for e, size in enumerate(sizes):
            if size:
                a = rows_of(a_RK, start, start + size)
                d_RN[start : start + size] = self._product(a, Quantized(b_ENK.q[e], b_ENK.sf[e]))
            start += size
        return d_RN

    def grouped_by_k(
        self, a_MR: Quantized, b_NR: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor:
        sizes = aligned_counts(num_tokens_per_expert_E).tolist()
        d_EMN = a_MR.q.new_zeros(len(sizes), a_MR.q.shape[0], b_NR.q.shape[0], dtype=dtype)
        start = 0
        for e, size in enumerate(sizes):
            if size:
                a, b = (columns_of(x, start, start + size) for x in (a_MR, b_NR))
                d_EMN[e] = self._product(a, b)
            start += size
        return d_EMN


def _scaled_mm(recipe: Recipe) -> Gemm:
    from infra.fp8.gemm_cuda import ScaledMmGemm

    return ScaledMmGemm(recipe)


def _deep_gemm(recipe: Recipe) -> Gemm:
    from infra.fp8.gemm_cuda import DeepGemm

    return DeepGemm(recipe)


GEMMS: dict[str, Callable[[Recipe], Gemm]] = {
    "reference": ReferenceGemm,
    "scaled_mm": _scaled_mm,
    "deep_gemm": _deep_gemm,
}
