"""A run in its folder: what it says and leaves when there is nothing, or nothing whole, to go on with."""

import pytest

from infra import incidents
from tests.launch.runs import config, in_folder, run_fit, small_data
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("fit"))


def test_a_run_beyond_its_last_step_says_so_and_does_nothing(data, tmp_path, capfd):
    run_ranks(1, run_fit, in_folder(config(data, steps=2), tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run_ranks(1, run_fit, in_folder(config(data, steps=1), tmp_path))
    assert "is at step 2 already: nothing to do for train.steps=1" in capfd.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over_and_noted(data, tmp_path):
    run_ranks(2, run_fit, in_folder(config(data, steps=4), tmp_path, every=2))
    file = tmp_path / "checkpoints" / "step_4" / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run_ranks(2, run_fit, in_folder(config(data, steps=4), tmp_path, every=2))
    damaged, resumed = incidents.read(tmp_path)
    assert (damaged["kind"], damaged["step"]) == ("damaged_checkpoint", 4)
    assert str(file) in damaged["why"]
    assert (resumed["kind"], resumed["step"], resumed["lost"]) == ("resumed", 2, 2)
