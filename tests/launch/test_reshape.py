"""A checkpoint made under one layout is the same training under another."""

import pytest
import torch

from infra.checkpoint import Checkpoint
from infra.distributed import World
from launch.trainer import Trainer
from parallel.state import held, whole_model
from tests.launch.runs import config, small_data
from tests.ranks import run_ranks

LAYOUTS = {
    "alone": (1, {}),
    "dualpipe": (2, {"pp": 2, "schedule": "dualpipe"}),
    "experts": (4, {"ep": 2, "dispatcher": "two_hop", "ranks_per_node": 2}),
    "both": (4, {"pp": 2, "ep": 2, "schedule": "zbv", "dispatcher": "all_to_all"}),
}


def _steps_and_save(rank, world_size, config, root):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    for _ in range(3):
        trainer.train_step()
    trainer.save(root)
    return [trainer.train_step()[0]["loss"] for _ in range(2)]


def _load_and_step(rank, world_size, config, folder):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer.load(folder)
    saved = Checkpoint(folder)
    for key, tensor in held(trainer.replica, trainer.optimizer, trainer.ema).items():
        assert torch.equal(tensor, saved.read([key])[key]), key
    return [trainer.train_step()[0]["loss"] for _ in range(2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("reshape"))


@pytest.mark.parametrize("before", LAYOUTS)
def test_what_one_layout_saves_every_other_continues(data, tmp_path, before):
    world, parallel = LAYOUTS[before]
    unbroken = run_ranks(world, _steps_and_save, config(data, **parallel), tmp_path)[0]
    for after, (world, parallel) in LAYOUTS.items():
        if after != before:
            for losses in run_ranks(world, _load_and_step, config(data, **parallel), tmp_path / "step_3"):
                assert losses == pytest.approx(unbroken, rel=1e-9), f"{before} -> {after}"


def _logits(rank, world_size, config, folder):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer.load(folder)
    return trainer.evaluate()["eval_loss"]


def test_the_whole_model_of_a_checkpoint_is_the_model_that_was_trained(data, tmp_path):
    world, parallel = LAYOUTS["both"]
    run_ranks(world, _steps_and_save, config(data, **parallel), tmp_path)
    evaluated = run_ranks(1, _logits, config(data), tmp_path / "step_3")[0]
    model = whole_model(Checkpoint(tmp_path / "step_3"))
    held_out = _held_out_tokens(data)
    with torch.no_grad():
        logits = model(held_out[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert loss.item() == pytest.approx(evaluated, rel=1e-9)


def _held_out_tokens(data):
    from infra.data import TokenDataset

    return TokenDataset(data, "held_out", vocab_size=320).batch(range(8), 24)
