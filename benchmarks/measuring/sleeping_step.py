"""A step of layers that sleep, over links of an emulated cluster, as a planner's layout says - and what the planner is
told of it: the model's shape, its layers as they ran on one pipeline rank, the rate of the links.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from infra import distributed
from infra.distributed import World
from infra.hardware import ClusterConfig, KernelRates
from launch.measure_layers import Chain
from measuring.pipelined_step import PipelinedStep
from measuring.sleeping_layers import HIDDEN, NUM_EXPERTS, PHASE, ROW_BYTES, TOKENS, TOP_K, at_random, sleeping_stages
from model.config import ModelConfig
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig
from parallel.mesh import Mesh
from parallel.pipeline.schedules import SCHEDULES
from parallel.plan.layout import Layout
from parallel.plan.measured import key

ROUNDS, TURNS = 2, 4  # steps, and microbatches through the layers


def sleeping_model(num_layers: int) -> ModelConfig:
    """What a planner has to know of it."""
    return ModelConfig(
        num_hidden_layers=num_layers, first_k_dense_replace=0, num_nextn_predict_layers=0, hidden_size=HIDDEN,
        n_routed_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, n_group=1, topk_group=1, vocab_size=8,
    )  # fmt: skip


def rate_for(share: float) -> float:
    """Bits a second at which the four all-to-alls of a layer on two ranks take `share` of its six sleeps."""
    return 4 * TOKENS * TOP_K // 2 * ROW_BYTES * 8 / (share * 6 * PHASE)


def sleeping_cluster(world: int, rate: float, row: dict[str, Any]) -> ClusterConfig:
    """`world` ranks, a node each, links of `rate` bits a second; `row`: the layers, measured."""
    return ClusterConfig(
        num_ranks=world, ranks_per_node=1, network_gbs=rate / 8e9, network_latency_us=0.0, num_sms=1, comm_sms=0,
        rates=KernelRates(stream_gbs=1.0, hbm_gbs=3350.0), measured=[row],
    )  # fmt: skip


def sleeping_row(layout: Layout, world: World) -> dict[str, Any]:
    """The layers of a layout as they run on one pipeline rank, all ranks at once: as launch/calibrate.py has them."""
    mesh, four = Mesh(replace(layout, pp=1).mesh), sleeping_model(4)
    dispatcher = DISPATCHERS[layout.dispatcher](mesh, DispatchConfig(NUM_EXPERTS))
    chain = SCHEDULES["interleaved_1f1b"](1, 1, 4)
    stages = sleeping_stages(chain, mesh, dispatcher, 4, at_random(world.rank))
    run = Chain(four, stages, dispatcher, (1, TOKENS), world)
    return {"of": key(four, layout, TOKENS), "seconds": run.seconds(TURNS)}


def sleeping_steps(cases: list[tuple[Layout, int]]) -> list[dict[str, Any]]:
    """On every rank: of each layout and batch its layers, and the seconds of `ROUNDS` steps, each of the slowest rank.
    Tokens choose their experts at random."""
    world, found = distributed.start(), []
    for layout, batch in cases:
        mesh, num_microbatches = Mesh(layout.mesh), layout.num_microbatches(batch)
        dispatcher = DISPATCHERS[layout.dispatcher](mesh, DispatchConfig(NUM_EXPERTS))
        schedule = layout.make_schedule(num_microbatches)
        stages = sleeping_stages(schedule, mesh, dispatcher, 2 * layout.pp, at_random(world.rank))
        step = PipelinedStep(schedule, stages, mesh, dispatcher)
        tokens_MBL = torch.zeros(num_microbatches, 1, TOKENS + 1, dtype=torch.int64)
        for _ in range(1 + ROUNDS):
            step.run(tokens_MBL)
        found.append({"seconds": step.seconds[1:], "row": sleeping_row(layout, world)})
    distributed.stop()
    return found
