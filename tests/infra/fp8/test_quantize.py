"""Casts against formulas written again in plain Python and float64, bit for bit."""

import bisect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.fp8 import quantize as qz
from infra.fp8.quantize import Quantized, block_cast, cast, dequantize, tile_cast, transpose_cast
from infra.fp8.recipe import WHOLE_TENSOR
from infra.live_bytes import LiveBytes

E4M3_VALUES = sorted(
    {(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)} - {480.0}
)
E5M6_VALUES = sorted(
    {(m / 64 if e == 0 else 1 + m / 64) * 2.0 ** (max(e, 1) - 15) for e in range(31) for m in range(64)}
)


def nearest(value: float, grid: list[float]) -> float:
    """The nearest grid point, ties to the even one (even index: mantissas count up along the grid), saturating."""
    magnitude = min(abs(value), grid[-1])
    above = bisect.bisect_left(grid, magnitude)
    best = min((max(above - 1, 0), above), key=lambda i: (abs(grid[i] - magnitude), i % 2))
    return math.copysign(grid[best], value)


def slow_cast(x: Tensor, height: int, width: int, power_of_two: bool) -> Tensor:
    """The formulas of quantize.py, one piece at a time; returns the dequantised matrix in FP32."""
    out = torch.empty(x.shape)
    for r in range(0, x.shape[0], height):
        for c in range(0, x.shape[1], width):
            piece = x[r : r + height, c : c + width].float()
            sf = torch.tensor(max(piece.abs().max().item(), 1e-4)) / 448  # in FP32, as the cast does
            if power_of_two:
                mantissa, exponent = math.frexp(sf.item())
                sf = torch.tensor(2.0 ** (exponent - (mantissa == 0.5)))
            q = [nearest(v, E4M3_VALUES) for v in (piece / sf).flatten().tolist()]
            out[r : r + height, c : c + width] = torch.tensor(q).view(piece.shape) * sf
    return out


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal values over several orders of magnitude, with outliers and zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.randn(*shape, generator=g).mul(3).exp2()
    x[torch.rand(*shape, generator=g) < 0.1] = 0
    x[torch.rand(*shape, generator=g) < 0.01] *= 1000
    return x


def test_golden_tile() -> None:
    x = torch.zeros(1, 128)
    x[0, :8] = torch.tensor([896.0, -448.0, 1.0, 3.3, 1e-3, 17.0, 19.0, -(2.0**-9)])
    q, sf = tile_cast(x)
    assert sf.tolist() == [[2.0]]
    # 3.3/2 = 1.65 -> 1.625; 5e-4 is below half the smallest subnormal 2^-9; 8.5 and 9.5 are ties: 8 and 10
    assert q.float()[0, :8].tolist() == [448, -224, 0.5, 1.625, 0, 8, 10, -0.0]
    assert q.view(torch.uint8)[0, :8].tolist() == [0x7E, 0xF6, 0x30, 0x3D, 0x00, 0x50, 0x52, 0x80]


def test_golden_power_of_two() -> None:
    x = torch.zeros(2, 128)
    x[0, :2] = torch.tensor([449.0, 1.0])  # 449/448 is rounded up to 2
    x[1, :2] = torch.tensor([448.0, 1.0])  # exactly 1 stays 1
    q, sf = tile_cast(x, power_of_two=True)
    assert sf.tolist() == [[2.0], [1.0]]
    assert q.float()[:, :2].tolist() == [[224.0, 0.5], [448.0, 1.0]]


def test_zeros_stay_zeros_with_the_published_floor() -> None:
    q, sf = tile_cast(torch.zeros(3, 256))
    assert (q.view(torch.uint8) == 0).all()
    assert torch.equal(sf, torch.full((3, 2), 1e-4) / 448)


@pytest.mark.parametrize("shape", [(3, 128), (5, 200), (130, 257), (1, 1), (128, 384), (129, 3)])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_are_the_formulas(shape: tuple[int, int], power_of_two: bool, dtype: torch.dtype) -> None:
    x = random(*shape).to(dtype)
    assert torch.equal(dequantize(tile_cast(x, power_of_two)), slow_cast(x, 1, 128, power_of_two))
    assert torch.equal(dequantize(block_cast(x, power_of_two)), slow_cast(x, 128, 128, power_of_two))
    assert torch.equal(dequantize(cast(x, WHOLE_TENSOR, power_of_two)), slow_cast(x, 10**6, 10**6, power_of_two))


