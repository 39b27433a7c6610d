"""A run in its folder: what it says and leaves when there is nothing, or nothing whole, to go on with."""

import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra import checkpoint, incidents
from infra.metrics import read_records
from launch import status
from launch.convert import to_hugging_face
from launch.generate import find
from tests.launch.runs import config, in_folder, run_fit, small_data
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("fit"))


def test_a_run_beyond_its_last_step_says_so_and_does_nothing(data, tmp_path, capfd):
    run_ranks(1, run_fit, in_folder(config(data, steps=2), tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run_ranks(1, run_fit, in_folder(config(data, steps=1), tmp_path))
    assert "is at step 2 already: nothing to do for train.steps=1" in capfd.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over_and_noted(data, tmp_path):
    run_ranks(2, run_fit, in_folder(config(data, steps=4), tmp_path, every=2))
    file = tmp_path / "checkpoints" / "step_4" / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run_ranks(2, run_fit, in_folder(config(data, steps=4), tmp_path, every=2))
    damaged, resumed = incidents.read(tmp_path)
    assert (damaged["kind"], damaged["step"]) == ("damaged_checkpoint", 4)
    assert str(file) in damaged["why"]
    assert (resumed["kind"], resumed["step"], resumed["lost"]) == ("resumed", 2, 2)


def test_a_damaged_checkpoint_is_not_used_by_name_either(data, tmp_path):
    run_ranks(1, run_fit, in_folder(config(data, steps=1), tmp_path))
    folder = tmp_path / "checkpoints" / "step_1"
    assert find(folder) == find(tmp_path) == folder
    damaged = bytearray((folder / "rank_00000.safetensors").read_bytes())
    damaged[-5] ^= 1
    (folder / "rank_00000.safetensors").write_bytes(damaged)
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        find(folder)
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        to_hugging_face(folder, tmp_path / "out", torch.bfloat16)


def _full_disk_on_rank_1(trainer):
    if trainer.world.rank == 1:

        def full(tensors, file):
            raise OSError(28, "No space left on device", str(file))

        checkpoint.save_tensors = full


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(data, tmp_path, asynchronous):
    settings = in_folder(config(data, steps=8), tmp_path, every=3)
    settings = replace(settings, checkpoint=replace(settings.checkpoint, asynchronous=asynchronous))
    run_ranks(2, run_fit, replace(settings, train=replace(settings.train, steps=2)))
    with pytest.raises(AssertionError, match=r"OSError: .*(No space left|other ranks could not write)"):
        run_ranks(2, run_fit, settings, _full_disk_on_rank_1)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_2"]
    assert len(read_records(tmp_path)) < 6  # said at the next step, not at the end


def _slow_disk(trainer):
    save_tensors = checkpoint.save_tensors

    def slow(tensors, file):
        time.sleep(0.5)
        save_tensors(tensors, file)

    checkpoint.save_tensors = slow


def _slow_disk_and_sigterm_in_a_save(trainer):
    _slow_disk(trainer)
    save = trainer.save

    def save_and_stop(*args, **options):
        save(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer.save = save_and_stop


def test_the_end_of_a_run_and_a_sigterm_wait_for_the_save_under_way(data, tmp_path):
    """Both come while the checkpoint of the step before is being written; the last save is one like any other."""
    settings = in_folder(config(data, steps=4), tmp_path / "end", every=3)
    run_ranks(2, run_fit, settings, _slow_disk)
    assert [checkpoint.step_of(c.folder) for c in checkpoint.whole(tmp_path / "end" / "checkpoints")] == [4, 3]
    settings = in_folder(config(data, steps=20), tmp_path / "stopped", every=3)
    run_ranks(2, run_fit, settings, _slow_disk_and_sigterm_in_a_save)
    assert [checkpoint.step_of(c.folder) for c in checkpoint.whole(tmp_path / "stopped" / "checkpoints")] == [3]


def test_what_a_kill_has_left_half_written_is_removed_and_named(data, tmp_path):
    (tmp_path / "checkpoints" / ".step_7.writing").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_7.writing" / "rank_00000.safetensors").write_text("half")
    run_ranks(1, run_fit, in_folder(config(data, steps=1), tmp_path))
    (half,) = incidents.read(tmp_path)
    assert (half["kind"], half["step"]) == ("half_written_checkpoint", 7)
    assert ".step_7.writing" in half["why"]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


class _Trap:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_pickle_planted_in_any_file_of_a_run_folder_is_not_run(data, tmp_path):
    """Those of a checkpoint are in tests/infra/test_checkpoint.py."""
    run, marker = tmp_path / "run", tmp_path / "sprung"
    run_ranks(1, run_fit, in_folder(config(data, steps=1), run))
    incidents.note(run, "resumed", 0, "so that there is a file")
    (run / "config.yaml").write_text("train: {steps: 1}")
    planted = [file for file in run.rglob("*") if file.is_file() and "checkpoints" not in file.parts]
    assert {file.name for file in planted} >= {"metrics.jsonl", "incidents.jsonl", "config.yaml"}
    for file in [*planted, run / "left_out.json"]:
        file.write_bytes(pickle.dumps(_Trap(marker)))
    with pytest.raises(AssertionError, match=r"left_out.json is damaged"):
        run_ranks(1, run_fit, in_folder(config(data, steps=2), run))
    with pytest.raises(ValueError, match="not a run's configuration"):
        status.figures(run, time.time())
    (run / "left_out.json").unlink()
    (run / "config.yaml").write_text("train: {steps: 2}")
    run_ranks(1, run_fit, in_folder(config(data, steps=2), run))
    assert status.figures(run, time.time())["step"] == 2
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Trap(marker)))
    assert marker.exists()  # the trap is one
