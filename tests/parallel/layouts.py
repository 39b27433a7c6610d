"""A tiny model with every feature, the gradients it has in one process, and the same under any layout."""

from __future__ import annotations

import torch
from torch import Tensor

from infra.precision import PrecisionConfig
from model.config import ModelConfig
from model.transformer import Transformer, init_model_
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, MeshConfig
from parallel.parallelize import Replica, parallelize
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P
from parallel.pipeline.passes import lower
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.stage import BatchScale

LENGTH = 12
EVERY_PIPELINE = [(name, pp) for name in [*SCHEDULES, "auto"] for pp in (1, 2, 4, 8) if (name, pp) != ("dualpipe", 1)]

lower(SCHEDULES["1f1b"](1, 1))  # loads the compiled code: once here rather than on every forked rank


def tiny(num_hidden_layers: int = 4, **changes: object) -> ModelConfig:
    values = dict(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=40,
        moe_intermediate_size=8,
        num_hidden_layers=num_hidden_layers,
        num_nextn_predict_layers=1,
        num_attention_heads=2,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        initializer_range=0.2,
        aux_loss_alpha=0.01,
        rope_scaling=None,
    )
    return ModelConfig(**(values | changes))


def tokens(num_samples: int, vocab_size: int = 61) -> Tensor:
    """[num_samples, L + 1]"""
    return torch.randint(vocab_size, (num_samples, LENGTH + 1), generator=torch.Generator().manual_seed(5))


def documents(num_samples: int) -> Tensor:
    """[num_samples, L + 1]; the document of each token, a few a sample."""
    return (torch.rand(num_samples, LENGTH + 1, generator=torch.Generator().manual_seed(9)) < 0.25).cumsum(1)


def weights(config: ModelConfig, num_samples: int) -> dict[str, float]:
    depths = max(1, config.num_nextn_predict_layers)
    return {"lm_loss": 1.0, "mtp_loss": 0.3 / depths, "balance_loss": config.aux_loss_alpha / num_samples}


def reference_gradients(config: ModelConfig, num_samples: int, masked: bool = False) -> dict[str, Tensor]:
    """Of the whole batch at once, by plain autograd over `Transformer.losses`, in one process: obviously right."""
    torch.set_default_dtype(torch.float64)
    try:
        model = init_model_(Transformer(config), seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    batch = tokens(num_samples)
    ids = documents(num_samples)[:, :-1] if masked else None
    losses = model.losses(batch[:, :-1], batch[:, 1:], num_samples * LENGTH, num_samples, ids)
    depths = max(1, config.num_nextn_predict_layers)
    (losses.lm_loss + 0.3 / depths * losses.mtp_losses_K.sum() + config.aux_loss_alpha * losses.balance_loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def build(
    config: ModelConfig,
    parallel: ParallelConfig,
    world: int,
    num_microbatches: int,
    schedule: Schedule | None = None,
    precision: str = "fp64",
) -> tuple[Replica, Executor, Mesh]:
    """This rank's part, and its executor; one sequence a microbatch. schedule: the layout's own where none is given."""
    mesh = Mesh(MeshConfig(parallel.pp, parallel.ep, parallel.ranks_per_node, world))
    schedule = schedule or parallel.make_schedule(num_microbatches)
    replica = parallelize(
        config,
        parallel,
        mesh,
        schedule,
        precision=PrecisionConfig(precision),
        device=torch.device("cpu"),
        seed=3,
        weight_decay=0.1,
        microbatch=(1, LENGTH),
    )
    up, down = (mesh.group(mesh.config.partition("pp")).pg for _ in range(2))
    p2p = P2P(mesh.pp.ranks, mesh.pp.rank, up, down, torch.device("cpu"))
    executor = Executor(schedule, lower(schedule).programs[mesh.at.pp], mesh.at.pp, replica.stages, p2p)
    return replica, executor, mesh


def begin(config: ModelConfig, replica: Replica, mesh: Mesh, num_microbatches: int, masked: bool = False) -> None:
    """Hands this rank its microbatches of a batch of `num_microbatches * dp` samples.

    masked: tokens see those of their own document only.
    """
    num_samples = num_microbatches * mesh.config.dp
    batch_MBL, ids_MBL = (
        each.view(num_microbatches, mesh.config.dp, LENGTH + 1)[:, mesh.at.dp, None]
        for each in (tokens(num_samples), documents(num_samples))
    )
    scale = BatchScale(num_samples * LENGTH, weights(config, num_samples))
    for stage in replica.stages.values():
        stage.begin(batch_MBL, scale, training=True, documents_MBL=ids_MBL if masked else None)
