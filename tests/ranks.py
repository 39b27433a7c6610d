"""Runs a function on several gloo ranks: forked processes, a file store, no ports.

    def check(rank, world_size):            # runs on every rank, inside an initialised process group
        ...
        return something_picklable

    results = run_ranks(4, check)           # the list of what the ranks returned

The first exception on any rank is raised here with that rank's traceback, and the others are killed.
"""

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # imported once here, or every child imports sympy: 17 s

_FAILED = 86  # the exit code of a rank whose traceback was reported


def _rank_main(rank: int, world_size: int, store: str, results: Any, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            rank=rank,
            world_size=world_size,
            store=dist.FileStore(store, world_size),
            timeout=timedelta(seconds=60),
        )
        out = fn(rank, world_size, *args)
        results.send((True, out))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.send((False, traceback.format_exc()))
        raise SystemExit(_FAILED) from None


def _raise_if_dead(ranks: list) -> None:
    """A rank that died without a traceback is the culprit; the errors of the others are its consequences."""
    for rank, process in enumerate(ranks):
        if process.exitcode not in (None, 0, _FAILED):
            raise AssertionError(f"rank {rank} died with exit code {process.exitcode}")


def run_ranks(world_size: int, fn: Callable, *args: Any, timeout: float = 100.0) -> list[Any]:
    """Returns `[fn(rank, world_size, *args) for rank in range(world_size)]`, each run on its own gloo rank."""
    context = mp.get_context("fork")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the parent's OpenMP pool
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        store = str(Path(folder) / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(target=_rank_main, args=(r, world_size, store, pipes[r][1], fn, args))
            for r in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            outputs: dict[int, Any] = {}
            awaited = {reader: r for r, (reader, _) in enumerate(pipes)}
            deadline = time.monotonic() + timeout
            while awaited:
                # sleeps till something happens: a look every few ms would take time from the ranks it measures
                living = [process.sentinel for process in ranks if process.exitcode is None]
                _raise_if_dead(ranks)
                ready = wait([*awaited, *living], max(deadline - time.monotonic(), 0))
                if not ready:
                    missing = sorted(awaited.values())
                    raise TimeoutError(f"ranks {missing} of {world_size} gave no result in {timeout:.0f} s")
                for reader in [reader for reader in ready if reader in awaited]:
                    rank = awaited.pop(reader)
                    ok, value = reader.recv()
                    if not ok:
                        _raise_if_dead(ranks)
                        raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                    outputs[rank] = value
            return [outputs[r] for r in range(world_size)]
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()
            torch.set_num_threads(threads)
