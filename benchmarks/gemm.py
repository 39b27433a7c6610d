"""FP8 matrix products: what the reference costs, and how fast a GPU's back ends are.

    python benchmarks/gemm.py [--out gemm.json]

Anywhere: the time of an FP8 linear layer, forward and backward, through the `reference` back end, over that of a plain
one, the two in turn (median and quartiles of the ratio). How exact they are is in benchmarks/fp8_recipes.py.

On a Hopper GPU: TFLOP/s of every back end that runs at V3's shapes, dense and grouped, beside torch's BF16 matmul, with
the share of the card's peak; and an FP8 linear layer, forward and backward with all its casts, beside BF16's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.fp8.gemm import GEMMS
from infra.fp8.linear import BACKENDS, make_linear
from infra.fp8.quantize import block_cast, tile_cast, transpose_cast
from infra.fp8.recipe import Recipe

# (N, K) of V3's linear layers; M tokens. Report and DeepGEMM's tables.
DENSE = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
GROUPED = [(4, 4096, 7168), (4, 7168, 2048), (8, 4096, 7168), (8, 7168, 2048)]  # experts, N, K
M, ROWS_PER_EXPERT = 4096, {4: 8192, 8: 4096}
PEAK_TFLOPS = {"H100": (989, 1979), "H800": (989, 1979), "H200": (989, 1979)}  # BF16, FP8; dense, from NVIDIA
LAYER = "model.layers.1.self_attn.q_a_proj"


def at_once(weight: Tensor, compute: Callable[[], Tensor | None]) -> Tensor | None:
    return compute()


def layer_step(backend: str, tokens: int, N: int, K: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Forward and backward of one linear layer; `plain` is torch's own."""
    x = torch.randn(tokens, K, dtype=dtype, device=device, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(N, K, dtype=dtype, device=device))
    weight.main_grad = torch.zeros(N, K, device=device)  # type: ignore[attr-defined]
    dy = torch.randn(tokens, N, dtype=dtype, device=device)
    linear = None if backend == "plain" else make_linear(backend, Recipe(power_of_two=True), LAYER)

    def step() -> None:
        y = F.linear(x, weight) if linear is None else linear(x, weight, at_once)
        y.backward(dy)
        if linear is None:
            weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
            weight.grad = None

    return step


def seconds(step: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def in_turn(steps: Mapping[str, Callable[[], object]], device: str, turns: int) -> dict[str, list[float]]:
    """Times of each, turn about, after two turns that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            elapsed = seconds(step, device)
            if turn >= 2:
                times[name].append(elapsed)
    return times


def reference_cost(turns: int) -> list[dict[str, Any]]:
    rows = []
    for tokens, N, K in ((512, 320, 320), (512, 1024, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            steps = {name: layer_step(name, tokens, N, K, dtype, "cpu") for name in ("plain", "reference")}
            times = in_turn(steps, "cpu", turns)
            low, ratio, high = statistics.quantiles(
                [b / a for a, b in zip(times["plain"], times["reference"], strict=True)], n=4
            )
            rows.append(
                {"tokens": tokens, "N": N, "K": K, "dtype": str(dtype)[6:], "ratio": ratio, "quartiles": [low, high]}
            )
    return rows


def gpu_products(turns: int) -> list[dict[str, Any]]:
    """TFLOP/s of the products alone, operands already cast."""
    card = torch.cuda.get_device_name()
    peaks = next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)
    gemms = {}
    for name, make in GEMMS.items():
        try:
            gemms[name] = make(Recipe())
        except RuntimeError as error:
            print(f"{name}: {error}")
    gemms.pop("reference")
    rows = []

    def measure(shape: str, flops: int, steps: Mapping[str, Callable[[], object]]) -> None:
        for name, times in in_turn(steps, "cuda", turns).items():
            tflops = flops / statistics.median(times) / 1e12
            peak = peaks[name != "bf16"] if peaks else None
            rows.append({"shape": shape, "backend": name, "tflops": tflops, "share": tflops / peak if peak else None})
            print(f"{shape:34} {name:10} {tflops:7.0f} TFLOP/s" + (f" {tflops / peak:5.0%} of peak" if peak else ""))

    for N, K in DENSE:
        x, weight, dy = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((M, K), (N, K), (M, N)))
        a, b, a_w, b_w = tile_cast(x), block_cast(weight), transpose_cast(dy), transpose_cast(x)
        steps: dict[str, Callable[[], object]] = {"bf16": partial(torch.matmul, x, weight.t())}
        for name, gemm in gemms.items():
            steps[name] = partial(gemm.dense, a, b, torch.bfloat16)
        measure(f"fprop M={M} N={N} K={K}", 2 * M * N * K, steps)
        steps = {"bf16": partial(torch.matmul, dy.t(), x)}
        for name, gemm in gemms.items():
            steps[name] = partial(gemm.dense, a_w, b_w, torch.float32)
        measure(f"wgrad M={N} N={K} K={M}", 2 * M * N * K, steps)
    for E, N, K in GROUPED:
        R = E * ROWS_PER_EXPERT[E]
        counts = torch.full((E,), ROWS_PER_EXPERT[E], device="cuda")
        x, weight = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((R, K), (E, N, K)))
        a, b, ends = tile_cast(x), block_cast(weight), counts.cumsum(0, dtype=torch.int32)
        steps = {"bf16": partial(F.grouped_mm, x, weight.mT, offs=ends)}
        for name, gemm in gemms.items():
            steps[name] = partial(gemm.grouped_by_rows, a, b, counts, torch.bfloat16)
        measure(f"experts E={E} R={R} N={N} K={K}", 2 * R * N * K, steps)
    return rows


def gpu_layers(turns: int) -> list[dict[str, Any]]:
    """Forward and backward of a layer with all casts: time of BF16 over time of each back end."""
    rows = []
    for N, K in ((7168, 2048), (4096, 7168), (7168, 16384)):
        steps = {"plain": layer_step("plain", M, N, K, torch.bfloat16, "cuda")}
        for backend in BACKENDS:
            if backend == "reference":
                continue
            try:
                steps[backend] = layer_step(backend, M, N, K, torch.bfloat16, "cuda")
            except RuntimeError as error:
                print(f"{backend}: {error}")
        times = in_turn(steps, "cuda", turns)
        for backend in steps:
            ratios = [a / b for a, b in zip(times["plain"], times[backend], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            rows.append({"N": N, "K": K, "backend": backend, "speedup": ratio, "quartiles": [low, high]})
            print(f"layer N={N} K={K} {backend:10} {ratio:5.2f} times BF16 ({low:.2f} to {high:.2f})")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if torch.cuda.is_available():
        figures["products"], figures["layers"] = gpu_products(args.turns), gpu_layers(args.turns)
        hardware = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    else:
        torch.set_num_threads(1)
        figures["reference"] = reference_cost(args.turns)
        print("an FP8 layer through `reference`, forward and backward, over a plain one (no GPU: no TFLOP/s)")
        for row in figures["reference"]:
            low, high = row["quartiles"]
            shape = f"{row['tokens']} x {row['K']} -> {row['N']}"
            print(f"{shape:20} {row['dtype']:9} {row['ratio']:6.2f} times as long ({low:.2f} to {high:.2f})")
        hardware = {"cpu": platform.processor() or platform.machine(), "threads": "1"}
    if args.out:
        record = {"date": str(datetime.date.today()), "hardware": {**hardware, "torch": torch.__version__}, **figures}
        beside = args.out.with_name(args.out.name + ".new")
        beside.write_text(json.dumps(record, indent=2))
        beside.replace(args.out)


if __name__ == "__main__":
    main()
