"""softmax(q k^T) v under a causal mask, in blocks of query rows.

On a CPU torch's fused attention wants queries, keys and values of one width - latent attention's values are narrower -
and otherwise forms the whole L x L matrix. Here a block of queries meets only the keys it may see, so about half of the
matrix is
never computed. Up to `KEEP` tokens the attention weights are kept, which are then no more than a layer's other
activations; of longer sequences the backward makes each block again, as flash attention does (arXiv 2205.14135).
Elsewhere than on a CPU torch's own kernel is taken.

Shapes: B batch, N heads, L length, H head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW_BYTES = 256  # of one column of a block: it has 64 query rows in float32, 128 in bfloat16
KEEP = 512  # tokens of a sequence whose attention weights are kept for the backward


def attention(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLV: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Causal attention, (B, N, L, V).

    Args:
        mask: bool, broadcasts to (B, N, L, L), True where a query may look; given, it is all that masks, so it must
            itself forbid to look ahead.
    """
    if mask is None and q_BNLH.is_cpu:
        return _BlockAttention.apply(q_BNLH, k_BNLH, v_BNLV, scale)
    return F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLV, mask, is_causal=mask is None, scale=scale)


def _blocks(q_GLH: Tensor) -> Iterator[tuple[slice, slice]]:
    """The query rows of each block, and the keys that they may see."""
    L, num_rows = q_GLH.shape[1], ROW_BYTES // q_GLH.itemsize
    for start in range(0, L, num_rows):
        end = min(start + num_rows, L)
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
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        scaled = q * scale
        out = v.new_empty(B, L, N, V).transpose(1, 2)  # the layout the output projection reads
        kept = []
        for rows, keys in _blocks(q):
            probs = _probs(scaled, k, rows, keys)
            out[:, :, rows] = torch.bmm(probs, v[:, keys]).view(B, N, -1, V)
            if L <= KEEP:
                kept.append(probs)
        # The queries as they came, not scaled: they may be recomputed, and are then not kept.
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, *kept = ctx.saved_tensors
        q = q * ctx.scale
        B, N = dout.shape[:2]
        dout = dout.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), k[:, :0], v[:, :0]
        for rows, keys in reversed(list(_blocks(q))):  # the last block sees all keys: the others add to its gradients
            probs = kept.pop() if kept else _probs(q, k, rows, keys)
            dprobs = torch.bmm(dout[:, rows], v[:, keys].transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            dq[:, rows] = torch.bmm(dscores, k[:, keys])
            dv = _added(dv, torch.bmm(probs.transpose(1, 2), dout[:, rows]))
            dk = _added(dk, torch.bmm(dscores.transpose(1, 2), q[:, rows]))
        return *(grad.unflatten(0, (B, N)) for grad in (dq.mul_(ctx.scale), dk, dv)), None


def _added(total_GLH: Tensor, part_GSH: Tensor) -> Tensor:
    """The sum of gradients of the first S keys and of all L; the first part is of all and starts the empty sum."""
    if total_GLH.shape[1] == 0:
        return part_GSH
    total_GLH[:, : part_GSH.shape[1]] += part_GSH
    return total_GLH
