"""Who am I among how many: from the environments that torchrun, srun and plain python leave."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from infra import distributed
from infra.distributed import _environment, _free_port, any_rank, largest
from tests.ranks import run_ranks

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
}


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", *SRUN):
        monkeypatch.delenv(name, raising=False)

    def with_variables(**variables: str) -> dict[str, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return _environment()

    return with_variables


def test_plain_python_is_one_rank(environment):
    assert environment() == {"RANK": "0", "WORLD_SIZE": "1"}


def test_torchrun_has_said_it_all(environment):
    assert environment(RANK="3", WORLD_SIZE="4", **SRUN) == {}


def test_a_task_of_srun(environment):
    found = environment(**SRUN)
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    assert 1024 < int(port) < 65536


def test_a_batch_script_is_one_process_though_its_job_has_tasks(environment):
    alone = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")}
    assert environment(**alone | {"SLURM_PROCID": "0"}) == {"RANK": "0", "WORLD_SIZE": "1"}


def test_several_nodes_must_name_the_first(environment):
    with pytest.raises(ValueError, match="export MASTER_ADDR="):
        environment(**SRUN | {"SLURM_STEP_NUM_NODES": "2"})
    assert environment(MASTER_ADDR="node7", **SRUN | {"SLURM_STEP_NUM_NODES": "2"})["MASTER_ADDR"] == "node7"


def test_two_tasks_of_srun_find_each_other():
    code = "from infra import distributed as d; w = d.start(); print(w.rank, w.size, d.largest(w.rank)); d.stop()"
    base = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    base |= SRUN | {"MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=base | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["0 2 1.0", "1 2 1.0"]


def _agree(rank, world_size):
    return largest(rank / 3), any_rank(rank == 1), any_rank(False)


def test_every_rank_hears_the_largest():
    assert run_ranks(3, _agree) == [(2 / 3, True, False)] * 3
    assert largest(0.25) == 0.25
    assert any_rank(True)


def _attempt(store: dist.Store, label: str, ranks: int = 4) -> list[set[str]]:
    """What each of so many ranks, threads here, finds in its part of the store after all have left a mark there."""

    def start(rank: int) -> set[str]:
        part = distributed._of_this_attempt(store, rank, ranks)
        part.set(f"mark/{rank}", f"{label} {rank}")
        return {part.get(f"mark/{other}").decode() for other in range(ranks)}

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(start, range(ranks)))


def test_every_attempt_has_a_part_of_the_store_for_itself():
    """torchrun hands one store to all attempts; some ranks of an earlier one died between hello and welcome."""
    store = dist.HashStore()
    for label in ("first", "second", "third"):
        assert _attempt(store, label) == [{f"{label} {rank}" for rank in range(4)}] * 4
        store.set("hello/2", "said by a rank that has died")
