"""The products of `gemm.py` on Hopper GPUs, through torch's block-scaled matmul and through DeepGEMM.

Not yet measured: written against the documented interfaces of torch 2.13 and DeepGEMM (June 2026), and tested against
`reference` by the tests marked `gpu`.

Both kernels take tiles of 1x128 on the left, and tiles or 128x128 blocks on the right, with FP32 scale factors; both
want dimensions that are multiples of 16 or 128. What is missing is filled up here with zeros, and cut off again.

Letters: M, N rows of a and b; K summed over; R rows of all experts, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.fp8.quantize import Quantized, aligned_counts
from infra.fp8.recipe import BLOCK_128X128, TILE, TILE_1X128, Recipe

ROWS = 16  # both libraries' strides are multiples of 16 bytes


def _require_hopper(backend: str, install: str) -> None:
    """Raises ValueError with the reason unless an NVIDIA GPU of compute capability 9.x and CUDA 12.9 are there."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ValueError(
            f"precision.backend={backend} needs an NVIDIA Hopper GPU, and torch {torch.__version__} sees no GPU; "
            "precision.backend=reference runs anywhere"
        )
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        raise ValueError(
            f"precision.backend={backend} needs compute capability 9.x (Hopper), and {torch.cuda.get_device_name()} "
            f"has {major}.{minor}; precision.backend=reference runs anywhere"
        )
    if tuple(map(int, torch.version.cuda.split("."))) < (12, 9):
        raise ValueError(f"precision.backend={backend} needs CUDA 12.9, and torch has {torch.version.cuda}: {install}")


def _require_published_shapes(backend: str, recipe: Recipe) -> None:
    if (recipe.activation, recipe.gradient, recipe.weight) != (TILE_1X128, TILE_1X128, BLOCK_128X128):
        raise ValueError(
            f"precision.backend={backend} has kernels for 1x128 tiles and 128x128 blocks only; this recipe has "
            f"{recipe.activation}, {recipe.gradient}, {recipe.weight}: precision.backend=reference has all"
        )
    if recipe.accumulator_bits is not None:
        raise ValueError(
            f"precision.backend={backend} sums as the hardware does; accumulator_bits={recipe.accumulator_bits} "
            "is modelled by precision.backend=reference"
        )


def _fill(x: Tensor, rows: int, cols: int, value: float = 0.0) -> Tensor:
    """Up to (rows, cols); float8 goes through its bytes, whose zero is 0."""
    missing = (0, cols - x.shape[-1], 0, rows - x.shape[-2])
    if not any(missing):
        return x
    if x.dtype == torch.float8_e4m3fn:
        return F.pad(x.view(torch.uint8), missing).view(torch.float8_e4m3fn)
    return F.pad(x, missing, value=value)


