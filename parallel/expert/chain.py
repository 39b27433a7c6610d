"""A dispatcher made of hops: the matrix P of a dispatch as a chain of exchanges.

For each `Hop`, rows are copied and exchanged within one group; at the end they are copied into the order of the local
experts. A combine runs the chain backwards, and adds copies up where dispatch had made them - on the node before
crossing, if that is where they were made. What tells the dispatchers apart is their hops, and nothing else:

    local         none
    all_to_all    one, over the ep group, a row for each pair
    two_hop       one across nodes, a row for each token and node; one within the node, a row for each token and rank

A hop over a group of one rank moves nothing and is left out, so each of them is `local` on one rank.

Letters: N pairs of a token and an expert, S rows before a hop; the others as in dispatcher.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import Routed
from parallel.expert.dispatcher import DispatchConfig, Dispatcher
from parallel.expert.lane import Lane, Pending
from parallel.expert.payload import decode, encode
from parallel.expert.permutation import Rows, depart
from parallel.mesh import Group, Mesh

V = TypeVar("V")


class Hop(NamedTuple):
    """One exchange: a pair of expert e goes to index `e // experts_per_dest % group.size` of the group."""

    group: Group
    experts_per_dest: int
    once: bool  # the pairs of a row that go to one destination share one copy of it


class Exchange(NamedTuple):
    """One hop of one plan: the rows copied, and how many rows and pairs go to and come from each rank of the group."""

    group: Group
    rows: Rows
    rows_sent: list[int]
    rows_received: list[int]
    pair_order_N: Tensor
    pairs_sent: list[int]
    pairs_received: list[int]


class Plan(NamedTuple):
    """Where the rows of one dispatch go, and the routing weights, which travel with that news."""

    exchanges: list[Exchange]
    rows: Rows  # from the rows that arrive to the R rows of the experts
    pair_order_R: Tensor
    num_tokens_per_expert_E: Tensor  # int64, experts of this rank
    weights_R: Tensor
    shape_TK: torch.Size


Handle = Pending[Plan]


def exchange(group: Group, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """All-to-all within a group: `sent[i]` rows go to rank i, `received[i]` come from it.

    Raises ConnectionError when a rank dies.
    """
    out, rows = rows.new_empty(sum(received), *rows.shape[1:]), rows.contiguous()
    out_by_rank, rows_by_rank = out.split(received), rows.split(sent)
    try:
        if rows.is_cuda:
            dist.all_to_all_single(out, rows, received, sent, group=group.pg)
        else:
            _receive_then_send(group, out_by_rank, rows_by_rank)
    except RuntimeError as error:
        raise ConnectionError(f"lost one of ranks {list(group.ranks)} in their all-to-all: {error}") from error
    return out


def _receive_then_send(group: Group, out: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Gloo's own all-to-all sends first: the news that a rank is ready to receive then queues behind what it sends, on
    the same connection, and of two large messages the second waits for the first."""
    out[group.rank].copy_(rows[group.rank])
    others = [(group.rank + i) % group.size for i in range(1, group.size)]
    works = [dist.irecv(out[i], group=group.pg, group_src=i) for i in reversed(others) if len(out[i])]
    works += [dist.isend(rows[i], group=group.pg, group_dst=i) for i in others if len(rows[i])]
    for work in works:
        work.wait()  # type: ignore[union-attr]


def _scattered(values_N: Tensor, order_N: Tensor) -> Tensor:
    """The inverse of `values[order]`."""
    out_N = torch.empty_like(values_N)
    out_N[order_N] = values_N
    return out_N


