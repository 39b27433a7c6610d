"""Casts to FP8 and back, and the 12-bit format E5M6 (DeepSeek-V3 report, sections 3.3.1 to 3.3.3).

A piece of a tensor that shares a scale factor - a *tile* of 1x128, a *block* of 128x128, or all of it - is cast as

    sf = max(amax, 1e-4) / 448            rounded up to 2^ceil(log2 sf) where a power of two is asked for
    q  = E4M3(clamp(x / sf, -448, 448))   to nearest, ties to even
    x' = q * sf

The last tile of a row, and the last blocks of a matrix, are shorter where the shape is not a multiple of 128: the
elements that are missing count as zeros. A tile of zeros stays zeros.

A NaN or an infinity is not representable, and saturating it would hide a broken run. On a CPU it is refused with a
ValueError. On a GPU, where asking would stall the stream, its scale factor is not finite, so that the whole tile comes
back as NaN and the loss shows it in the same step.

E5M6 is sign, 5 exponent and 6 mantissa bits: float16 without its last four bits. Two values take three bytes.

Letters: M rows, K columns, R rows of all experts, E experts. Everything works on any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.fp8.recipe import TILE, TILE_1X128, WHOLE_TENSOR, Block

E4M3_MAX = 448.0
E5M6_MAX = 65024.0  # (2 - 2^-6) 2^15: as in float16, the highest exponent is left to infinity and NaN
MIN_AMAX = 1e-4  # published: bounds the scale factor from below
PIECE = 1 << 18  # values that are cast at a time on a CPU, where their FP32 copies then stay in its cache


P = TypeVar("P", bound=tuple)


class Quantized(NamedTuple):
    """An FP8 matrix and its scale factors.

    q: float8_e4m3fn, (..., M, K), K contiguous.
    sf: FP32, (..., m, k): m is M (tiles), ceil(M/128) (blocks) or 1; k is ceil(K/128) or 1.
    """

    q: Tensor
    sf: Tensor


def num_tiles(size: int) -> int:
    return -(-size // TILE)


def round_up_to_power_of_two(sf: Tensor) -> Tensor:
    """2^ceil(log2 sf), exactly: a mantissa that is not zero carries into the exponent. NaN and infinity stay."""
    rounded = ((sf.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
    return torch.where(sf.isfinite(), rounded, sf)


def _scale_factors(amax: Tensor, largest: float, power_of_two: bool) -> Tensor:
    sf = amax.float().clamp_min(MIN_AMAX) / largest
    if not sf.is_cuda and not sf.isfinite().all():
        raise ValueError(
            f"{int((~sf.isfinite()).sum())} of {sf.numel()} pieces to be quantised hold a NaN or an infinity: "
            "the run diverged before this cast (lower the learning rate, or look for the first layer that overflows)"
        )
    return round_up_to_power_of_two(sf) if power_of_two else sf


def _pad(x: Tensor, row_multiple: int) -> Tensor:
    """Zeros up to multiples of (row_multiple, 128)."""
    rows, cols = x.shape[-2:]
    missing = (-cols % TILE, -rows % row_multiple)
    return F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x


def _to_e4m3(scaled: Tensor) -> Tensor:
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def cast(x: Tensor, block: Block = TILE_1X128, power_of_two: bool = False) -> Quantized:
    """(..., M, K) of any floating dtype -> FP8 with one scale factor for each `block`.

    Raises ValueError on a CPU if `x` holds a NaN or an infinity.
    """
    rows, cols = x.shape[-2:]
    if block != WHOLE_TENSOR and len(parts := _pieces(x)) > 1:
        return _joined([cast(part, block, power_of_two) for part in parts], dim=0)
    x = x.float()
    if x.numel() == 0:
        sf = x.new_ones(*x.shape[:-2], rows if block[0] == 1 else num_tiles(rows), num_tiles(cols))
        return Quantized(x.to(torch.float8_e4m3fn), sf)
    if block == WHOLE_TENSOR:
        sf = _scale_factors(x.abs().amax((-2, -1), keepdim=True), E4M3_MAX, power_of_two)
        return Quantized(_to_e4m3(x / sf), sf)
    height = block[0]
    padded = _pad(x, height)
    pieces = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, height))  # (..., m, height, k, 128)
    sf = _scale_factors(pieces.abs().amax((-3, -1)), E4M3_MAX, power_of_two)
    q = _to_e4m3(pieces / sf[..., :, None, :, None]).view(padded.shape)
    return Quantized(q[..., :rows, :cols].contiguous(), sf)


def _rows_at_once(cols: int) -> int:
    return max(1, PIECE // (TILE * cols)) * TILE


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """A matrix in some rows at a time, several matrices one at a time; on a GPU as they are."""
    if x.is_cuda or x.numel() <= PIECE:
        return (x,)
    return x.split(1 if x.dim() > 2 else _rows_at_once(x.shape[-1]))


def _joined(parts: Iterable[P], dim: int) -> P:
    each, *others = parts
    return type(each)(*(torch.cat(same, dim) for same in zip(each, *others, strict=True)))


def tile_cast(x: Tensor, power_of_two: bool = False) -> Quantized:
    """Activations and gradients: one scale factor for each 128 columns of a row."""
    return cast(x, TILE_1X128, power_of_two)


def block_cast(weight: Tensor, power_of_two: bool = False) -> Quantized:
    """Weights: one scale factor for each 128x128 block."""
    return cast(weight, (TILE, TILE), power_of_two)


def e4m3_to_float(q: Tensor) -> Tensor:
    """float8_e4m3fn -> FP32, exactly. On a CPU by shifting bits, which is several times as fast as torch's own cast."""
    if q.is_cuda:
        return q.float()
    bits = q.view(torch.int8).to(torch.int16)  # the sign is extended
    magnitude = (bits & 0x7F).bitwise_left_shift_(
        4
    )  # exponent and mantissa in BF16's places, with E4M3's bias: 7 for 127
    return magnitude.bitwise_or_(bits.bitwise_and_(-0x8000)).view(torch.bfloat16).float().mul_(2.0**120)


