"""softmax(q k^T) v under a causal mask, in blocks of query rows.

On a CPU torch's fused attention wants queries, keys and values of one width - latent attention's values are narrower -
and otherwise forms the whole L x L matrix. Here a block of queries meets only the keys it may see, so about half of the
matrix is
never computed, and none of it is kept: the backward makes each block again, as flash attention does (arXiv 2205.14135).
Elsewhere than on a CPU torch's own kernel is taken.

Shapes: B batch, N heads, L length, H head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # query rows of a block


def attention(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLV: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Causal attention, (B, N, L, V).

    Args:
        mask: bool, broadcasts to (B, N, L, L), True where a query may look; given, it is all that masks, so it must
            itself forbid to look ahead.
    """
    if mask is None and q_BNLH.is_cpu:
        return _BlockAttention.apply(q_BNLH, k_BNLH, v_BNLV, scale)
    return F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLV, mask, is_causal=mask is None, scale=scale)


def _blocks(L: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, L, ROWS):
        end = min(start + ROWS, L)
        yield slice(start, end), slice(0, end)


def _probs(q_GLH: Tensor, k_GLH: Tensor, rows: slice, keys: slice) -> Tensor:
    """Attention weights of one block of (scaled) query rows; only its last square looks ahead anywhere."""
    scores = torch.bmm(q_GLH[:, rows], k_GLH[:, keys].transpose(1, 2))
    square = scores[:, :, rows]
    square += torch.full_like(square[0], -torch.inf).triu_(1)
    return scores.softmax(-1)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        B, N, L, V = v.shape
        q, k, v = (q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = v.new_empty(B, L, N, V).transpose(1, 2)  # the layout the output projection reads
        for rows, keys in _blocks(L):
            out[:, :, rows] = torch.bmm(_probs(q, k, rows, keys), v[:, keys]).view(B, N, -1, V)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out = ctx.saved_tensors
        B, N, L, _ = dout.shape
        delta = (dout * out).sum(-1, keepdim=True).flatten(0, 1)
        dout = dout.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in _blocks(L):
            probs = _probs(q, k, rows, keys)
            dv[:, keys].baddbmm_(probs.transpose(1, 2), dout[:, rows])
            dscores = torch.bmm(dout[:, rows], v[:, keys].transpose(1, 2)).sub_(delta[:, rows]).mul_(probs)
            dq[:, rows] = torch.bmm(dscores, k[:, keys])
            dk[:, keys].baddbmm_(dscores.transpose(1, 2), q[:, rows])
        return *(grad.unflatten(0, (B, N)) for grad in (dq.mul_(ctx.scale), dk, dv)), None
