"""Latent attention against the formulas, blocks against the plain form, the absorbed form against the expanded."""

import math

import pytest
import torch

from model import attention_core
from model.attention import MLA, _Heads, causal_mask, rope_frequencies, rope_table, rotate
from model.attention_core import attention
from model.config import ModelConfig, RopeScaling
from tests.model.small import small_config, small_model, text


def plain_attention(q, k, v, scale, mask=None):
    L = q.shape[2]
    mask = torch.ones(L, L, dtype=torch.bool).tril() if mask is None else mask
    return ((q @ k.transpose(2, 3)) * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def qkv(B, N, L, H, V):
    torch.manual_seed(0)
    return [torch.randn(B, L, N, d, dtype=torch.float64).transpose(1, 2).requires_grad_() for d in (H, H, V)]


@pytest.mark.parametrize("length", [0, 1, 5, 8, 19, 300])
@pytest.mark.parametrize("keep", [0, 512], ids=["made again", "kept"])
def test_blocks_are_the_plain_form(length, keep, monkeypatch):
    monkeypatch.setattr(attention_core, "KEEP", keep)
    if length < 300:
        monkeypatch.setattr(attention_core, "ROW_BYTES", 8 * 8)
    ours, theirs = qkv(2, 3, length, 6, 4), qkv(2, 3, length, 6, 4)
    weights = torch.randn(2, 3, length, 4, dtype=torch.float64)
    a, b = attention(*ours, 0.7), plain_attention(*theirs, 0.7)
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-10)


def test_a_token_does_not_look_ahead():
    model = small_model()
    tokens, _ = text(1, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 8:], after[:, 8:], rtol=0, atol=1e-3)


def test_documents_are_hidden_from_each_other():
    model = small_model()
    tokens, _ = text(1, 12)
    ids = torch.tensor([[0] * 5 + [1] * 7])
    assert causal_mask(ids).shape == (1, 1, 12, 12)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 61
    assert torch.allclose(model(tokens, ids)[:, 5:], model(changed, ids)[:, 5:], rtol=0, atol=1e-12)
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:], rtol=0, atol=1e-3)
    alone = torch.zeros_like(ids)
    assert torch.allclose(model(tokens, alone), model(tokens), rtol=0, atol=1e-10)


def test_attention_is_the_formula():
    """Section 2.1.1, one head and one pair of positions at a time."""
    config = small_config()
    mla = MLA(config).double()
    torch.manual_seed(0)
    for p in mla.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    N, nope, rope, V = 2, 8, 4, 6
    frequencies = rope_frequencies(rope, config.rope_theta, config.rope_scaling)

    def rms(t, weight):
        return t / (t.square().mean() + 1e-6).sqrt() * weight

    def turned(t, position):
        pairs = torch.view_as_complex(t.reshape(-1, 2))
        angles = (frequencies * position).double()
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()

    queries, keys, values = [], [], []
    for t, h in enumerate(x[0]):
        q = mla.q_b_proj.weight @ rms(mla.q_a_proj.weight @ h, mla.q_a_layernorm.weight)
        latent, shared = (mla.kv_a_proj_with_mqa.weight @ h).split([16, 4])
        kv = mla.kv_b_proj.weight @ rms(latent, mla.kv_a_layernorm.weight)
        queries.append([torch.cat((a[:nope], turned(a[nope:], t))) for a in q.view(N, -1)])
        keys.append([torch.cat((a[:nope], turned(shared, t))) for a in kv.view(N, -1)])
        values.append([a[nope:] for a in kv.view(N, -1)])
    scale = (nope + rope) ** -0.5 * (0.1 * math.log(4.0) + 1) ** 2
    for t in range(6):
        heads = []
        for n in range(N):
            scores = torch.stack([queries[t][n] @ keys[s][n] for s in range(t + 1)]) * scale
            heads.append(sum(p * values[s][n] for s, p in enumerate(scores.softmax(0))))
        expected = mla.o_proj.weight @ torch.cat(heads)
        assert expected.shape == (32,)
        assert mla.o_proj.weight.shape[1] == V * N
        assert torch.allclose(mla(x)[0, t], expected, rtol=0, atol=1e-6)  # the tables' angles are float32


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_scaling": None}])
def test_the_absorbed_form_is_the_expanded_one(changes):
    model = small_model(**changes)
    mla = model.blocks[0].self_attn
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    cache = mla.new_cache(x, batch_size=2, length=11)
    pieces = [mla.decode(piece, cache) for piece in x.split([4, 1, 1, 3, 2], dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), mla(x), rtol=0, atol=1e-10)


def test_heads_are_the_rotated_and_shared_parts():
    torch.manual_seed(0)
    q, kv, key = (torch.randn(2, 5, *d, dtype=torch.float64, requires_grad=True) for d in ((3, 6), (3, 7), (2,)))
    cos, sin = rope_table(2, 1e4, None, 5, torch.float64, torch.device("cpu"))
    queries, keys, values = _Heads.apply(q, kv, key, cos, sin)
    assert torch.equal(
        queries.transpose(1, 2), torch.cat((q[..., :4], rotate(q[..., 4:], cos[:, None], sin[:, None])), -1)
    )
    shared = rotate(key, cos, sin)[:, :, None].expand(-1, -1, 3, -1)
    assert torch.equal(keys.transpose(1, 2), torch.cat((kv[..., :4], shared), -1))
    assert torch.equal(values.transpose(1, 2), kv[..., 4:])
    assert torch.autograd.gradcheck(lambda *t: _Heads.apply(*t, cos, sin), (q, kv, key))


def test_a_full_cache_says_so():
    mla = small_model().blocks[0].self_attn
    cache = mla.new_cache(torch.zeros(1, dtype=torch.float64), batch_size=1, length=3)
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of 3"):
        mla.decode(torch.randn(1, 4, 32, dtype=torch.float64), cache)


def test_yarn_stretches_the_slow_pairs_only():
    """The published figures: low 10, high 23 of 32 pairs for factor 40 over 4096."""
    v3 = ModelConfig(rope_scaling=RopeScaling())
    plain = rope_frequencies(64, v3.rope_theta, None)
    yarn = rope_frequencies(64, v3.rope_theta, v3.rope_scaling)
    assert torch.equal(yarn[:11], plain[:11])
    assert torch.allclose(yarn[23:], plain[23:] / 40)
    assert (yarn[11:23] < plain[11:23]).all()
    assert (yarn[11:23] > plain[11:23] / 40).all()
    assert math.isclose(MLA(small_config()).scale, 12**-0.5 * (1 + 0.1 * math.log(4)) ** 2)


def test_building_on_meta_loses_no_table():
    with torch.device("meta"):
        mla = MLA(small_config())
    mla = mla.to_empty(device="cpu").double()
    assert not [name for name, _ in mla.named_buffers()]
    cos, _ = rope_table(4, 1e4, None, 8, torch.float64, torch.device("cpu"))
    assert cos[0].tolist() == [1.0, 1.0]
