"""Calibration: what the file says, that plans take it, and that its bytes are those of a run."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from infra.distributed import World
from infra.live_bytes import LiveBytes
from launch import calibrate, plan
from launch.measure_layers import lane_counted, measure_layer
from launch.trainer import Trainer
from launch.validate import config_of
from parallel.plan.layout import Layout
from parallel.plan.memory import MemoryModel
from parallel.plan.step import StepModel
from tests.launch import runs
from tests.parallel.layouts import tiny
from tests.ranks import run_ranks

SMALL = ("model=debug", "data.sequence_length=64", "train.global_batch_size=8", "train.tokens=1e8", "exact=5")


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """Calibrates one rank in an empty folder, with layers, as fast as can be."""
    monkeypatch.chdir(tmp_path)
    words = ["data.sequence_length=64", "microbatch_sizes=[1]", "seconds=0.0001", "layers=true", "recompute=[none]"]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *words, "out=cluster/here.yaml"])
    try:
        calibrate.main()
    finally:
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    assert "cluster=here" in capsys.readouterr().out
    return yaml.safe_load((tmp_path / "cluster/here.yaml").read_text())


def test_the_file_says_what_was_measured_and_plans_take_it(
    calibrated: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrated["calibrated"]["torch"] == torch.__version__
    assert calibrated["calibrated"]["not_measured"] == ["messages between ranks", "messages between nodes"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    assert calibrated["host_memory_gb"] == pytest.approx(machine, rel=1e-3)
    rates = calibrated["rates"]
    assert all(row[3] > 0 for kind in ("dense", "grouped", "wgrad") for row in rates[kind])
    assert min(rates[name] for name in ("attention_forward", "stream_gbs", "permute_gbs", "update_gbs")) > 0

    cluster = config_of("model=debug", "cluster=here").cluster  # found in ./cluster
    model = config_of("model=debug").model
    one = Layout(1, 1, dispatcher="local", overlap=False, zero_stage=0)
    step = StepModel(model, cluster, 64)
    assert step.measured(one) is not None
    assert step.doubts(one) == []
    assert step.doubts(replace(one, microbatch_size=8)) != []  # 8 times the rows of any product
    assert any("attention" in line for line in StepModel(model, cluster, 1024).doubts(one))
    assert step.simulate(one, 4).total > 0

    monkeypatch.setattr(sys, "argv", ["plan.py", *SMALL, "cluster=here", "cluster.num_ranks=2", "worlds=[2]"])
    monkeypatch.setenv("COLUMNS", "160")
    plan.main()
    printed = capsys.readouterr().out
    assert "note: messages between ranks were not measured" in printed
    assert "the largest unexplained term is" in printed


def held(rank: int, size: int, config: object) -> float:
    trainer = Trainer(config, World(rank, size, torch.device("cpu")))  # type: ignore[arg-type]
    trainer.train_step()
    live = LiveBytes()
    with lane_counted(live), live.counting():
        trainer.train_step()
    return live.peak


@pytest.mark.parametrize(
    ("words", "recompute"),
    [
        ({"pp": 2, "schedule": "zb1p"}, "none"),
        pytest.param({"ep": 2, "schedule": "1f1b", "dispatcher": "two_hop"}, "selective", marks=pytest.mark.slow),
    ],
)
def test_bytes_of_layers_add_up_to_those_of_a_run(tmp_path: Path, words: dict, recompute: str) -> None:
    """The fullest moment of a step, of every rank, within 3 %; what is not measured is further away."""
    model = tiny(4, vocab_size=320, hidden_size=64, intermediate_size=160, moe_intermediate_size=32)
    words = {"dispatcher": "local"} | words
    layout = Layout(2, 2, overlap=False, zero_stage=0, recompute=recompute, precision="fp32", **words)
    config = runs.config(
        runs.small_data(tmp_path), precision="fp32", model=model, recompute=recompute, overlap=False,
        force_balance=True, ranks_per_node=2, **words,
    )  # fmt: skip
    alone = replace(layout, pp=1, world=layout.ep, ranks_per_node=layout.ep)

    def layer(rank: int, size: int) -> dict:
        return measure_layer(model, alone, 24, World(rank, size, torch.device("cpu")), turns=1)

    row = run_ranks(layout.ep, layer)[0]
    cluster = config_of("cluster=laptop", "cluster.num_ranks=2").cluster
    cluster.measured = [row]
    memory = MemoryModel(StepModel(model, cluster, 24, "fp32"), ema=False)
    peaks = run_ranks(2, held, config)
    for rank, peak in enumerate(peaks):
        planned = memory.rank(layout, 8, layout.mesh.coordinates(rank).pp)
        assert planned.activations + planned.workspace == pytest.approx(peak, rel=0.03)
    cluster.measured = []
    guess = MemoryModel(StepModel(model, cluster, 24, "fp32"), ema=False).rank(layout, 8, 0)
    assert guess.activations + guess.workspace != pytest.approx(peaks[0], rel=0.03)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["precision=fp8"], "precision=fp8: expected one of bf16, fp32"),
        (["microbatch_sizes=[]"], "microbatch_sizes=.*one at least"),
        (["out=mine.txt"], "out=mine.txt: a cluster file is named NAME.yaml"),
        (["seconds=0"], "seconds=0.0 must be above 0"),
        (["recompute=[some]"], "recompute=some: expected one of none, selective, full"),
    ],
)
def test_wrong_input_ends_in_one_line(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *words])
    with pytest.raises(SystemExit, match="2"):
        calibrate.main()
    assert re.search(line, capsys.readouterr().err)
