"""Text to a token file: every core at work, resumable after a kill, the same bytes whatever the number of workers.

Each unit of the sources (infra/sources.py) becomes one shard in `OUT.partial/shards`. Finished shards survive a kill,
and a second run with the same sources and options goes on from them. The shards are joined in order and the finished
folder is renamed to `OUT`, so `OUT` is either whole or absent; anything else that goes wrong leaves nothing behind. A
document goes to the held-out split if the hash of its text says so: equal documents never stand on both sides.
[no torch]
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from infra import sources
from infra.sources import FORMATS, Unit, find_sources, plan_units, read_documents
from infra.token_file import SPLITS, VERSION, DataError, Header, Split, read_header, token_dtype
from infra.tokenizer import Tokenizer, identity, load_tokenizer, tokenizer_from_json, train_bpe
from infra.wording import counted

MOST_TOKENS = 10_000_000  # of a vocabulary; tables for a hundred times as many fill a machine's memory


@dataclass
class TrainBPEConfig:
    """Train a byte-level BPE on the sources; `vocab_size` counts the special tokens, 0 trains none."""

    vocab_size: int = 0
    max_bytes: int = 256 << 20  # of text to learn from, taken evenly over the sources

    def __post_init__(self) -> None:
        if not 0 <= self.vocab_size <= MOST_TOKENS:
            raise ValueError(f"train_bpe.vocab_size={self.vocab_size} must be between 0 (none) and {MOST_TOKENS:,}")
        if self.max_bytes < 1:
            raise ValueError(f"train_bpe.max_bytes={self.max_bytes} must be at least 1")


@dataclass
class PrepareConfig:
    source: str = ""  # a file, a folder (every text file below it), a glob such as src/**/*.py, or - for standard input
    out: str = ""  # the folder to make
    tokenizer: str = "byte"  # or the path of a `tokenizers` JSON file
    train_bpe: TrainBPEConfig = field(default_factory=TrainBPEConfig)
    vocab_size: int = 0  # the model's, where it is larger than the tokenizer's; 0 takes the tokenizer's
    format: str = "auto"  # by file name; standard input is text unless this says jsonl
    text_key: str = "text"  # the key of .jsonl lines, the column of .parquet files
    separator: str = ""  # what stands between the documents of a text file (\n: new line); "": each file is one
    exclude: list[str] = field(default_factory=list)  # patterns of paths to leave out, such as */tests/*
    held_out: float = 0.01  # share of documents kept for evaluation
    workers: int = 0  # processes; 0 takes every core

    @property
    def delimiter(self) -> str:
        """`separator` with its new lines, which are awkward to type."""
        return self.separator.replace("\\n", "\n")

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source= is missing; give a file, a folder, a glob such as 'src/**/*.py', or - for stdin")
        if not self.out:
            raise ValueError("out= is missing; give the folder to make, such as out=data/mine")
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format} is not known; choose from {' '.join(FORMATS)}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be at least 0 and below 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be at least 0 (0 takes every core)")
        if self.train_bpe.vocab_size and self.tokenizer != "byte":
            raise ValueError(
                f"tokenizer={self.tokenizer} and train_bpe.vocab_size exclude each other; give one of them"
            )


def prepare(config: PrepareConfig, quiet: bool = False) -> Header:
    """Make the folder `config.out`; DataError with one line if a source cannot be used or the disk is full."""
    out = Path(config.out)
    if out.exists():
        raise DataError(f"out={out} exists already; remove it or choose another folder")
    partial = out.with_name(out.name + ".partial")
    with _locked(partial):
        try:
            header = _prepare(config, out, partial, quiet)
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, perhaps for want of memory; the same command goes on from the finished "
                f"shards in {partial}, workers=1 needs least"
            ) from None
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, DataError):
                raise DataError(str(error)) from None  # without the trace of the worker it came from
            if isinstance(error, OSError):
                what = f"{error.filename or f'out={out}'}: {error.strerror or error}"
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    what += "; nothing is kept: make room for the tokens twice over, or choose another disk with out="
                raise DataError(what) from None
            raise
        shutil.rmtree(partial, ignore_errors=True)
    return header


def prepare_default(path: str | Path, held_out: float = 0.01, quiet: bool = False) -> None:
    """Real text that every machine has: the Python standard library's sources, prepared in `path` on first use."""
    if Path(path).exists():
        read_header(Path(path))
        return
    source = glob.escape(sysconfig.get_paths()["stdlib"]) + "/**/*.py"
    exclude = ["*/site-packages/*", "*/dist-packages/*"]
    # One process: a second or two of work, and the caller may hold threads that a fork would not carry over.
    prepare(PrepareConfig(source=source, out=str(path), exclude=exclude, held_out=held_out, workers=1), quiet)


