"""What a dispatched row looks like on the wire: the tensor's own dtype, or FP8 with its scale factors alongside.

An FP8 row is D bytes of E4M3, in tiles of 1x128 that each have a scale factor `sf = amax / 448` (V3, section 3.3),
followed by the scale factors of its tiles: `fp8` rounds them up to powers of two and sends only the exponent, one
byte a tile, as V3 does for the input of the MoE up-projection; `fp8_fp32_sf` sends them as FP32, four bytes a tile.
The last tile of a row is shorter where D is not a multiple of 128. Rows of bytes travel over any back end: gloo knows
no float8.

    dtype            bytes of a row, D=7168
    native (BF16)    14,336
    fp8               7,168 + 56
    fp8_fp32_sf       7,168 + 224

Combine is never quantised: partial sums travel in the tensor's own dtype.
Letters: T rows, D model, J tiles of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
_E4M3_MAX = 448.0
_MIN_AMAX = 1e-4  # a tile of zeros needs a scale too


def _tiles(x_TD: Tensor) -> Tensor:
    """[T, D] -> FP32 [T, J, 128], the last tile filled up with zeros."""
    num_tokens, hidden = x_TD.shape
    return torch.nn.functional.pad(x_TD.float(), (0, -hidden % TILE)).view(num_tokens, -(-hidden // TILE), TILE)


def encode(x_TD: Tensor, dispatch_dtype: str) -> Tensor:
    """Rows as they are sent: [T, D] unchanged for `native`, else uint8 [T, D + bytes of the scale factors]."""
    if dispatch_dtype == "native":
        return x_TD
    x_TJ128 = _tiles(x_TD)
    sf_TJ = x_TJ128.abs().amax(-1).clamp_min(_MIN_AMAX) / _E4M3_MAX
    if dispatch_dtype == "fp8":
        mantissa_TJ, exponent_TJ = torch.frexp(sf_TJ)  # mantissa in [0.5, 1): rounds up exactly, as log2 would not
        exponent_TJ = exponent_TJ - (mantissa_TJ == 0.5).int()
        sf_TJ = exponent_TJ.float().exp2()
        sf_bytes = (exponent_TJ + 127).to(torch.uint8)
    else:
        sf_bytes = sf_TJ.contiguous().view(torch.uint8)
    q_TD = (x_TJ128 / sf_TJ.unsqueeze(-1)).clamp(-_E4M3_MAX, _E4M3_MAX).flatten(1)[:, : x_TD.shape[1]]
    return torch.cat([q_TD.to(torch.float8_e4m3fn).view(torch.uint8), sf_bytes], dim=1)


def decode(rows: Tensor, hidden: int, dtype: torch.dtype, dispatch_dtype: str) -> Tensor:
    """The inverse of `encode`: [T, D] of `dtype`."""
    if dispatch_dtype == "native":
        return rows
    sf_bytes = rows[:, hidden:].contiguous()
    sf_TJ = (sf_bytes.float() - 127).exp2() if dispatch_dtype == "fp8" else sf_bytes.view(torch.float32)
    x_TJ128 = _tiles(rows[:, :hidden].contiguous().view(torch.float8_e4m3fn))
    return (x_TJ128 * sf_TJ.unsqueeze(-1)).flatten(1)[:, :hidden].to(dtype)


def row_bytes(hidden: int, itemsize: int, dispatch_dtype: str) -> int:
    """Bytes of one dispatched row of `hidden` values of `itemsize` bytes."""
    if dispatch_dtype == "native":
        return hidden * itemsize
    return hidden + -(-hidden // TILE) * (1 if dispatch_dtype == "fp8" else 4)
