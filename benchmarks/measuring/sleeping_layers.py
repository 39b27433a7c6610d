"""Layers whose attention and experts sleep while real rows travel: so few cores can play many ranks."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from model.linear import Linear, at_once
from parallel.expert.dispatcher import Dispatcher
from parallel.mesh import Mesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.p2p import Spec
from parallel.pipeline.stage import TransformerStage

HIDDEN, TOKENS, TOP_K, NUM_EXPERTS = 256, 256, 8, 16
PHASE = 0.02  # seconds of F, I or W, of attention or of the experts
ROW_BYTES = HIDDEN * 4


class _Sleep(torch.autograd.Function):
    """Sleeps through F and I; offers a W that sleeps."""

    @staticmethod
    def forward(ctx, x, weight, weight_grad):
        ctx.weight, ctx.weight_grad = weight, weight_grad
        time.sleep(PHASE)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(PHASE)
        ctx.weight_grad(ctx.weight, lambda: time.sleep(PHASE))
        return grad, None, None


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_grad = at_once
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, self.weight_grad)


def evenly() -> Tensor:
    """[T, K]: every rank gets as many rows as any other."""
    first = torch.arange(TOKENS).unsqueeze(1)
    return (first + torch.arange(0, NUM_EXPERTS, NUM_EXPERTS // TOP_K)) % NUM_EXPERTS


def at_random(seed: int) -> Tensor:
    """[T, K]: every token draws its experts by itself."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(TOKENS, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K]


class SleepingBlock(nn.Module):
    """A MoE layer whose attention and experts sleep; its tokens really travel, to the experts `topk_idx_TK`."""

    is_moe = True

    def __init__(self, dispatcher: Dispatcher, topk_idx_TK: Tensor):
        super().__init__()
        self.attention, self.expert = Sleeper(), Sleeper()
        self.mlp = SimpleNamespace(dispatcher=dispatcher)
        self.topk_idx_TK = topk_idx_TK
        self.weights_TK = torch.full((TOKENS, TOP_K), 1 / TOP_K)

    def attend(self, h_BLD: Tensor, documents_BL: Tensor | None) -> SimpleNamespace:
        h_BLD = self.attention(h_BLD)
        x_TD = h_BLD.flatten(0, 1)
        nothing = torch.zeros(())
        return SimpleNamespace(
            h_BLD=h_BLD,
            x_TD=x_TD,
            topk_weights_TK=self.weights_TK,
            balance_loss=nothing,
            topk_idx_TK=self.topk_idx_TK,
            load_E=torch.zeros(NUM_EXPERTS, dtype=torch.int64),
        )

    def shared_expert(self, x_TD: Tensor) -> Tensor:
        return x_TD.view_as(x_TD)

    def experts(self, x_RD: Tensor, weights_R: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return self.expert(x_RD) * weights_R.unsqueeze(1)


def sleeping_stages(
    schedule: Schedule, mesh: Mesh, dispatcher: Dispatcher, num_layers: int, topk_idx_TK: Tensor
) -> dict[int, TransformerStage]:
    """`num_layers` in the whole model, shared out evenly; the head is next to nothing."""
    each, last = num_layers // schedule.num_stages, schedule.num_stages - 1
    start = nn.Parameter(torch.zeros(1, TOKENS, HIDDEN))
    head = Linear(HIDDEN, 8)
    nn.init.zeros_(head.weight)
    return {
        s: TransformerStage(
            {s * each + n: SleepingBlock(dispatcher, topk_idx_TK) for n in range(each)},  # type: ignore[misc]
            Spec((1, TOKENS, HIDDEN), torch.float32),
            is_first=s == 0,
            embed=(lambda tokens_BL: start.clone()) if s == 0 else None,
            norm=(lambda h_BLD: h_BLD) if s == last else None,
            head=head if s == last else None,
        )
        for s in schedule.stages_of(mesh.at.pp)
    }
