"""What the planner counts against what a real rank holds, byte for byte."""

from dataclasses import asdict

import pytest
import torch

from infra.optim import make_adamw
from infra.precision import PrecisionConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, MeshConfig
from parallel.parallelize import parallelize
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.split import split_layers
from parallel.plan.counts import ALIGNMENT, layer_count, rank_groups, state_bytes
from parallel.plan.layout import schedule_of
from tests.parallel.layouts import tiny
from tests.ranks import run_ranks


def real_bytes(config: ModelConfig, parallel: ParallelConfig, world: int, precision: str, moments: str) -> dict:
    """What this rank holds, and the copies of each bucket's parameters."""
    mesh = Mesh(MeshConfig(parallel.pp, parallel.ep, parallel.ranks_per_node, world))
    replica = parallelize(
        config,
        parallel,
        mesh,
        SCHEDULES[parallel.schedule](parallel.pp, 2 * parallel.pp),
        precision=PrecisionConfig(precision),
        device=torch.device("cpu"),
        seed=0,
        weight_decay=0.1,
        microbatch=(1, 8),
    )
    buckets = replica.buckets
    optimizer = make_adamw(buckets, 1e-3, (0.9, 0.95), 1e-8, moments)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for b in buckets for t in (b.weight, b.master)}
    masters = sum(b.master.nbytes for b in buckets)
    return {
        "num_params": sum(p.numel() for b in buckets for p in b.params.values()),
        "weights": sum(storage.nbytes() for storage in storages.values()) - masters,
        "gradients": sum(b.grad.nbytes for b in buckets),
        "optimizer": masters + sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim()),
        "ema_host": sum(b.share_of(b.master).nbytes for b in buckets),
        "copied": sum(p.numel() * b.num_copies for b in buckets for p in b.params.values()),
    }


LAYOUTS = [
    (ParallelConfig(pp=2, ep=2, schedule="dualpipe", dispatcher="all_to_all"), 4, "bf16", 1),
    (ParallelConfig(pp=4, schedule="1f1b"), 4, "fp32", 1),
    (ParallelConfig(pp=2, schedule="dualpipev"), 2, "fp64", 1),
    (ParallelConfig(pp=2, ep=2, schedule="zbv", dispatcher="two_hop", ranks_per_node=2), 4, "bf16", 0),
    (ParallelConfig(ep=4, schedule="1f1b", dispatcher="two_hop", ranks_per_node=2), 4, "fp8", 2),
    (ParallelConfig(pp=2, schedule="interleaved_1f1b"), 4, "bf16", 1),
    (ParallelConfig(pp=2, ep=2, schedule="dualpipe", dispatcher="all_to_all", zero_stage=1), 4, "bf16", 1),
    (ParallelConfig(ep=2, schedule="1f1b", dispatcher="all_to_all", zero_stage=1), 4, "fp8", 1),
    (ParallelConfig(pp=2, schedule="interleaved_1f1b", zero_stage=1), 8, "fp64", 1),
]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("parallel", "world", "precision", "depths"), LAYOUTS, ids=lambda v: getattr(v, "schedule", None)
)
def test_states_are_those_of_a_real_run(
    parallel: ParallelConfig, world: int, precision: str, depths: int, moments: str
) -> None:
    config = tiny(5, num_nextn_predict_layers=depths)
    mesh = MeshConfig(parallel.pp, parallel.ep, parallel.ranks_per_node, world)
    schedule = schedule_of(parallel.schedule, parallel.pp, 2 * parallel.pp, parallel.overlap)
    planned = rank_groups(config, mesh, schedule, split_layers(config, schedule.num_stages))
    measured = run_ranks(world, lambda rank, size: real_bytes(config, parallel, size, precision, moments))
    for rank, real in enumerate(measured):
        groups = planned[mesh.coordinates(rank).pp]
        states = state_bytes(groups, precision, parallel.zero_stage, moments, ema=True)
        assert asdict(states) | {"copied": sum(g.num_params * g.copies for g in groups)} == real


def test_the_comparison_can_fail() -> None:
    config, schedule = tiny(5), schedule_of("dualpipe", 2, 4, paired=True)
    layers_of = split_layers(config, 2)
    right = rank_groups(config, MeshConfig(2, 2, 8, 4), schedule, layers_of)
    wrong = rank_groups(config, MeshConfig(2, 1, 8, 4), schedule, layers_of)
    assert right != wrong


@pytest.mark.parametrize("config", [ModelConfig(), tiny(5), tiny(3, q_lora_rank=None, num_nextn_predict_layers=2)])
def test_layers_add_up_to_the_model(config: ModelConfig) -> None:
    """`parts` is another way to the same number; it counts routing biases, which are no parameters."""
    layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers
    counted = sum(sum(layer_count(config, n)) for n in range(layers + depths))
    counted += 2 * config.vocab_size * config.hidden_size + config.hidden_size
    parts = sum(part.num_params for part in config.parts().values())
    assert counted == parts - (config.num_moe_layers + depths) * config.n_routed_experts


def test_zero_1_cuts_only_optimizer_states() -> None:
    config, schedule = ModelConfig(), schedule_of("dualpipe", 16, 32, paired=True)
    groups = rank_groups(config, MeshConfig(16, 64, 8, 2048), schedule, split_layers(config, 16))[7]
    whole, cut = (state_bytes(groups, "fp8", stage, "bf16", True) for stage in (0, 1))
    assert (whole.weights, whole.gradients) == (cut.weights, cut.gradients)
    assert [group.copies for group in groups] == [256, 256, 4]  # both directions of DualPipe hold a copy
    for group in groups:
        assert group.num_params <= group.copies * group.share < group.num_params + group.copies * ALIGNMENT
    assert cut.optimizer == 8 * sum(group.share for group in groups)
    assert whole.optimizer == 8 * sum(group.copies * group.share for group in groups)
