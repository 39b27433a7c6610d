"""Saving beside the training: the state of the moment, one at a time, whole or failed on all ranks."""

import threading
import time

import pytest
import torch

from infra import checkpoint
from infra.checkpoint import Checkpoint
from infra.saver import Saver
from tests.ranks import run_ranks


def _hold(release: threading.Event) -> None:
    """From now on, checkpoints are written only once `release` is set."""
    save = checkpoint.save

    def held_back(*args):
        release.wait()
        return save(*args)

    checkpoint.save = held_back


@pytest.fixture
def release(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(checkpoint, "save", checkpoint.save)
    _hold(release)
    yield release
    release.set()


def test_what_is_saved_is_the_state_of_the_call(tmp_path, release):
    state = {"a": torch.ones(3), "b": torch.arange(4.0)}
    saver = Saver()
    saver.save(tmp_path, 1, state, {"samples": 5}, 1, wait=False)
    state["a"].zero_()  # training goes on
    assert not list(tmp_path.iterdir())
    release.set()
    saver.wait()
    saved = Checkpoint(tmp_path / "step_1")
    saved.verify()
    assert saved.meta["samples"] == 5
    assert torch.equal(saved.read(["a"])["a"], torch.ones(3))


def test_a_save_waits_for_the_one_before(tmp_path, release):
    saver, state = Saver(), {"a": torch.ones(3)}
    saver.save(tmp_path, 1, state, {}, 1, wait=False)
    threading.Timer(0.3, release.set).start()
    saver.save(tmp_path, 2, state, {}, 1, wait=False)
    assert release.is_set()
    saver.wait()
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_2"]  # and what it replaces is gone


def test_reserved_room_is_what_is_copied_into(tmp_path):
    saver, state = Saver(), {"a": torch.ones(3), "b": torch.arange(4)}
    saver.reserve(state)
    room = {key: copy.data_ptr() for key, copy in saver._copies.items()}
    saver.save(tmp_path, 1, state, {}, 1, wait=False)
    saver.wait()
    assert {key: copy.data_ptr() for key, copy in saver._copies.items()} == room
    assert torch.equal(Checkpoint(tmp_path / "step_1").read(["b"])["b"], state["b"])


def test_copies_follow_a_state_that_changes_shape(tmp_path):
    saver = Saver()
    for step, state in ((1, {"a": torch.ones(3)}), (2, {"a": torch.zeros(5), "b": torch.ones(1)})):
        saver.save(tmp_path, step, state, {}, 2, wait=False)
        saver.wait()
        saved = Checkpoint(tmp_path / f"step_{step}")
        assert saved.keys == set(state)
        assert all(torch.equal(saved.read([key])[key], value) for key, value in state.items())


def _fail_on_one(rank, world_size, root):
    if rank == 1:

        def full(tensors, file):
            raise OSError(28, "No space left on device", str(file))

        checkpoint.save_tensors = full
    saver = Saver()
    saver.save(root, 4, {f"a{rank}": torch.ones(2)}, {}, 1, wait=False)
    deadline = time.monotonic() + 20
    while not saver.has_failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(OSError, match="No space left" if rank == 1 else "other ranks could not write"):
        saver.wait()
    assert not saver.has_failed


def test_a_full_disk_on_one_rank_fails_on_all_and_keeps_the_old(tmp_path):
    checkpoint.save(tmp_path, 3, {"a": torch.ones(2)}, {}, keep=1)
    run_ranks(3, _fail_on_one, tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_3"]