def test_experts_are_cast_one_by_one() -> None:
    weight = random(3, 130, 200)
    together = block_cast(weight)
    for e in range(3):
        alone = block_cast(weight[e])
        assert torch.equal(together.q[e].view(torch.uint8), alone.q.view(torch.uint8))
        assert torch.equal(together.sf[e], alone.sf)


def test_decoding_is_torchs_own() -> None:
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    number = ~every.float().isnan()
    assert torch.equal(qz.e4m3_to_float(every)[number], every.float()[number])
    assert number.sum() == 254


def test_the_scale_factor_is_rounded_up_exactly() -> None:
    """Where log2 in FP32 would round down: one unit above a power of two."""
    powers = torch.tensor([2.0**k for k in range(-40, 40)])
    above = torch.nextafter(powers, torch.tensor(torch.inf))
    assert torch.equal(qz.round_up_to_power_of_two(powers), powers)
    assert torch.equal(qz.round_up_to_power_of_two(above), 2 * powers)
    strange = qz.round_up_to_power_of_two(torch.tensor([torch.nan, torch.inf]))
    assert strange[0].isnan()
    assert strange[1].isinf()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    x = random(4, 300)
    x[2, 290] = wrong
    for refuse in (tile_cast, block_cast, qz.cast_e5m6, transpose_cast):
        with pytest.raises(ValueError, match=r"of \d+ pieces .* NaN or an infinity"):
            refuse(x)


@given(
    st.integers(1, 6),
    st.integers(1, 300),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
)
@settings(max_examples=60, deadline=None)
def test_a_cast_is_close_and_casting_again_changes_nothing(rows: int, cols: int, seed: int, size: float) -> None:
    x = random(rows, cols, seed=seed) * size
    for power_of_two in (False, True):
        quantized = tile_cast(x, power_of_two)
        back = dequantize(quantized)
        sf = quantized.sf.repeat_interleave(128, 1)[:, :cols]
        # half a unit in the last of three mantissa bits, or of a subnormal; and a little for FP32's own rounding
        assert ((back - x).abs() <= torch.maximum(x.abs() / 16, sf * 2.0**-10) * (1 + 1e-5)).all()
        assert torch.equal(dequantize(tile_cast(-x, power_of_two)), -back)
    assert torch.equal(dequantize(tile_cast(back, power_of_two=True)), back)


def test_transposed_tiles_lie_along_the_rows_and_never_over_two_experts() -> None:
    counts = torch.tensor([5, 0, 130, 128])
    x = random(263, 70)
    x[4] *= 1e4  # the first expert's outlier may cost the first expert only
    together = transpose_cast(x, counts)
    assert together.q.shape == (70, 128 + 0 + 256 + 128)
    assert together.sf.shape == (70, 4)
    start = aligned = 0
    for count in counts.tolist():
        piece = x[start : start + count].t().contiguous()
        alone = dequantize(tile_cast(piece))
        assert torch.equal(dequantize(together)[:, aligned : aligned + count], alone)
        start, aligned = start + count, aligned + count + -count % 128
    padding = dequantize(together)[:, 5:128]
    assert (padding == 0).all()


