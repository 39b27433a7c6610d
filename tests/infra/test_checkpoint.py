"""Checkpoints are whole or absent: round trips, damage of every kind, full disks, several ranks."""

import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import warnings
import weakref

import pytest
import torch

from infra import checkpoint
from infra.checkpoint import Checkpoint, CheckpointError, piece
from tests.ranks import run_ranks


def _tensors(rank: int) -> dict:
    return {f"rank{rank}.a": torch.arange(6.0).view(2, 3) + rank, f"rank{rank}.b": torch.ones(4, dtype=torch.bfloat16)}


def test_what_is_saved_is_read(tmp_path):
    folder = checkpoint.save(tmp_path, 7, _tensors(0), {"samples": 70}, keep=2)
    saved = Checkpoint(folder)
    saved.verify()
    assert folder.name == "step_7"
    assert saved.meta == {"samples": 70, "step": 7}
    read = saved.read(saved.keys)
    assert set(read) == set(_tensors(0))
    for name, tensor in _tensors(0).items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_tensors_saved_one_by_one_are_never_held_together(tmp_path):
    held = weakref.WeakSet()
    most = 0

    def tensors():
        nonlocal most
        for i in range(20):
            tensor = torch.full((10,), float(i))
            held.add(tensor)
            most = max(most, len(held))
            yield f"t{i}", tensor
            del tensor

    saved = Checkpoint(checkpoint.save_one_by_one(tmp_path, 3, tensors(), {"samples": 0}, max_bytes=4 * 40))
    saved.verify()
    assert most == 5  # four of a file, and the one that does not fit
    assert len(list(saved.folder.glob("*.safetensors"))) == 5
    assert saved.meta == {"samples": 0, "step": 3}
    assert {key: value[0].item() for key, value in saved.read(saved.keys).items()} == {f"t{i}": i for i in range(20)}


def test_what_fails_on_the_way_leaves_the_one_before(tmp_path):
    def tensors():
        yield "a", torch.ones(3)
        raise ValueError("no such tensor")

    checkpoint.save(tmp_path, 0, _tensors(0), {}, keep=1)
    with pytest.raises(ValueError, match="no such tensor"):
        checkpoint.save_one_by_one(tmp_path, 0, tensors(), {})
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_0"]
    assert Checkpoint(tmp_path / "step_0").keys == set(_tensors(0))


@pytest.mark.parametrize(("kind", "call", "left"), [("rename", 1, 0.0), ("rename", 2, 0.0), ("rmtree", 3, 1.0)])
def test_a_kill_while_one_is_replaced_loses_neither(tmp_path, monkeypatch, kind, call, left):
    """Before the old one is moved away, before the new one comes into its place, and before the old one is removed."""
    checkpoint.save(tmp_path, 4, {"a": torch.zeros(3)}, {}, keep=1)
    if (child := os.fork()) == 0:
        module = {"rename": os, "rmtree": shutil}[kind]
        original, calls = getattr(module, kind), itertools.count(1)

        def kill_or_do(*arguments, **options):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        monkeypatch.setattr(module, kind, kill_or_do)
        checkpoint.save(tmp_path, 4, {"a": torch.ones(3)}, {}, keep=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    checkpoint.restore_replaced(tmp_path)
    list(checkpoint.clear(tmp_path))
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_4"]
    saved = Checkpoint(tmp_path / "step_4")
    saved.verify()
    assert saved.read(["a"])["a"].tolist() == [left] * 3


def test_one_left_half_replaced_is_found_where_there_is_no_other(tmp_path):
    folder, moved = checkpoint.save(tmp_path, 4, _tensors(0), {}, keep=2), tmp_path / ".step_4.replaced"
    folder.rename(moved)
    assert checkpoint.newest(tmp_path) == folder
    other = checkpoint.save(tmp_path, 3, _tensors(0), {}, keep=2)
    folder.rename(moved)
    assert checkpoint.newest(tmp_path) == other  # a run may be at work here: its folders are not touched
    assert moved.exists()


def test_pieces_are_read_as_one_and_in_other_pieces(tmp_path):
    whole = torch.arange(12.0).view(4, 3)
    borders = [10, 12, 0, 3, 3, 10]
    pieces = {piece("x", i, j, (4, 3)): whole.flatten()[i:j] for i, j in zip(borders[::2], borders[1::2], strict=True)}
    saved = Checkpoint(checkpoint.save(tmp_path, 1, {"a": whole + 1, **pieces}, {}, keep=1))
    assert saved.keys == {"a", "x"}
    assert torch.equal(saved.read(["x"])["x"], whole)
    for start in range(12):
        for stop in range(start + 1, 13):
            read = saved.read([piece("a", start, stop, (4, 3)), piece("x", start, stop, (4, 3))])
            a, x = read.values()
            assert torch.equal(x, whole.flatten()[start:stop])
            assert torch.equal(a, x + 1)


@pytest.mark.parametrize(
    ("borders", "wrong"),
    [
        ([(0, 5), (4, 12)], "do not fit at element 5"),  # an element twice
        ([(0, 5), (0, 5), (5, 12)], "do not fit at element 5"),
        ([(0, 5), (6, 12)], "do not fit at element 5"),  # an element missing
        ([(5, 12)], "do not fit at element 0"),
        ([(0, 5), (5, 11)], "saved up to element 11 of 12"),
    ],
)
def test_pieces_that_are_not_the_whole_are_refused(borders, wrong):
    keys = [piece("x", start, stop, (4, 3)) for start, stop in borders]
    with pytest.raises(AssertionError, match=wrong):
        checkpoint._check_whole(keys)
    checkpoint._check_whole([piece("x", 0, 5, (4, 3)), "whole", piece("x", 5, 12, (4, 3))])


def test_a_tensor_that_two_ranks_save_is_refused():
    with pytest.raises(AssertionError, match="2 ranks save a"):
        checkpoint._check_whole(["a", "b", "a"])


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, _tensors(0), {}, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"step_2", "step_10"}
    assert checkpoint.newest(tmp_path) == tmp_path / "step_10"


