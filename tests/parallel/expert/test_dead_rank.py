"""A rank that dies in the middle of an exchange: all the others raise within seconds, with the reason, on their own."""

import multiprocessing as mp
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from parallel.expert import DISPATCHERS, chain
from parallel.expert.dispatcher import DispatchConfig
from parallel.mesh import Mesh, MeshConfig

RANKS, DYING = 4, 2


def _rank(rank: int, store: str, name: str, last_exchange: int, results) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=600)  # no timeout helps them: they must notice
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=dist.FileStore(store, RANKS), timeout=timeout)
    dispatcher = DISPATCHERS[name](
        Mesh(MeshConfig(ep=RANKS, ranks_per_node=2, world=RANKS), timeout), DispatchConfig(8)
    )
    if rank == DYING:
        exchange, count = chain.exchange, 0

        def exchange_or_die(*args):
            nonlocal count
            count += 1
            if count > last_exchange:
                os._exit(9)
            return exchange(*args)

        chain.exchange = exchange_or_die
    x = torch.randn(64, 32, requires_grad=True)
    topk_idx = torch.rand(64, 8).topk(4).indices
    try:
        for _ in range(3):
            routed = dispatcher.dispatch(x, topk_idx, torch.rand(64, 4))
            dispatcher.combine(routed.x_RD, routed.handle).sum().backward()
    except ConnectionError as error:
        results.put((rank, str(error)))
        raise SystemExit(1) from None


@pytest.mark.parametrize(("name", "last_exchange"), [("all_to_all", 2), ("two_hop", 4), ("two_hop", 9)])
def test_the_others_end_with_the_reason(tmp_path, name, last_exchange):
    context = mp.get_context("fork")
    results = context.Queue()
    began = time.monotonic()
    args = (str(tmp_path / "store"), name, last_exchange, results)
    ranks = [context.Process(target=_rank, args=(rank, *args)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=max(0.0, began + 15 - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [9 if rank == DYING else 1 for rank in range(RANKS)]
    reasons = dict(results.get(timeout=1) for _ in range(RANKS - 1))
    assert all("lost one of ranks [" in reason for reason in reasons.values()), reasons
