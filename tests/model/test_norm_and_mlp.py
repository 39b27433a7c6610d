"""The fused norm and SwiGLU against plain torch, and their derivatives against finite differences."""

import torch
import torch.nn.functional as F

from model.mlp import MLP, swiglu
from model.moe import _WeightedSwiGLU
from model.norm import RMSNorm


def test_rms_norm():
    torch.manual_seed(0)
    norm = RMSNorm(7, 1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(norm(x), F.rms_norm(x, (7,), norm.weight, 1e-3), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


def test_rms_norm_of_bfloat16_sums_in_float32():
    x = torch.randn(4, 4096).to(torch.bfloat16)
    norm = RMSNorm(4096, 1e-6).to(torch.bfloat16)
    torch.nn.init.ones_(norm.weight)
    exact = F.rms_norm(x.double(), (4096,), None, 1e-6)
    assert (norm(x).double() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_swiglu():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.allclose(swiglu(gate, up), F.silu(gate) * up, rtol=1e-12)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_weighted_swiglu():
    gate_up = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, -1)
    assert torch.allclose(_WeightedSwiGLU.apply(gate_up, weights), F.silu(gate) * up * weights[:, None], rtol=1e-12)
    assert torch.autograd.gradcheck(_WeightedSwiGLU.apply, (gate_up, weights))


def test_mlp_is_down_of_silu_gate_times_up():
    mlp = MLP(4, 6).double()
    for p in mlp.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gate, up, down = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert torch.allclose(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=1e-12)
