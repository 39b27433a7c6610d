"""Loads of experts, read back from what a run wrote."""

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.metrics import Metrics
from launch.expert_load import read_expert_load


def test_the_later_half_of_a_runs_histograms_comes_back(tmp_path: Path) -> None:
    rows = {step: torch.tensor([step, 2 * step, 3, 4]) for step in (1, 2, 3, 4)}
    with Metrics(tmp_path, num_steps=4, log_every=1) as metrics:
        for step, row in rows.items():
            histograms = {"expert_load/layer_1": row, "expert_load/layer_2": torch.tensor([0, 0, 0, 0])}
            metrics.write({"step": step, "loss": 1.0}, histograms | {"routing_bias/layer_1": torch.zeros(4)})
    assert np.array_equal(read_expert_load(tmp_path), [rows[3].tolist(), rows[4].tolist()])


def test_a_run_without_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensorboard does not exist"):
        read_expert_load(tmp_path)
    with Metrics(tmp_path, num_steps=1) as metrics:
        metrics.write({"step": 1, "loss": 1.0}, {})
    with pytest.raises(ValueError, match="holds no histograms expert_load/layer_"):
        read_expert_load(tmp_path)
