"""Every way a prepared folder can be wrong, each told in one line; each test mends nothing and breaks one thing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.data import TokenDataset
from infra.token_file import DataError, open_token_file, read_header, token_dtype, verify_checksums
from infra.tokenizer import ByteTokenizer, train_bpe
from tests.infra.test_data import some_documents, write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "d", some_documents(20))


def edit_header(path: Path, **changes: object) -> None:
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps({**header, **changes}))


def truncate(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing header": (lambda p: (p / "header.json").unlink(), r"has no header.json.*prepare_data.py"),
    "empty header": (lambda p: (p / "header.json").write_text(""), r"header.json is empty or damaged"),
    "header of another kind": (lambda p: (p / "header.json").write_text("[1]"), r"header.json is empty or damaged"),
    "another version": (
        lambda p: edit_header(p, version=9),
        r"braid-tokens version 9, this program reads .*1",
    ),
    "edited header": (lambda p: edit_header(p, vocab_size=64), r"header.json does not match its checksum"),
    "unknown field": (lambda p: edit_header(p, more=1), r"header.json is empty or damaged"),
    "missing tokens": (lambda p: (p / "train.tokens").unlink(), r"train.tokens is missing"),
    "empty tokens": (lambda p: (p / "train.tokens").write_text(""), r"train.tokens is empty: 0 bytes, .* says \d+"),
    "truncated tokens": (lambda p: truncate(p / "train.tokens", 3), r"train.tokens is truncated: \d+ bytes"),
    "long tokens": (lambda p: (p / "train.tokens").open("ab").write(b"x"), r"train.tokens is too long"),
    "truncated documents": (lambda p: truncate(p / "train.documents", 8), r"train.documents is truncated"),
    "foreign documents": (
        lambda p: (p / "train.documents").write_bytes(b"\1" * (p / "train.documents").stat().st_size),
        r"train.documents ends at token \d+, .* counts \d+",
    ),
    "missing tokenizer": (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer.json cannot be read"),
    "damaged tokenizer": (lambda p: (p / "tokenizer.json").write_text("{"), r"tokenizer.json cannot be read"),
    "another tokenizer": (
        lambda p: (p / "tokenizer.json").write_text(train_bpe(iter(["abc"]), 262).to_json()),
        r"not the tokenizer that made this data \(hash \w+, the header says \w+\)",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_told_in_one_line(data: Path, name: str) -> None:
    open_token_file(data)
    break_it, says = BREAKS[name]
    break_it(data)
    with pytest.raises(DataError, match=says) as caught:
        TokenDataset(data)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; .*prepare_data.py"):
        open_token_file(tmp_path / "nowhere")


def test_another_vocabulary_names_both_numbers(data: Path) -> None:
    open_token_file(data, vocab_size=ByteTokenizer.vocab_size)
    with pytest.raises(DataError, match=r"vocabulary of 320 .* vocab_size=129280; set model.vocab_size=320"):
        open_token_file(data, vocab_size=129280)


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_flipped_bit_is_found_by_the_full_check_alone(tmp_path: Path, kind: str) -> None:
    from infra.prepare import PrepareConfig, prepare

    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    data = tmp_path / "d"
    prepare(PrepareConfig(source=f"{tmp_path}/*.txt", out=str(data), held_out=0), quiet=True)
    verify_checksums(data)
    raw = bytearray((data / f"train.{kind}").read_bytes())
    raw[0] ^= 1
    (data / f"train.{kind}").write_bytes(raw)
    TokenDataset(data)
    with pytest.raises(DataError, match=rf"train.{kind} does not match its checksum"):
        TokenDataset(data, verify=True)


def test_header_round_trip(data: Path) -> None:
    header = read_header(data)
    assert header.to_json() == (data / "header.json").read_text()
    assert header.train.bytes_per_token == header.train.num_bytes / header.train.num_tokens
    assert header.held_out.bytes_per_token == 0


def test_dtype_holds_the_vocabulary() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == ("<u2", "<u4")
