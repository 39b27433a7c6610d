"""The harness itself: results come back in order, and a failure on one rank is a failure here."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _sum_of_ranks(rank: int, world_size: int) -> float:
    x = torch.tensor(float(rank))
    dist.all_reduce(x)
    return x.item() + rank


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def test_results_come_back_in_rank_order():
    assert run_ranks(4, _sum_of_ranks) == [6.0, 7.0, 8.0, 9.0]


def test_an_exception_on_one_rank_is_raised_here():
    with pytest.raises(AssertionError, match="rank one is unwell"):
        run_ranks(2, _fail_on_one)


def test_a_dead_rank_is_named():
    with pytest.raises(AssertionError, match="rank 1 died with exit code 3"):
        run_ranks(2, _die)