def test_a_power_of_two_scale_makes_requantising_cheap() -> None:
    """Why the input of the attention output has powers of two: the second cast keeps most values exactly."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))

    def twice(power_of_two: bool) -> float:
        once = dequantize(tile_cast(x, power_of_two))
        again = dequantize(transpose_cast(once, power_of_two=power_of_two)).t()
        return ((again - once).norm() / once.norm()).item()

    assert twice(True) < 0.2 * twice(False)


def test_blocks_transpose_without_rounding() -> None:
    weight = block_cast(random(300, 200))
    assert torch.equal(dequantize(qz.transpose_blocks(weight)), dequantize(weight).t())


def test_empty() -> None:
    for x in (torch.empty(0, 300), torch.empty(300, 0)):
        quantized = tile_cast(x)
        assert dequantize(quantized).shape == x.shape
        assert isinstance(quantized, Quantized)


@pytest.mark.parametrize("shape", [(3, 128), (2, 201), (1, 1), (2, 3, 130)])
def test_e5m6_is_the_nearest_of_its_values(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    packed = qz.cast_e5m6(x)
    back = qz.dequantize_e5m6(packed, shape[-1])
    sf = packed.sf.repeat_interleave(128, -1)[..., : shape[-1]]
    slow = torch.tensor([nearest(v, E5M6_VALUES) for v in (x / sf).flatten().tolist()]).view(x.shape) * sf
    assert torch.equal(back, slow)
    assert packed.packed.dtype == torch.uint8
    assert packed.packed.shape[-1] == (shape[-1] + 1) // 2 * 3  # 12 bits a value


def test_e5m6_holds_each_of_its_values_in_twelve_bits() -> None:
    values = torch.tensor(E5M6_VALUES)
    x = torch.cat([values, -values, torch.tensor([65024.0] * 126)]).view(-1, 2)
    x = torch.cat([x, torch.full((x.shape[0], 126), 65024.0)], dim=1)  # amax 65024 in each tile: the scale is 1
    packed = qz.cast_e5m6(x)
    assert (packed.sf == 1).all()
    assert torch.equal(qz.dequantize_e5m6(packed, 128), x)


def test_e5m6_golden_bytes() -> None:
    x = torch.full((1, 128), 65024.0)
    x[0, :4] = torch.tensor([1.0, -1.5, 2.0**-20, 0.0])
    # 1.0 = 0 01111 000000 = 0x3C0; -1.5 = 1 01111 100000 = 0xBE0; the smallest subnormal is 0x001
    assert qz.cast_e5m6(x).packed[0, :6].tolist() == [0xC0, 0x03, 0xBE, 0x01, 0x00, 0x00]


@pytest.mark.gpu
def test_a_gpu_poisons_what_is_not_finite() -> None:
    x = random(4, 256).cuda()
    x[1, 3], x[2, 200] = torch.nan, torch.inf
    for power_of_two in (False, True):
        back = dequantize(tile_cast(x, power_of_two))
        assert back[1, :128].isnan().all()
        assert back[2, 128:].isnan().all()
        assert back[1, 128:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_gpu_casts_bit_for_bit(power_of_two: bool) -> None:
    x = random(300, 500)
    for function in (tile_cast, block_cast):
        here, there = function(x, power_of_two), function(x.cuda(), power_of_two)
        assert torch.equal(here.q.view(torch.uint8), there.q.cpu().view(torch.uint8))
        assert torch.equal(here.sf, there.sf.cpu())


@pytest.mark.parametrize("shape", [(700, 130), (3, 260, 200)])
def test_casts_of_large_tensors_go_in_pieces(shape, monkeypatch):
    """Pieces end where tiles and blocks do; the bits are those of a cast in one go."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([300, 0, 129, shape[-2] - 429]) if shape[-2] > 429 else None
    of = {
        "tiles": lambda: tile_cast(x),
        "blocks": lambda: block_cast(x),
        "e5m6": lambda: qz.cast_e5m6(x),
        "e5m6 and back": lambda: (qz.dequantize_e5m6(qz.cast_e5m6(x), shape[-1]),),
    }
    if x.dim() == 2:
        of["transposed"] = lambda: transpose_cast(x, counts)
        of["transposed from FP8"] = lambda: transpose_cast(tile_cast(x), counts)
        of["tiles and back"] = lambda: (dequantize(tile_cast(x)),)
        of["blocks and back"] = lambda: (dequantize(block_cast(x), torch.bfloat16),)
        of["blocks, transposed"] = lambda: transpose_cast(x, counts, (128, 128))
    whole = {name: fn() for name, fn in of.items()}
    monkeypatch.setattr(qz, "PIECE", 128 * shape[-1])
    for name, fn in of.items():
        for one, piece in zip(whole[name], fn(), strict=True):
            assert torch.equal(one.view(torch.uint8), piece.view(torch.uint8)), name
    if x.dim() == 2:
        once = tile_cast(x)
        for a, b in zip(transpose_cast(once, counts), transpose_cast(dequantize(once), counts), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "FP8 is taken as its values"


@pytest.mark.parametrize("of", ["tiles", "blocks", "e5m6"])
def test_dequantising_holds_the_result_and_a_few_pieces_beside_it(of: str) -> None:
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    some = {"tiles": tile_cast, "blocks": block_cast, "e5m6": qz.cast_e5m6}[of](x)
    live = LiveBytes()
    with live.counting():
        back = qz.dequantize_e5m6(some, 1024) if of == "e5m6" else dequantize(some)
    assert back.nbytes == x.nbytes == 16 * 4 * qz.PIECE
    assert live.peak < back.nbytes + 8 * 4 * qz.PIECE
