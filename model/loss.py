"""Cross-entropy over a large vocabulary that never holds all logits at once.

The head is part of the loss: it works through the tokens in chunks, turns each chunk's logits into their own gradient
in place and multiplies that out right away, in the forward. What is kept for the backward is the gradient of the
hidden states and of the head's weight, instead of T x V logits. The weight gradient goes through the head's
`weight_grad` hole like any other.

Where the gradient of the loss is known beforehand, as a stage knows it, the weight gradient is added to `main_grad`
chunk by chunk, and nothing of the head's size waits (3.7 GB a microbatch for V3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.linear import Linear
from model.matmul import add_mm_, mm
from model.norm import accumulation_dtype

IGNORE = -100  # a label that has no loss
LOGITS_PER_CHUNK = 1 << 24
LOGITS_PER_BLOCK = 1 << 18  # as many as a core's cache holds


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD, weight, labels_T, normaliser, weight_grad, gradient):
        T, V = h_TD.shape[0], weight.shape[0]
        dtype = accumulation_dtype(h_TD)
        needs_dh, needs_dw = ctx.needs_input_grad[:2]
        at_once = gradient is not None and hasattr(weight, "main_grad")
        dh_TD = torch.empty_like(h_TD) if needs_dh else None
        dw_VD = None
        loss = h_TD.new_zeros((), dtype=dtype)
        chunk = max(1, LOGITS_PER_CHUNK // V)
        for start in range(0, T, chunk):
            h, labels = h_TD[start : start + chunk], labels_T[start : start + chunk]
            logits = mm(h, weight.t())
            loss += _loss_and_gradient_(logits, labels, normaliser, dtype)
            if dh_TD is not None:
                dh_TD[start : start + chunk] = mm(logits, weight)
            if needs_dw and at_once:
                add_mm_(weight.main_grad, logits.mul_(gradient).t(), h)
            elif needs_dw:
                part = mm(logits.t(), h)
                if dw_VD is None:
                    dw_VD = part if chunk >= T else part.to(dtype)
                else:
                    dw_VD += part
        ctx.save_for_backward(dh_TD, dw_VD)
        ctx.weight, ctx.weight_grad = weight, weight_grad
        return loss / normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (dh_TD, dw_VD), weight = ctx.saved_tensors, ctx.weight
        dh_TD = None if dh_TD is None else dh_TD * dloss
        if dw_VD is None:
            return dh_TD, None, None, None, None, None

        def compute() -> Tensor | None:
            if hasattr(weight, "main_grad"):
                weight.main_grad.addcmul_(dw_VD, dloss)
                return None
            return (dw_VD * dloss).to(weight.dtype)

        return dh_TD, ctx.weight_grad(weight, compute), None, None, None, None


def _loss_and_gradient_(logits_TV: Tensor, labels_T: Tensor, normaliser: float, dtype: torch.dtype) -> Tensor:
    """The sum of the tokens' losses; in place of the logits stands their gradient, divided by `normaliser`.

    On a CPU it works through blocks that stay in a core's cache, in `dtype`, each in one buffer.
    """
    T, V = logits_TV.shape
    loss = logits_TV.new_zeros((), dtype=dtype)
    rows = max(1, LOGITS_PER_BLOCK // V) if logits_TV.is_cpu else max(1, T)
    for block, labels in zip(logits_TV.split(rows), labels_T[:, None].split(rows), strict=True):
        counted = labels != IGNORE
        index = labels.where(counted, 0)
        logits = block.to(dtype)
        probs = logits.softmax(-1)
        # log of the sum of exponentials, from the largest: its probability is at least 1 / V
        lse = logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
        loss += (lse - logits.gather(1, index)).where(counted, 0).sum()
        probs.scatter_add_(1, index, -torch.ones_like(lse))
        torch.mul(probs, counted / probs.new_tensor(normaliser), out=block)
    return loss


def cross_entropy(
    h_TD: Tensor, head: Linear, labels_T: Tensor, normaliser: float, gradient: float | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(head(h))[label], divided by `normaliser`; labels of -100 do not count.

    Args:
        h_TD: normed hidden states; labels_T: int64; normaliser: tokens of the whole global batch, so that
        microbatches add up. gradient: of this loss in what is minimised, if it is known; it is then a promise.
    Returns: a scalar in float32 (float64 of float64), nats.
    """
    # detached where nothing is learnt: autograd says that a parameter needs its gradient even then
    weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
    return _CrossEntropy.apply(h_TD, weight, labels_T, normaliser, head.weight_grad, gradient)