class ChainDispatcher(Dispatcher):
    """The four raw verbs for any chain of hops."""

    def __init__(self, mesh: Mesh, config: DispatchConfig, hops: list[Hop]):
        super().__init__(mesh, config)
        self.hops = [hop for hop in hops if hop.group.size > 1]
        self.lane = Lane(self.times)

    def start_dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Pending[Routed]:
        handle = self._start("dispatch", self._plan, topk_idx_TK, topk_weights_TK)

        def send(x_TD: Tensor) -> Routed:
            plan = handle.wait()
            return Routed(self._scatter(x_TD, plan), plan.weights_R, plan.num_tokens_per_expert_E, handle)

        return self._start("dispatch", send, x_TD)

    def start_dispatch_backward(self, gx_RD: Tensor, gw_R: Tensor, handle: Handle) -> Pending[tuple[Tensor, Tensor]]:
        def send(gx_RD: Tensor, gw_R: Tensor) -> tuple[Tensor, Tensor]:
            return self._gather(gx_RD, handle.wait()), self._weights_home(gw_R, handle.wait())

        return self._start("combine", send, gx_RD, gw_R)

    def start_combine(self, y_RD: Tensor, handle: Handle) -> Pending[Tensor]:
        return self._start("combine", lambda y_RD: self._gather(y_RD, handle.wait()), y_RD)

    def start_combine_backward(self, gy_TD: Tensor, handle: Handle) -> Pending[Tensor]:
        return self._start("dispatch", lambda gy_TD: self._scatter(gy_TD, handle.wait()), gy_TD)

    def _start(self, kind: str, task: Callable[..., V], *args: Tensor) -> Pending[V]:
        """On the lane, or at once where there is nothing to send. `kind` is the leg of the traffic that it makes."""
        if self.hops:
            return self.lane.start(task, *args, kind=kind)
        with torch.no_grad():
            result = task(*args)
        return Pending(lambda: result)

    def _plan(self, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Plan:
        """Sends each pair to the rank of its expert, hop by hop, and notes which rows have to follow."""
        num_rows, top_k = topk_idx_TK.shape
        expert_N, weight_N = self.config.routing(topk_idx_TK).reshape(-1), topk_weights_TK.reshape(-1)
        row_N = torch.arange(num_rows, device=expert_N.device).repeat_interleave(top_k)
        self.traffic.count_nodes(expert_N.view(-1, top_k), self.config.n_routed_experts // self.mesh.config.ep_nodes)
        exchanges = []
        for group, experts_per_dest, once in self.hops:
            leaving = depart(row_N, expert_N // experts_per_dest % group.size, num_rows, group.size, once)
            counts = torch.stack([leaving.rows_per_dest, leaving.pairs_per_dest], dim=1)
            ones = [1] * group.size
            rows_sent, pairs_sent = counts.t().tolist()
            rows_received, pairs_received = self._exchange("routing", group, counts, ones, ones).t().tolist()

            order_N = leaving.pair_order_N
            place = torch.stack([leaving.pair_row_N, expert_N[order_N]], dim=1).int()
            news = torch.cat([place.view(torch.uint8), weight_N[order_N].unsqueeze(1).view(torch.uint8)], dim=1)
            news = self._exchange("routing", group, news, pairs_sent, pairs_received)
            row_N, expert_N = news[:, :8].contiguous().view(torch.int32).long().unbind(1)
            weight_N = news[:, 8:].contiguous().view(topk_weights_TK.dtype).squeeze(1)

            first_row = torch.tensor([0, *accumulate(rows_received)], device=row_N.device)
            row_N = row_N + first_row[:-1].repeat_interleave(torch.tensor(pairs_received, device=row_N.device))
            num_rows = sum(rows_received)
            exchanges.append(
                Exchange(group, leaving.rows, rows_sent, rows_received, order_N, pairs_sent, pairs_received)
            )
        num_local = self.config.n_routed_experts // self.mesh.config.ep
        local_N = expert_N - self.mesh.ep.rank * num_local
        order_R = torch.argsort(local_N, stable=True)
        num_tokens_per_expert_E = torch.bincount(local_N, minlength=num_local)
        self.traffic.num_pairs += len(order_R)
        return Plan(
            exchanges,
            Rows(row_N[order_R], num_rows),
            order_R,
            num_tokens_per_expert_E,
            weight_N[order_R],
            topk_idx_TK.shape,
        )

    def _scatter(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """P x: [T, D] -> [R, D]."""
        rows = encode(x_TD, self.config.dispatch_dtype)
        for group, out, sent, received, *_ in plan.exchanges:
            rows = self._exchange("dispatch", group, out.expand(rows), sent, received)
        return decode(plan.rows.expand(rows), x_TD.shape[1], x_TD.dtype, self.config.dispatch_dtype)

    def _gather(self, y_RD: Tensor, plan: Plan) -> Tensor:
        """P^T y: [R, D] -> [T, D]."""
        rows = plan.rows.add_up(y_RD)
        for group, out, sent, received, *_ in reversed(plan.exchanges):
            rows = out.add_up(self._exchange("combine", group, rows, received, sent))
        return rows

    def _weights_home(self, gw_R: Tensor, plan: Plan) -> Tensor:
        """The routing weights are moved, not copied: their gradients go back the way they came."""
        gw_N = _scattered(gw_R, plan.pair_order_R)
        for each in reversed(plan.exchanges):
            gw_N = self._exchange("routing", each.group, gw_N, each.pairs_received, each.pairs_sent)
            gw_N = _scattered(gw_N, each.pair_order_N)
        return gw_N.view(plan.shape_TK)

    def _exchange(self, leg: str, group: Group, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        at = self.mesh.config.coordinates
        others = [(at(rank).node, n) for rank, n in zip(group.ranks, sent, strict=True) if rank != self.mesh.rank]
        within = sum(n for node, n in others if node == self.mesh.at.node)
        across = sum(n for _, n in others) - within
        row_bytes = rows[:1].nbytes
        self.traffic.add(leg, across * row_bytes, within * row_bytes)
        return exchange(group, rows, sent, received)
