"""The format of prepared data: a folder with a JSON header, flat token files and document ends, all of them
memory-mapped.

    data/mine/
      header.json            what follows, and its own checksum
      tokenizer.json         the tokenizer that made it
      train.tokens           uint16 or uint32, little-endian: the documents, each ended by eos, one after another
      train.documents        int64, little-endian: where each document ends in train.tokens (exclusive)
      held_out.tokens, held_out.documents     the same for the documents kept for evaluation

`open_token_file` checks what is cheap (header, sizes, last document end) at every start; `verify_checksums` reads every
byte. Both raise `DataError` with one line. [no torch]
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from infra.tokenizer import Tokenizer, identity, tokenizer_from_json

FORMAT = "braid-tokens"
VERSION = 1
SPLITS = ("train", "held_out")
HOW_TO_PREPARE = "prepare it with `python launch/prepare_data.py source=... out=...`"


class DataError(ValueError):
    """Data that cannot be used; the message is one line that says what is wrong and what would fix it."""


@dataclass
class Split:
    """What a header says of one split. Checksums are SHA-256 in hexadecimal."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0  # UTF-8 bytes of the text the tokens came from
    tokens_checksum: str = ""
    documents_checksum: str = ""

    @property
    def bytes_per_token(self) -> float:
        """A loss of x nats per token is x / bytes_per_token nats per byte."""
        return self.num_bytes / self.num_tokens if self.num_tokens else 0.0


@dataclass
class Header:
    dtype: str
    vocab_size: int
    tokenizer: str  # identity hash
    train: Split = field(default_factory=Split)
    held_out: Split = field(default_factory=Split)
    format: str = FORMAT
    version: int = VERSION

    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "checksum": self.checksum()}, indent=2) + "\n"


@dataclass
class TokenFile:
    """One split, mapped: tokens [num_tokens] and document_ends [num_documents] are read-only views of the disk."""

    path: Path
    header: Header
    split: Split
    tokens: np.ndarray
    document_ends: np.ndarray
    tokenizer: Tokenizer


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def read_header(path: Path) -> Header:
    """The header of the prepared data in folder `path`; DataError if it is missing, damaged or of another version."""
    file = path / "header.json"
    if not path.exists():
        raise DataError(f"data {path} does not exist; {HOW_TO_PREPARE}")
    if not file.is_file():
        raise DataError(f"data {path} has no header.json, so it is not prepared data; {HOW_TO_PREPARE}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT or values["version"] != VERSION:
            found = f"{values['format']} version {values['version']}"
            raise DataError(f"{file} is {found}, this program reads {FORMAT} version {VERSION}; prepare the data again")
        checksum = values.pop("checksum")
        header = Header(**{**values, "train": Split(**values["train"]), "held_out": Split(**values["held_out"])})
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is empty or damaged ({type(error).__name__}: {error}); prepare the data again"
        ) from None
    if header.checksum() != checksum:
        raise DataError(
            f"{file} does not match its checksum ({header.checksum()[:12]}, not {checksum[:12]}); it was edited or "
            "damaged: prepare the data again"
        )
    return header


def open_token_file(path: str | Path, split: str = "train", vocab_size: int | None = None) -> TokenFile:
    """Map one split of the prepared data in folder `path`.

    `vocab_size` is the model's: data built with another vocabulary is refused, because its tokens would mean
    something else. Raises DataError with one line if anything is missing, truncated, empty or of another vocabulary.
    """
    path = Path(path)
    header = read_header(path)
    if vocab_size is not None and vocab_size != header.vocab_size:
        raise DataError(
            f"data {path} has a vocabulary of {header.vocab_size} tokens but the model has vocab_size={vocab_size}; "
            f"set model.vocab_size={header.vocab_size}, or prepare the data with the model's tokenizer "
            f"(vocab_size={vocab_size} there pads a smaller one)"
        )
    info: Split = getattr(header, split)
    tokens = _map(path / f"{split}.tokens", header.dtype, info.num_tokens)
    ends = _map(path / f"{split}.documents", "<i8", info.num_documents)
    if info.num_documents and int(ends[-1]) != info.num_tokens:
        raise DataError(
            f"{path}/{split}.documents ends at token {int(ends[-1])}, but {path}/header.json counts {info.num_tokens}; "
            "the files do not belong together: prepare the data again"
        )
    return TokenFile(path, header, info, tokens, ends, read_tokenizer(path, header))


def read_tokenizer(path: str | Path, header: Header | None = None) -> Tokenizer:
    """The tokenizer that made the data in folder `path`."""
    path = Path(path)
    header = header or read_header(path)
    try:
        tokenizer = tokenizer_from_json((path / "tokenizer.json").read_text(encoding="utf-8"), f"{path}/tokenizer.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}/tokenizer.json cannot be read ({error}); prepare the data again") from None
    if identity(tokenizer) != header.tokenizer:
        raise DataError(
            f"{path}/tokenizer.json is not the tokenizer that made this data (hash {identity(tokenizer)[:12]}, "
            f"the header says {header.tokenizer[:12]}); put the right one back or prepare the data again"
        )
    return tokenizer


def verify_checksums(path: str | Path) -> None:
    """Read every byte of the data in folder `path` and compare checksums; DataError names the first file that
    differs."""
    path = Path(path)
    header = read_header(path)
    for split in SPLITS:
        open_token_file(path, split)
        for kind in ("tokens", "documents"):
            file = path / f"{split}.{kind}"
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            expected = getattr(getattr(header, split), f"{kind}_checksum")
            if found != expected:
                raise DataError(
                    f"{file} does not match its checksum ({found[:12]}, the header says {expected[:12]}); the file is "
                    "damaged: prepare the data again"
                )


def _map(file: Path, dtype: str, length: int) -> np.ndarray:
    """A read-only plain array over a file of exactly `length` elements."""
    if not file.is_file():
        raise DataError(f"{file} is missing; prepare the data again")
    expected, size = length * np.dtype(dtype).itemsize, file.stat().st_size
    if size != expected:
        wrong = "is empty" if size == 0 else "is truncated" if size < expected else "is too long"
        raise DataError(f"{file} {wrong}: {size} bytes, the header says {expected}; prepare the data again")
    if length == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    # A plain view: slicing np.memmap itself costs microseconds more each time.
    return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray)
