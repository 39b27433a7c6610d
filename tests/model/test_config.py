"""The published counts follow from the published keys, and what does not fit together says so."""

import subprocess
import sys

import pytest

from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer
from tests.model.small import small_config

V2 = dict(
    vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
    num_nextn_predict_layers=0, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6,
    first_k_dense_replace=1, topk_group=3, topk_method="group_limited_greedy", scoring_func="softmax",
)  # fmt: skip
V2_LITE = dict(
    V2, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
    num_attention_heads=16, q_lora_rank=None, n_routed_experts=64, n_group=1, topk_group=1, topk_method="greedy",
)  # fmt: skip


def test_the_671b_has_the_published_counts():
    v3 = ModelConfig()
    assert v3.num_params() == 671_026_419_200
    assert v3.num_activated_params() == 37_552_275_456
    assert round(v3.flops_per_token(causal=True) / 1e9, 2) == 250.45
    assert round(v3.flops_per_token(causal=False) / 1e9, 2) == 281.15
    assert v3.kv_cache_bytes_per_token() == 70_272
    assert round(v3.parts()["mtp"].num_params / 1e9, 2) == 11.61
    assert v3.attention_params == 187_105_280
    assert v3.expert_params == 44_040_192


def test_v2_and_v2_lite_have_theirs():
    assert round(ModelConfig(**V2).num_params() / 1e9, 2) == 235.74
    assert round(ModelConfig(**V2).flops_per_token(causal=True) / 1e9, 1) == 155.3
    assert round(ModelConfig(**V2_LITE).num_params() / 1e9, 3) == 15.706
    assert ModelConfig(**V2).kv_cache_bytes_per_token() == 69_120
    assert ModelConfig(**V2_LITE).kv_cache_bytes_per_token() == 31_104


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"num_nextn_predict_layers": 2}, {"n_shared_experts": 3}]
)
def test_the_arithmetic_counts_what_is_built(changes):
    config = small_config(**changes)
    model = Transformer(config)
    numbers = {name: t.numel() for name, t in model.state_dict().items()}
    is_mtp = {name: name.startswith("model.layers.") and int(name.split(".")[2]) >= 3 for name in numbers}
    assert sum(n for name, n in numbers.items() if not is_mtp[name]) == config.num_params()
    assert sum(n for name, n in numbers.items() if is_mtp[name]) == config.parts()["mtp"].num_params


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 3}, ["8", "3", "divide"]),
        ({"topk_group": 5}, ["5", "4"]),
        ({"num_experts_per_tok": 5}, ["5", "4 experts"]),
        ({"num_key_value_heads": 1}, ["1", "2"]),
        ({"first_k_dense_replace": 3}, ["3", "lower it to 2"]),
        ({"qk_rope_head_dim": 5}, ["5", "even"]),
        ({"scoring_func": "tanh"}, ["tanh", "sigmoid"]),
        ({"topk_method": "greedy"}, ["n_group is 4", "n_group=1"]),
        ({"n_group": 8, "topk_group": 4}, ["leaves 1", "at most 4"]),
        ({"hidden_size": 0}, ["hidden_size is 0"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
    ],
)
def test_numbers_that_disagree_are_named(changes, words):
    with pytest.raises(ValueError, match=r".+") as error:
        small_config(**changes)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_only_yarn_is_known():
    with pytest.raises(ValueError, match=r"'linear'.*yarn"):
        RopeScaling(type="linear")


def test_no_torch_is_needed():
    code = "import sys, model.config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
