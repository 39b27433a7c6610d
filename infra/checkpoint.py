"""Checkpoints: named tensors and a few numbers, written whole or not at all.

    checkpoints/step_120/
        rank_00000.safetensors ...   each tensor once, whole or in pieces, by the ranks that hold them
        index.json                   the meta data, and of every file its size, checksum and keys

A key is a whole-model name (`master/model.layers.3.mlp.experts.7.up_proj.weight`), never a rank's: any other layout
finds what it needs by name. A piece is a run of a tensor's elements, `NAME[128:256/16x64]`. Everything is written into
a folder beside the target, which is renamed only when every rank's file and the index are on disk; so a folder called
`step_<n>` is whole, and a kill at any moment leaves the ones before it. Nothing is pickled: tensors are safetensors,
the index is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from infra.distributed import largest
from infra.tensor_file import save_tensors

FORMAT = 1
_STEP = re.compile(r"step_\d+")
_PIECE = re.compile(r"(.+)\[(\d+):(\d+)/([\dx]+)\]")
_REPLACED = re.compile(r"\.(step_\d+)\.replaced")
_WRITING = re.compile(r"\.step_(\d+)\.writing")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def piece(key: str, start: int, stop: int, shape: Sequence[int]) -> str:
    """The key of elements `start` to `stop` of a tensor of this shape, flat."""
    return f"{key}[{start}:{stop}/{'x'.join(map(str, shape))}]"


class _Bounds(NamedTuple):
    """Which elements of a tensor of which shape; a whole tensor's key says neither."""

    start: int = 0
    stop: int = 0
    shape: tuple[int, ...] = ()


