"""A layout never changes the mathematics: gradients of every parameter equal those of one process, in float64."""

import pytest
import torch

from infra.optim import Reduction
from parallel.config import ParallelConfig
from tests.parallel.layouts import EVERY_PIPELINE, begin, build, reference_gradients, tiny
from tests.ranks import run_ranks


def _gradients(rank: int, world: int, config, parallel: ParallelConfig, num_microbatches: int, masked: bool) -> dict:
    replica, executor, mesh = build(config, parallel, world, num_microbatches)
    begin(config, replica, mesh, num_microbatches, masked)
    executor.step()
    Reduction(replica.buckets).wait()
    assert all(stage.live == 0 for stage in replica.stages.values())
    grads = {name: g.clone() for b in replica.buckets for name, g in b.views(b.grad).items()}
    return {"first_expert": replica.first_expert, "grads": {n: g.numpy() for n, g in grads.items()}}


def check_layout(config, parallel: ParallelConfig, world: int, num_microbatches: int, masked: bool = False) -> None:
    expected = reference_gradients(config, num_microbatches * world // parallel.pp, masked)
    seen = set()
    for result in run_ranks(world, _gradients, config, parallel, num_microbatches, masked):
        for name, grad in result["grads"].items():
            want = expected[name]
            if ".mlp.experts." in name:
                want = want[result["first_expert"] : result["first_expert"] + len(grad)]
            torch.testing.assert_close(
                torch.from_numpy(grad), want, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
            seen.add(name)
    assert seen == set(expected)


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_gradient_accumulation_on_one_rank(num_microbatches):
    check_layout(tiny(), ParallelConfig(), 1, num_microbatches)


@pytest.mark.parametrize(
    ("schedule", "pp", "num_microbatches"),
    [
        ("gpipe", 2, 3),
        ("1f1b", 2, 4),
        ("1f1b", 4, 6),
        ("interleaved_1f1b", 2, 4),
        ("zb1p", 4, 5),
        ("zbv", 2, 5),
        ("zbv", 4, 9),
        ("dualpipe", 2, 4),
        ("dualpipe", 4, 8),
        ("dualpipe", 8, 16),
        ("dualpipev", 4, 10),
    ],
)
def test_pipelines(schedule, pp, num_microbatches):
    check_layout(tiny(num_hidden_layers=8), ParallelConfig(pp=pp, schedule=schedule), pp, num_microbatches)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "two_hop"])
@pytest.mark.parametrize(
    ("schedule", "pp", "ep", "world"), [("1f1b", 1, 4, 4), ("1f1b", 2, 2, 4), ("dualpipe", 2, 2, 8)]
)
def test_experts_and_pipelines(dispatcher, schedule, pp, ep, world):
    parallel = ParallelConfig(pp=pp, ep=ep, schedule=schedule, dispatcher=dispatcher, ranks_per_node=2)
    check_layout(tiny(), parallel, world, 4)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation(recompute):
    check_layout(tiny(), ParallelConfig(pp=2, schedule="zbv", recompute=recompute), 2, 4)


@pytest.mark.parametrize("depths", [0, 2])
def test_multi_token_prediction_of_any_depth(depths):
    check_layout(tiny(num_nextn_predict_layers=depths), ParallelConfig(pp=2, schedule="dualpipe"), 2, 4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_documents_are_masked_at_every_depth(recompute):
    parallel = ParallelConfig(pp=2, schedule="dualpipe", recompute=recompute)
    check_layout(tiny(num_nextn_predict_layers=2), parallel, 2, 4, masked=True)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_v2_router_without_compressed_queries_or_a_shared_expert(recompute):
    v2 = {"q_lora_rank": None, "scoring_func": "softmax", "topk_method": "group_limited_greedy"}
    config = tiny(n_shared_experts=0, norm_topk_prob=False, n_routed_experts=32, **v2)
    parallel = ParallelConfig(pp=2, ep=2, schedule="dualpipe", dispatcher="two_hop", recompute=recompute)
    check_layout(config, parallel, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "pp"), EVERY_PIPELINE)
def test_every_schedule_with_uneven_stages_and_no_expert_on_the_first_rank(schedule, pp):
    """More layers than stages by three, an uneven number of microbatches, MTP, and a first stage of dense layers."""
    num_microbatches = 2 * pp + 1
    num_stages = ParallelConfig(pp=pp, schedule=schedule).make_schedule(num_microbatches).num_stages
    num_layers = num_stages + 3
    config = tiny(num_hidden_layers=num_layers, first_k_dense_replace=2)
    layers_per_stage = [2] * min(num_stages, 2) + [1] * (num_stages - 2)
    layers_per_stage[-1] += num_layers - sum(layers_per_stage)
    parallel = ParallelConfig(pp=pp, schedule=schedule, layers_per_stage=layers_per_stage)
    check_layout(config, parallel, pp, num_microbatches)