def dequantize(x: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * sf, in FP32, then `dtype`."""
    if x.q.numel() == 0:
        return x.q.to(dtype)
    rows, cols = x.q.shape[-2:]
    if x.q.dim() == 2 and len(_pieces(x.q)) > 1:
        step = _rows_at_once(cols)
        result = x.q.new_empty(x.q.shape, dtype=dtype)  # filled piece by piece: `cat` would hold every value twice
        for i in range(0, rows, step):
            result[i : i + step] = dequantize(rows_of(x, i, i + step), dtype)
        return result
    values, sf = e4m3_to_float(x.q), x.sf
    if sf.shape[-2] not in (1, rows):
        sf = sf.repeat_interleave(TILE, dim=-2)[..., :rows, :]
    if sf.shape[-1] == 1:
        return values.mul_(sf).to(dtype)
    if cols % TILE:
        return values.mul_(sf.repeat_interleave(TILE, dim=-1)[..., :cols]).to(dtype)
    return values.unflatten(-1, (-1, TILE)).mul_(sf.unsqueeze(-1)).flatten(-2).to(dtype)


def rows_of(x: Quantized, start: int, stop: int) -> Quantized:
    """Some rows of a matrix, with a scale factor row for each of them wherever blocks begin."""
    sf = x.sf
    if sf.shape[-2] not in (1, x.q.shape[-2]):
        sf = sf.repeat_interleave(TILE, dim=-2)
    return Quantized(x.q[..., start:stop, :], sf if sf.shape[-2] == 1 else sf[..., start:stop, :])


def columns_of(x: Quantized, start: int, stop: int) -> Quantized:
    """Some columns of a matrix; `start` is a multiple of 128."""
    sf = x.sf if x.sf.shape[-1] == 1 else x.sf[..., start // TILE : num_tiles(stop)]
    return Quantized(x.q[..., start:stop], sf)


def transpose_blocks(weight: Quantized) -> Quantized:
    """A matrix in square blocks, transposed: nothing is rounded, so that dgrad sees the weights that fprop saw."""
    return Quantized(weight.q.mT.contiguous(), weight.sf.mT.contiguous())


def align_groups(x_RK: Tensor, num_tokens_per_expert_E: Tensor, multiple: int = TILE) -> Tensor:
    """Rows sorted by expert -> the same with zero rows after each expert's, so that each starts at a multiple of
    `multiple`.
    """
    pieces = x_RK.split(num_tokens_per_expert_E.tolist())
    return torch.cat([F.pad(piece, (0, 0, 0, -piece.shape[0] % multiple)) for piece in pieces])


def aligned_counts(num_tokens_per_expert_E: Tensor, multiple: int = TILE) -> Tensor:
    """How many rows `align_groups` gives each expert."""
    return (num_tokens_per_expert_E + multiple - 1) // multiple * multiple


def transpose_cast(
    x: Tensor | Quantized,
    num_tokens_per_expert_E: Tensor | None = None,
    block: Block = TILE_1X128,
    power_of_two: bool = False,
) -> Quantized:
    """The operand of wgrad: (R, K) -> FP8 (K, R') in tiles along the rows, R' being R with each expert's rows aligned.

    With `num_tokens_per_expert_E` no tile holds rows of two experts; without, all rows are one group. What is FP8
    already, in tiles of 1x128, is dequantised a piece at a time.
    """

    if isinstance(x, Quantized) and (block == WHOLE_TENSOR or x.sf.shape[0] != x.q.shape[0]):
        x = dequantize(x)
    if isinstance(x, Quantized):
        all_rows = _aligned(x.q.view(torch.uint8), num_tokens_per_expert_E)  # torch pads no FP8
        quantized = Quantized(all_rows.view(x.q.dtype), _aligned(x.sf, num_tokens_per_expert_E))
    else:
        all_rows, quantized = _aligned(x, num_tokens_per_expert_E), None

    def some(start: int, stop: int) -> Tensor:
        return dequantize(rows_of(quantized, start, stop)) if quantized else all_rows[start:stop]

    num_rows, cols = all_rows.shape
    step = num_rows if block == WHOLE_TENSOR or all_rows.is_cuda else _rows_at_once(cols)
    starts = range(0, max(num_rows, 1), max(step, 1))
    return _joined([cast(some(i, i + step).mT.contiguous(), block, power_of_two) for i in starts], dim=1)


def _aligned(x_RK: Tensor, num_tokens_per_expert_E: Tensor | None) -> Tensor:
    if num_tokens_per_expert_E is None:
        return F.pad(x_RK, (0, 0, 0, -x_RK.shape[0] % TILE))
    return align_groups(x_RK, num_tokens_per_expert_E)


class E5M6(NamedTuple):
    """12-bit values in tiles of 1x128.

    packed: uint8, (..., M, K/2*3), K rounded up to even; sf: FP32 powers of two, (..., M, ceil(K/128)).
    """

    packed: Tensor
    sf: Tensor


def cast_e5m6(x: Tensor) -> E5M6:
    """(..., M, K) -> 12 bits a value, to nearest, ties to even; one power-of-two scale factor for each 1x128 tile."""
    if len(parts := _pieces(x)) > 1:
        return _joined((cast_e5m6(part) for part in parts), dim=0)
    rows_shape, cols = x.shape[:-1], x.shape[-1]
    tiles = _pad(x.float(), 1).unflatten(-1, (-1, TILE))
    sf = _scale_factors(tiles.abs().amax(-1), E5M6_MAX, power_of_two=True)
    scaled = tiles / sf.unsqueeze(-1)
    # Adding 1.5 * 2^(e+17) leaves room for 6 bits below the value's own exponent e (-14 for subnormals): FP32 does the
    # rounding.
    exponent_bits = (scaled.view(torch.int32) & 0x7F800000).clamp_min((127 - 14) << 23)
    magic = (exponent_bits + (17 << 23) | 0x400000).view(torch.float32)
    rounded = (scaled + magic) - magic
    codes = (rounded.half().view(torch.int16).int() >> 4) & 0xFFF
    codes = codes.view(*rows_shape, -1)[..., : cols + cols % 2]
    first, second = codes[..., 0::2], codes[..., 1::2]
    packed = torch.stack([first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4], dim=-1)
    return E5M6(packed.flatten(-2).to(torch.uint8), sf)


def dequantize_e5m6(x: E5M6, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `cast_e5m6`; `cols` is K."""
    if len(parts := _pieces(x.packed)) > 1:
        sizes = [len(part) for part in parts]
        result = x.packed.new_empty(*x.packed.shape[:-1], cols, dtype=dtype)
        for into, packed, sf in zip(result.split(sizes), parts, x.sf.split(sizes), strict=True):
            into.copy_(dequantize_e5m6(E5M6(packed, sf), cols, dtype))
        return result
    low, middle, high = x.packed.unflatten(-1, (-1, 3)).int().unbind(-1)
    codes = torch.stack([low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)], dim=-1).flatten(-2)[..., :cols]
    values = (codes << 4).to(torch.int16).view(torch.float16).float()
    return (values * x.sf.repeat_interleave(TILE, dim=-1)[..., :cols]).to(dtype)
