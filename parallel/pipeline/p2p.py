"""Tensors between the ranks of a pipeline: no tags, no global shapes, nothing waited for before it is needed.

Messages between two ranks are told apart by their order alone, as NCCL demands: each ordered pair of ranks is a
first-in first-out channel, and the lowered schedule names the same order on both sides. Traffic to higher ranks and
traffic to lower ranks travel in two process groups, so that under NCCL a send never queues behind a receive whose
partner is not ready.

What crosses each stage border - shape and dtype - is negotiated once, before the first step, and sent back: under NCCL
the first message on a channel halts both hosts until both have come to it, so every channel is opened there, both ways.
A receive that was posted ahead would otherwise keep its rank from computing what the sender is waiting for.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.pipeline.actions import Schedule

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADER = 8  # dtype code, number of dims, up to six dims
AHEAD = 8  # receives that gloo is handed at once: each call wakes the other rank, one alone takes as long as eight
WINDOW = 8  # tensors under way to one rank before the oldest is waited for; gloo cannot say that a send has ended


class Spec(NamedTuple):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} of {tuple(self.shape)}"


class P2P:
    """This pipeline rank's channels to the others.

    ranks: world rank of every pipeline rank. rank: mine among them. up, down: process groups over `ranks` for messages
    to higher and to lower pipeline ranks (both None in a pipeline of one, which never sends).
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        up: dist.ProcessGroup | None,
        down: dist.ProcessGroup | None,
        device: torch.device,
    ):
        self._ranks, self._rank, self._up, self._down, self.device = tuple(ranks), rank, up, down, device
        self._sending: dict[int, deque[tuple[dist.Work, Tensor]]] = defaultdict(deque)
        self.ahead = 1 if device.type == "cuda" else AHEAD

    def negotiate(self, schedule: Schedule, outputs: Mapping[int, Spec]) -> dict[int, Spec]:
        """Tells every next stage what the stages here send; returns what the stages here receive, by stage.

        outputs: shape and dtype of the hidden state that each stage on this rank hands on. Collective over the
        pipeline.
        """
        inputs: dict[int, Spec] = {}
        for route in schedule.placement:
            for stage, (src, dst) in enumerate(pairwise(route)):
                if src == dst == self._rank:
                    inputs[stage + 1] = outputs[stage]
                elif src == self._rank:
                    shape, dtype = outputs[stage]
                    header = [_DTYPES.index(dtype), len(shape), *shape]
                    header += [0] * (_HEADER - len(header))
                    sent = torch.tensor(header, device=self.device)
                    dist.send(sent, self._ranks[dst], group=self._group(dst))
                    dist.recv(sent, self._ranks[dst], group=self._group(dst, receiving=True))
                elif dst == self._rank:
                    received = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
                    dist.recv(received, self._ranks[src], group=self._group(src, receiving=True))
                    dist.send(received, self._ranks[src], group=self._group(src))
                    code, num_dims, *dims = received.tolist()
                    inputs[stage + 1] = Spec(tuple(dims[:num_dims]), _DTYPES[code])
        return inputs

    def send(self, tensor: Tensor, dst: int) -> None:
        """Starts sending `tensor` to pipeline rank `dst`. Raises ConnectionError where that has ended."""
        tensor = tensor.contiguous()
        sending = self._sending[dst]
        try:
            while sending and sending[0][0].is_completed():
                sending.popleft()
            if len(sending) >= WINDOW:
                sending.popleft()[0].wait()
            work = self._group(dst).send([tensor], dst, 0)
        except RuntimeError as error:
            raise self.lost(dst, "while sending to it", error) from error
        sending.append((work, tensor))  # the tensor must outlive the send

    def receive(self, src: int, spec: Spec) -> tuple[Tensor, dist.Work]:
        """Posts the receive of the next tensor from pipeline rank `src`; wait for the work before reading it. Raises
        ConnectionError where that rank has ended."""
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        try:
            work = self._group(src, receiving=True).recv([tensor], src, 0)
        except RuntimeError as error:
            raise self.lost(src, "while receiving from it", error) from error
        return tensor, work

    def drain(self) -> None:
        """Waits until every tensor that was sent has left. Raises ConnectionError where a receiver has ended."""
        for dst, sending in self._sending.items():
            try:
                while sending:
                    sending.popleft()[0].wait()
            except RuntimeError as error:
                raise self.lost(dst, "while sending to it", error) from error

    def lost(self, rank: int, doing: str, error: RuntimeError) -> ConnectionError:
        """What to raise when pipeline rank `rank` has ended; other pipelines have ranks of the same number."""
        world_rank = self._ranks[rank]
        name = f"rank {rank}" if world_rank == rank else f"rank {rank} (world rank {world_rank})"
        return ConnectionError(f"lost {name} {doing}: {error}")

    def _group(self, peer: int, receiving: bool = False) -> dist.ProcessGroup:
        group = self._up if (peer > self._rank) != receiving else self._down
        assert group is not None, "only a pipeline of one has no groups, and it sends nothing"
        return group
