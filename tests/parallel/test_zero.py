"""ZeRO-1: sharded optimizer states are the same training, to the bit, in a part of the memory."""

import pytest
import torch
import torch.distributed as dist

from infra.optim import Bucket, clip_gradients, global_grad_norm, make_adamw, reduce_gradients, update
from tests.launch.runs import config, small_data, train
from tests.ranks import run_ranks

SHAPES = {
    "one": [(1,)],
    "odd": [(7, 13), (5,)],
    "large": [(37, 91), (3, 5, 11)],
}  # "one": most ranks have padding alone


def _updates(rank, world, num_copies, dtype, accumulation, is_sharded):
    """Weights, norms and bytes after five clipped updates of every kind of bucket, `num_copies` ranks to a group."""
    groups = [dist.new_group(list(range(i, i + num_copies))) for i in range(0, world, num_copies)]
    first = rank // num_copies * num_copies
    buckets = []
    for i, shapes in enumerate(SHAPES.values()):
        named = {f"{i}.{j}": torch.Size(shape) for j, shape in enumerate(shapes)}
        buckets.append(
            Bucket(
                named,
                weight_decay=0.1 * i,
                compute_dtype=dtype,
                accumulation_dtype=accumulation,
                device=torch.device("cpu"),
                group=groups[rank // num_copies] if num_copies > 1 else None,
                num_copies=num_copies,
                copy=rank - first,
                is_sharded=is_sharded,
            )
        )
    values = torch.Generator().manual_seed(first)
    for bucket in buckets:
        for name, param in bucket.params.items():
            bucket.fill(name, torch.randn(param.shape, generator=values, dtype=accumulation))
    optimizer = make_adamw(buckets, 1e-2, (0.9, 0.95), 1e-8)
    gradients, norms = torch.Generator().manual_seed(100 + rank), []
    for _ in range(5):
        for bucket in buckets:
            for param in bucket.params.values():
                param.main_grad += torch.randn(param.shape, generator=gradients, dtype=accumulation)
        reduce_gradients(buckets)
        norms.append(global_grad_norm(buckets, world))
        clip_gradients(buckets, norms[-1], 10.0)
        update(buckets, optimizer, 1e-2)
        assert not any(bucket.grad.any() for bucket in buckets)
    held = sum(t.nbytes for b in buckets for t in (b.master, *optimizer.state[b.master].values()) if t.dim())
    return [p.detach().double().numpy() for b in buckets for p in b.params.values()], norms, held


@pytest.mark.parametrize(("world", "num_copies"), [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (8, 8)])
@pytest.mark.parametrize(
    ("dtype", "accumulation"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=["fp64", "bf16"]
)
def test_updates_are_those_without_it_to_the_bit(world, num_copies, dtype, accumulation):
    whole, cut = (
        run_ranks(world, _updates, num_copies, dtype, accumulation, is_sharded) for is_sharded in (False, True)
    )
    for (weights, norms, held), (cut_weights, cut_norms, cut_held) in zip(whole, cut, strict=True):
        assert norms == cut_norms
        assert min(norms) > 10  # every update is clipped
        assert all((a == b).all() for a, b in zip(weights, cut_weights, strict=True))
        assert cut_held * num_copies == held


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {}),
        (4, {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "two_hop", "ranks_per_node": 2}),
        pytest.param(3, {"pp": 3, "schedule": "zbv"}, marks=pytest.mark.slow),  # most buckets have one copy
        pytest.param(4, {"ep": 2, "dispatcher": "all_to_all"}, marks=pytest.mark.slow),
        pytest.param(
            8, {"pp": 2, "ep": 2, "schedule": "dualpipev", "dispatcher": "all_to_all"}, marks=pytest.mark.slow
        ),
    ],
)
def test_twenty_losses_are_those_without_it(data, world, parallel):
    whole, cut = (run_ranks(world, train, config(data, **parallel, zero_stage=stage), 20) for stage in (0, 1))
    for expected, records in zip(whole, cut, strict=True):
        for want, got in zip(expected, records, strict=True):
            for key in {"loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "eval_loss"} & want.keys():
                assert got[key] == pytest.approx(want[key], rel=1e-9), f"step {want.get('step')} {key}"
