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

from infra.fp8.quantize import Quantized, dequantize, num_tiles, tile_cast


def encode(x_TD: Tensor, dispatch_dtype: str) -> Tensor:
    """Rows as they are sent: [T, D] unchanged for `native`, else uint8 [T, D + bytes of the scale factors]."""
    if dispatch_dtype == "native":
        return x_TD
    q_TD, sf_TJ = tile_cast(x_TD, power_of_two=dispatch_dtype == "fp8")
    if dispatch_dtype == "fp8":
        sf_bytes = (sf_TJ.view(torch.int32) >> 23).to(torch.uint8)  # a power of two is its FP32 exponent
    else:
        sf_bytes = sf_TJ.contiguous().view(torch.uint8)
    return torch.cat([q_TD.view(torch.uint8), sf_bytes], dim=1)


def decode(rows: Tensor, hidden: int, dtype: torch.dtype, dispatch_dtype: str) -> Tensor:
    """The inverse of `encode`: [T, D] of `dtype`, which say how they came, see `values_of`."""
    if dispatch_dtype == "native":
        return rows
    q_TD = rows[:, :hidden].contiguous().view(torch.float8_e4m3fn)
    sf_bytes = rows[:, hidden:].clone(memory_format=torch.contiguous_format)  # FP32 must start at a multiple of four
    if dispatch_dtype == "fp8":
        return values_of(Quantized(q_TD, (sf_bytes.int() << 23).view(torch.float32)), dtype, power_of_two=True)
    return values_of(Quantized(q_TD, sf_bytes.view(torch.float32)), dtype, power_of_two=False)


def values_of(rows: Quantized, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The rows in `dtype`, with what they came as, in which they may wait, as `came_as`; where its scale factors are
    powers of two, it is an operand as well: `quantized` (infra/fp8/linear.py)."""
    x_TD = dequantize(rows, dtype)
    x_TD.came_as = rows  # type: ignore[attr-defined]
    if power_of_two:
        x_TD.quantized = rows  # type: ignore[attr-defined]
    return x_TD


def row_bytes(hidden: int, itemsize: int, dispatch_dtype: str) -> int:
    """Bytes of one dispatched row of `hidden` values of `itemsize` bytes."""
    if dispatch_dtype == "native":
        return hidden * itemsize
    return hidden + num_tiles(hidden) * (1 if dispatch_dtype == "fp8" else 4)
