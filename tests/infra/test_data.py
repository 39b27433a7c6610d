"""The loader against a slow twin that builds the whole epoch in Python lists."""

import functools
import itertools
import math
import operator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.data import GROUP, DataConfig, TokenDataset, mix, mix_array, permute, sample_indexes
from infra.token_file import DataError, Header, Split, token_dtype
from infra.tokenizer import ByteTokenizer, identity

SPECIAL = ByteTokenizer.special
EOS = SPECIAL["eos"]


def write_data(path: Path, documents: list[list[int]], split: str = "train") -> Path:
    """Prepared data with these documents (eos is added), written by hand."""
    path.mkdir(parents=True)
    tokenizer = ByteTokenizer()
    dtype = token_dtype(tokenizer.vocab_size)
    ended = [[*document, EOS] for document in documents]
    num_tokens = sum(map(len, ended))
    header = Header(dtype=dtype, vocab_size=tokenizer.vocab_size, tokenizer=identity(tokenizer))
    setattr(header, split, Split(num_tokens, len(ended), num_tokens - len(ended)))
    for name in ("train", "held_out"):
        kept = ended if name == split else []
        np.array(functools.reduce(operator.iadd, kept, []), dtype).tofile(path / f"{name}.tokens")
        np.cumsum([len(d) for d in kept]).astype("<i8").tofile(path / f"{name}.documents")
    (path / "tokenizer.json").write_text(tokenizer.to_json())
    (path / "header.json").write_text(header.to_json())
    return path


def some_documents(num: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(1, longest)).tolist() for _ in range(num)]


def slow_epoch(documents: list[list[int]], seed: int, epoch: int, fim_rate: float) -> tuple[list[int], list[int]]:
    """The packed stream of one epoch and the document under each of its tokens, from the definition."""
    key = mix(seed, epoch)
    stream: list[int] = []
    owner: list[int] = []
    for first in range(0, len(documents), GROUP):
        group = range(first, min(first + GROUP, len(documents)))
        num_fim = math.floor(fim_rate * group.stop) - math.floor(fim_rate * group.start)
        fim = sorted(group, key=lambda d: mix((d + mix(key, 2)) % 2**64))[:num_fim]
        for d in sorted(group, key=lambda d: mix((d + mix(key, 1)) % 2**64)):
            text = documents[d]
            if d in fim:
                low, high = sorted(mix(key, n, d) % (len(text) + 1) for n in (3, 4))
                begin, hole, end = (SPECIAL[name] for name in ("fim_begin", "fim_hole", "fim_end"))
                text = [begin, *text[:low], hole, *text[high:], end, *text[low:high]]
            stream += [*text, EOS]
            owner += [d] * (len(text) + 1)
    return stream, owner


@pytest.mark.parametrize("fim_rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("num_documents", "sequence_length"), [(1, 3), (40, 16), (GROUP, 64), (3 * GROUP + 7, 256)])
def test_samples_are_the_windows_of_the_slow_epoch(
    tmp_path: Path, num_documents: int, sequence_length: int, fim_rate: float
) -> None:
    documents = [[1] * 9, *some_documents(num_documents)][:num_documents]
    data = TokenDataset(write_data(tmp_path / "d", documents), seed=5, fim_rate=fim_rate)
    num_samples = data.samples_per_epoch(sequence_length)
    for epoch in range(2):
        stream, owner = slow_epoch(documents, 5, epoch, fim_rate)
        assert len(stream) == data.tokens_per_epoch
        assert num_samples == (len(stream) - 1) // sequence_length
        starts = set()
        for window in range(num_samples):
            start = permute(window, num_samples, mix(5, epoch)) * sequence_length
            starts.add(start)
            index = epoch * num_samples + window
            expected = stream[start : start + sequence_length + 1]
            assert data.sample(index, sequence_length).tolist() == expected
            owners = owner[start : start + sequence_length + 1]
            changes = np.cumsum([0] + [a != b for a, b in itertools.pairwise(owners)])
            assert data.document_ids(index, sequence_length).tolist() == changes.tolist()
        assert starts == {n * sequence_length for n in range(num_samples)}


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=400), fim_rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_documents_any_rate(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], fim_rate: float, seed: int
) -> None:
    documents = [[(7 * i + j) % 256 for j in range(n)] for i, n in enumerate(lengths)]
    data = TokenDataset(write_data(tmp_path_factory.mktemp("d") / "d", documents), seed=seed, fim_rate=fim_rate)
    stream, _ = slow_epoch(documents, seed, 0, fim_rate)
    windows = [data.sample(i, 1).tolist() for i in range(data.samples_per_epoch(1))]
    assert sorted(windows) == sorted([a, b] for a, b in itertools.pairwise(stream))