def test_a_damaged_one_is_none_of_those_that_are_kept(tmp_path):
    for step in (4, 10):
        checkpoint.save(tmp_path, step, _tensors(0), {}, keep=2)
    (tmp_path / "step_10" / "index.json").write_text("")
    checkpoint.save(tmp_path, 6, _tensors(0), {}, keep=1)
    with pytest.warns(UserWarning, match="step_10"):
        assert checkpoint.newest(tmp_path) == tmp_path / "step_6"


def test_folders_of_other_names_are_left_alone(tmp_path):
    for name in ("step_2_best", "step_x", "steps"):
        (tmp_path / name).mkdir()
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, _tensors(0), {}, keep=1)
    assert {p.name for p in tmp_path.iterdir()} == {"step_2_best", "step_x", "steps", "step_10"}
    assert checkpoint.newest(tmp_path) == tmp_path / "step_10"


def _save_where_no_folder_can_be(rank, world_size, root):
    with pytest.raises(OSError, match="Not a directory" if rank == 0 else "other ranks could not write"):
        checkpoint.save(root, 4, _tensors(rank), {}, keep=1)


def test_a_folder_that_cannot_be_made_fails_on_all(tmp_path):
    (tmp_path / "file").touch()
    run_ranks(2, _save_where_no_folder_can_be, tmp_path / "file" / "checkpoints")


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") is None


def _save_on_ranks(rank, world_size, root):
    checkpoint.save(root, 3, _tensors(rank), {}, keep=1)


def test_every_rank_contributes(tmp_path):
    run_ranks(3, _save_on_ranks, tmp_path)
    assert Checkpoint(tmp_path / "step_3").keys == {f"rank{r}.{x}" for r in range(3) for x in "ab"}


def _save_with_one_full_disk(rank, world_size, root):
    if rank == 1:

        def full(*_):
            raise OSError(28, "No space left on device", str(root))

        checkpoint.save_tensors = full
    with pytest.raises(OSError, match="No space left" if rank == 1 else "other ranks could not write"):
        checkpoint.save(root, 4, _tensors(rank), {}, keep=1)


