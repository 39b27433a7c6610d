"""The start and the end of a job: who am I, how many are we, and how do we talk.

A job is started by torchrun, by mpirun (through mpi4py), by Slurm's srun, or as plain `python` for a single rank;
whichever it was, `start` leaves an initialised default process group: gloo on CPU, NCCL (with gloo for CPU tensors) on
CUDA.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from infra.allocator import keep_freed_memory


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, its device, and how long it waits for the others."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)  # a collective that takes longer raises on every rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _environment_of_mpi() -> dict[str, str]:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    address = (socket.gethostname(), _free_port()) if comm.rank == 0 else None
    host, port = comm.bcast(address)
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    environment = {
        "RANK": str(comm.rank),
        "WORLD_SIZE": str(comm.size),
        "LOCAL_RANK": str(local.rank),
        "LOCAL_WORLD_SIZE": str(local.size),
        "MASTER_ADDR": "127.0.0.1" if local.size == comm.size else host,
        "MASTER_PORT": str(port),
    }
    MPI.Finalize()  # else a rank that fails would wait at its exit for all others to finish
    return environment


def _environment_of_slurm() -> dict[str, str]:
    env = os.environ
    if "MASTER_ADDR" not in env and int(env.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        raise ValueError(
            "srun on several nodes needs MASTER_ADDR: export MASTER_ADDR=$(scontrol show hostnames | sed -n 1p)"
        )
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000)),
    }


def _environment() -> dict[str, str]:
    """What torchrun would have set, from whichever launcher started this process; empty for plain `python`."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {}
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return _environment_of_mpi()
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # of srun: a batch script itself is one process
        return _environment_of_slurm()
    return {"RANK": "0", "WORLD_SIZE": "1"}


def _of_this_attempt(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the store that no earlier attempt of this job has written to; collective.

    torchrun hands the ranks that it starts again the store of those that died, where their addresses still stand: who
    reads them connects to nobody, or waits for ever. Nothing in the environment tells attempts apart on all nodes. So
    rank 0 invents a name and tells every rank that has said hello, under a word that this rank has invented; whoever
    answered before was of an earlier attempt, and is not heard again.
    """
    mine = uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        store.wait([f"welcome/{mine}"], World.timeout)
        name = store.get(f"welcome/{mine}").decode()
        store.set(f"here/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, until = set(range(1, size)), time.monotonic() + World.timeout.total_seconds()
    while missing:
        if time.monotonic() > until:
            raise RuntimeError(f"ranks {sorted(missing)} have not said hello in {World.timeout}: have they started?")
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
            if store.check([f"here/{mine}/{other}"]):
                missing.discard(other)
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def start() -> World:
    """Initialises the default process group and returns this process's place in it."""
    os.environ.update(_environment())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if not cuda and size > 1 and "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    store: dist.Store | None = dist.HashStore() if size == 1 else None
    if size > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        shared, _, _ = next(dist.rendezvous("env://", rank, size, timeout=World.timeout))
        store = _of_this_attempt(shared, rank, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=World.timeout,
    )
    return World(rank, size, device)


def largest_of_each(values: Sequence[float]) -> list[float]:
    """Each of the `values`, as large as on any rank; collective over the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def largest(value: float) -> float:
    """The largest `value` of all ranks; collective over the world."""
    return largest_of_each([value])[0]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; collective over the world."""
    return bool(largest(flag))


def stop() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
