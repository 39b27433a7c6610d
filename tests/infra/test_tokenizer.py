"""Both tokenizers give text back, keep special tokens out of text, and say who they are."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.prepare import TrainBPEConfig
from infra.tokenizer import SPECIAL_TOKENS, ByteTokenizer, JsonTokenizer, identity, load_tokenizer, train_bpe

CORPUS = ["the cat sat on the mat, the cat sat", "def f(x):\n    return x + 12345\n", "été 中文 😀"] * 3
BPE = train_bpe(iter(CORPUS), 300)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
class TestBoth:
    @given(text=st.text())
    def test_round_trip(self, tokenizer: ByteTokenizer | JsonTokenizer, text: str) -> None:
        (tokens,) = tokenizer.encode([text])
        assert tokenizer.decode(tokens) == text
        assert not set(tokens.tolist()) & set(tokenizer.special.values())

    def test_spelt_special_tokens_stay_text(self, tokenizer: ByteTokenizer | JsonTokenizer) -> None:
        text = "".join(names[0] for names in SPECIAL_TOKENS.values())
        (tokens,) = tokenizer.encode([text])
        assert not set(tokens.tolist()) & set(tokenizer.special.values())
        assert tokenizer.decode(tokens) == text

    def test_special_tokens_are_shown_by_name(self, tokenizer: ByteTokenizer | JsonTokenizer) -> None:
        assert set(tokenizer.special) == set(SPECIAL_TOKENS)
        (tokens,) = tokenizer.encode(["a"])
        assert tokenizer.decode([*tokens, tokenizer.special["eos"]]) == "a<|eos_token|>"

    @given(text=st.text())
    def test_what_others_read_makes_the_same_tokens(self, tokenizer: ByteTokenizer | JsonTokenizer, text: str) -> None:
        theirs = JsonTokenizer(tokenizer.to_tokenizers_json())
        assert np.array_equal(theirs.encode([text])[0], tokenizer.encode([text])[0])
        assert theirs.special == tokenizer.special

    def test_json_round_trip(self, tokenizer: ByteTokenizer | JsonTokenizer, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text(tokenizer.to_json(), encoding="utf-8")
        again = load_tokenizer(tmp_path / "t.json")
        assert type(again) is type(tokenizer)
        assert identity(again) == identity(tokenizer)
        assert np.array_equal(again.encode(CORPUS)[1], tokenizer.encode(CORPUS)[1])


def test_bytes_are_their_own_tokens() -> None:
    assert ByteTokenizer().encode(["aé"])[0].tolist() == [97, 0xC3, 0xA9]


def test_trained_bpe_has_the_size_asked_for_and_is_always_the_same() -> None:
    assert BPE.vocab_size == 300
    assert identity(BPE) == identity(train_bpe(iter(CORPUS), 300))
    assert identity(BPE) != identity(train_bpe(iter(CORPUS), 280))
    assert len(BPE.encode([CORPUS[0]])[0]) < len(CORPUS[0].encode()) / 2


def test_names_of_other_published_tokenizers_are_known() -> None:
    theirs = json.loads(BPE.to_json())
    renamed = {"<|eos_token|>": "<｜end▁of▁sentence｜>", "<|fim_hole|>": "<｜fim▁hole｜>"}
    for token in theirs["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    theirs["model"]["vocab"] = {renamed.get(token, token): i for token, i in theirs["model"]["vocab"].items()}
    assert JsonTokenizer(json.dumps(theirs)).special == BPE.special


def test_wrong_tokenizers_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*nowhere.json .* give tokenizer=byte or"):
        load_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "t.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"t.json is not a tokenizer"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"vocab_size=261 is too small; .* need 262"):
        train_bpe(iter(CORPUS), 261)
    bare = json.loads(BPE.to_json())
    bare["added_tokens"] = []
    bare["model"]["vocab"] = {t: i for t, i in bare["model"]["vocab"].items() if not t.startswith("<|")}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match=r"bare.json has no end-of-document token; add one of <\|eos_token\|>"):
        load_tokenizer(tmp_path / "bare.json")


def test_absurd_vocabularies_are_refused_before_anything_is_read() -> None:
    for size in (-1, 10**9):
        with pytest.raises(ValueError, match=r"vocab_size=.* must be between 0 .none. and 10,000,000"):
            TrainBPEConfig(vocab_size=size)
    with pytest.raises(ValueError, match="max_bytes=0 must be at least 1"):
        TrainBPEConfig(vocab_size=500, max_bytes=0)
