"""Conversion from the command line's functions: Hugging Face's to a training checkpoint and back."""

import pytest
import torch

from infra.checkpoint import Checkpoint
from launch.convert import from_hugging_face, to_hugging_face
from model.hf import HuggingFaceCheckpoint, write_hugging_face
from tests.model.small import small_model


def test_there_and_back_again(tmp_path):
    model = small_model()
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    step = from_hugging_face(tmp_path / "published", tmp_path / "checkpoints")
    ours = Checkpoint(step)
    assert step.name == "step_0"
    key = "model.layers.1.mlp.experts.5.down_proj"
    assert torch.equal(ours.read([f"master/{key}"])[f"master/{key}"], model.blocks[1].mlp.experts.down_proj[5])
    assert not ours.read([f"exp_avg_sq/{key}"])[f"exp_avg_sq/{key}"].any()
    assert "bias/model.layers.1.mlp.gate.e_score_correction_bias" in ours.keys
    assert ours.meta["model"]["hidden_size"] == 32
    to_hugging_face(step, tmp_path / "exported", torch.float64)
    back = HuggingFaceCheckpoint(tmp_path / "exported")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.tensor(name), tensor), name


def test_another_shape_is_named(tmp_path):
    model = small_model()
    state = model.state_dict()
    state["model.norm.weight"] = torch.ones(31)
    write_hugging_face(tmp_path / "published", model.config, state.items())
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(31,\).*\(32,\)"):
        from_hugging_face(tmp_path / "published", tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