def _parse(key: str) -> tuple[str, _Bounds]:
    """The key of the tensor, and which part of it `key` is."""
    if match := _PIECE.fullmatch(key):
        return match[1], _Bounds(int(match[2]), int(match[3]), tuple(map(int, match[4].split("x"))))
    return key, _Bounds()


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes `root/step_<step>`; collective over the world.

    tensors: what this rank contributes, whole tensors and pieces; over all ranks, each element exactly once.
    meta: JSON values, rank 0's count.
    keep: how many checkpoints stay; older ones are removed once this one is whole.
    group: the whole world, where the default group is in use elsewhere.
    Raises OSError on every rank when any rank could not write (a full disk); older checkpoints are untouched.
    """
    rank, world_size = _place()
    target, beside = root / f"step_{step}", root / f".step_{step}.writing"
    error: OSError | None = None
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
        except OSError as failure:
            error = failure
    _agree(error, root, group)
    try:
        _write_file(beside, rank, tensors)
    except OSError as failure:
        error = failure
    try:
        _agree(error, root, group)
        if rank == 0:
            try:
                _publish(beside, target, world_size, dict(meta, step=step))
                _prune(root, step, keep)
            except OSError as failure:
                error = _named(failure, target)
        _agree(error, root, group)
    except OSError:
        if rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


def save_one_by_one(
    root: Path, step: int, tensors: Iterable[tuple[str, Tensor]], meta: Mapping[str, Any], max_bytes: int = 5 * 10**9
) -> Path:
    """Like `save`, on one rank, of tensors that need not fit into memory together: a file for every `max_bytes`.

    Raises OSError where it cannot write, and whatever making a tensor raises; an older `root/step_<step>` is untouched.
    """
    target, beside = root / f"step_{step}", root / f".step_{step}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    held: dict[str, Tensor] = {}
    num_files = num_bytes = 0
    try:
        beside.mkdir(parents=True)
        for name, tensor in tensors:
            if held and num_bytes + tensor.nbytes > max_bytes:
                _write_file(beside, num_files, held)
                num_files, held, num_bytes = num_files + 1, {}, 0
            held[name] = tensor
            num_bytes += tensor.nbytes
        _write_file(beside, num_files, held)
        _publish(beside, target, num_files + 1, dict(meta, step=step))
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):
            root.rmdir()  # where it holds nothing else
        if isinstance(error, OSError):
            raise _named(error, target) from None
        raise
    return target


def folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, whole or damaged, by step; a folder of any other name is nobody's business."""
    return sorted((folder for folder in root.glob("step_*") if _STEP.fullmatch(folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a folder called `step_<n>`."""
    return int(folder.name.removeprefix("step_"))


def whole(root: Path, damaged: Callable[[Path, str], None] | None = None) -> Iterator[Checkpoint]:
    """The whole checkpoints under `root`, newest first, every byte read: by all ranks, some files each. Collective over
    the world.

    damaged: told, on one rank that found it, the folder and what is wrong with it, of those that are passed over; a
    warning says so in any case.
    """
    rank, world_size = _place()
    steps = iter([step_of(folder) for folder in reversed(folders(root))] if rank == 0 else [])
    while (step := int(largest(next(steps, -1)))) >= 0:
        folder, wrong = root / f"step_{step}", ""
        saved: Checkpoint | None = None
        try:
            saved = Checkpoint(folder)
            saved.verify(rank, world_size)
        except CheckpointError as error:
            wrong = str(error)
        finder = int(largest(rank if wrong else -1))
        if finder == rank:
            warnings.warn(f"passing over a damaged checkpoint: {wrong}", stacklevel=2)
            if damaged:
                damaged(folder, wrong)
        if finder < 0:
            assert saved is not None
            yield saved


def newest(root: Path, damaged: Callable[[Path, str], None] | None = None) -> Path | None:
    """The newest whole checkpoint under `root`; those that are damaged are passed over, as in `whole`. Where there is
    none at all, one that a kill left half-replaced is put back first. Collective."""
    rank, _ = _place()
    if rank == 0 and not folders(root):  # else the run that saves here may be about to rename it itself
        restore_replaced(root)
    return next((saved.folder for saved in whole(root, damaged)), None)


class Checkpoint:
    """A whole checkpoint, read by key. Raises CheckpointError when `folder` is none."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            index = json.loads((folder / "index.json").read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is not a checkpoint: it has no index.json") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / 'index.json'} cannot be read: {error}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CheckpointError(f"{folder / 'index.json'} is not of checkpoint format {FORMAT}")
        if index.get("checksum") != _checksum_of_index(index):
            raise CheckpointError(f"{folder / 'index.json'} is damaged: its checksum does not match")
        self.meta: dict[str, Any] = index["meta"]
        self._files: dict[str, dict[str, Any]] = index["files"]
        self._places: dict[str, list[_Place]] = {}
        for name, entry in self._files.items():
            for saved_as in entry["keys"]:
                key, bounds = _parse(saved_as)
                self._places.setdefault(key, []).append(_Place(bounds, name, saved_as))
        for places in self._places.values():
            places.sort()

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads every byte, or those of one of so many parts of the files. Raises CheckpointError naming the file that
        is missing, truncated or altered.
        """
        for name, entry in list(self._files.items())[part::parts]:
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if (size := file.stat().st_size) != entry["size"]:
                raise CheckpointError(f"{file} has {size} bytes, but {entry['size']} were written")
            if _checksum(file) != entry["checksum"]:
                raise CheckpointError(f"{file} is damaged: its checksum does not match")

    @property
    def keys(self) -> set[str]:
        """Of whole tensors, also of those that were saved in pieces."""
        return set(self._places)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors and pieces of `keys`, on the CPU; pieces come flat. Raises CheckpointError for a key that is not
        here.
        """
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for wanted in keys:
                key, bounds = _parse(wanted)
                if key not in self._places:
                    raise CheckpointError(f"{self.folder} has no {key}: it was made by another model")
                parts = []
                for place in self._places[key]:
                    if place.misses(bounds):
                        continue
                    if place.file not in files:
                        files[place.file] = stack.enter_context(safe_open(self.folder / place.file, framework="pt"))
                    parts.append(_elements(files[place.file], place, bounds))
                tensors[wanted] = parts[0] if len(parts) == 1 else torch.cat(parts)
                if not bounds.stop and (shape := self._places[key][0].bounds.shape):
                    tensors[wanted] = tensors[wanted].view(shape)
        return tensors


class _Place(NamedTuple):
    """Where a tensor, or a piece of it, lies."""

    bounds: _Bounds
    file: str
    saved_as: str

    def misses(self, wanted: _Bounds) -> bool:
        mine = self.bounds
        return bool(mine.stop and wanted.stop) and (mine.stop <= wanted.start or wanted.stop <= mine.start)


def _elements(file: Any, place: _Place, wanted: _Bounds) -> Tensor:
    """What `place` has of the wanted piece, flat; where the whole tensor is wanted, all of it."""
    if not wanted.stop:
        return file.get_tensor(place.saved_as)
    rows = file.get_slice(place.saved_as)
    num_rows, *rest = rows.get_shape()
    row = prod(rest)
    start = max(0, wanted.start - place.bounds.start)
    stop = min(num_rows * row, wanted.stop - place.bounds.start)
    first = start // row
    return rows[first : -(-stop // row)].flatten()[start - first * row : stop - first * row]


def _check_whole(keys: Iterable[str]) -> None:
    """Raises AssertionError unless the keys make every tensor exactly once, whole or in pieces that tile it."""
    pieces: dict[str, list[_Bounds]] = {}
    for saved_as in keys:
        key, bounds = _parse(saved_as)
        pieces.setdefault(key, []).append(bounds)
    for key, parts in pieces.items():
        end, shape = 0, parts[0].shape
        assert shape or len(parts) == 1, f"{len(parts)} ranks save {key}"
        for part in sorted(parts):
            assert (part.start, part.shape) == (end, shape), f"the pieces of {key} do not fit at element {end}"
            end = part.stop
        assert not shape or end == prod(shape), f"{key} is saved up to element {end} of {prod(shape)}"


def restore_replaced(root: Path) -> None:
    """Puts back what a kill between the two renames of `_publish` has left moved away under `root`; one that was
    replaced is removed."""
    for folder in root.glob(".step_*.replaced"):
        if (match := _REPLACED.fullmatch(folder.name)) and not (target := root / match[1]).exists():
            folder.rename(target)
        elif match:
            shutil.rmtree(folder)


def clear(root: Path) -> Iterator[tuple[Path, int]]:
    """Removes what a kill has left half-written under `root`: the folder, and the step of each."""
    for folder in sorted(root.glob(".step_*.writing")):
        if match := _WRITING.fullmatch(folder.name):
            shutil.rmtree(folder)
            yield folder, int(match[1])


def _write_file(beside: Path, number: int, tensors: Mapping[str, Tensor]) -> None:
    """What one rank contributes, and what the index will say of it. Raises OSError, which names the file."""
    file = beside / f"rank_{number:05d}.safetensors"
    try:
        save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
        entry = {"size": file.stat().st_size, "checksum": _checksum(file), "keys": sorted(tensors)}
        _write_json(file.with_suffix(".json"), entry)
    except OSError as failure:
        raise _named(failure, file) from None


def _publish(beside: Path, target: Path, num_files: int, meta: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    for number in range(num_files):
        entry = beside / f"rank_{number:05d}.json"
        files[f"rank_{number:05d}.safetensors"] = json.loads(entry.read_text())
        entry.unlink()
    _check_whole(key for entry in files.values() for key in entry["keys"])
    index = {"format": FORMAT, "meta": meta, "files": files}
    _write_json(beside / "index.json", index | {"checksum": _checksum_of_index(index)})
    before = target.with_name(f".{target.name}.replaced")
    if target.exists():  # an import that is replaced, or of a run that was resumed from an earlier step
        shutil.rmtree(before, ignore_errors=True)
        os.rename(target, before)  # a kill right after this leaves it to `restore_replaced` to put it back
    os.rename(beside, target)
    _sync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def _prune(root: Path, step: int, keep: int) -> None:
    """Leaves the last `keep` up to `step`. Later ones were passed over as damaged, and do not count."""
    for folder in [folder for folder in folders(root) if step_of(folder) <= step][:-keep]:
        shutil.rmtree(folder)


def _agree(error: OSError | None, root: Path, group: dist.ProcessGroup | None) -> None:
    """A barrier that fails on every rank when one rank has failed."""
    failed = torch.tensor(int(error is not None))
    if dist.is_initialized():
        dist.all_reduce(failed, group=group)
    if error is not None:
        raise error
    if failed:
        raise OSError(None, f"{int(failed)} other ranks could not write the checkpoint", str(root))


def _named(failure: OSError, file: Path) -> OSError:
    """The failure with the name of its file: a full disk does not say where."""
    return OSError(failure.errno, failure.strerror or str(failure), failure.filename or str(file))


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]


def _checksum_of_index(index: Mapping[str, Any]) -> str:
    body = {k: v for k, v in index.items() if k != "checksum"}
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


def _write_json(file: Path, value: Any) -> None:
    with file.open("w") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
