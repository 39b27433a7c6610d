"""AdamW with BF16 moments: against torch's where moments are wide, and against an element-by-element twin where not."""

import copy
import math

import pytest
import torch
from torch import Tensor

import infra.adamw
from infra.adamw import LowPrecisionAdamW

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(size: int, steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=g, dtype=dtype) * 10.0 ** (i % 3 - 2) for i in range(steps)]
    grads[1][::3] = 0
    return grads


def run(optimizer: torch.optim.Optimizer, param: Tensor, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def start(size: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, size, dtype=dtype))


def test_wide_moments_are_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(infra.adamw.PIECE, False, 64)  # several pieces, the last one shorter
    grads = gradients(1000, 20, torch.float64)
    ours, theirs = start(1000, torch.float64), start(1000, torch.float64)
    run(LowPrecisionAdamW([ours], **HYPER, moment_dtype=torch.float64), ours, grads)
    run(torch.optim.AdamW([theirs], **HYPER), theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def bf16(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().bfloat16().double().item()


def test_bf16_moments_against_a_slow_twin() -> None:
    """The formulas in Python numbers; the moments are rounded to BF16 between steps and only there."""
    size, (beta1, beta2) = 40, HYPER["betas"]
    grads = gradients(size, 12)
    param = start(size)
    optimizer = LowPrecisionAdamW([param], **HYPER)
    twin = [(p, 0.0, 0.0) for p in param.tolist()]
    for t, grad in enumerate(grads, start=1):
        run(optimizer, param, [grad])
        new = []
        for (p, m, v), g in zip(twin, grad.tolist(), strict=True):
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            d = math.sqrt(v / (1 - beta2**t)) + HYPER["eps"]
            p = p * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] / (1 - beta1**t) * m / d
            new.append((p, bf16(m), bf16(v)))
        twin = new
        torch.testing.assert_close(param.detach(), torch.tensor([p for p, _, _ in twin]), rtol=1e-5, atol=1e-6)
        state = optimizer.state[param]
        twin = [
            (p, m, v)
            for (p, _, _), m, v in zip(twin, state["exp_avg"].tolist(), state["exp_avg_sq"].tolist(), strict=True)
        ]
        expected_m = torch.tensor([m for _, m, _ in new])
        torch.testing.assert_close(state["exp_avg"].float(), expected_m, rtol=2.0**-8, atol=0)  # at most a BF16 unit
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_bf16_moments_follow_fp32_ones() -> None:
    """Rounding the moments moves a parameter by well under one step in 20; forgetting them would not."""
    grads = gradients(500, 30)
    fp32, low = start(500), start(500)
    run(torch.optim.AdamW([fp32], **HYPER), fp32, grads)
    run(LowPrecisionAdamW([low], **HYPER), low, grads)
    moved = (fp32 - start(500)).norm()
    assert 0 < (low - fp32).norm() < 0.01 * moved


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grads, results = gradients(1024, 3), []
    for piece in (1 << 16, 128):
        monkeypatch.setitem(infra.adamw.PIECE, False, piece)
        param = start(1024)
        results.append(run(LowPrecisionAdamW([param], **HYPER), param, grads))
    assert torch.equal(*results)


def test_groups_have_their_own_weight_decay() -> None:
    a, b = start(10), start(10)
    optimizer = LowPrecisionAdamW([{"params": [a], "weight_decay": 0.0}, {"params": [b]}], **HYPER)
    for param in (a, b):
        param.grad = torch.zeros(10)
    optimizer.step()
    assert torch.equal(a, start(10))
    torch.testing.assert_close(b.detach(), start(10).detach() * (1 - 3e-3 * 0.1))


def test_a_resumed_run_is_bitwise_the_same() -> None:
    grads = gradients(100, 10)
    whole = start(100)
    run(LowPrecisionAdamW([whole], **HYPER), whole, grads)
    first = start(100)
    optimizer = LowPrecisionAdamW([first], **HYPER)
    run(optimizer, first, grads[:4])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = LowPrecisionAdamW([second], **HYPER)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state[second]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(run(resumed, second, grads[4:]), whole)


def test_betas_that_bf16_cannot_follow_are_refused() -> None:
    """With 0.999 a second moment of BF16 does not reach a gradient that has become twice as large."""
    with pytest.raises(ValueError, match=r"stand still with a beta above 0\.9961"):
        LowPrecisionAdamW([start(3)], lr=1e-3, betas=(0.9, 0.999))
    v = torch.ones((), dtype=torch.bfloat16)
    for _ in range(1000):
        v = (v.float() * 0.999 + 0.001 * 4).bfloat16()
    assert v < 2  # FP32 would be at 2.9
