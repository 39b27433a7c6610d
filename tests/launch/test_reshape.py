"""A checkpoint made under one layout is the same training under another."""

import pytest
import torch

from infra import checkpoint
from infra.checkpoint import Checkpoint, CheckpointError
from infra.distributed import World
from launch.trainer import Trainer
from parallel import state
from tests.launch.runs import config, small_data
from tests.ranks import run_ranks

LAYOUTS = {
    "alone": (1, {}),
    "dualpipe": (2, {"pp": 2, "schedule": "dualpipe", "zero_stage": 1}),
    "experts": (4, {"ep": 2, "dispatcher": "two_hop", "ranks_per_node": 2, "zero_stage": 1}),
    "both": (4, {"pp": 2, "ep": 2, "schedule": "zbv", "dispatcher": "all_to_all"}),
    "three": (3, {"pp": 3, "schedule": "1f1b", "zero_stage": 1}),
    "four": (4, {"pp": 4, "schedule": "dualpipe"}),
    "ep 4": (4, {"ep": 4, "dispatcher": "all_to_all"}),
    "eight": (8, {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "all_to_all", "zero_stage": 1}),
}
FAST = ("alone", "dualpipe", "both")


EXPERT_7 = "master/model.layers.2.mlp.experts.7.down_proj"


def settings(data, **parallel):
    changed = config(data, **parallel)
    changed.train.ema_decay = 0.9
    return changed


def _steps_and_save(rank, world_size, config, root):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    for _ in range(3):
        trainer.train_step()
    trainer.save(root)
    return [trainer.train_step()[0]["loss"] for _ in range(5)]


def _load_and_step(rank, world_size, config, folder):
    """The losses that follow; all that was loaded is what was saved, and the model computes with it."""
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer.load(folder)
    saved = Checkpoint(folder)
    assert (trainer.step, trainer.samples, trainer.tokens) == (3, 24, 24 * 24)
    held = state.held(trainer.replica, trainer.optimizer, trainer.ema)
    assert {key.partition("/")[0] for key in held} == {"master", "exp_avg", "exp_avg_sq", "ema", "bias"}
    for key, tensor in held.items():
        assert torch.equal(tensor, saved.read([key])[key]), key
    for bucket in trainer.replica.buckets:
        for name, param in bucket.params.items():
            whole = [config.model.n_routed_experts, *param.shape[1:]] if state.is_expert(name) else param.shape
            master = state.whole_tensor(saved, name, torch.Size(whole))
            first = trainer.replica.first_expert if state.is_expert(name) else 0
            assert torch.equal(param, master[first : first + len(param)].to(param.dtype)), name
    return [trainer.train_step()[0]["loss"] for _ in range(5)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("reshape"))


SLOW = (pytest.mark.slow, pytest.mark.timeout(900))


@pytest.mark.parametrize(
    ("before", "afters"),
    [(before, FAST) for before in FAST] + [pytest.param(before, tuple(LAYOUTS), marks=SLOW) for before in LAYOUTS],
)
def test_what_one_layout_saves_every_other_continues(data, tmp_path, before, afters):
    world, parallel = LAYOUTS[before]
    unbroken = run_ranks(world, _steps_and_save, settings(data, **parallel), tmp_path)[0]
    for after in set(afters) - {before}:
        world, parallel = LAYOUTS[after]
        for losses in run_ranks(world, _load_and_step, settings(data, **parallel), tmp_path / "step_3"):
            assert losses == pytest.approx(unbroken, rel=1e-9), f"{before} -> {after}"


def _load_incomplete(rank, world_size, config, folder):
    """What says the loading of a checkpoint without one expert, and of one with an expert more."""
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    saved = Checkpoint(folder)
    tensors = saved.read(saved.keys)
    more = tensors | {EXPERT_7.replace(".7.", ".8."): tensors[EXPERT_7].clone()}
    less = {name: tensor for name, tensor in tensors.items() if name != EXPERT_7}
    said = []
    for step, wrong in enumerate((less, more)):
        with pytest.raises(CheckpointError) as error:
            trainer.load(checkpoint.save(folder.parent / "wrong", step, wrong, saved.meta, keep=9))
        said.append(str(error.value))
    return said


def test_a_checkpoint_with_an_expert_missing_or_too_many_is_refused(data, tmp_path):
    run_ranks(1, _steps_and_save, settings(data), tmp_path)
    less, more = run_ranks(1, _load_incomplete, settings(data), tmp_path / "step_3")[0]
    assert less.endswith(f"lacks {EXPERT_7}")
    assert more.endswith(f"is not of its own model: it has {EXPERT_7.replace('.7.', '.8.')}")


def _logits(rank, world_size, config, folder):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer.load(folder)
    return trainer.evaluate()["eval_loss"]


def test_the_whole_model_of_a_checkpoint_is_the_model_that_was_trained(data, tmp_path):
    world, parallel = LAYOUTS["both"]
    run_ranks(world, _steps_and_save, config(data, **parallel), tmp_path)
    evaluated = run_ranks(1, _logits, config(data), tmp_path / "step_3")[0]
    model = state.whole_model(Checkpoint(tmp_path / "step_3"))
    held_out = _held_out_tokens(data)
    with torch.no_grad():
        logits = model(held_out[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert loss.item() == pytest.approx(evaluated, rel=1e-9)


def _held_out_tokens(data):
    from infra.data import TokenDataset

    return TokenDataset(data, "held_out", vocab_size=320).batch(range(8), 24)