def test_a_full_disk_on_one_rank_fails_on_all_and_keeps_the_old(tmp_path):
    run_ranks(3, _save_on_ranks, tmp_path)
    run_ranks(3, _save_with_one_full_disk, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_3"]
    Checkpoint(tmp_path / "step_3").verify()


def _die_in_save(rank, world_size, root):
    def die(*_):
        os._exit(9)

    checkpoint._publish = die
    checkpoint.save(root, 4, _tensors(rank), {}, keep=1)


def test_a_kill_before_the_rename_leaves_the_old_one(tmp_path):
    checkpoint.save(tmp_path, 3, _tensors(0), {}, keep=1)
    with pytest.raises(AssertionError, match="died with exit code 9"):
        run_ranks(1, _die_in_save, tmp_path)
    assert checkpoint.newest(tmp_path) == tmp_path / "step_3"
    checkpoint.save(tmp_path, 4, _tensors(0), {}, keep=1)  # and what it left half-written is in nobody's way
    assert [p.name for p in tmp_path.iterdir()] == ["step_4"]


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    """200 random places over all files: each damage is detected, and the one before is taken, with a warning."""
    rng = random.Random(1)
    checkpoint.save(tmp_path, 1, _tensors(0), {}, keep=2)
    folder = checkpoint.save(tmp_path, 2, _tensors(0), {}, keep=2)
    files = sorted(folder.iterdir())
    for _ in range(200):
        file = rng.choice(files)
        whole = file.read_bytes()
        place = rng.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(flipped) if rng.random() < 0.5 else whole[:place])
        with pytest.raises(CheckpointError, match=r"step_2"):
            Checkpoint(folder).verify()
        with pytest.warns(UserWarning, match=r"damaged"):
            assert checkpoint.newest(tmp_path) == tmp_path / "step_1"
        file.write_bytes(whole)
    Checkpoint(folder).verify()


def _newest_together(rank, world_size, root):
    told, read, checksum = [], [], checkpoint._checksum

    def noted(file):
        read.append((file.parent.name, file.name))
        return checksum(file)

    checkpoint._checksum = noted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = checkpoint.newest(root, lambda folder, why: told.append((folder.name, why)))
    return newest, told, read


def _save_on_each(rank, world_size, root):
    for step in (1, 2, 3):
        checkpoint.save(root, step, _tensors(rank), {}, keep=3)


def test_ranks_share_the_reading_and_agree_on_what_is_damaged(tmp_path):
    run_ranks(3, _save_on_each, tmp_path)
    (tmp_path / "step_3" / "index.json").write_text("{")  # which all ranks see
    file = tmp_path / "step_2" / "rank_00002.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    newest, told, read = zip(*run_ranks(3, _newest_together, tmp_path), strict=True)
    assert set(newest) == {tmp_path / "step_1"}
    (broken, why), (altered, where) = sorted((one for some in told for one in some), reverse=True)
    assert (broken, altered) == ("step_3", "step_2")
    assert "index.json" in why
    assert "rank_00002.safetensors is damaged" in where
    for rank, files in enumerate(read):
        assert files == [(f"step_{step}", f"rank_{rank:05d}.safetensors") for step in (2, 1)]


def test_a_missing_file_is_named(tmp_path):
    folder = checkpoint.save(tmp_path, 1, _tensors(0), {}, keep=1)
    (folder / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is missing"):
        Checkpoint(folder).verify()


def test_a_missing_key_says_so(tmp_path):
    folder = checkpoint.save(tmp_path, 1, _tensors(0), {}, keep=1)
    with pytest.raises(CheckpointError, match=r"has no other"):
        Checkpoint(folder).read(["other"])


class _Trap:
    def __reduce__(self):
        return (os._exit, (66,))


def test_a_planted_pickle_is_not_run(tmp_path):
    folder = checkpoint.save(tmp_path, 1, _tensors(0), {}, keep=1)
    for file in folder.iterdir():
        whole = file.read_bytes()
        file.write_bytes(pickle.dumps(_Trap()))
        with pytest.raises(CheckpointError):
            Checkpoint(folder).verify()
        file.write_bytes(whole)


def _mode(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    folder = checkpoint.save(tmp_path, 1, _tensors(0), {}, keep=1)
    assert {_mode(file) for file in folder.iterdir()} == {_mode(tmp_path / "plain")}


def _save_beyond_the_limit(rank, world_size, root):
    if rank == 1:  # the kernel refuses to let a file grow, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    tensors = {f"rank{rank}.large": torch.ones(100_000)}
    with pytest.raises(OSError, match="rank_00001.safetensors" if rank == 1 else "other ranks could not write"):
        checkpoint.save(root, 4, tensors, {}, keep=1)


def test_a_file_that_cannot_grow_fails_on_all_and_keeps_the_old(tmp_path):
    run_ranks(3, _save_on_ranks, tmp_path)
    run_ranks(3, _save_beyond_the_limit, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_3"]
    Checkpoint(tmp_path / "step_3").verify()
