"""Runs a schedule for real, with stages that only take time: the way to try one on a few ranks, CPU or GPU.

    torchrun --nproc-per-node=4 launch/simulate.py execute=true parallel.schedule=zbv parallel.pp=4 costs.f=20 ...

Each action sleeps, or multiplies matrices, for as long as its cost says (`unit`; milliseconds where none is named), and
real tensors of costs.p2p_bytes travel between the ranks.
"""

from __future__ import annotations

import torch.distributed as dist

from infra import distributed
from parallel.mesh import Group
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.measure import clock_offset, measured
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.passes import lower
from parallel.pipeline.simulate import Costs, stage_times
from parallel.pipeline.synthetic import SyntheticStage, Work, matmul_work, sleep
from parallel.pipeline.timeline import Timeline

WORKS = ("sleep", "matmul")
_WARM_UPS = 2


def execute(schedule: Schedule, costs: Costs, seconds_per_unit: float, work: str) -> Timeline | None:
    """The measured step, in milliseconds, on the first rank; None on the others.

    Raises ValueError where the ranks are not those of the schedule, or where costs name what cannot be executed.
    """
    import torch

    for name in ("fb", "jitter"):
        if getattr(costs, name):
            raise ValueError(f"costs.{name} cannot be executed: stages only take the time of their own F, I and W")
    world = distributed.start()
    if world.size != schedule.num_ranks:
        distributed.stop()
        raise ValueError(
            f"{schedule.name} is a schedule of {schedule.num_ranks} ranks, but {world.size} were started: "
            f"torchrun --nproc-per-node={schedule.num_ranks} launch/simulate.py ..., or parallel.pp={world.size}"
        )
    ranks = tuple(range(world.size))
    everyone = Group(ranks, world.rank, dist.group.WORLD)
    do: Work = matmul_work(world.device) if work == "matmul" else sleep
    f_S, _, i_S, w_S = (stage_times(schedule, costs) * seconds_per_unit * costs.slow.get(world.rank, 1.0)).tolist()
    output = Spec((max(1, int(costs.p2p_bytes / 4)),), torch.float32)
    stages = {
        s: SyntheticStage(f_S[s], i_S[s], w_S[s], output, world.device, do) for s in schedule.stages_of(world.rank)
    }
    p2p = P2P(ranks, world.rank, dist.new_group(), dist.new_group(), world.device)
    executor = Executor(schedule, lower(schedule).programs[world.rank], world.rank, stages, p2p)
    for _ in range(_WARM_UPS + 1):
        dist.barrier()
        executor.step()
    timeline = measured(executor, everyone, clock_offset(everyone))
    distributed.stop()
    return timeline if world.is_main else None
