"""Routing as published, where others got it wrong; experts against a loop over them; the balance loss by formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.dispatch import LocalDispatcher
from model.moe import MoE, Router, sequence_balance_loss, updated_bias
from tests.model.small import small_config, small_model


def router(bias=None, **changes):
    config = small_config(**changes)
    gate = Router(config).double()
    torch.manual_seed(1)
    torch.nn.init.normal_(gate.weight)
    if config.topk_method == "noaux_tc":
        gate.e_score_correction_bias = (
            torch.zeros(8, dtype=torch.float64) if bias is None else torch.tensor(bias).double()
        )
    return gate


def one_token(gate, x):
    """The published rule for one token, in plain Python."""
    config = gate.config
    logits = gate.weight @ x
    raw = (logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(0)).tolist()
    v3 = config.topk_method == "noaux_tc"
    choice = [s + b for s, b in zip(raw, gate.e_score_correction_bias.tolist(), strict=True)] if v3 else raw
    size = len(raw) // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    best_two = lambda g: sum(sorted((choice[e] for e in g), reverse=True)[: 2 if v3 else 1])  # noqa: E731
    allowed = [e for g in sorted(groups, key=best_two, reverse=True)[: config.topk_group] for e in g]
    chosen = sorted(allowed, key=lambda e: choice[e], reverse=True)[: config.num_experts_per_tok]
    total = sum(raw[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: raw[e] / total * config.routed_scaling_factor for e in chosen}


V2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
V2_LITE = {**V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1}


@pytest.mark.parametrize("changes", [{}, {"routed_scaling_factor": 1.0}, V2, V2_LITE, {"n_group": 2, "topk_group": 1}])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_routing_is_the_published_rule(changes, spread):
    torch.manual_seed(0)
    gate = router((spread * torch.randn(8)).tolist(), **changes)
    x = torch.randn(2, 20, 32, dtype=torch.float64) / 4
    routing = gate(x)
    for t, token in enumerate(x.flatten(0, 1)):
        ours = dict(zip(routing.topk_idx_TK[t].tolist(), routing.topk_weights_TK[t].tolist(), strict=True))
        assert ours == pytest.approx(one_token(gate, token), rel=1e-12)
    assert routing.load_E.tolist() == torch.bincount(routing.topk_idx_TK.flatten(), minlength=8).tolist()


def test_the_bias_chooses_but_does_not_weigh():
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    plain, biased = router()(x), router([9.0, 9, 9, 0, 0, 0, 0, 0])(x)
    assert set(biased.topk_idx_TK[0].tolist()) == {0, 1, 2}
    assert biased.topk_weights_TK.sum().item() == pytest.approx(2.5)
    scores = router().scores(x)[0, 0]
    for e, w in zip(biased.topk_idx_TK[0].tolist(), biased.topk_weights_TK[0].tolist(), strict=True):
        assert w == pytest.approx((scores[e] / scores[:3].sum() * 2.5).item(), rel=1e-12)
    assert set(plain.topk_idx_TK[0].tolist()) != {0, 1, 2}


def test_groups_are_ranked_by_the_sum_of_their_two_best():
    gate = router(topk_group=1, n_group=4, num_experts_per_tok=2)
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.6, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert set(gate.select(scores)[0].tolist()) == {2, 3}  # by the maximum it would be the first group
    v2 = router(**{**V2, "topk_group": 1, "num_experts_per_tok": 2})
    assert set(v2.select(scores)[0].tolist()) == {0, 1}


def test_a_rejected_group_stays_rejected_when_biases_are_negative():
    gate = router([-5.0] * 8, topk_group=1, num_experts_per_tok=2)
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert set(gate.select(scores)[0].tolist()) == {0, 1}  # masked with 0, the others would win


def test_the_bias_stays_float32_in_a_bfloat16_model():
    gate = Router(small_config())
    gate.e_score_correction_bias.fill_(1.001)
    assert gate.to(torch.bfloat16).e_score_correction_bias.tolist() == pytest.approx([1.001] * 8, abs=1e-6)
    assert gate.weight.dtype == torch.bfloat16
    assert "e_score_correction_bias" in gate.state_dict()


def test_bias_update():
    bias = torch.tensor([0.5, 0.0, 0.0, -0.5])
    load = torch.tensor([10, 2, 5, 3])
    assert torch.allclose(updated_bias(bias, load, 0.001), torch.tensor([0.499, 0.001, 0.0, -0.499]))
    assert torch.equal(updated_bias(bias, load, 0.0), bias)
    layers = updated_bias(torch.zeros(2, 4), torch.stack([load, load.flip(0)]), 1.0)
    assert layers.tolist() == [[-1, 1, 0, 1], [1, 0, 1, -1]]


def test_balance_loss_is_equations_17_to_20():
    torch.manual_seed(0)
    scores = torch.rand(3, 7, 5, dtype=torch.float64).requires_grad_()
    K, expected = 2, 0.0
    for sequence in scores:
        T, E = sequence.shape
        for i in range(E):
            f = E / (K * T) * sum(1 for t in range(T) if i in sequence[t].topk(K).indices.tolist())
            P = sum(sequence[t, i] / sequence[t].sum() for t in range(T)) / T
            expected = expected + f * P
    loss = sequence_balance_loss(scores, scores.topk(K).indices)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    mine, theirs = (torch.autograd.grad(value, scores)[0] for value in (loss, expected))
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    assert mine.norm() > 0
    even = torch.ones(1, 8, 4) + torch.eye(4).repeat(2, 1)
    assert sequence_balance_loss(even, even.topk(1).indices).item() == pytest.approx(1.0)


@pytest.mark.parametrize("is_v2", [False, True])
def test_v3_counts_raw_scores_and_v2_where_tokens_go(is_v2):
    """V2 as `MoEGate` of the published code: ce counts `topk_idx`, times the mean scores, summed over experts."""
    v2 = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False}
    config = small_config(aux_loss_alpha=0.001, num_experts_per_tok=2, topk_group=1, **(v2 if is_v2 else {}))
    router = Router(config).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    if not is_v2:
        torch.nn.init.normal_(router.e_score_correction_bias)
    x = torch.randn(2, 6, config.hidden_size, dtype=torch.float64)
    routing, scores, K = router(x), router.scores(x), config.num_experts_per_tok
    by_score = scores.topk(K).indices
    sent = routing.topk_idx_TK.view(by_score.shape)
    assert not torch.equal(by_score.sort().values, sent.sort().values)  # else the test would tell nothing
    counted = sent if is_v2 else by_score
    expected = 0.0
    for b in range(2):
        ce = torch.bincount(counted[b].flatten(), minlength=config.n_routed_experts).double()
        share = scores[b] / scores[b].sum(-1, keepdim=True)
        expected += (ce / (6 * K / config.n_routed_experts) * share.mean(0)).sum().item()
    assert routing.balance_loss.item() == pytest.approx(expected, rel=1e-12)


def loop_over_experts(moe, x, routing):
    out = 0 * x
    for t in range(x.shape[0]):
        for e, w in zip(routing.topk_idx_TK[t].tolist(), routing.topk_weights_TK[t], strict=True):
            gate, up = (moe.experts.gate_up_proj[e] @ x[t]).chunk(2)
            out[t] = out[t] + w * (moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_dispatch_experts_combine_is_a_loop_over_experts(tokens):
    moe: MoE = small_model().blocks[1].mlp
    x = torch.randn(1, tokens, 32, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in ("fast", "slow"):
        moe.zero_grad()
        x.grad = None
        routing = moe.gate(x)
        if run == "fast":
            routed = moe.dispatcher.dispatch(x[0], routing.topk_idx_TK, routing.topk_weights_TK)
            assert routed.num_tokens_per_expert_E.sum() == tokens * 3
            y = moe.dispatcher.combine(
                moe.experts(routed.x_RD, routed.weights_R, routed.num_tokens_per_expert_E), routed.handle
            )
        else:
            y = loop_over_experts(moe, x[0], routing)
        y.square().sum().backward()
        params = [p for name, p in moe.named_parameters() if "shared" not in name]
        grads.append([y.detach(), x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params)])
    for fast, slow in zip(*grads, strict=True):
        assert torch.allclose(fast, slow, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_rows_come_back_to_their_tokens(T, K, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, 3, generator=generator, dtype=torch.float64)
    idx = torch.stack([torch.randperm(6, generator=generator)[:K] for _ in range(T)]) if T else torch.zeros(0, K).long()
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64)
    dispatcher = LocalDispatcher(6)
    routed = dispatcher.dispatch(x, idx, weights)
    experts = torch.arange(6).repeat_interleave(routed.num_tokens_per_expert_E)
    y = routed.x_RD * (routed.weights_R * (experts + 1))[:, None]
    expected = x * (weights * (idx + 1)).sum(1, keepdim=True)
    assert torch.allclose(dispatcher.combine(y, routed.handle), expected, rtol=0, atol=1e-12)
