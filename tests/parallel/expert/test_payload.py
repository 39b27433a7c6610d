"""FP8 payloads: exact where E4M3 is exact, as close as its three mantissa bits otherwise, and of the bytes promised."""

import pytest
import torch

from infra.fp8.quantize import dequantize
from parallel.expert.payload import decode, encode, row_bytes

FP8 = ("fp8", "fp8_fp32_sf")


@pytest.mark.parametrize("dispatch_dtype", FP8)
@pytest.mark.parametrize("hidden", [1, 100, 128, 200, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_row_comes_back_as_near_as_e4m3_has_numbers(dispatch_dtype, hidden, dtype, num_rows):
    generator = torch.Generator().manual_seed(hidden)
    magnitude = 10.0 ** torch.randint(-3, 4, (num_rows, 1), generator=generator)
    x = (torch.randn(num_rows, hidden, generator=generator) * magnitude).to(dtype)
    rows = encode(x, dispatch_dtype)
    assert rows.dtype == torch.uint8
    assert rows.nbytes == num_rows * row_bytes(hidden, dtype.itemsize, dispatch_dtype)
    back = decode(rows, hidden, dtype, dispatch_dtype)
    assert back.dtype == dtype
    step = x.double().abs() * 2**-4 + x.double().abs().amax(1, keepdim=True) * 2**-16
    assert ((back.double() - x.double()).abs() <= step).all()


def test_powers_of_two_times_e4m3_are_exact():
    x = torch.arange(-15, 16).float().repeat(2, 9)[:, :256] * torch.tensor([[2.0**-9], [2.0**7]])
    assert torch.equal(decode(encode(x, "fp8"), 256, x.dtype, "fp8"), x)


@pytest.mark.parametrize("dispatch_dtype", FP8)
def test_each_tile_has_a_scale_of_its_own(dispatch_dtype):
    x = torch.cat([torch.full((1, 128), 1e-3), torch.full((1, 128), 1e3)], dim=1)
    back = decode(encode(x, dispatch_dtype), 256, x.dtype, dispatch_dtype)
    torch.testing.assert_close(back, x, rtol=2**-4, atol=0)


def test_only_powers_of_two_are_handed_on_as_operands():
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    rows = decode(encode(x, "fp8"), 256, x.dtype, "fp8")
    assert torch.equal(rows.quantized.sf, rows.quantized.sf.log2().round().exp2())
    others = decode(encode(x, "fp8_fp32_sf"), 256, x.dtype, "fp8_fp32_sf")
    assert not hasattr(others, "quantized")
    assert torch.equal(dequantize(others.came_as, x.dtype), others)


@pytest.mark.parametrize("dispatch_dtype", FP8)
def test_no_rows_and_rows_of_zeros(dispatch_dtype):
    assert decode(encode(torch.zeros(0, 130), dispatch_dtype), 130, torch.float32, dispatch_dtype).shape == (0, 130)
    assert not decode(encode(torch.zeros(3, 130), dispatch_dtype), 130, torch.float32, dispatch_dtype).any()


def test_native_is_untouched_in_float64():
    x = torch.randn(4, 10, dtype=torch.float64)
    assert encode(x, "native") is x
    assert decode(x, 10, x.dtype, "native") is x


def test_fp8_halves_a_row_of_v3():
    bf16 = row_bytes(7168, 2, "native")
    assert row_bytes(7168, 2, "fp8") / bf16 == pytest.approx(0.504, abs=0.001)
    assert row_bytes(7168, 2, "fp8_fp32_sf") / bf16 == pytest.approx(0.516, abs=0.001)
