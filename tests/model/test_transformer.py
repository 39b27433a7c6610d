"""The whole model: built anywhere, the same from any slice, and each loss by its definition."""

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.loss import IGNORE, cross_entropy
from model.transformer import Transformer, init_model_, init_parameter_
from tests.model.small import small_config, small_model, text


def test_the_671b_builds_on_meta():
    with torch.device("meta"):
        model = Transformer(ModelConfig())
    mtp = sum(p.numel() for depth in model.mtp for p in depth.parameters())
    biases = 58 * 256
    assert sum(p.numel() for p in model.parameters()) - mtp == 671_026_419_200 - biases
    assert "model.layers.3.mlp.gate.e_score_correction_bias" in dict(model.named_buffers())


def test_published_names():
    names = set(small_model().state_dict())
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ):
        assert name in names


def test_initial_values_depend_on_seed_and_name_alone():
    config = small_config(initializer_range=0.006, hidden_size=256)
    a, b = (init_model_(Transformer(config), 3).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    name = "model.layers.1.mlp.experts.down_proj"
    part = init_parameter_(name, torch.empty_like(a[name][2:5]), 3, first_expert=2)
    assert torch.equal(part, a[name][2:5])
    wide = init_parameter_(name, torch.empty_like(a[name], dtype=torch.float64), 3)
    assert torch.equal(wide.float(), a[name])
    assert not torch.equal(init_parameter_(name, torch.empty_like(a[name]), 4), a[name])
    assert not torch.equal(a[name][0], a[name][1])
    assert a["lm_head.weight"].std().item() == pytest.approx(0.006, rel=0.05)
    assert (a["model.layers.0.self_attn.kv_a_layernorm.weight"] == 1).all()
    assert (a["model.layers.1.mlp.gate.e_score_correction_bias"] == 0).all()


@pytest.mark.parametrize("chunk", [1 << 24, 61 * 4])
def test_cross_entropy_is_the_plain_one(chunk, monkeypatch):
    monkeypatch.setattr("model.loss.LOGITS_PER_CHUNK", chunk)
    head = small_model().lm_head
    h = torch.randn(10, 32, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(61, (10,))
    labels[[2, 7]] = IGNORE
    ours = cross_entropy(h, head, labels, 5.0)
    (3 * ours).backward()
    grads = h.grad.clone(), head.weight.grad.clone()
    h.grad = head.weight.grad = None
    theirs = F.cross_entropy(h @ head.weight.T, labels, reduction="sum", ignore_index=IGNORE) / 5.0
    (3 * theirs).backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert torch.allclose(grads[0], h.grad, rtol=0, atol=1e-12)
    assert torch.allclose(grads[1], head.weight.grad, rtol=0, atol=1e-12)


def test_cross_entropy_of_an_impossible_label_is_finite():
    head = small_model().lm_head.float()
    h = 1e4 * head.weight[:1].detach()
    loss = cross_entropy(h, head, torch.tensor([5]), 1.0)
    assert loss.item() == pytest.approx(F.cross_entropy(h @ head.weight.T, torch.tensor([5])).item(), rel=1e-5)
    assert loss > 100


def test_losses_are_their_definitions():
    """Equations 21 to 25 for depths 1 and 2, and equation 17 summed over every layer with experts."""
    model = small_model(num_nextn_predict_layers=2)
    tokens, labels = text(2, 9)
    losses = model.losses(tokens, labels, num_tokens=18, num_sequences=2)
    logits = model(tokens)
    assert losses.lm_loss.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-12
    )
    h, outputs = model.hidden(tokens)
    whole = torch.cat((tokens, labels[:, -1:]), 1)
    for k, depth in enumerate(model.mtp, start=1):
        embedding = model.model.embed_tokens.weight
        joined = torch.stack(
            [
                torch.cat((depth.enorm(embedding[whole[:, i + k]]), depth.hnorm(h[:, i])), -1) @ depth.eh_proj.weight.T
                for i in range(9 - k)
            ],
            dim=1,
        )
        outputs.append(depth(joined))
        h = outputs[-1].h_BLD
        logp = (depth.shared_head["norm"](h) @ model.lm_head.weight.T).log_softmax(-1)
        picked = [logp[b, i, whole[b, i + k + 1]] for b in range(2) for i in range(9 - k)]
        assert losses.mtp_losses_K[k - 1].item() == pytest.approx(-sum(picked).item() / 18, rel=1e-12)
    balance = [o.balance_loss for o in outputs if o.balance_loss is not None]
    assert len(balance) == 4
    assert losses.balance_loss.item() == pytest.approx(sum(balance).item() / 2, rel=1e-12)
    assert losses.load_ME.sum(1).tolist() == [54, 54, 48, 42]


def test_microbatches_add_up():
    tokens, labels = text(4, 8)
    grads = []
    for split in (1, 4):
        model = small_model()
        for t, l in zip(tokens.chunk(split), labels.chunk(split), strict=True):
            losses = model.losses(t, l, num_tokens=32, num_sequences=4)
            (losses.lm_loss + 0.3 * losses.mtp_losses_K.sum() + 0.01 * losses.balance_loss).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=0, atol=1e-10), name
        assert grad.norm() > 0, name


def test_phases_compose_to_forward():
    model = small_model()
    block = model.blocks[1]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    a = block.attend(x)
    routed = block.dispatch(a.x_TD, a.topk_idx_TK, a.topk_weights_TK)
    y = block.experts(routed.x_RD, routed.weights_R, routed.num_tokens_per_expert_E)
    out = block.combine(a.h_BLD, y, block.shared_expert(a.x_TD), routed.handle)
    assert torch.equal(out, block(x).h_BLD)


def test_derivatives_of_the_whole_model():
    """One random direction through every parameter against a central difference."""
    model = small_model()
    tokens, labels = text(1, 8)

    def loss():
        losses = model.losses(tokens, labels, 8, 1)
        return losses.lm_loss + 0.3 * losses.mtp_losses_K.sum() + 0.01 * losses.balance_loss

    loss().backward()
    torch.manual_seed(0)
    directions = [torch.randn_like(p) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True)).item()
    values = []
    for sign in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(model.parameters(), directions, strict=True):
                p += sign * d
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_decoding_with_a_cache_is_forward():
    model = small_model()
    tokens, _ = text(2, 10)
    caches = model.new_caches(2, 10)
    logits = [model.decode(piece, caches) for piece in tokens.split([6, 1, 1, 2], 1)]
    full = model(tokens)
    for got, position in zip(logits, (5, 6, 7, 9), strict=True):
        assert torch.allclose(got, full[:, position], rtol=0, atol=1e-10)