def _aligned(x: Quantized) -> Quantized:
    """Rows filled up to a multiple of 16, columns of 128. Scale factors of new rows are 1."""
    rows, cols = x.q.shape[-2:]
    new_rows = rows + -rows % ROWS
    is_tiles = x.sf.shape[-2] == rows
    sf_rows = new_rows if is_tiles else -(-new_rows // TILE)
    return Quantized(_fill(x.q, new_rows, cols + -cols % TILE), _fill(x.sf, sf_rows, x.sf.shape[-1], 1.0))


def _is_blocks(x: Quantized) -> bool:
    return x.sf.shape[-2] != x.q.shape[-2]


def _rows(x: Quantized, start: int, end: int) -> Quantized:
    return Quantized(x.q[start:end], x.sf[start:end])


class ScaledMmGemm:
    """torch.nn.functional.scaled_mm. Experts take turns: torch 2.13 has no grouped product with these scale factors."""

    def __init__(self, recipe: Recipe) -> None:
        _require_hopper("scaled_mm", "pip install 'torch>=2.11,<2.14' from the CUDA 12.9 or 13 index")
        _require_published_shapes("scaled_mm", recipe)

    @staticmethod
    def _scale(x: Quantized) -> tuple[Tensor, F.ScalingType]:
        """Tiles: (rows, k) with stride (1, rows). Blocks: (k rounded up to 4, row blocks) with stride (1, k rounded
        up).
        """
        if _is_blocks(x):
            k = x.sf.shape[-1]
            return F.pad(x.sf, (0, -k % 4)).t(), F.ScalingType.BlockWise128x128
        return x.sf.t().contiguous().t(), F.ScalingType.BlockWise1x128

    def dense(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        M, N = a.q.shape[0], b.q.shape[0]
        if M == 0 or a.q.shape[1] == 0:
            return torch.zeros(M, N, dtype=dtype, device=a.q.device)
        a, b = _aligned(a), _aligned(b)
        (scale_a, recipe_a), (scale_b, recipe_b) = self._scale(a), self._scale(b)
        out_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        d = F.scaled_mm(a.q, b.q.t(), scale_a, recipe_a, scale_b, recipe_b, output_dtype=out_dtype)
        return d[:M, :N].to(dtype)

    def grouped_by_rows(
        self, a_RK: Quantized, b_ENK: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ends = num_tokens_per_expert_E.cumsum(0).tolist()
        products = [
            self.dense(_rows(a_RK, start, end), Quantized(q, sf), dtype)
            for start, end, q, sf in zip([0, *ends], ends, b_ENK.q, b_ENK.sf, strict=False)
        ]
        return torch.cat(products)

    def grouped_by_k(
        self, a_MR: Quantized, b_NR: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ends = aligned_counts(num_tokens_per_expert_E).cumsum(0).tolist()

        def columns(x: Quantized, start: int, end: int) -> Quantized:
            return Quantized(x.q[:, start:end].contiguous(), x.sf[:, start // TILE : end // TILE])

        return torch.stack(
            [
                self.dense(columns(a_MR, start, end), columns(b_NR, start, end), dtype)
                for start, end in zip([0, *ends], ends, strict=False)
            ]
        )


class DeepGemm:
    """github.com/deepseek-ai/DeepGEMM: kernels compiled on first use, for dense and both grouped products."""

    def __init__(self, recipe: Recipe) -> None:
        install = "git clone --recursive https://github.com/deepseek-ai/DeepGEMM && cd DeepGEMM && ./install.sh"
        _require_hopper("deep_gemm", install)
        _require_published_shapes("deep_gemm", recipe)
        try:
            import deep_gemm
        except ImportError as error:
            raise ImportError(f"precision.backend=deep_gemm: {error}; to install: {install}") from None
        self.lib = deep_gemm

    def dense(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        M, N = a.q.shape[0], b.q.shape[0]
        if M == 0 or a.q.shape[1] == 0:
            return torch.zeros(M, N, dtype=dtype, device=a.q.device)
        is_wgrad = not _is_blocks(b)
        a, b = _aligned(a), _aligned(b)
        if is_wgrad:  # tiles on both sides: this kernel adds to FP32
            d = torch.zeros(a.q.shape[0], b.q.shape[0], device=a.q.device)
            self.lib.fp8_gemm_nt(tuple(a), tuple(b), d, c=d, recipe=(1, 1, TILE))
        else:
            d = torch.empty(a.q.shape[0], b.q.shape[0], dtype=torch.bfloat16, device=a.q.device)
            self.lib.fp8_gemm_nt(tuple(a), tuple(b), d, recipe=(1, TILE, TILE))
        return d[:M, :N].to(dtype)

    def grouped_by_rows(
        self, a_RK: Quantized, b_ENK: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Each expert's rows start at a multiple of the kernel's block of rows; rows between belong to expert -1."""
        R, N = a_RK.q.shape[0], b_ENK.q.shape[1]
        if R == 0:
            return torch.zeros(R, N, dtype=dtype, device=a_RK.q.device)
        counts, device = num_tokens_per_expert_E, a_RK.q.device
        multiple = self.lib.get_mk_alignment_for_contiguous_layout()
        padded = aligned_counts(counts, multiple)
        expert_R = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
        shift_E = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        row_R = torch.arange(R, device=device) + shift_E[expert_R]
        num_rows, cols = int(padded.sum()), a_RK.q.shape[1] + -a_RK.q.shape[1] % TILE

        q = torch.zeros(num_rows, cols, dtype=torch.uint8, device=device)
        q[row_R] = _fill(a_RK.q, R, cols).view(torch.uint8)
        sf = torch.ones(num_rows, a_RK.sf.shape[1], device=device)
        sf[row_R] = a_RK.sf
        layout = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        layout[row_R] = expert_R.int()
        b = _aligned(b_ENK)
        d = torch.empty(num_rows, b.q.shape[1], dtype=torch.bfloat16, device=device)
        self.lib.m_grouped_fp8_gemm_nt_contiguous((q.view(torch.float8_e4m3fn), sf), tuple(b), d, layout)
        return d[row_R, :N].to(dtype)

    def grouped_by_k(
        self, a_MR: Quantized, b_NR: Quantized, num_tokens_per_expert_E: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """On Hopper the kernel wants each expert's matrix whole, one after the other in one flat tensor."""
        M, N, ks = a_MR.q.shape[0], b_NR.q.shape[0], aligned_counts(num_tokens_per_expert_E)
        d = torch.zeros(len(ks), M + -M % ROWS, N + -N % ROWS, device=a_MR.q.device)
        if a_MR.q.shape[1] == 0:
            return d[:, :M, :N].to(dtype)
        a, b, sizes = _aligned(a_MR), _aligned(b_NR), ks.tolist()

        def flat(x: Quantized) -> tuple[Tensor, Tensor]:
            pieces = [piece.flatten() for piece in x.q.view(torch.uint8).split(sizes, 1)]
            return torch.cat(pieces).view(torch.float8_e4m3fn), x.sf

        self.lib.k_grouped_fp8_gemm_nt_contiguous(flat(a), flat(b), d, sizes, ks.int(), c=d, recipe=(1, 1, TILE))
        return d[:, :M, :N].to(dtype)
