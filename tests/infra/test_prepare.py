"""Preparation: nothing lost, the same bytes whatever the workers, resumable, and nothing left behind when it fails."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from infra import prepare as prepare_module
from infra import sources
from infra.prepare import PrepareConfig, TrainBPEConfig, is_held_out, prepare, prepare_default
from infra.sources import find_sources, plan_units, read_documents
from infra.token_file import DataError, open_token_file

fork = multiprocessing.get_context("fork")


def some_texts(num: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    words = ["lorem", "ipsum", "été", "中文", "12345", "\t", "😀"]
    return [f"{i}: " + " ".join(random.choice(words, random.integers(1, 40))) for i in range(num)]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units of little data."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in some_texts(100)))
    return file


def run(source: Path | str, out: Path, **options: object) -> Path:
    prepare(PrepareConfig(source=str(source), out=str(out), **{"workers": 1, **options}), quiet=True)  # type: ignore[arg-type]
    assert not out.with_name(out.name + ".partial").exists()
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def texts_of(folder: Path, split: str = "train") -> list[str]:
    """The documents of a split, read back token by token."""
    file = open_token_file(folder, split)
    texts = []
    for begin, end in zip([0, *file.document_ends], file.document_ends, strict=False):
        *document, last = file.tokens[begin:end]
        assert last == file.tokenizer.special["eos"]
        texts.append(file.tokenizer.decode(document))
    return texts


@pytest.mark.usefixtures("small_units")
def test_every_format_gives_the_same_bytes_and_the_texts_back(tmp_path: Path, jsonl: Path) -> None:
    texts = some_texts(100)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "texts.parquet", row_group_size=7)
    (tmp_path / "texts.txt").write_text("<|sep|>".join(texts))
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "folder" / "below" / f"{i:04d}.py").write_text(text)
    expected = files_of(run(jsonl, tmp_path / "a", held_out=0.2))
    assert files_of(run(tmp_path / "texts.parquet", tmp_path / "b", held_out=0.2)) == expected
    assert files_of(run(tmp_path / "texts.txt", tmp_path / "c", held_out=0.2, separator="<|sep|>")) == expected
    assert files_of(run(tmp_path / "folder", tmp_path / "d", held_out=0.2)) == expected
    assert files_of(run(f"{tmp_path}/folder/**/*.py", tmp_path / "e", held_out=0.2)) == expected

    assert texts_of(tmp_path / "a") == [text for text in texts if not is_held_out(text, 0.2)]
    assert texts_of(tmp_path / "a", "held_out") == [text for text in texts if is_held_out(text, 0.2)]
    file = open_token_file(tmp_path / "a")
    assert file.split.num_bytes == sum(len(text.encode()) for text in texts_of(tmp_path / "a"))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("options", [{}, {"train_bpe": TrainBPEConfig(vocab_size=300)}], ids=["byte", "bpe"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, jsonl: Path, options: dict[str, object]) -> None:
    one, two, three = (files_of(run(jsonl, tmp_path / f"{n}", workers=n, **options)) for n in (1, 2, 3))
    assert one == two == three
    assert len(texts_of(tmp_path / "1") + texts_of(tmp_path / "1", "held_out")) == 100


def test_wide_vocabularies_take_four_bytes(tmp_path: Path, jsonl: Path) -> None:
    file = open_token_file(run(jsonl, tmp_path / "d", vocab_size=129280), vocab_size=129280)
    assert file.tokens.dtype == np.uint32
    assert file.tokenizer.decode(file.tokens[:3]) == some_texts(1)[0][:3]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("ab\n", max_size=30), max_size=30),
    unit_bytes=st.integers(1, 100),
    separator=st.sampled_from(["|", "<|sep|>"]),
)
def test_units_cut_between_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit_bytes: int, separator: str
) -> None:
    file = tmp_path_factory.mktemp("units") / "t.txt"
    file.write_text(separator.join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", unit_bytes)
        units = plan_units([str(file)], "auto", "text", separator)
    pieces = [piece for unit in units for piece in unit]
    assert sum(piece.num_bytes for piece in pieces) == file.stat().st_size
    assert [d for piece in pieces for d in read_documents(piece, "text", separator) or ()] == [t for t in texts if t]


def test_a_separator_across_two_reads_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 10)
    first = "a" * (10 + (1 << 20) - 2)
    (tmp_path / "t.txt").write_text(first + "<sep>" + "b" * 20)
    units = plan_units([str(tmp_path / "t.txt")], "auto", "text", "<sep>")
    assert [unit[0].stop for unit in units] == [len(first) + 5, len(first) + 25]


def test_held_out_share_and_duplicates() -> None:
    texts = some_texts(5000)
    held = {text for text in texts if is_held_out(text, 0.1)}
    assert 0.08 < len(held) / len(texts) < 0.12
    assert held < {text for text in texts if is_held_out(text, 0.2)}  # a larger share keeps the smaller one's
    assert not any(is_held_out(text, 0) for text in texts)


@pytest.mark.usefixtures("small_units")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = files_of(run(jsonl, tmp_path / "unbroken"))
    make_shard = prepare_module.make_shard
    made: list[str] = []

    def killed_at_the_third(unit, shard, *rest):  # type: ignore[no-untyped-def]
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(shard.name)
        return make_shard(unit, shard, *rest)

    monkeypatch.setattr(prepare_module, "make_shard", killed_at_the_third)
    child = fork.Process(target=run, args=(jsonl, tmp_path / "d"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    partial = tmp_path / "d.partial"
    assert sorted(file.name for file in (partial / "shards").iterdir()) == [f"{i:06d}.npz" for i in range(3)]
    assert not (tmp_path / "d").exists()

    def counted(unit, shard, *rest):  # type: ignore[no-untyped-def]
        made.append(shard.name)
        return make_shard(unit, shard, *rest)

    monkeypatch.setattr(prepare_module, "make_shard", counted)
    assert files_of(run(jsonl, tmp_path / "d")) == expected
    num_units = len(plan_units([str(jsonl)], "auto", "text", ""))
    assert made == [f"{i:06d}.npz" for i in range(3, num_units)]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("change", ["option", "source"])
def test_shards_of_another_recipe_are_not_used(tmp_path: Path, jsonl: Path, change: str) -> None:
    (tmp_path / "d.partial" / "shards").mkdir(parents=True)
    config = PrepareConfig(source=str(jsonl), out=str(tmp_path / "d"), held_out=0.5 if change == "option" else 0.01)
    recipe = prepare_module._recipe(config, [str(jsonl)], prepare_module.load_tokenizer("byte"))
    (tmp_path / "d.partial" / "recipe.json").write_text(recipe)
    (tmp_path / "d.partial" / "shards" / "000000.npz").write_text("no shard")
    if change == "source":
        jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
    expected = files_of(run(jsonl, tmp_path / "fresh"))
    assert files_of(run(jsonl, tmp_path / "d")) == expected


@pytest.mark.usefixtures("small_units")
def test_workers_leave_with_a_killed_parent(tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(unit, shard, *rest):  # type: ignore[no-untyped-def]
        (tmp_path / f"pid{os.getpid()}").touch()
        time.sleep(60)

    monkeypatch.setattr(prepare_module, "make_shard", sleep)
    child = fork.Process(target=run, args=(jsonl, tmp_path / "d"), kwargs={"workers": 2})
    child.start()
    wait_until(lambda: len(list(tmp_path.glob("pid*"))) == 2)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    pids = [int(file.name[3:]) for file in tmp_path.glob("pid*")]
    wait_until(lambda: not any(alive(pid) for pid in pids))


def wait_until(done: Callable[[], bool]) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 30 s")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and whom nobody has asked about yet does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.usefixtures("small_units")
def test_a_worker_that_dies_is_told_and_its_siblings_work_stays(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shard = prepare_module.make_shard

    def dies(unit, shard, *rest):  # type: ignore[no-untyped-def]
        if shard.name == "000002.npz":
            os._exit(1)
        return make_shard(unit, shard, *rest)

    monkeypatch.setattr(prepare_module, "make_shard", dies)
    with pytest.raises(DataError, match=r"a worker process died.*goes on from the finished shards"):
        run(jsonl, tmp_path / "d", workers=2)
    assert (tmp_path / "d.partial" / "shards" / "000000.npz").exists()
    monkeypatch.setattr(prepare_module, "make_shard", make_shard)
    assert files_of(run(jsonl, tmp_path / "d")) == files_of(run(jsonl, tmp_path / "unbroken"))


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing further than this fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(("where", "num_bytes"), [("recipe", 100), ("shard", 1500), ("join", 8000)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, jsonl: Path, where: str, num_bytes: int, workers: int
) -> None:
    before = set(tmp_path.iterdir())
    with largest_file(num_bytes), pytest.raises(DataError, match=r"make room for the tokens twice over") as caught:
        run(jsonl, tmp_path / "d", workers=workers)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_no_space_left_is_said_so(tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=r"out=.*/d: No space left on device; nothing is kept"):
        run(jsonl, tmp_path / "d")
    assert list(tmp_path.iterdir()) == [jsonl]


def test_two_runs_do_not_share_a_folder(tmp_path: Path, jsonl: Path) -> None:
    ready, done = fork.Event(), fork.Event()

    def hold() -> None:
        with prepare_module._locked(tmp_path / "d.partial"):
            ready.set()
            done.wait(30)

    child = fork.Process(target=hold)
    child.start()
    assert ready.wait(30)
    with pytest.raises(DataError, match=r"another process is writing .*d.partial"):
        run(jsonl, tmp_path / "d")
    done.set()
    child.join()
    run(jsonl, tmp_path / "d")


def test_files_that_are_not_text_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("text")
    (tmp_path / "s" / "b.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "s" / "empty.txt").write_text("")
    prepare(PrepareConfig(source=str(tmp_path / "s"), out=str(tmp_path / "d"), held_out=0, workers=1))
    assert texts_of(tmp_path / "d") == ["text"]
    assert "left out 1 of 3 files, not UTF-8 text" in capsys.readouterr().err


def test_standard_input(tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl.read_bytes())))
    assert files_of(run("-", tmp_path / "a", format="jsonl")) == files_of(run(jsonl, tmp_path / "b"))


def test_blank_lines_can_separate(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\nstill one\n\ntwo\n\nthree")
    run(tmp_path / "t.txt", tmp_path / "d", separator="\\n\\n", held_out=0)
    assert texts_of(tmp_path / "d") == ["one\nstill one", "two", "three"]


def test_exclude_and_odd_names(tmp_path: Path) -> None:
    for name in ("a[1].txt", "tests/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert find_sources(str(tmp_path / "a[1].txt"), []) == [str(tmp_path / "a[1].txt")]
    found = find_sources(str(tmp_path), ["*/tests/*"])
    assert [Path(path).name for path in found] == ["a[1].txt", "c.txt"]


def test_default_is_the_standard_library_without_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("os.py", "json/decoder.py", "site-packages/numpy/core.py", "json/data.txt"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"# {name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    prepare_default(tmp_path / "d", held_out=0, quiet=True)
    assert texts_of(tmp_path / "d") == ["# json/decoder.py", "# os.py"]
    before = files_of(tmp_path / "d")
    prepare_default(tmp_path / "d", held_out=0, quiet=True)  # already there
    assert files_of(tmp_path / "d") == before
    (tmp_path / "d" / "header.json").write_text("")
    with pytest.raises(DataError, match="empty or damaged"):
        prepare_default(tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", r"holds no text to train on"),
        ("a.txt", b"\xff", r"no text to train on \(0 documents held out, 1 file not UTF-8\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 1}\n', r"a.jsonl line 3 is not .* string under 'text'; .*text_key="),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl line 2 is not a JSON object"),
        ("a.jsonl", b'["text"]', r"a.jsonl line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}', r"a.jsonl line 1 is not a JSON object"),
        ("a.parquet", b"PAR1", r"a.parquet is not a readable Parquet file"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_wrong_sources_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, says: str, workers: int) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        run(tmp_path / name, tmp_path / "d", workers=workers)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_wrong_parquet_columns(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"content": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' but content, n; name one with text_key="):
        run(tmp_path / "a.parquet", tmp_path / "d")
    with pytest.raises(DataError, match=r"column 'n' holds int64, not strings"):
        run(tmp_path / "a.parquet", tmp_path / "d", text_key="n")
    run(tmp_path / "a.parquet", tmp_path / "d", text_key="content", held_out=0)


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    run(tmp_path / "a.jsonl", tmp_path / "d", held_out=0)
    assert texts_of(tmp_path / "d") == ["a?b"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": ""}, r"source= is missing"),
        ({"out": ""}, r"out= is missing"),
        ({"format": "csv"}, r"format=csv .* auto text jsonl parquet"),
        ({"held_out": 1.0}, r"held_out=1.0 must be"),
        ({"workers": -1}, r"workers=-1 must be"),
        ({"tokenizer": "t.json", "train_bpe": TrainBPEConfig(300)}, r"tokenizer=t.json and train_bpe"),
    ],
)
def test_config_refuses(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PrepareConfig(**{"source": "a", "out": "b", **options})  # type: ignore[arg-type]


def test_what_stands_in_the_way_is_named(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(DataError, match=r"matches no file; "):
        run(tmp_path / "*.rst", tmp_path / "d")
    with pytest.raises(DataError, match=r"vocab_size=300 is smaller than the tokenizer's 320"):
        run(jsonl, tmp_path / "d", vocab_size=300)
    with pytest.raises(ValueError, match=r"cannot read the tokenizer"):
        run(jsonl, tmp_path / "d", tokenizer=str(tmp_path / "t.json"))
    assert list(tmp_path.iterdir()) == [jsonl]
    run(jsonl, tmp_path / "d")
    with pytest.raises(DataError, match=r"out=.*/d exists already"):
        run(jsonl, tmp_path / "d")
