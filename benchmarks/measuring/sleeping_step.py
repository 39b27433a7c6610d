"""A step of layers that sleep, over links of an emulated cluster, as a planner's layout says - and what the planner is
told of it: the model's shape, how long a layer sleeps, the rate of the links.
"""

from __future__ import annotations

import torch

from infra import distributed
from infra.hardware import ClusterConfig, KernelRates
from measuring.pipelined_step import PipelinedStep
from measuring.sleeping_layers import HIDDEN, NUM_EXPERTS, PHASE, ROW_BYTES, TOKENS, TOP_K, at_random, sleeping_stages
from model.config import ModelConfig
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig
from parallel.mesh import Mesh
from parallel.plan.layout import Layout, schedule_of
from parallel.plan.measured import key

ROUNDS = 2


def sleeping_model(num_layers: int) -> ModelConfig:
    """What a planner has to know of it."""
    return ModelConfig(
        num_hidden_layers=num_layers, first_k_dense_replace=0, num_nextn_predict_layers=0, hidden_size=HIDDEN,
        n_routed_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, n_group=1, topk_group=1, vocab_size=8,
    )  # fmt: skip


def rate_for(share: float) -> float:
    """Bits a second at which the four all-to-alls of a layer on two ranks take `share` of its six sleeps."""
    return 4 * TOKENS * TOP_K // 2 * ROW_BYTES * 8 / (share * 6 * PHASE)


def sleeping_cluster(model: ModelConfig, layout: Layout, rate: float) -> ClusterConfig:
    """Links of `rate` bits a second, a rank a node; a layer sleeps in attention and experts, F, I and W alike."""
    layer = {name: [PHASE, PHASE] for name in "fiw"}
    row = {"of": key(model, layout, TOKENS), "seconds": {"moe": layer, "first": [0.0] * 3, "last": [0.0] * 3}}
    return ClusterConfig(
        num_ranks=layout.world, ranks_per_node=1, network_gbs=rate / 8e9, network_latency_us=0.0, num_sms=1, comm_sms=0,
        rates=KernelRates(stream_gbs=1.0, hbm_gbs=3350.0), measured=[row],
    )  # fmt: skip


def sleeping_steps(cases: list[tuple[Layout, int]]) -> list[list[float]]:
    """On every rank: of each layout and batch the seconds of `ROUNDS` steps, each of the slowest rank. Tokens choose
    their experts at random."""
    world, found = distributed.start(), []
    for layout, batch in cases:
        mesh, num_microbatches = Mesh(layout.mesh), layout.num_microbatches(batch)
        dispatcher = DISPATCHERS[layout.dispatcher](mesh, DispatchConfig(NUM_EXPERTS))
        schedule = schedule_of(layout.schedule, layout.pp, num_microbatches)
        stages = sleeping_stages(schedule, mesh, dispatcher, 2 * layout.pp, at_random(world.rank))
        step = PipelinedStep(schedule, stages, mesh, dispatcher, layout.overlap)
        tokens_MBL = torch.zeros(num_microbatches, 1, TOKENS + 1, dtype=torch.int64)
        for _ in range(1 + ROUNDS):
            step.run(tokens_MBL)
        found.append(step.seconds[1:])
    distributed.stop()
    return found
