"""Multi-head latent attention: keys and values are expanded from one small latent per token, and only that is cached.

Down: c_kv = W_DKV h (512 numbers) and, beside it, one rotary key of 64 shared by all heads; queries are compressed
too. Up: each head's key (without position), value and query come from the latents. A head's query and key are the
position-free part and the rotary part side by side. V2 paper, section 2.1; V3 report, section 2.1.1, equations 1 to
11.

The rotary part is decoupled because only then can W_UK be absorbed into the query (and W_UV into the output): a
decoder then attends to the cached latents directly and never expands them. `decode` is that absorbed form.

Shapes: B batch, L length, S cached length, N heads, H = qk_nope + qk_rope head dim, V value head dim, C latent, R
rotary dim.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.attention_core import attention
from model.config import ModelConfig, RopeScaling
from model.linear import Linear, Region, run_region
from model.norm import RMSNorm, accumulation_dtype


def yarn_mscale(factor: float, mscale: float) -> float:
    """The attention temperature 0.1 mscale ln(factor) + 1 (V3 report, section 4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each of the dim / 2 pairs, float32; YaRN (arXiv 2309.00071) stretches the slow pairs."""
    wavelength = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return 1.0 / wavelength

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return (
            dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * wavelength) * (1 - keep) + 1.0 / wavelength * keep


@lru_cache(maxsize=16)
def rope_table(
    dim: int, theta: float, scaling: RopeScaling | None, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and pair, (length, dim / 2) each. Angles are float32, as in the published code."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_frequencies(dim, theta, scaling))
    amplitude = 1.0
    if scaling is not None:
        amplitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return (angles.cos() * amplitude).to(device, dtype), (angles.sin() * amplitude).to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns adjacent pairs (x0, x1), (x2, x3), ...; the result holds all first members, then all second ones.

    Queries and keys are permuted alike, so their products are those of the interleaved layout.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _turn_back(grad: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """The backward of `rotate`, into the interleaved `out`."""
    first, second = grad.chunk(2, dim=-1)
    torch.addcmul(first * cos, second, sin, out=out[..., 0::2])
    torch.addcmul(second * cos, first, sin, value=-1, out=out[..., 1::2])


class _Heads(torch.autograd.Function):
    """Queries, keys and values of every head, (B, N, L, ...) and contiguous, from what the projections give."""

    @staticmethod
    def forward(ctx, q_BLNH, kv_BLN, key_BLR, cos, sin):
        nope = q_BLNH.shape[-1] - key_BLR.shape[-1]
        ctx.save_for_backward(cos, sin)
        ctx.nope = nope
        q, kv = q_BLNH.transpose(1, 2), kv_BLN.transpose(1, 2)
        queries = q.new_empty(q.shape)
        queries[..., :nope] = q[..., :nope]
        queries[..., nope:] = rotate(q[..., nope:], cos, sin)
        keys = q.new_empty(q.shape)
        keys[..., :nope] = kv[..., :nope]
        keys[..., nope:] = rotate(key_BLR, cos, sin)[:, None]
        return queries, keys, kv[..., nope:].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dqueries, dkeys, dvalues):
        (cos, sin), nope = ctx.saved_tensors, ctx.nope
        B, N, L, H = dqueries.shape
        dq_BLNH = dqueries.new_empty(B, L, N, H)
        dq = dq_BLNH.transpose(1, 2)
        dq[..., :nope] = dqueries[..., :nope]
        _turn_back(dqueries[..., nope:], cos, sin, out=dq[..., nope:])
        dkv_BLN = dqueries.new_empty(B, L, N, nope + dvalues.shape[-1])
        dkv = dkv_BLN.transpose(1, 2)
        dkv[..., :nope] = dkeys[..., :nope]
        dkv[..., nope:] = dvalues
        dkey_BLR = dqueries.new_empty(B, L, H - nope)
        _turn_back(dkeys[..., nope:].sum(1), cos, sin, out=dkey_BLR)
        return dq_BLNH, dkv_BLN, dkey_BLR, None, None


def causal_mask(document_ids_BL: Tensor) -> Tensor:
    """(B, 1, L, L), True where a query may look: not ahead, and not into another document."""
    L = document_ids_BL.shape[1]
    same = document_ids_BL[:, None, :, None] == document_ids_BL[:, None, None, :]
    return same & torch.ones_like(same[:1, :, :1, :1]).expand(1, 1, L, L).tril()


class LatentCache:
    """One layer's cache: per token the latent (C) and the rotated shared key (R), (C + R) numbers in all."""

    def __init__(self, latent_BSC: Tensor, key_BSR: Tensor) -> None:
        self.latent_BSC, self.key_BSR, self.length = latent_BSC, key_BSR, 0

    def append(self, latent_BLC: Tensor, key_BLR: Tensor) -> tuple[Tensor, Tensor]:
        """Adds L tokens; returns all that is cached."""
        end, room = self.length + latent_BLC.shape[1], self.latent_BSC.shape[1]
        if end > room:
            raise ValueError(f"{end} tokens do not fit a cache of {room}; make a longer cache")
        self.latent_BSC[:, self.length : end] = latent_BLC
        self.key_BSR[:, self.length : end] = key_BLR
        self.length = end
        return self.latent_BSC[:, :end], self.key_BSR[:, :end]


class MLA(nn.Module):
    """Multi-head latent attention. Parameter names are the published checkpoint's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        self.region: Region = run_region
        self.scale = config.qk_head_dim**-0.5
        if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
            self.scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    def _compressed_queries(self, x_BLD: Tensor) -> Tensor:
        """What queries are expanded from."""
        return x_BLD if self.config.q_lora_rank is None else self.q_a_proj(x_BLD)

    def _queries(self, c_BLC: Tensor) -> Tensor:
        is_plain = self.config.q_lora_rank is None
        q = self.q_proj(c_BLC) if is_plain else self.q_b_proj(self.q_a_layernorm(c_BLC))
        return q.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))

    def _rope(self, x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        config = self.config
        cos, sin = rope_table(
            config.qk_rope_head_dim, config.rope_theta, config.rope_scaling, _power_of_two(end), x.dtype, x.device
        )
        return cos[start:end], sin[start:end]

    def forward(self, x_BLD: Tensor, document_ids_BL: Tensor | None = None) -> Tensor:
        """Causal attention over a whole sequence: (B, L, D) -> (B, L, D).

        Args:
            document_ids_BL: int; where given, a token sees its own document only. V3's pre-training gives none.
        """
        config = self.config
        cos, sin = self._rope(x_BLD, 0, x_BLD.shape[1])

        def expand(c_BLC: Tensor, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            kv_BLN = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (config.num_attention_heads, -1))
            return _Heads.apply(self._queries(c_BLC), kv_BLN, key, cos, sin)

        latent, key = self.kv_a_proj_with_mqa(x_BLD).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        queries, keys, values = self.region(expand, self._compressed_queries(x_BLD), latent, key)
        mask = None if document_ids_BL is None else causal_mask(document_ids_BL)
        out_BNLV = attention(queries, keys, values, self.scale, mask)
        return self.o_proj(out_BNLV.transpose(1, 2).flatten(2))

    def new_cache(self, x: Tensor, batch_size: int, length: int) -> LatentCache:
        """An empty cache for `length` tokens, of the dtype and in the memory of `x`."""
        config = self.config
        return LatentCache(
            x.new_zeros(batch_size, length, config.kv_lora_rank),
            x.new_zeros(batch_size, length, config.qk_rope_head_dim),
        )

    def decode(self, x_BLD: Tensor, cache: LatentCache) -> Tensor:
        """Attention of L new tokens to everything cached and to themselves, in the absorbed form; appends them."""
        config = self.config
        start, L = cache.length, x_BLD.shape[1]
        cos, sin = self._rope(x_BLD, start, start + L)
        latent, key = self.kv_a_proj_with_mqa(x_BLD).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent_BSC, key_BSR = cache.append(self.kv_a_layernorm(latent), rotate(key, cos, sin))
        q_nope, q_rope = self._queries(self._compressed_queries(x_BLD)).split(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1
        )
        up = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        up_k_NHC, up_v_NVC = up.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        scores_BNLS = torch.einsum("blnc,bsc->bnls", torch.einsum("blnh,nhc->blnc", q_nope, up_k_NHC), latent_BSC)
        scores_BNLS += torch.einsum("blnr,bsr->bnls", rotate(q_rope, cos[:, None], sin[:, None]), key_BSR)
        ahead_LS = torch.ones_like(scores_BNLS[0, 0], dtype=torch.bool).triu(start + 1)
        scores_BNLS = (scores_BNLS * self.scale).masked_fill(ahead_LS, -torch.inf)
        probs_BNLS = scores_BNLS.softmax(-1, dtype=accumulation_dtype(x_BLD)).to(x_BLD.dtype)
        out_BLNV = torch.einsum("blnc,nvc->blnv", torch.einsum("bnls,bsc->blnc", probs_BNLS, latent_BSC), up_v_NVC)
        return self.o_proj(out_BLNV.flatten(2))


def _power_of_two(length: int) -> int:
    """Table lengths are rounded up, so that decoding does not make a new table for every token."""
    return 1 << (length - 1).bit_length()