def _prepare(config: PrepareConfig, out: Path, partial: Path, quiet: bool) -> Header:
    say = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True).print
    paths = [_spool_stdin(partial)] if config.source == "-" else find_sources(config.source, config.exclude)
    units = plan_units(paths, config.format, config.text_key, config.delimiter)
    tokenizer = load_tokenizer(config.tokenizer)
    _start_or_resume(partial, _recipe(config, paths, tokenizer))
    if config.train_bpe.vocab_size:
        trained = partial / "tokenizer.json"
        if not trained.exists():
            say(f"training a BPE of {config.train_bpe.vocab_size} tokens ...")
            _write_text(trained, train_bpe(_training_texts(units, config), config.train_bpe.vocab_size).to_json())
        tokenizer = tokenizer_from_json(trained.read_text(encoding="utf-8"))
    vocab_size = config.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise DataError(f"vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; raise it")

    shards = [partial / "shards" / f"{i:06d}.npz" for i in range(len(units))]
    num_done = sum(shard.exists() for shard in shards)
    if num_done:
        say(f"going on from {num_done} of {len(shards)} finished shards")
    _make_shards(units, shards, config, tokenizer, vocab_size, quiet)
    header, num_skipped = join_shards(shards, partial / "joined", tokenizer, vocab_size)
    if num_skipped:
        say(f"left out {num_skipped} of {counted(len(paths), 'file')}, not UTF-8 text")
    if not header.train.num_documents:
        held_out, skipped = counted(header.held_out.num_documents, "document"), counted(num_skipped, "file")
        raise DataError(
            f"source={config.source} holds no text to train on ({held_out} held out, {skipped} not UTF-8); "
            "give other files or a smaller held_out"
        )
    (partial / "joined").rename(out)
    return header


