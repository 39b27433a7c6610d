"""A rank that stops in the middle of a step: all others say where they stand in their program, and exit."""

import multiprocessing as mp
import os
import re
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from infra import incidents
from infra.metrics import read_records
from infra.watchdog import EXIT_CODE, HangConfig
from tests.launch.runs import config, in_folder, run_fit, small_data

RANKS, STOPPED = 4, 2


def _stop_in_a_forward(trainer) -> None:
    """The rank stops itself in the middle of its fourth step: nobody can end that step without it."""
    stage = next(iter(trainer.replica.stages.values()))
    forward = stage.forward

    def forward_or_stop(mb, x):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return (yield from forward(mb, x))

    stage.forward = forward_or_stop


def _rank(rank: int, settings, folder) -> None:
    torch.set_num_threads(1)
    sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
    timeout = timedelta(seconds=600)  # no timeout helps them
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=store, timeout=timeout)
    run_fit(rank, RANKS, settings, _stop_in_a_forward if rank == STOPPED else None)


def test_a_rank_that_stops_is_noticed_and_everybody_says_where_it_stands(tmp_path):
    settings = config(small_data(tmp_path), steps=10, pp=2, ep=2, schedule="dualpipe", dispatcher="all_to_all")
    settings = replace(in_folder(settings, tmp_path / "run"), hang=HangConfig(factor=4.0, least=2.0, first=60.0))
    context = mp.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, settings, tmp_path)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    try:
        others = [rank for rank in range(RANKS) if rank != STOPPED]
        deadline = time.monotonic() + 60
        for rank in others:
            ranks[rank].join(max(0.0, deadline - time.monotonic()))
        assert [ranks[rank].exitcode for rank in others] == [EXIT_CODE] * len(others)
        assert ranks[STOPPED].exitcode is None
    finally:
        for process in ranks:
            process.kill()
            process.join()
    usual = set()
    for rank in others:
        said = (tmp_path / f"{rank}.err").read_text()
        usual |= set(re.findall(r"usually takes (\S+) s", said))
        assert f"rank {rank} hangs: no progress for" in said
        assert "in a step, which usually takes" in said
        assert f"dualpipe: rank {rank // 2}, slot" in said
        assert re.search(r"^rank \d .*\[\d[FBI]\d.*\]", said, re.MULTILINE), "the slot is marked in the grid"
        assert "its main thread: " in said
    assert len(usual) == 1, "all ranks have one patience"
    hangs = incidents.read(tmp_path / "run")
    assert sorted(hang["rank"] for hang in hangs) == others
    assert len(read_records(tmp_path / "run")) == 3
