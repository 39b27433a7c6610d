"""Bad numbers: a step that is not finite is skipped on all ranks, a spike is rolled back and its data left out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infra import incidents
from infra.distributed import World
from infra.metrics import read_records
from infra.spike import SpikeConfig
from launch import trainer as trainer_module
from launch.trainer import Trainer
from parallel.state import held
from tests.launch.runs import TIMES, config, in_folder, run_fit, small_data
from tests.parallel.layouts import tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("bad_numbers"))


def poison(trainer: Trainer, step: int, value: float) -> None:
    """Puts `value` into one gradient of this rank, before gradients are summed, in the step after `step`."""
    reduce = trainer_module.Reduction

    def reduce_poisoned(buckets):
        if trainer.step == step:
            trainer.replica.buckets[0].grad[3] = value
        return reduce(buckets)

    trainer_module.Reduction = reduce_poisoned


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in held(trainer.replica, trainer.optimizer, trainer.ema).items()}


def _poisoned_step(rank, world_size, config, value):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    if rank == 1:
        poison(trainer, 2, value)
    records, same = [], []
    for _ in range(4):
        before = _state(trainer)
        records.append(trainer.train_step()[0])
        after = _state(trainer)
        same.append(all(torch.equal(before[key], after[key]) for key in before))
    return records, same, [len(trainer.losses.state()["losses"]), trainer.skipped_in_a_row, trainer.samples]


@pytest.mark.parametrize(("value", "zero_stage"), [(math.nan, 0), (math.inf, 1)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(data, value, zero_stage):
    layout = {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "all_to_all", "zero_stage": zero_stage}
    settings = config(data, train={"ema_decay": 0.9}, **layout)
    for records, same, rest in run_ranks(4, _poisoned_step, settings, value):
        assert same == [False, False, True, False]  # weights, moments, averages and routing biases
        assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1]
        assert not math.isfinite(records[2]["grad_norm"])
        assert all(math.isfinite(records[step]["grad_norm"]) for step in (0, 1, 3))
        assert rest == [3, 0, 4 * 8]


def numbers(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_records(folder)]


def kinds(folder: Path) -> list[str]:
    return [incident["kind"] for incident in incidents.read(folder)]


def small(data, steps: int):
    model = tiny(num_hidden_layers=2, num_nextn_predict_layers=0, vocab_size=320, initializer_range=0.1)
    train = {"steps": steps, "global_batch_size": 4, "eval_samples": 0}
    return config(data, model=model, precision="fp32", train=train)


def _poison_step_3(trainer):
    if trainer.world.rank == 0:
        poison(trainer, 3, math.nan)


def _poison_step_3_and_die_at_6(trainer):
    _poison_step_3(trainer)
    die_at(trainer, 6)


class Died(Exception):
    pass


def die_at(trainer: Trainer, step: int) -> None:
    train_step = trainer.train_step

    def train_step_or_die():
        if trainer.step == step:
            raise Died
        return train_step()

    trainer.train_step = train_step_or_die


def test_a_run_with_a_skipped_step_resumes_bit_for_bit(data, tmp_path):
    settings = small(data, steps=8)
    run_ranks(2, run_fit, in_folder(settings, tmp_path / "unbroken"), _poison_step_3)
    broken = in_folder(settings, tmp_path / "broken", every=5)
    with pytest.raises(AssertionError, match="Died"):
        run_ranks(2, run_fit, broken, _poison_step_3_and_die_at_6)
    run_ranks(2, run_fit, broken)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "unbroken")
    assert numbers(tmp_path / "broken")[-1]["skipped_steps"] == 1
    assert kinds(tmp_path / "broken") == ["skipped_step", "resumed"]


def _poison_every_step(trainer):
    reduce = trainer_module.Reduction

    def reduce_poisoned(buckets):
        buckets[0].grad[0] = math.nan
        return reduce(buckets)

    trainer_module.Reduction = reduce_poisoned


def test_a_run_that_learns_nothing_any_more_gives_up(data, tmp_path):
    settings = config(data, train={"max_skipped_steps": 3})
    with pytest.raises(AssertionError, match=r"train.max_skipped_steps=3 steps, to step 3, had a loss"):
        run_ranks(1, run_fit, in_folder(settings, tmp_path), _poison_every_step)
    assert len(read_records(tmp_path)) == 3


def _poison_every_step_and_die_at_4(trainer):
    _poison_every_step(trainer)
    die_at(trainer, 4)


def test_a_bad_stretch_is_counted_over_a_restart(data, tmp_path):
    """And a run that has given up tries one step more when it is started again, as its options may be others."""
    settings = in_folder(config(data, steps=20, train={"max_skipped_steps": 6}), tmp_path, every=2)
    with pytest.raises(AssertionError, match="Died"):
        run_ranks(1, run_fit, settings, _poison_every_step_and_die_at_4)
    for step in (6, 7):
        with pytest.raises(AssertionError, match=rf"train.max_skipped_steps=6 steps, to step {step}, had a loss"):
            run_ranks(1, run_fit, settings, _poison_every_step)
    run_ranks(1, run_fit, settings)
    assert numbers(tmp_path)[-1]["skipped_steps"] == 7


# Spikes: the data of step 19, from sample 72 to 76, is garbage.

GARBAGE = range(72, 76)


def _garbage(trainer: Trainer) -> None:
    batch = trainer.train_data.batch

    def batch_with_garbage(indexes, length):
        tokens = batch(indexes, length)
        bad = torch.from_numpy(np.isin(indexes, GARBAGE))
        noise = torch.randint(0, 320, tokens.shape, generator=torch.Generator().manual_seed(1))
        return torch.where(bad.view(*bad.shape, *[1] * (tokens.dim() - bad.dim())), noise, tokens)

    trainer.train_data.batch = batch_with_garbage


def _garbage_and_die_after_the_rollback(trainer: Trainer) -> None:
    """Dies where it comes to step 17 for the second time, before the next checkpoint."""
    _garbage(trainer)
    train_step, times = trainer.train_step, [0]

    def train_step_or_die():
        times[0] += trainer.step == 17
        if times[0] == 2:
            raise Died
        return train_step()

    trainer.train_step = train_step_or_die


def spiky(data, **changes):
    return replace(small(data, steps=24), spike=SpikeConfig(**({"threshold": 3.0, "window": 12, "skip": 2} | changes)))


def test_a_spike_is_rolled_back_and_its_data_left_out(data, tmp_path):
    """As the run that knew from the start what to leave out; also when it is killed in the middle."""
    (tmp_path / "expected").mkdir()
    (tmp_path / "expected" / "left_out.json").write_text("[[68, 76]]")
    run_ranks(2, run_fit, in_folder(spiky(data), tmp_path / "expected"), _garbage)
    run_ranks(2, run_fit, in_folder(spiky(data), tmp_path / "run", every=5), _garbage)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "expected")
    (rollback,) = incidents.read(tmp_path / "run")
    assert (rollback["kind"], rollback["step"], rollback["to"]) == ("rollback", 19, 15)
    assert rollback["left_out"] == [68, 76]
    with pytest.raises(AssertionError, match="Died"):
        run_ranks(2, run_fit, in_folder(spiky(data), tmp_path / "broken", every=5), _garbage_and_die_after_the_rollback)
    assert read_records(tmp_path / "broken")[-1]["step"] == 17
    run_ranks(2, run_fit, in_folder(spiky(data), tmp_path / "broken", every=5), _garbage)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "expected")
    assert kinds(tmp_path / "broken") == ["rollback", "resumed"]


def test_without_an_old_enough_checkpoint_a_spike_is_only_noted(data, tmp_path):
    run_ranks(1, run_fit, in_folder(spiky(data), tmp_path), _garbage)
    assert len(read_records(tmp_path)) == 24
    assert kinds(tmp_path) == ["spike"]


def test_no_threshold_no_spikes(data, tmp_path):
    run_ranks(1, run_fit, in_folder(spiky(data, threshold=0.0), tmp_path, every=5), _garbage)
    assert kinds(tmp_path) == []


def test_a_damaged_list_of_what_is_left_out_is_refused(data, tmp_path):
    settings = in_folder(config(data, steps=2), tmp_path)
    run_ranks(1, run_fit, settings)
    (tmp_path / "left_out.json").write_text(json.dumps([[1, 2, 3]]))
    with pytest.raises(AssertionError, match=r"left_out.json is damaged"):
        run_ranks(1, run_fit, settings)
