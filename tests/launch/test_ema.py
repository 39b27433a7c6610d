"""The moving average in training: the same under every layout, held once, and a model like any other."""

import warnings

import pytest
import torch

from infra.checkpoint import Checkpoint, CheckpointError
from infra.distributed import World
from infra.optim import ALIGNMENT
from launch.convert import to_hugging_face
from launch.trainer import Trainer
from model.hf import HuggingFaceCheckpoint
from parallel import state
from tests.launch.runs import config, small_data
from tests.ranks import run_ranks

DECAY = 0.26  # the third step is the first for which it, and not the warm-up, decides
LAYOUTS = {
    "mirrored": (2, {"pp": 2, "schedule": "dualpipe"}),
    "replicas": (3, {}),
    "everything": (8, {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "all_to_all"}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("ema"))


def settings(data, decay=DECAY, **parallel):
    result = config(data, train={"ema_decay": decay, "global_batch_size": 24, "eval_samples": 0}, **parallel)
    result.optim.moments = "bf16"
    return result


def _alone(rank, world_size, config, root):
    """Three steps with a checkpoint after each, and the averages that a plain loop makes of the weights."""
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))

    def masters():
        held = state.held(trainer.replica, trainer.optimizer, trainer.ema)
        return {key.removeprefix("master/"): t.clone() for key, t in held.items() if key.startswith("master/")}

    averages = masters()
    for n in range(1, 4):
        trainer.train_step()
        decay = min(DECAY, (1 + n) / (10 + n))
        for name, weight in masters().items():
            averages[name] += (1 - decay) * (weight - averages[name])
        trainer.save(root)
    return {name: t.tolist() for name, t in averages.items()}


def _steps(rank, world_size, config, root, resume):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    if resume:
        trainer.load(resume)
    while trainer.step < 3:
        trainer.train_step()
    trainer.save(root)
    return sum(t.numel() for t in trainer.ema.averages)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    expected = run_ranks(1, _alone, settings(data), root)[0]
    return root / "step_3", {name: torch.tensor(t, dtype=torch.float64) for name, t in expected.items()}


def averages(folder):
    saved = Checkpoint(folder)
    keys = [key for key in saved.keys if key.startswith("ema/")]
    return {key.removeprefix("ema/"): t.flatten() for key, t in saved.read(keys).items()}


def test_the_average_is_that_of_a_plain_loop(alone):
    folder, expected = alone
    got = averages(folder)
    assert set(got) == set(expected)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name].flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_the_same_average_once(data, alone, tmp_path, layout):
    folder, expected = alone
    world, parallel = LAYOUTS[layout]
    held = run_ranks(world, _steps, settings(data, **parallel), tmp_path, None)
    padding = sum(held) - sum(t.numel() for t in expected.values())
    assert 0 <= padding < 6 * ALIGNMENT * world  # a rank has six buckets at most
    for name, tensor in averages(tmp_path / "step_3").items():
        torch.testing.assert_close(tensor, expected[name].flatten(), rtol=1e-6, atol=1e-9)  # of BF16 moments
    again = tmp_path / "again"
    run_ranks(world, _steps, settings(data, **parallel), again, folder)  # loads what one rank has saved, and saves it
    for name, tensor in averages(again / "step_3").items():
        assert torch.equal(tensor, averages(folder)[name]), name


def test_a_resumed_run_averages_as_an_unbroken_one(data, alone, tmp_path):
    """The warm-up goes on where it was."""
    folder, _ = alone
    run_ranks(1, _steps, settings(data), tmp_path, folder.with_name("step_2"))
    for name, tensor in averages(tmp_path / "step_3").items():
        assert torch.equal(tensor, averages(folder)[name]), name


def test_it_is_a_model_like_any_other(alone, tmp_path):
    folder, expected = alone
    model = state.whole_model(Checkpoint(folder), weights="ema")
    name = "model.layers.2.mlp.experts.3.down_proj"
    assert torch.equal(model.model.layers[2].mlp.experts.down_proj[3].detach().flatten(), averages(folder)[name])
    assert torch.isfinite(model(torch.arange(20)[None])).all()
    to_hugging_face(folder, tmp_path / "exported", torch.float64, weights="ema")
    exported = HuggingFaceCheckpoint(tmp_path / "exported").tensor("model.norm.weight")
    torch.testing.assert_close(exported, expected["model.norm.weight"], rtol=1e-12, atol=1e-12)
    assert not torch.equal(exported, Checkpoint(folder).read(["master/model.norm.weight"])["master/model.norm.weight"])


def test_without_averages_they_start_from_the_weights_and_none_can_be_asked_for(data, tmp_path):
    run_ranks(1, _steps, settings(data, decay=0.0), tmp_path / "without", None)
    without = Checkpoint(tmp_path / "without/step_3")
    with pytest.raises(CheckpointError, match=r"holds no averages: train with train.ema_decay=0.999"):
        state.whole_model(without, weights="ema")
    run_ranks(2, _steps, settings(data), tmp_path / "with", without.folder)
    for name, tensor in averages(tmp_path / "with/step_3").items():
        assert torch.equal(tensor, without.read([f"master/{name}"])[f"master/{name}"].flatten())


def test_averages_that_are_given_up_are_said(data, alone):
    folder, _ = alone

    def load(rank, world_size):
        with warnings.catch_warnings(record=True) as said:
            Trainer(settings(data, decay=0.0), World(rank, world_size, torch.device("cpu"))).load(folder)
        return [str(warning.message) for warning in said if "averages" in str(warning.message)]

    assert len(run_ranks(1, load)[0]) == 1