def test_every_document_keeps_its_tokens_under_fim(tmp_path: Path) -> None:
    documents = [list(document) for document in {tuple(d) for d in some_documents(300, 40)}]
    data = TokenDataset(write_data(tmp_path / "d", documents), fim_rate=0.1)
    num = data.samples_per_epoch(1)
    in_order = np.argsort([permute(i, num, mix(0, 0)) for i in range(num)])
    stream = [int(data.sample(in_order[0], 1)[0]), *(int(data.sample(i, 1)[1]) for i in in_order)]
    found, fims = [], 0
    while stream:
        end = stream.index(EOS)
        document, stream = stream[:end], stream[end + 1 :]
        if document and document[0] == SPECIAL["fim_begin"]:
            fims += 1
            hole, middle = document.index(SPECIAL["fim_hole"]), document.index(SPECIAL["fim_end"])
            document = document[1:hole] + document[middle + 1 :] + document[hole + 1 : middle]
        found.append(document)
    assert sorted(found) == sorted(documents)
    assert fims == len(documents) // 10


def test_epochs_and_seeds_differ_and_a_second_reader_agrees(tmp_path: Path) -> None:
    path = write_data(tmp_path / "d", some_documents(300))
    data = TokenDataset(path, seed=1, fim_rate=0.1)
    num = data.samples_per_epoch(32)
    first = [data.sample(i, 32).tolist() for i in range(2 * num)]
    assert first[:num] != first[num:]
    assert first != [TokenDataset(path, seed=2, fim_rate=0.1).sample(i, 32).tolist() for i in range(2 * num)]
    again = TokenDataset(path, seed=1, fim_rate=0.1)
    resumed = [again.sample(i, 32).tolist() for i in reversed(range(2 * num))]
    assert first == resumed[::-1]


def test_golden_sample(tmp_path: Path) -> None:
    """Frozen: a change here makes every resumed run read other tokens than it would have."""
    data = TokenDataset(write_data(tmp_path / "d", [[i] * 5 for i in range(40)]), seed=1234, fim_rate=0.1)
    assert data.sample(1, 12).tolist() == GOLDEN
    assert mix(1, 2, 3) == GOLDEN_MIX
    assert [permute(i, 10, 7) for i in range(10)] == GOLDEN_PERMUTATION


GOLDEN = [6, 6, 6, 6, 6, 257, 259, 12, 12, 260, 12, 12, 261]
GOLDEN_MIX = 0x6AE515C1C0AC7E37
GOLDEN_PERMUTATION = [8, 5, 3, 7, 1, 9, 4, 6, 0, 2]


@pytest.mark.parametrize(
    ("dp_size", "num_microbatches", "microbatch_size"), [(1, 4, 6), (2, 4, 3), (4, 2, 3), (8, 3, 1)]
)
def test_a_step_covers_the_same_samples_under_every_layout(
    dp_size: int, num_microbatches: int, microbatch_size: int
) -> None:
    parts = [sample_indexes(100, num_microbatches, microbatch_size, r, dp_size) for r in range(dp_size)]
    assert all(part.shape == (num_microbatches, microbatch_size) for part in parts)
    assert np.stack(parts, 1).reshape(-1).tolist() == list(range(100, 124))


def test_batch_is_int64_and_stacks_samples(tmp_path: Path) -> None:
    import torch

    data = TokenDataset(write_data(tmp_path / "d", some_documents(50)))
    indexes = sample_indexes(3, 2, 3, 1, 2)
    batch = data.batch(indexes, 8)
    assert batch.dtype == torch.int64
    assert batch.shape == (2, 3, 9)
    assert batch[1, 2].tolist() == data.sample(int(indexes[1, 2]), 8).tolist()


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permutation_is_one_to_one(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutation_mixes() -> None:
    """Neighbours part: the mean jump of a random permutation of n is n / 3, and few points stay."""
    n = 10_000
    where = np.array([permute(i, n, 42) for i in range(n)])
    assert abs(np.abs(np.diff(where)).mean() / (n / 3) - 1) < 0.05
    assert (where == np.arange(n)).sum() < 10


def test_mix_array_is_mix() -> None:
    values, key = np.arange(100), 2**64 - 50
    assert mix_array(values, key).tolist() == [mix((int(v) + key) % 2**64) for v in values]


def test_too_little_data_for_one_sample(tmp_path: Path) -> None:
    data = TokenDataset(write_data(tmp_path / "d", [[1, 2, 3]]))
    with pytest.raises(DataError, match=r"holds 4 tokens.*sequence_length=4 "):
        data.sample(0, 4)
    assert sorted(data.sample(0, 3).tolist()) == sorted([1, 2, 3, EOS])
    empty = TokenDataset(tmp_path / "d", "held_out")
    with pytest.raises(DataError, match=r"held_out.* holds 0 tokens"):
        empty.sample(0, 4)


@pytest.mark.parametrize("wrong", [{"sequence_length": 0}, {"fim_rate": 1.5}, {"held_out": 1.0}])
def test_config_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DataConfig(**wrong)  # type: ignore[arg-type]
