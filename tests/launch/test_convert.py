"""Conversion from the command line's functions: Hugging Face's to a training checkpoint and back."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers

from infra.checkpoint import Checkpoint, newest, save_one_by_one
from infra.data import TokenDataset
from infra.distributed import World
from infra.tokenizer import SPECIAL_TOKENS, ByteTokenizer, load_tokenizer, train_bpe
from launch import convert
from launch.convert import from_hugging_face, to_hugging_face
from launch.generate import find
from launch.trainer import Trainer
from model.hf import HuggingFaceCheckpoint, write_hugging_face
from tests.launch.runs import config, small_data
from tests.model.small import small_model
from tests.ranks import run_ranks


def test_there_and_back_again(tmp_path):
    model = small_model()
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    step = from_hugging_face(tmp_path / "published", tmp_path / "checkpoints")
    ours = Checkpoint(step)
    assert step.name == "step_0"
    key = "model.layers.1.mlp.experts.5.down_proj"
    assert torch.equal(ours.read([f"master/{key}"])[f"master/{key}"], model.blocks[1].mlp.experts.down_proj[5])
    assert "bias/model.layers.1.mlp.gate.e_score_correction_bias" in ours.keys
    assert ours.meta["model"]["hidden_size"] == 32
    to_hugging_face(step, tmp_path / "exported", torch.float64)
    back = HuggingFaceCheckpoint(tmp_path / "exported")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.tensor(name), tensor), name


def _first_step(rank, world_size, config, folder):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer.load(folder)
    return trainer.train_step()[0]["lm_loss"]


def test_training_goes_on_from_what_was_published(tmp_path):
    """Under any layout, and though the published config.json has another initialisation and balance loss."""
    model = small_model(vocab_size=320, aux_loss_alpha=0.001)
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    step = from_hugging_face(tmp_path / "published", tmp_path / "checkpoints")
    data = small_data(tmp_path)
    mine = replace(model.config, initializer_range=0.006, aux_loss_alpha=0.0001, num_key_value_heads=None)
    batch = TokenDataset(data, "train", fim_rate=0.1).batch(range(8), 24)
    expected = model.losses(batch[:, :-1], batch[:, 1:], 8 * 24, 8).lm_loss.item()
    for world, layout in ((1, {}), (2, {"pp": 2, "schedule": "dualpipe"})):
        for loss in run_ranks(world, _first_step, config(data, model=mine, **layout), step):
            assert loss == pytest.approx(expected, rel=1e-9)
    with pytest.raises(AssertionError, match=r"holds another model: its n_group is 4, but model.n_group=2"):
        run_ranks(1, _first_step, config(data, model=replace(mine, n_group=2)), step)


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path, monkeypatch, capsys):
    model = small_model()
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    from_hugging_face(tmp_path / "published", tmp_path / "run" / "checkpoints")
    monkeypatch.setattr("sys.argv", ["convert.py", f"source={tmp_path / 'run'}", f"target={tmp_path / 'exported'}"])
    convert.main()
    assert str(tmp_path / "run/checkpoints/step_0") in capsys.readouterr().out
    assert HuggingFaceCheckpoint(tmp_path / "exported").config.hidden_size == model.config.hidden_size


def test_an_older_import_is_replaced_only_when_asked(tmp_path):
    model = small_model()
    source, root = tmp_path / "published", tmp_path / "run" / "checkpoints"
    write_hugging_face(source, model.config, model.state_dict().items(), torch.float64)
    step = from_hugging_face(source, root)
    before = (step / "index.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="step_0 exists: choose another target, or replace it with overwrite=true"):
        from_hugging_face(source, root)
    assert (step / "index.json").stat().st_mtime_ns == before
    from_hugging_face(source, root, overwrite=True)
    assert (step / "index.json").stat().st_mtime_ns > before


def test_a_kill_while_an_import_is_replaced_hides_none(tmp_path):
    """Between the two renames: reading finds the older import, and another import does not delete it unasked."""
    model = small_model()
    source, run = tmp_path / "published", tmp_path / "run"
    write_hugging_face(source, model.config, model.state_dict().items(), torch.float64)
    step = from_hugging_face(source, run / "checkpoints")
    index = (step / "index.json").stat()
    step.rename(step.with_name(".step_0.replaced"))
    assert find(run) == step
    step.rename(step.with_name(".step_0.replaced"))
    with pytest.raises(ValueError, match="step_0 exists: choose another target, or replace it with overwrite=true"):
        from_hugging_face(source, run / "checkpoints")
    assert (step / "index.json").stat() == index


TEXT = "def f(x):\n    return 'é 中文 😀'"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(iter([TEXT] * 9), 300)], ids=["byte", "bpe"])
def test_the_tokenizer_goes_with_the_weights(tmp_path, tokenizer):
    """Out, where transformers reads it, and in again."""
    model = small_model(vocab_size=320)
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    step = from_hugging_face(tmp_path / "published", tmp_path / "run" / "checkpoints")
    assert not to_hugging_face(step, tmp_path / "without", torch.float64)
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    (tmp_path / "run" / "tokenizer.json").write_text(tokenizer.to_json())
    assert to_hugging_face(step, tmp_path / "exported", torch.float64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    tokens = tokenizer.encode([TEXT])[0].tolist()
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokens
    assert theirs.decode(tokens) == TEXT
    assert theirs.eos_token_id == tokenizer.special["eos"]
    assert HuggingFaceCheckpoint(tmp_path / "exported").config.eos_token_id == tokenizer.special["eos"]
    from_hugging_face(tmp_path / "exported", tmp_path / "again" / "checkpoints")
    again = load_tokenizer(tmp_path / "again" / "tokenizer.json")
    assert (again.encode([TEXT])[0].tolist(), again.special) == (tokens, tokenizer.special)


@pytest.mark.parametrize("other", ["<|endoftext|>", "[OTHER]"])
def test_the_special_tokens_of_an_import_are_those_of_its_config(tmp_path, other):
    """Though the names say otherwise, or nothing; after training here it is the tokenizer that says which they are."""
    known = other == "<|endoftext|>"
    text = train_bpe(iter([TEXT] * 9), 300).to_json()
    for name, theirs in (
        ("bos", "[UNK]"),
        ("eos", other),
        ("pad", "[START]"),
        ("fim_hole", "</s>" if known else "[END]"),
    ):
        text = text.replace(SPECIAL_TOKENS[name][0], theirs)  # tokens 0, 1, 2 and 4
    model = small_model(vocab_size=320, bos_token_id=2, eos_token_id=4)
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    (tmp_path / "published" / "tokenizer.json").write_text(text)
    with nullcontext() if known else pytest.warns(UserWarning, match="is copied, but has no end-of-document token"):
        step = from_hugging_face(tmp_path / "published", tmp_path / "run" / "checkpoints")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == text
    assert _bos_and_eos(step, tmp_path / "exported") == (2, 4)
    ours = Checkpoint(step)
    trained = save_one_by_one(step.parent, 1, ours.read(ours.keys).items(), ours.meta | {"tokens": 24})
    assert _bos_and_eos(trained, tmp_path / "later") == (None, 1 if known else None)


def _bos_and_eos(step, target):
    """What an export says, in both files."""
    to_hugging_face(step, target, torch.float64)
    published, theirs = (
        json.loads((target / "config.json").read_text()),
        transformers.AutoTokenizer.from_pretrained(target),
    )
    assert (theirs.bos_token_id, theirs.eos_token_id) == (published["bos_token_id"], published["eos_token_id"])
    return theirs.bos_token_id, theirs.eos_token_id


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "tokenizer.json cannot be used .it is not a tokenizer of the `tokenizers` library: .*fetch it again"),
        (b"\xff", "tokenizer.json cannot be used .*fetch it again, or remove it to import the weights alone"),
        (ByteTokenizer().to_json().encode(), "it has 320 tokens, more than the model's vocab_size=64.; fetch it again"),
    ],
)
def test_a_tokenizer_that_the_model_cannot_use_is_refused(tmp_path, content, words):
    model = small_model(vocab_size=64)
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    (tmp_path / "published" / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        from_hugging_face(tmp_path / "published", tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run").exists()


def test_an_import_lands_where_training_looks(tmp_path, monkeypatch, capsys):
    """The target is the run folder or its `checkpoints`; the run then starts from it."""
    model = small_model()
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    run_called_so = tmp_path / "checkpoints"
    run_called_so.mkdir()
    (run_called_so / "config.yaml").touch()
    cases = {"a/checkpoints": "a/checkpoints", "b": "b/checkpoints", "checkpoints": "checkpoints/checkpoints"}
    for target, root in cases.items():
        given = tmp_path / target
        monkeypatch.setattr("sys.argv", ["convert.py", f"source={tmp_path / 'published'}", f"target={given}"])
        convert.main()
        told = "" if root == target else f": {given} is taken as the run folder, run.dir={given}"
        assert f"wrote {tmp_path / root}/step_0{told}\n" in capsys.readouterr().out
        assert newest(tmp_path / root) == tmp_path / root / "step_0"
        assert not (given / "step_0").exists() or root == target


def test_an_import_that_no_run_would_take_is_refused(tmp_path):
    model = small_model()
    write_hugging_face(tmp_path / "published", model.config, model.state_dict().items(), torch.float64)
    (tmp_path / "checkpoints" / "step_6").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="step_6 exists, and training would go on from it, not from step_0"):
            from_hugging_face(tmp_path / "published", tmp_path / "checkpoints", overwrite)
    assert not (tmp_path / "checkpoints" / "step_0").exists()


def test_another_shape_is_named(tmp_path):
    model = small_model()
    state = model.state_dict()
    state["model.norm.weight"] = torch.ones(31)
    write_hugging_face(tmp_path / "published", model.config, state.items())
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(31,\).*\(32,\)"):
        from_hugging_face(tmp_path / "published", tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
