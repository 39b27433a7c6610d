"""Checkpoints: named tensors and a few numbers, written whole or not at all.

    checkpoints/step_120/
        rank_00000.safetensors ...   each tensor once, written by one of the ranks that hold it
        index.json                   the meta data, and of every file its size, checksum and keys

A key is a whole-model name (`master/model.layers.3.mlp.experts.7.up_proj.weight`), never a rank's: any other layout
finds what it needs by name. Ranks that share a tensor may write a part each, `KEY#START` from element START on; `KEY`
then reads as one flat tensor. Everything is written into a folder beside the target, which is renamed only when every
rank's file and the index are on disk; so a folder called `step_<n>` is whole, and a kill at any moment leaves the ones
before it. Nothing is pickled: tensors are safetensors, the index is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from infra.tensor_file import save_tensors

FORMAT = 1
_STEP = re.compile(r"step_\d+")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def save(root: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int) -> Path:
    """Writes `root/step_<step>`; collective over the world.

    tensors: what this rank contributes; every key, or part of one, must come from exactly one rank. meta: JSON values,
    rank 0's count. keep: how many checkpoints stay; older ones are removed once this one is whole.
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
    _agree(error, root)
    file = beside / f"rank_{rank:05d}.safetensors"
    try:
        save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
        entry = {"size": file.stat().st_size, "checksum": _checksum(file), "keys": sorted(tensors)}
        _write_json(file.with_suffix(".json"), entry)
    except OSError as failure:
        error = _named(failure, file)
    try:
        _agree(error, root)
        if rank == 0:
            try:
                _publish(beside, target, world_size, dict(meta, step=step))
                _prune(root, keep)
            except OSError as failure:
                error = _named(failure, target)
        _agree(error, root)
    except OSError:
        if rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


def folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, whole or damaged, by step; a folder of any other name is nobody's business."""
    return sorted((folder for folder in root.glob("step_*") if _STEP.fullmatch(folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a folder called `step_<n>`."""
    return int(folder.name.removeprefix("step_"))


def whole(root: Path, damaged: Callable[[Path, str], None] | None = None) -> Iterator[Checkpoint]:
    """The whole checkpoints under `root`, newest first, every byte read.

    damaged: told the folder, and what is wrong with it, of those that are passed over; a warning says so in any case.
    """
    for folder in reversed(folders(root)):
        try:
            saved = Checkpoint(folder)
            saved.verify()
        except CheckpointError as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
            if damaged:
                damaged(folder, str(error))
        else:
            yield saved


def newest(root: Path, damaged: Callable[[Path, str], None] | None = None) -> Path | None:
    """The newest whole checkpoint under `root`; those that are damaged are passed over, as in `whole`."""
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
        self._file_of = {key: name for name, entry in self._files.items() for key in entry["keys"]}
        self._parts_of: dict[str, list[str]] = {}
        for part in sorted((key for key in self._file_of if "#" in key), key=lambda key: int(key.rpartition("#")[2])):
            self._parts_of.setdefault(part.rpartition("#")[0], []).append(part)

    def verify(self) -> None:
        """Reads every byte. Raises CheckpointError naming the file that is missing, truncated or altered."""
        for name, entry in self._files.items():
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if (size := file.stat().st_size) != entry["size"]:
                raise CheckpointError(f"{file} has {size} bytes, but {entry['size']} were written")
            if _checksum(file) != entry["checksum"]:
                raise CheckpointError(f"{file} is damaged: its checksum does not match")

    @property
    def keys(self) -> set[str]:
        """Of whole tensors, whether written whole or in parts."""
        return {key for key in self._file_of if "#" not in key} | set(self._parts_of)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of `keys`, on the CPU; one that was written in parts is flat.

        Raises CheckpointError for a key that is not here.
        """
        parts_of = {key: self._parts_of.get(key, [key]) for key in keys}
        by_file: dict[str, list[str]] = {}
        for key in (part for parts in parts_of.values() for part in parts):
            if key not in self._file_of:
                raise CheckpointError(f"{self.folder} has no {key}: it was made by another model")
            by_file.setdefault(self._file_of[key], []).append(key)
        tensors: dict[str, Tensor] = {}
        for name, names in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in names}
        return {key: self._joined(parts, tensors) for key, parts in parts_of.items()}

    def _joined(self, parts: list[str], tensors: Mapping[str, Tensor]) -> Tensor:
        if "#" not in parts[0]:
            return tensors[parts[0]]
        end = 0
        for part in parts:
            if int(part.rpartition("#")[2]) != end:
                raise CheckpointError(f"{self.folder}: the part before {part} is missing")
            end += tensors[part].numel()
        return torch.cat([tensors[part] for part in parts])


def _publish(beside: Path, target: Path, world_size: int, meta: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    seen: set[str] = set()
    for rank in range(world_size):
        part = beside / f"rank_{rank:05d}.json"
        entry = json.loads(part.read_text())
        if doubled := seen & set(entry["keys"]):
            raise AssertionError(f"two ranks save {sorted(doubled)[0]}")
        seen |= set(entry["keys"])
        files[f"rank_{rank:05d}.safetensors"] = entry
        part.unlink()
    index = {"format": FORMAT, "meta": meta, "files": files}
    _write_json(beside / "index.json", index | {"checksum": _checksum_of_index(index)})
    if target.exists():
        shutil.rmtree(target)  # of a run that was resumed from an earlier step
    os.rename(beside, target)
    _sync_folder(target.parent)


def _prune(root: Path, keep: int) -> None:
    for folder in folders(root)[:-keep]:
        shutil.rmtree(folder)


def _agree(error: OSError | None, root: Path) -> None:
    """A barrier that fails on every rank when one rank has failed."""
    failed = torch.tensor(int(error is not None))
    if dist.is_initialized():
        dist.all_reduce(failed)
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