def _recipe(config: PrepareConfig, paths: list[str], tokenizer: Tokenizer) -> str:
    """Everything the result depends on: equal recipes may share shards."""
    elsewhere = ("source", "out", "exclude", "workers")  # the paths say it, or it does not matter
    return json.dumps(
        {
            "version": VERSION,
            "sources": [[path, (stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in paths],
            "options": {key: value for key, value in asdict(config).items() if key not in elsewhere},
            "tokenizer": identity(tokenizer),
            "unit_bytes": sources.UNIT_BYTES,
        }
    )


def _start_or_resume(partial: Path, recipe: str) -> None:
    """Throw away what an earlier run left in `partial`, unless it followed the same recipe."""
    file = partial / "recipe.json"
    shutil.rmtree(partial / "joined", ignore_errors=True)
    if not file.exists() or file.read_text(encoding="utf-8") != recipe:
        shutil.rmtree(partial / "shards", ignore_errors=True)
        (partial / "tokenizer.json").unlink(missing_ok=True)
        _write_text(file, recipe)
    (partial / "shards").mkdir(exist_ok=True)


def _spool_stdin(partial: Path) -> str:
    with (partial / "stdin").open("wb") as stream:
        shutil.copyfileobj(sys.stdin.buffer, stream)
    return str(partial / "stdin")


def _write_text(file: Path, text: str) -> None:
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.rename(file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of `folder`. The lock goes with this process, however it ends, and is not its workers'."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; choose another out=") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process is writing {folder}; wait for it or choose another out=") from None
        yield


# --- units to shards ------------------------------------------------------------------------------------------------


def is_held_out(text: str, rate: float) -> bool:
    """Whether the hash of a document puts it among the share `rate` kept for evaluation."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < rate * 2**64


def _training_texts(units: list[Unit], config: PrepareConfig) -> Iterator[str]:
    """Text to train a tokenizer on: units taken evenly over the sources, held-out documents left out."""
    total = sum(piece.num_bytes for unit in units for piece in unit)
    stride = max(1, -(-total // max(config.train_bpe.max_bytes, 1)))
    for unit in units[::stride]:
        for piece in unit:
            documents = read_documents(piece, config.text_key, config.delimiter) or ()
            yield from (text for text in documents if not is_held_out(text, config.held_out))


def make_shard(unit: Unit, shard: Path, config: PrepareConfig, tokenizer: Tokenizer, vocab_size: int) -> int:
    """Tokenize one unit into the file `shard`; returns the unit's bytes."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    num_skipped = 0
    for piece in unit:
        documents = read_documents(piece, config.text_key, config.delimiter)
        num_skipped += documents is None
        for text in documents or ():
            texts["held_out" if is_held_out(text, config.held_out) else "train"].append(text)
    dtype = token_dtype(vocab_size)
    eos = np.array([tokenizer.special["eos"]], dtype)
    arrays: dict[str, np.ndarray] = {"num_skipped": np.array(num_skipped)}
    for split in SPLITS:
        encoded = tokenizer.encode(texts[split])
        parts = [part.astype(dtype) for document in encoded for part in (document, eos)]
        arrays[f"{split}_tokens"] = np.concatenate(parts) if parts else np.empty(0, dtype)
        arrays[f"{split}_lengths"] = np.array([len(document) + 1 for document in encoded], np.int64)
        arrays[f"{split}_bytes"] = np.array(sum(len(text.encode()) for text in texts[split]))
    beside = shard.with_suffix(f".{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        beside.rename(shard)
    finally:
        beside.unlink(missing_ok=True)
    return _num_bytes(unit)


def _make_shards(
    units: list[Unit], shards: list[Path], config: PrepareConfig, tokenizer: Tokenizer, vocab_size: int, quiet: bool
) -> None:
    """Make the shards that are not there yet, on every core, with a progress bar."""
    waiting = [(unit, shard) for unit, shard in zip(units, shards, strict=True) if not shard.exists()]
    total, left = sum(map(_num_bytes, units)), sum(_num_bytes(unit) for unit, _ in waiting)
    num_workers = min(config.workers or len(os.sched_getaffinity(0)), len(waiting))
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
    task = progress.add_task("", total=total, completed=total - left)
    if num_workers <= 1:
        with progress:
            for unit, shard in waiting:
                progress.advance(task, make_shard(unit, shard, config, tokenizer, vocab_size))
        return
    initargs = (os.getpid(), tokenizer.to_json())
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_workers, fork, initializer=_start_worker, initargs=initargs)
    try:
        futures = [pool.submit(_work, unit, shard, config, vocab_size) for unit, shard in waiting]
        with progress:  # after the fork: the bar has a thread of its own
            for future in as_completed(futures):
                progress.advance(task, future.result())
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer  # each worker process builds its own, once


def _start_worker(parent: int, tokenizer_json: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough
    _worker_tokenizer = tokenizer_from_json(tokenizer_json)

    def leave_with_parent() -> None:  # else a worker whose parent was killed waits for work for ever
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(unit: Unit, shard: Path, config: PrepareConfig, vocab_size: int) -> int:
    return make_shard(unit, shard, config, _worker_tokenizer, vocab_size)


def _num_bytes(unit: Unit) -> int:
    return sum(piece.num_bytes for piece in unit)


# --- shards to the token file ---------------------------------------------------------------------------------------


def join_shards(shards: list[Path], folder: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[Header, int]:
    """Write prepared data into the new `folder`; returns its header and how many source files were not UTF-8."""
    folder.mkdir()
    header = Header(token_dtype(vocab_size), vocab_size, identity(tokenizer))
    num_skipped = 0
    for split in SPLITS:
        info = Split()
        sums = hashlib.sha256(), hashlib.sha256()
        with (folder / f"{split}.tokens").open("wb") as tokens, (folder / f"{split}.documents").open("wb") as ends:
            for shard in shards:
                with np.load(shard, allow_pickle=False) as arrays:
                    document_ends = info.num_tokens + np.cumsum(arrays[f"{split}_lengths"])
                    info.num_tokens += len(arrays[f"{split}_tokens"])
                    info.num_documents += len(document_ends)
                    info.num_bytes += int(arrays[f"{split}_bytes"])
                    num_skipped += int(arrays["num_skipped"]) if split == "train" else 0
                    blocks = arrays[f"{split}_tokens"].tobytes(), document_ends.astype("<i8").tobytes()
                for stream, checksum, block in zip((tokens, ends), sums, blocks, strict=True):
                    stream.write(block)
                    checksum.update(block)
            for stream in (tokens, ends):
                stream.flush()
                os.fsync(stream.fileno())
        info.tokens_checksum, info.documents_checksum = (checksum.hexdigest() for checksum in sums)
        setattr(header, split, info)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / "header.json").write_text(header.to_json(), encoding="utf-8")
    return header, num_skipped
