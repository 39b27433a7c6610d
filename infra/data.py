"""Training samples from a memory-mapped token file: packing, fill-in-the-middle, and a position that is one number.

Global sample i has the same tokens under every layout, and needs nothing but (seed, i): a run resumes at sample i by
asking for sample i. How that stays exact *and* cheap:

- An **epoch** is one pass over all documents, packed into one stream without padding. Sample windows are
  `sequence_length` tokens apart and one longer, so every token of the stream is predicted once (the last partial
  window is dropped).
- The windows are visited in an order given by a **keyed permutation** of the window numbers: a Feistel network, a few
  multiplications per sample and no memory.
- Documents stand in **groups of 256** in file order. In each epoch a group shuffles its own documents and turns a
  *fixed number* of them, chosen anew, into fill-in-the-middle form, which is three tokens longer (prefix, suffix,
  middle with three marks around; V3 section 4.1). The number before document d is floor(rate * d), so where each
  group begins in the packed stream is known in closed form, the same in every epoch, and a token is found by two
  binary searches. Nothing is built per epoch, and the index is 8 bytes per 256 documents. The price: documents mix
  within their group, windows mix over the whole epoch.

Packed documents see each other, as published; `document_ids` is there for whoever wants a mask. The cuts of a
fill-in-the-middle document fall between tokens. Shapes: `B` sequences, `L` sequence length. [no torch, except where
tensors leave]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import floor, isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from infra.token_file import DataError, TokenFile, open_token_file, verify_checksums

if TYPE_CHECKING:
    import torch

GROUP = 256  # documents that are shuffled among themselves
FIM_TOKENS = 3  # what fill-in-the-middle adds to a document


@dataclass
class DataConfig:
    """`path` is a folder made by launch/prepare_data.py; empty means the default data set, prepared on first use."""

    path: str = ""
    sequence_length: int = 4096
    fim_rate: float = 0.1  # share of documents in fill-in-the-middle form; held-out data never is
    document_mask: bool = False  # hide packed documents from each other (V3 does not)
    held_out: float = 0.01  # share of documents kept for evaluation when the default data set is prepared
    verify: bool = False  # read every byte at start and compare checksums

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"data.sequence_length={self.sequence_length} must be at least 1")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"data.fim_rate={self.fim_rate} must lie between 0 and 1")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out} must be at least 0 and below 1")


class TokenDataset:
    """Random access to the packed samples of one split of prepared data.

    `vocab_size` is the model's, to be compared with the data's; `verify` reads every byte first. Raises DataError with
    one line (see infra/token_file.py).
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        seed: int = 0,
        fim_rate: float = 0.0,
        vocab_size: int | None = None,
        verify: bool = False,
    ):
        if verify:
            verify_checksums(path)
        self.file: TokenFile = open_token_file(path, split, vocab_size)
        self.split, self.seed, self.fim_rate = split, seed, fim_rate
        self.num_documents = len(self.file.document_ends)
        special = self.file.tokenizer.special
        missing = [name for name in ("fim_begin", "fim_hole", "fim_end") if name not in special]
        if fim_rate > 0 and missing:
            raise DataError(
                f"data {path}: its tokenizer has no {' '.join(missing)} token; set data.fim_rate=0 or add them"
            )
        self._marks = {name: np.array([i], self.file.tokens.dtype) for name, i in special.items()}
        # Where each group of documents begins in the packed stream, and where the last one ends: [num_groups + 1].
        firsts = np.append(np.arange(0, self.num_documents, GROUP), self.num_documents)
        stored = np.where(
            firsts > 0, self.file.document_ends[np.maximum(firsts, 1) - 1] if self.num_documents else 0, 0
        )
        self._group_starts = stored + FIM_TOKENS * np.array([self._num_fim_before(int(d)) for d in firsts])
        self._layout = lru_cache(maxsize=4096)(self._group_layout)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per stored token: nats per token divided by this are nats per byte."""
        return self.file.split.bytes_per_token

    @property
    def tokens_per_epoch(self) -> int:
        """Packed tokens, the marks of fill-in-the-middle included."""
        return int(self._group_starts[-1])

    def samples_per_epoch(self, sequence_length: int) -> int:
        num = (self.tokens_per_epoch - 1) // sequence_length
        if num < 1:
            without = ", or train.eval_samples=0 to do without" if self.split == "held_out" else ""
            raise DataError(
                f"data {self.file.path} ({self.split}) holds {self.tokens_per_epoch} tokens, fewer than one sample of "
                f"data.sequence_length={sequence_length} plus one; use more data or a shorter sequence{without}"
            )
        return num

    def sample(self, index: int, sequence_length: int) -> np.ndarray:
        """Tokens [L + 1] of global sample `index` >= 0, in the file's dtype: input is [:-1], target is [1:]."""
        sample_L1 = np.empty(sequence_length + 1, self.file.tokens.dtype)
        for at, skip, pieces, _ in self._documents(index, sequence_length):
            for piece in pieces:
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                part = piece[skip : skip + len(sample_L1) - at]
                sample_L1[at : at + len(part)] = part
                at, skip = at + len(part), 0
        return sample_L1

    def document_ids(self, index: int, sequence_length: int) -> np.ndarray:
        """For each token of `sample`, which of the sample's documents it belongs to, from 0: int32 [L + 1]."""
        ids_L1 = np.empty(sequence_length + 1, np.int32)
        for at, _, _, ordinal in self._documents(index, sequence_length):
            ids_L1[at:] = ordinal
        return ids_L1

    def batch(self, indexes: np.ndarray | range, sequence_length: int) -> torch.Tensor:
        """Tokens of many samples: int64 tensor of shape [*indexes.shape, L + 1]."""
        import torch

        indexes = np.asarray(indexes)
        tokens = np.empty((indexes.size, sequence_length + 1), np.int64)
        for row, index in zip(tokens, indexes.flat, strict=True):
            row[:] = self.sample(index, sequence_length)
        return torch.from_numpy(tokens.reshape(*indexes.shape, sequence_length + 1))

    def _documents(self, index: int, sequence_length: int) -> Iterator[tuple[int, int, list[np.ndarray], int]]:
        """The documents under one sample: (offset in the sample, tokens of the document before it, its pieces,
        ordinal)."""
        num_windows = self.samples_per_epoch(sequence_length)
        epoch, window = divmod(int(index), num_windows)
        key = mix(self.seed, epoch)
        position = start = permute(window, num_windows, key) * sequence_length
        stop = start + sequence_length + 1
        group = int(self._group_starts.searchsorted(position, "right")) - 1
        ordinal = 0
        while position < stop:
            documents, is_fim, ends = self._layout(key, group)
            first = int(ends.searchsorted(position, "right"))
            for i in range(first, len(documents)):
                begin = int(ends[i - 1]) if i else int(self._group_starts[group])
                yield position - start, position - begin, self._pieces(key, int(documents[i]), bool(is_fim[i])), ordinal
                ordinal += 1
                position = int(ends[i])
                if position >= stop:
                    return
            group += 1

    def _group_layout(self, key: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One group in one epoch: its documents in packed order, which are fill-in-the-middle, where they end in the
        stream."""
        first, last = group * GROUP, min((group + 1) * GROUP, self.num_documents)
        documents = np.arange(first, last)
        order = np.argsort(mix_array(documents, mix(key, 1)), kind="stable")
        num_fim = self._num_fim_before(last) - self._num_fim_before(first)
        is_fim = np.zeros(last - first, bool)
        is_fim[np.argsort(mix_array(documents, mix(key, 2)), kind="stable")[:num_fim]] = True
        before = int(self.file.document_ends[first - 1]) if first else 0
        lengths = np.diff(self.file.document_ends[first:last], prepend=before) + FIM_TOKENS * is_fim
        return documents[order], is_fim[order], self._group_starts[group] + np.cumsum(lengths[order])

    def _num_fim_before(self, document: int) -> int:
        return floor(self.fim_rate * document)

    def _pieces(self, key: int, document: int, is_fim: bool) -> list[np.ndarray]:
        """A document as it is packed: views of the file and marks, in order."""
        first = int(self.file.document_ends[document - 1]) if document else 0
        eos = int(self.file.document_ends[document]) - 1
        tokens, marks = self.file.tokens, self._marks
        if not is_fim:
            return [tokens[first : eos + 1]]
        cuts = (mix(key, 3, document) % (eos - first + 1), mix(key, 4, document) % (eos - first + 1))
        low, high = first + min(cuts), first + max(cuts)
        return [
            *(marks["fim_begin"], tokens[first:low]),
            *(marks["fim_hole"], tokens[high:eos]),
            *(marks["fim_end"], tokens[low:high]),
            tokens[eos : eos + 1],
        ]


def sample_indexes(
    first_sample: int, num_microbatches: int, microbatch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> np.ndarray:
    """Which global samples one data-parallel rank takes of a step that begins at `first_sample`: [num_microbatches, B].

    Microbatch m of all ranks together is one contiguous run of samples, and rank r has the r-th part of it. So the
    step as a whole covers `first_sample .. first_sample + num_microbatches * microbatch_size * dp_size` under every
    layout.
    """
    m = np.arange(num_microbatches)[:, None]
    return first_sample + (m * dp_size + dp_rank) * microbatch_size + np.arange(microbatch_size)[None, :]


_MASK = (1 << 64) - 1
_GOLDEN, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*values: int) -> int:
    """A 64-bit hash of whole numbers (splitmix64's finaliser, folded), the same on every machine and in every
    version."""
    x = 0
    for value in values:
        x = (x + value + _GOLDEN) & _MASK
        x = ((x ^ (x >> 30)) * _MUL1) & _MASK
        x = ((x ^ (x >> 27)) * _MUL2) & _MASK
        x ^= x >> 31
    return x


def mix_array(values: np.ndarray, key: int) -> np.ndarray:
    """`mix(value + key)` for many values at once: uint64, same shape."""
    x = values.astype(np.uint64) + np.uint64(key)  # wraps around, as it should
    x += np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MUL1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MUL2)
    return x ^ (x >> np.uint64(31))


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes in a pseudo-random permutation of range(size): a Feistel network over two digits.

    The digits have bases a and b with a * b barely above `size`; results that fall outside are sent through again,
    which keeps the map one-to-one.
    """
    a = isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    while True:
        high, low = divmod(index, b)
        for round in range(4):
            high = (high + mix(key + 2 * round * _GOLDEN + low)) % a
            low = (low + mix(key + (2 * round + 1) * _GOLDEN + high)) % b
        index = high * b + low
        if index < size:
            return index
