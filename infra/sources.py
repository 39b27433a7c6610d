"""Where text comes from: files, folders, globs and standard input, cut into units of work and read as documents.

A document is a line of .jsonl, a row of .parquet, and for anything else a whole text file, or a part of one if
`separator` says what stands between documents. A unit is about 4 MiB: whole small files, byte ranges of big ones that
begin and end between records, row groups of Parquet files. Units depend on the sources alone, not on who works on them.
[no torch]
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from infra.token_file import DataError

UNIT_BYTES = 4 << 20
FORMATS = ("auto", "text", "jsonl", "parquet")
_BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class Piece(NamedTuple):
    """Part of one source: bytes [start, stop) of a text or jsonl file, row groups [start, stop) of a Parquet file."""

    path: str
    format: str
    start: int
    stop: int
    num_bytes: int


Unit = list[Piece]


def find_sources(source: str, exclude: list[str]) -> list[str]:
    """The files that `source` (a file, a folder or a glob) stands for, sorted; DataError if there are none."""
    pattern = source
    if os.path.isdir(source):
        pattern = os.path.join(glob.escape(source), "**", "*")
    elif os.path.exists(source):
        pattern = glob.escape(source)
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    kept = [path for path in paths if not any(fnmatch(path, pattern) for pattern in exclude)]
    if not kept:
        excluded = f" ({len(paths)} excluded)" if paths else ""
        raise DataError(f"source={source} matches no file{excluded}; give a file, a folder or a quoted glob")
    return kept


def plan_units(paths: list[str], format: str, text_key: str, separator: str) -> list[Unit]:
    """Cut the files into units of about UNIT_BYTES, in order."""
    units: list[Unit] = []
    filled = UNIT_BYTES
    for piece in (piece for path in paths for piece in _cut(path, format, text_key, separator)):
        if filled + piece.num_bytes > UNIT_BYTES:
            units.append([])
            filled = 0
        units[-1].append(piece)
        filled += piece.num_bytes
    return units


def _cut(path: str, format: str, text_key: str, separator: str) -> Iterator[Piece]:
    if format == "auto":
        format = _BY_SUFFIX.get(Path(path).suffix.lower(), "text")
    if format == "parquet":
        metadata = _open_parquet(path, text_key).metadata
        for group in range(metadata.num_row_groups):
            yield Piece(path, format, group, group + 1, metadata.row_group(group).total_byte_size)
        return
    size = os.path.getsize(path)
    delimiter = b"\n" if format == "jsonl" else separator.encode()
    start = 0
    while start < size:
        stop = _end_of_record(path, start + UNIT_BYTES, delimiter, size) if delimiter else size
        yield Piece(path, format, start, stop, stop - start)
        start = stop


def _end_of_record(path: str, position: int, delimiter: bytes, size: int) -> int:
    """Where the first delimiter that begins at or after `position` ends."""
    with open(path, "rb") as stream:
        while position < size:
            stream.seek(position)
            chunk = stream.read((1 << 20) + len(delimiter))
            found = chunk.find(delimiter)
            if found >= 0:
                return position + found + len(delimiter)
            position += 1 << 20  # the overlap finds a delimiter that lies across two chunks
    return size


def read_documents(piece: Piece, text_key: str, separator: str) -> Iterator[str] | None:
    """The documents of a piece, empty ones left out; None for a text file that is not UTF-8."""
    if piece.format == "parquet":
        file = _open_parquet(piece.path, text_key)
        table = file.read_row_groups(list(range(piece.start, piece.stop)), columns=[text_key])
        return (text for text in table.column(0).to_pylist() if text)
    with open(piece.path, "rb") as stream:
        stream.seek(piece.start)
        raw = stream.read(piece.stop - piece.start)
    if piece.format == "jsonl":
        return _read_jsonl(raw, piece, text_key)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return (part for part in (text.split(separator) if separator else [text]) if part)


def _read_jsonl(raw: bytes, piece: Piece, text_key: str) -> Iterator[str]:
    for i, line in enumerate(raw.split(b"\n")):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            with open(piece.path, "rb") as stream:  # only now is the line's number worth counting
                number = stream.read(piece.start).count(b"\n") + i + 1
            raise DataError(
                f"{piece.path} line {number} is not a JSON object with a string under {text_key!r}; it begins "
                f"{line[:60].decode(errors='replace')!r}: mend it, or name the key with text_key="
            ) from None
        if text:
            yield text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, UTF-8 cannot


def _open_parquet(path: str, column: str) -> Any:
    """A pyarrow ParquetFile whose `column` holds strings."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from None
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"{path} has no column {column!r} but {', '.join(names)}; name one with text_key=")
    kind = file.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, not strings; name another one with text_key=")
    return file
