"""Hugging Face checkpoints in and out, against `transformers` itself."""

import json
import resource
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig, RopeScaling
from model.hf import (
    HuggingFaceCheckpoint,
    dequantize,
    from_hugging_face_config,
    to_hugging_face_config,
    write_hugging_face,
)
from model.transformer import Transformer
from tests.model.small import small_config, small_model, text


@pytest.fixture
def modeling(monkeypatch):
    """transformers' model file, its islands of float32 lifted to float64 (it casts down in norms, gate and softmax)."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

    lifted = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("__")})
    lifted.float32 = torch.float64
    monkeypatch.setattr(module, "torch", lifted)


def theirs_from(folder, dtype=torch.float64):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    model.set_experts_implementation("eager")  # its grouped one has no float64
    return model.eval()


def load(folder) -> Transformer:
    checkpoint = HuggingFaceCheckpoint(folder)
    model = Transformer(checkpoint.config).double()
    model.load_state_dict({name: checkpoint.tensor(name) for name in model.state_dict()})
    return model


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_scaling": None}])
def test_transformers_loads_what_we_write_and_agrees(tmp_path, modeling, changes):
    model = small_model(**changes)
    write_hugging_face(
        tmp_path / "out", model.config, model.state_dict().items(), torch.float64, max_shard_bytes=20_000
    )
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    theirs = theirs_from(tmp_path / "out")
    tokens, _ = text(2, 40)
    with torch.no_grad():
        expected, got = theirs(tokens, use_cache=False).logits, model(tokens)
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


V2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
V2 |= {"num_nextn_predict_layers": 0}
V2_LITE = {**V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}


@pytest.mark.parametrize("changes", [{}, V2, V2_LITE])
def test_unlifted_transformers_agrees_to_its_float32(tmp_path, changes):
    """Of V2 too, whose rotary positions `transformers` turns in float32 by a method that cannot be lifted."""
    model = small_model(**changes)
    write_hugging_face(tmp_path / "out", model.config, model.state_dict().items(), torch.float64)
    tokens, _ = text(2, 40)
    with torch.no_grad():
        expected = theirs_from(tmp_path / "out")(tokens, use_cache=False).logits
        assert (model(tokens) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_we_load_what_transformers_writes_and_agree(tmp_path, modeling):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = small_config(num_nextn_predict_layers=0)
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hugging_face_config(config))).double().eval()
    theirs.set_experts_implementation("eager")
    for name, bias in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(bias, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    ours = load(tmp_path / "theirs")
    tokens, _ = text(2, 40)
    with torch.no_grad():
        expected, got = theirs(tokens, use_cache=False).logits, ours(tokens)
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_everything_survives_the_way_out_and_in(tmp_path):
    model = small_model(num_nextn_predict_layers=2)
    write_hugging_face(tmp_path / "out", model.config, model.state_dict().items(), torch.float64)
    back = load(tmp_path / "out")
    assert back.config == model.config or back.config.num_key_value_heads == model.config.num_attention_heads
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.3.eh_proj.weight" in names
    assert "model.layers.3.shared_head.head.weight" in names
    assert "model.layers.4.mlp.experts.7.up_proj.weight" in names


def test_a_slice_of_experts_is_that_slice(tmp_path):
    model = small_model()
    write_hugging_face(tmp_path / "out", model.config, model.state_dict().items(), torch.float64)
    checkpoint = HuggingFaceCheckpoint(tmp_path / "out")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(checkpoint.tensor(name, 2, 3), model.state_dict()[name][2:5])


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)  # ragged: 2 x 3 blocks
    scales = torch.rand(2, 3) + 0.5
    expected = torch.empty(200, 300)
    for i in range(200):
        for j in range(300):
            expected[i, j] = weight[i, j].float() * scales[i // 128, j // 128]
    assert torch.equal(dequantize(weight, scales), expected)
    with pytest.raises(ValueError, match=r"200 x 300.*\(2, 3\) blocks.*\(3, 2\) scales"):
        dequantize(weight, scales.T)
    model = small_model()
    write_hugging_face(tmp_path / "out", model.config, model.state_dict().items(), torch.float32)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.tensor([[0.25]])
    save_file(tensors, file)
    index = tmp_path / "out" / "model.safetensors.index.json"
    published = json.loads(index.read_text())
    published["weight_map"][f"{name}_scale_inv"] = file.name
    index.write_text(json.dumps(published))
    read = HuggingFaceCheckpoint(tmp_path / "out").tensor("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(read[5], tensors[name].float() * 0.25)


def test_configs_of_both_families_come_back():
    v2 = small_config(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
    for config in (small_config(), ModelConfig(rope_scaling=RopeScaling()), v2):
        again = from_hugging_face_config(json.loads(json.dumps(to_hugging_face_config(config))))
        again.num_key_value_heads = config.num_key_value_heads
        assert again == config


def test_damage_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        HuggingFaceCheckpoint(tmp_path)
    model = small_model()
    out = tmp_path / "out"
    write_hugging_face(out, model.config, model.state_dict().items(), max_shard_bytes=50_000)
    with pytest.raises(ValueError, match="exists"):
        write_hugging_face(out, model.config, [])
    shards = sorted(out.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    checkpoint = HuggingFaceCheckpoint(out)
    damaged = next(name for name, file in checkpoint._file_of.items() if file == shards[1].name)
    with pytest.raises(ValueError, match=f"{shards[1].name} is damaged"):
        checkpoint._read(damaged)
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"{shards[0].name} is missing"):
        HuggingFaceCheckpoint(out)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="llama"):
        HuggingFaceCheckpoint(out)


def test_a_full_disk_names_the_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r".") as error:
            write_hugging_face(tmp_path / "out", small_config(), [("lm_head.weight", torch.zeros(61, 32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path):
    def tensors():
        yield "lm_head.weight", torch.zeros(2, 2)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_hugging_face(tmp_path / "out", small_config(), tensors())
    assert list(tmp_path.iterdir()) == []
