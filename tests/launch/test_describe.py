"""The models of conf/model, from their files: the published counts, and the JSON of the contract."""

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from launch import describe
from model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]


def model(name: str) -> ModelConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_object(compose("describe", overrides=[f"model={name}"])).model  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "billions", "activated", "kv_cache_bytes"),
    [
        ("16b", 15.706, 2.66, 31_104),
        ("236b", 235.741, 21.38, 69_120),
        ("671b", 671.026, 37.55, 70_272),
    ],
)
def test_published_counts(name, billions, activated, kv_cache_bytes):
    figures = describe.describe(model(name))
    assert round(figures["num_params"] / 1e9, 3) == billions
    assert round(figures["num_activated_params"] / 1e9, 2) == activated
    assert figures["kv_cache_bytes_per_token"] == kv_cache_bytes


def test_the_debug_model_has_every_feature_of_the_671b():
    debug, v3 = model("debug"), model("671b")
    assert 1e6 < debug.num_params() < 1e7
    for feature in ("topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_shared_experts"):
        assert getattr(debug, feature) == getattr(v3, feature)
    assert debug.q_lora_rank
    assert debug.rope_scaling
    assert debug.num_nextn_predict_layers == v3.num_nextn_predict_layers == 1
    assert 1 < debug.topk_group < debug.n_group
    assert debug.first_k_dense_replace
    assert debug.num_moe_layers
    assert v3.initializer_range == 0.006


def test_json_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch/describe.py"), "model=671b", "format=json"])
    describe.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_params"] == 671_026_419_200
    assert figures["num_activated_params"] == 37_552_275_456
    for key in ("num_params", "num_activated_params", "flops_per_token", "flops_per_token_causal"):
        summed = sum(part[key] for name, part in figures["parts"].items() if name != "mtp")
        assert summed == figures[key]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch/describe.py"), "model=16b"])
    describe.main()
    assert "15,706,484,224" in capsys.readouterr().out
