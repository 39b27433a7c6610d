"""A training step of one pipeline, timed, and the share of its communication that computing hid."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert.dispatcher import Dispatcher
from parallel.expert.travel import Interval
from parallel.mesh import Group, Mesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P
from parallel.pipeline.passes import lower
from parallel.pipeline.stage import BatchScale, TransformerStage

WEIGHTS = {"lm_loss": 1.0, "mtp_loss": 0.0, "balance_loss": 0.0}


class PipelinedStep:
    """One way to run a step, and what was measured of it.

    Hidden is 1 - exposed / communication in the pairs: the part of the lane's time in which its rank did not stand
    still. Travel is the part of the lane's time in which all ranks of an exchange took part; in the rest it waited for
    the last of them, whatever the links. Computing is a step without the time in which its rank stood still; without
    all communication would be too little, as even in turn shared experts compute while tokens travel.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, TransformerStage],
        mesh: Mesh,
        dispatcher: Dispatcher,
    ):
        up, down = (mesh.group(mesh.config.partition("pp")).pg for _ in range(2))
        p2p = P2P(mesh.pp.ranks, mesh.pp.rank, up, down, torch.device("cpu"))
        program = lower(schedule).programs[mesh.at.pp]
        self.executor = Executor(schedule, program, mesh.at.pp, stages, p2p)
        self.stages, self.mesh, self.dispatcher = stages, mesh, dispatcher
        self.seconds: list[float] = []
        self.hidden: list[float] = []
        self.comm: list[float] = []
        self.travel: list[float] = []
        self.computing: list[float] = []
        self.bytes_sent: list[int] = []

    def run(self, tokens_MBL: Tensor) -> None:
        """Seconds are those of the slowest rank; what is hidden, and what all-to-alls take, is the mean over ranks."""
        for stage in self.stages.values():
            stage.begin(tokens_MBL, BatchScale(tokens_MBL[..., 1:].numel(), WEIGHTS), training=True)
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        self.executor.step()
        seconds = time.perf_counter() - began
        times, traffic = self.dispatcher.times, self.dispatcher.traffic
        travels, waits = list(times.travels), list(times.waits)
        whole = times.take()
        times.travels, times.waits = travels, waits
        pairs = [(a.start, a.end) for a, b in pairwise(self.executor.spans) if a.slot == b.slot]
        inside = times.take(within=pairs)
        sent = sum(traffic.bytes_across_nodes.values())
        traffic.__init__()  # type: ignore[misc]
        figures = torch.tensor(
            [
                _total(whole, "time"),
                _total(whole, "exposed"),
                _together(travels, self.mesh.ep),
                _total(inside, "time"),
                _total(inside, "exposed"),
                sent,
            ],
            dtype=torch.float64,
        )
        slowest = torch.tensor(seconds, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            dist.all_reduce(figures)
            figures /= dist.get_world_size()
        comm, stood, travel, in_pairs, exposed, num_bytes = figures.tolist()
        self.seconds.append(slowest.item())
        self.comm.append(comm)
        self.travel.append(travel)
        self.computing.append(slowest.item() - stood)
        self.hidden.append(1 - exposed / in_pairs if in_pairs else 0.0)
        self.bytes_sent.append(int(num_bytes))

    def forget(self) -> None:
        """What was measured to warm up."""
        for figures in (self.seconds, self.hidden, self.comm, self.travel, self.computing, self.bytes_sent):
            figures.clear()

    def report(self) -> dict[str, Any]:
        names = ("seconds", "hidden", "comm", "travel", "computing")
        return {name: getattr(self, name) for name in names} | {"bytes": self.bytes_sent[-1]}


def _total(figures: Mapping[str, float], what: str) -> float:
    return sum(value for name, value in figures.items() if name.startswith(f"comm_{what}_"))


def _together(travels: Sequence[tuple[str, Interval]], group: Group) -> float:
    """Seconds of travels from when the last rank of the group began them: ranks begin the same ones in the same order,
    and those of one machine have one clock."""
    begun = torch.tensor([began for _, (began, _) in travels], dtype=torch.float64)
    ended = torch.tensor([end for _, (_, end) in travels], dtype=torch.float64)
    if group.size > 1:
        dist.all_reduce(begun, op=dist.ReduceOp.MAX, group=group.pg)
    return (ended - begun).sum().item()


def measure_in_turn(steps: Mapping[str, PipelinedStep], tokens_MBL: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Every step once to warm up, then `rounds` times, turn about."""
    for turn in range(rounds + 1):
        for step in steps.values():
            if turn == 1:
                step.forget()
            step.run(tokens_MBL)
    return {name: step.report() for name, step in steps.items()}
