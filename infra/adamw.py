"""AdamW whose moments are kept in BF16 (DeepSeek-V3 report, section 3.3.3): 4 bytes a parameter instead of 8.

    m = b1 m + (1 - b1) g                       p = p (1 - lr weight_decay) - lr / (1 - b1^t) * m / d
    v = b2 v + (1 - b2) g^2                     d = sqrt(v / (1 - b2^t)) + eps

Parameters and gradients are FP32 (the flat master weights of a bucket, see optim.py), and so is the arithmetic: the
moments are read from BF16, the update uses the new moments before they are rounded, and what is stored is rounded to
nearest, ties to even. It works through a tensor in pieces that fit into a cache, so its temporaries are a few
megabytes.

BF16 has eight significand bits: a moment that moves by less than 2^-9 of itself stays where it is. With b2 = 0.95, as
in V3, a step moves v by 5 % of the way; with b2 = 0.999 it would mostly stand still, so such betas are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Elements at once, on a CPU (two FP32 temporaries of a piece fit into its cache) and on a GPU (half a gigabyte).
PIECE = {False: 1 << 18, True: 1 << 26}


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW over contiguous parameters, with moments of `moment_dtype`; a parameter's step count is that of the
    optimizer.

    Raises ValueError for betas that BF16 moments cannot follow.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moment_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        slowest = 1 - torch.finfo(moment_dtype).eps / 2
        if max(betas) > slowest:
            raise ValueError(
                f"optim.betas={list(betas)}: moments of {moment_dtype} stand still with a beta above {slowest:.4f}: "
                "choose a smaller one (V3 has 0.9 and 0.95), or optim.moments=fp32"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moment_dtype = moment_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), device=param.device)
                    state["exp_avg"] = torch.zeros_like(param, dtype=self.moment_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(param, dtype=self.moment_dtype)
                flat = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
                for p, g, m, v in zip(*(t.view(-1).split(PIECE[param.is_cuda]) for t in flat), strict=True):
                    _update(p, g, m, v, state["step"].clone(), group)
                state["step"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which turns all state into the parameters' dtype; the moments then go back to theirs."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(self.moment_dtype)


def _update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """torch's fused AdamW on moments in the parameter's dtype, which are then rounded back."""
    wide_avg, wide_avg_sq = exp_avg.to(param.dtype), exp_avg_sq.to(param.dtype)
    adamw(
        [param], [grad], [wide_avg], [wide_avg_sq], [], [step],
        fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
        eps=group["eps"], weight_decay=group["weight_decay"],
    )  # fmt: skip
    exp_avg.copy_(wide_avg)
    exp_avg_sq.copy_(wide_avg_sq)
