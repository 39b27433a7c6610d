"""FP8 under layouts: recomputation, split backwards and overlap change no bit; FP8 payloads change next to nothing."""

import gc
from unittest import mock

import pytest
import torch

from infra.fp8 import linear
from infra.fp8.quantize import Quantized
from parallel.config import ParallelConfig
from tests.parallel.layouts import begin, build, tiny
from tests.ranks import run_ranks

MICROBATCHES = 4


def gradients(rank, world, parallel):
    """Of every bucket by name, after one step."""
    config = tiny(hidden_size=160, moe_intermediate_size=48)
    replica, executor, mesh = build(config, parallel, world, MICROBATCHES, precision="fp8")
    begin(config, replica, mesh, MICROBATCHES)
    executor.step()
    return {
        (name, replica.first_expert): grad.flatten().tolist()
        for bucket in replica.buckets
        for name, grad in bucket.views(bucket.grad).items()
    }


DUALPIPE = {
    "pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "two_hop", "ranks_per_node": 2, "dispatch_dtype": "fp8"
}  # fmt: skip


WITH_FP32_FACTORS = {"dispatcher": "all_to_all", "dispatch_dtype": "fp8_fp32_sf"}


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (1, WITH_FP32_FACTORS), (4, DUALPIPE)], ids=["alone", "fp32 factors", "dualpipe"]
)
def test_recomputation_changes_no_bit(world, layout):
    want = run_ranks(world, gradients, ParallelConfig(**layout))
    for recompute in ("selective", "full"):
        for overlap in (False, True) if world > 1 else (False,):
            got = run_ranks(world, gradients, ParallelConfig(**layout, recompute=recompute, overlap=overlap))
            assert got == want, (recompute, overlap)


def distance(got, want):
    names = {name for name, _ in want}
    flat = [[torch.tensor(each[name, 0]) for name in sorted(names)] for each in (got, want)]
    got, want = (torch.cat(tensors) for tensors in flat)
    return ((got - want).norm() / want.norm()).item()


def test_a_split_backward_and_fp8_payloads_are_the_same_training():
    want = run_ranks(1, gradients, ParallelConfig())[0]
    for layout in ({"schedule": "zb1p"}, {"dispatcher": "all_to_all", "dispatch_dtype": "fp8"}):
        got = run_ranks(1, gradients, ParallelConfig(**layout))[0]
        assert distance(got, want) < 1e-6, layout  # the rows of experts are rounded to the same powers of two


def _decoded(rank, world, options):
    """Bytes of the tensors that say how they came, while a microbatch is in flight."""
    config = tiny(hidden_size=160)
    parallel = ParallelConfig(ep=2, dispatcher="all_to_all", **options)
    replica, _, mesh = build(config, parallel, world, 1, precision="fp8")
    begin(config, replica, mesh, 1)
    (stage,) = replica.stages.values()
    for _ in stage.forward(0, None):
        pass
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    received = [t for t in tensors if isinstance(getattr(t, "came_as", None), Quantized)]
    return [t.untyped_storage().nbytes() for t in received]


@pytest.mark.parametrize(
    "options",
    [{"dispatch_dtype": "fp8"}, {"dispatch_dtype": "fp8_fp32_sf", "recompute": "full"}],
    ids=["none", "full"],
)
def test_received_rows_wait_in_fp8_alone(options):
    """No tensor of a forward that has ended still has the rows in BF16."""
    for sizes in run_ranks(2, _decoded, options):
        assert sizes == []


def _came_in_fp8(rank, world):
    """How many operands of one step were not cast where they were read, and how many MoE layers there are."""
    config = tiny(hidden_size=160)
    parallel = ParallelConfig(ep=2, dispatcher="all_to_all", dispatch_dtype="fp8")
    as_it_came, found = linear._as_it_came, []

    def watched(*args):
        found.append(as_it_came(*args))
        return found[-1]

    with mock.patch.object(linear, "_as_it_came", watched):
        replica, executor, mesh = build(config, parallel, world, 1, precision="fp8")
        begin(config, replica, mesh, 1)
        executor.step()
    layers = config.num_hidden_layers + config.num_nextn_predict_layers - config.first_k_dense_replace
    return sum(q is not None for q in found), layers


def test_rows_and_gradients_that_travelled_in_fp8_are_cast_once():
    for came, layers in run_ranks(2, _came_in_fp8):
        assert came == 2 * layers, "the up-projection's rows, and the gradients of the down-projection's"
