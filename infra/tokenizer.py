"""Text to tokens and back: bytes by default, or a `tokenizers` JSON file, or a byte-pair encoding trained on the spot.

Both kinds share four verbs (`encode`, `decode`, `to_json`, `to_tokenizers_json`) and a table of special tokens. Every
document ends with `eos`; the three `fim_*` tokens mark the parts of a fill-in-the-middle document. Text is always
encoded as text: a document that *spells* `<|eos_token|>` does not get the special token. `identity` is a hash of the
tokenizer's JSON, so two data sets with one identity agree on what every token means. [no torch]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

# What each special token is called: our own name first, then the names other published tokenizers use.
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "bos": ("<|bos_token|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>"),
    "eos": ("<|eos_token|>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>"),
    "pad": ("<|pad_token|>", "<｜▁pad▁｜>", "<pad>"),
    "fim_begin": ("<|fim_begin|>", "<｜fim▁begin｜>", "<|fim_prefix|>", "<fim_prefix>"),
    "fim_hole": ("<|fim_hole|>", "<｜fim▁hole｜>", "<|fim_suffix|>", "<fim_suffix>"),
    "fim_end": ("<|fim_end|>", "<｜fim▁end｜>", "<|fim_middle|>", "<fim_middle>"),
}


class Tokenizer(Protocol):
    vocab_size: int  # rows the model's embedding needs
    special: dict[str, int]  # a subset of SPECIAL_TOKENS' keys, from `load_tokenizer` always with "eos"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...
    def to_json(self) -> str: ...
    def to_tokenizers_json(self) -> str: ...  # the same tokens, in the format of the `tokenizers` library


class ByteTokenizer:
    """One token per UTF-8 byte (ids 0 to 255), then the special tokens (256 to 261); 320 rows are a multiple of 64."""

    vocab_size = 320
    special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}  # noqa: RUF012

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        names = {i: SPECIAL_TOKENS[name][0].encode() for name, i in self.special.items()}
        parts = (bytes([t]) if t < 256 else names.get(t, b"") for t in map(int, tokens))
        return b"".join(parts).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "byte", "vocab_size": self.vocab_size, "special": self.special})

    def to_tokenizers_json(self) -> str:
        """A byte-pair encoding that merges nothing."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        # A printable byte is written as itself, the others, in order, as the letters from U+0100 on.
        alphabet = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
        others = (letter for letter in alphabet if letter > 255)
        vocab = {chr(byte if byte in alphabet else next(others)): byte for byte in range(256)}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([SPECIAL_TOKENS[name][0] for name in self.special])
        return tokenizer.to_str()


class JsonTokenizer:
    """A tokenizer in the JSON format of the `tokenizers` library. Raises ValueError if it is none."""

    def __init__(self, text: str, source: str = "the tokenizer"):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{source} is not a tokenizer of the `tokenizers` library: {error}") from None
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._text = text
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        found = {name: [vocab[s] for s in spellings if s in vocab] for name, spellings in SPECIAL_TOKENS.items()}
        self.special = {name: ids[0] for name, ids in found.items() if ids}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)

    def to_json(self) -> str:
        return self._text

    to_tokenizers_json = to_json


def identity(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def check_fits(tokenizer: Tokenizer, vocab_size: int, source: str) -> None:
    """Raises ValueError where a model of `vocab_size` has no row for some token."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{source} has {tokenizer.vocab_size} tokens, more than the model's vocab_size={vocab_size}")


def added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens that text never makes, the special ones: how each is spelt."""
    return {token["id"]: token["content"] for token in json.loads(tokenizer.to_tokenizers_json())["added_tokens"]}


def published_files(tokenizer: Tokenizer, special: Mapping[str, int]) -> dict[str, str]:
    """The files, by name, from which `transformers` makes this tokenizer (AutoTokenizer.from_pretrained).

    special: the tokens that are called bos, eos and pad.
    """
    text, added = tokenizer.to_tokenizers_json(), added_tokens(tokenizer)
    names = {f"{name}_token": added.get(special.get(name, -1)) for name in ("bos", "eos", "pad")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """`byte`, or the path of a JSON file. Raises ValueError with one line if the file is missing, is no tokenizer or
    has no end-of-document token."""
    if str(name_or_path) == "byte":
        return ByteTokenizer()
    path = Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read the tokenizer {path} ({error}); give tokenizer=byte or a `tokenizers` JSON file"
        ) from None
    tokenizer = tokenizer_from_json(text, str(path))
    if "eos" not in tokenizer.special:
        raise ValueError(f"{path} has no end-of-document token; add one of {' '.join(SPECIAL_TOKENS['eos'])}")
    return tokenizer


def tokenizer_from_json(text: str, source: str = "the tokenizer") -> Tokenizer:
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    return JsonTokenizer(text, source)


def train_bpe(texts: Iterator[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level byte-pair encoding of `vocab_size` tokens, special tokens included, learnt from `texts`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = [spellings[0] for spellings in SPECIAL_TOKENS.values()]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(
            f"train_bpe.vocab_size={vocab_size} is too small; 256 bytes and special tokens need {smallest}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Digits alone, as published; then the usual split at words, which keeps punctuation and letters apart.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer.to_str())
