"""Wrong input: one line, with the place and what would be right. A bug: its trace."""

import json
import os
import warnings

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from conf.schema import RunConfig
from launch.errors import explain, one_line_errors
from launch.generate import GenerateConfig

ConfigStore.instance().store(
    "errors_test", OmegaConf.structured({"parallel": {"schedule": "1f1b", "pp": 8}}, flags={"struct": True})
)


def refusal(*overrides: str) -> str:
    with initialize_config_module("conf", version_base="1.3"), pytest.raises(Exception) as caught:  # noqa: PT011
        compose("errors_test", overrides=list(overrides))
    line = explain(caught.value)
    assert line is not None
    assert "\n" not in line
    return line


def test_a_misspelt_option_is_named_with_the_nearest_one() -> None:
    assert refusal("parallel.scheduel=zb1p") == "parallel.scheduel: no such option; did you mean parallel.schedule?"


def test_an_unknown_option_lists_what_there_is() -> None:
    assert refusal("parallel.zzz=1") == "parallel.zzz: no such option; there are pp, schedule"


def test_an_unknown_choice_of_a_group_lists_what_there_is() -> None:
    assert refusal("+precision=fp4") == "precision=fp4: expected one of bf16, fp32, fp64, fp8"


def test_a_missing_option_is_named() -> None:
    with pytest.raises(MissingMandatoryValue) as caught:
        OmegaConf.to_object(OmegaConf.structured(GenerateConfig))
    assert explain(caught.value) == "checkpoint= is missing: --help says what it takes"


def test_a_line_that_does_not_parse_is_shown() -> None:
    assert refusal("parallel.pp=[").startswith("parallel.pp=[: not of the form option=value")


def test_an_error_of_our_own_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from parallel.pipeline.actions import Action

    with pytest.raises(SystemExit) as stop, one_line_errors():
        Action.parse("2X0")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: '2X0' is not an action")
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_bug_keeps_its_trace() -> None:
    for bug in (lambda: {}["missing"], lambda: json.loads("{"), lambda: [].index(3)):
        with pytest.raises((KeyError, ValueError)), one_line_errors():
            bug()


def test_a_bug_in_our_own_lines_keeps_its_trace() -> None:
    """What a C function raises from a line of ours is not a complaint of ours."""
    from infra.token_file import token_dtype
    from model.generate import generate

    with pytest.raises(TypeError), one_line_errors():
        token_dtype("many")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unpack"), one_line_errors():
        generate(None, torch.zeros(1), 1)  # type: ignore[arg-type]


def test_a_lost_rank_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    gloo = "[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:62182. This is typically ..."
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise RuntimeError(gloo)
    assert stop.value.code == 1  # nothing is wrong with the input
    assert capsys.readouterr().err.startswith("world rank 0 ends: another rank has ended (Connection closed by peer): ")
    with pytest.raises(RuntimeError, match="shape"), one_line_errors():
        raise RuntimeError("shape mismatch")


def test_the_trace_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.pipeline.actions import Action

    monkeypatch.setattr("launch.errors.TRACES", True)
    with pytest.raises(ValueError, match="not an action"), one_line_errors():
        Action.parse("2X0")


def test_only_the_first_line_of_a_long_message_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from parallel.pipeline.passes import from_csv

    with pytest.raises(SystemExit) as stop, one_line_errors():
        from_csv("0B0,0F0\n", name="mine.csv")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: mine.csv: rank 0, slot 0: 0B0 needs 0F0, which runs only in slot 1\n"


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors(), open("no/such/file"):
        pass
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no/such/file: No such file or directory\n"


def test_a_warning_is_one_line_without_its_place() -> None:
    before = warnings.formatwarning
    shown = (UserWarning("passing over\nstep_3"), UserWarning, "infra/checkpoint.py", 143)
    with one_line_errors(), one_line_errors():
        assert warnings.formatwarning(*shown) == "warning: passing over step_3\n"
    assert warnings.formatwarning is before
    assert "infra/checkpoint.py:143" in warnings.formatwarning(*shown)


def test_a_warning_keeps_its_place_where_traces_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.errors.TRACES", True)
    with one_line_errors():
        assert "mine.py:7: UserWarning" in warnings.formatwarning(UserWarning("x"), UserWarning, "mine.py", 7)


def test_an_empty_run_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Path("") is the folder that one stands in."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        RunConfig(dir="")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: run.dir= is empty: name a folder, such as runs/first\n"


def test_it_can_be_nested() -> None:
    from parallel.pipeline.actions import Action

    with pytest.raises(SystemExit), one_line_errors(), one_line_errors():
        Action.parse("2X0")
