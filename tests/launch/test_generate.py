"""The command that continues text; the model's part stands in tests/model/test_generate.py."""

from types import SimpleNamespace

import pytest
import torch

from infra.tokenizer import ByteTokenizer
from launch import generate


@pytest.mark.parametrize(("new", "shown"), [([98, ByteTokenizer.special["eos"]], "ab"), ([98, 99], "abc")])
def test_the_end_of_a_document_is_not_printed(tmp_path, monkeypatch, capsys, new, shown):
    monkeypatch.setattr(generate, "find", lambda folder: folder)
    monkeypatch.setattr(generate, "load", lambda folder, weights: SimpleNamespace(config=ByteTokenizer))
    monkeypatch.setattr(generate, "generate", lambda model, prompt, *args, **kwargs: torch.tensor([[97, *new]]))
    monkeypatch.setattr("sys.argv", ["generate.py", f"checkpoint={tmp_path}", "prompt=a", "tokenizer=byte"])
    generate.main()
    assert capsys.readouterr().out == shown + "\n"
