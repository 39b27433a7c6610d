"""ZeRO-1: sharded optimizer states are the same training, to the bit, in a part of the memory."""

import os

import pytest
import torch
import torch.distributed as dist

from infra import optim
from infra.checkpoint import Checkpoint
from infra.distributed import World
from infra.optim import Bucket, Reduction, clip_gradients, global_grad_norm, make_adamw, update
from launch.trainer import Trainer
from parallel import state
from tests.launch.runs import config, small_data, train
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
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
        Reduction(buckets).wait()
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


def _updates_without_gathering(*args):
    optim._all_gather = lambda *_, **__: None
    return _updates(*args)


def test_the_comparison_can_fail():
    args = (2, torch.float64, torch.float64)
    whole, _, _ = run_ranks(2, _updates, *args, False)[0]
    cut, _, _ = run_ranks(2, _updates_without_gathering, *args, True)[0]
    assert not all((a == b).all() for a, b in zip(whole, cut, strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, {}, marks=SLOW),
        (4, {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "two_hop", "ranks_per_node": 2}),
        pytest.param(3, {"pp": 3, "schedule": "1f1b"}, marks=SLOW),  # most buckets have one copy
        pytest.param(4, {"ep": 2, "dispatcher": "all_to_all"}, marks=SLOW),
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"zero_stage": 2}, "parallel.zero_stage=2: expected one of 0, 1"),
        ({"zero_backend": "fairscale"}, "parallel.zero_backend=fairscale: expected one of torch, deepspeed"),
        ({"zero_backend": "deepspeed"}, "parallel.zero_stage=0 does not: use parallel.zero_stage=1"),
        ({"zero_backend": "deepspeed", "zero_stage": 1}, "precision=fp64: use precision=bf16 or fp8"),
    ],
)
def test_wrong_words_are_refused_in_one_line(tmp_path, words, said):
    with pytest.raises(ValueError, match=said) as error:
        config(tmp_path, **words)
    assert "\n" not in str(error.value)


def _train_and_save(rank, world_size, config, root, num_steps):
    """The losses, and of each bucket (bytes of its states here, its elements, how many ranks have a copy)."""
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    losses = [trainer.train_step()[0]["loss"] for _ in range(num_steps)]
    trainer.save(root)
    held = []
    for bucket in trainer.replica.buckets:
        moments = trainer.optimizer.state[bucket.master].values()
        num_bytes = sum(tensor.nbytes for tensor in (bucket.master, *moments) if tensor.dim())
        held.append((num_bytes, sum(param.numel() for param in bucket.params.values()), bucket.num_copies))
    return losses, held


def _load_and_step(rank, world_size, config, folder):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer.load(folder)
    saved = Checkpoint(folder)
    for key, tensor in state.held(trainer.replica, trainer.optimizer, trainer.ema).items():
        assert torch.equal(tensor, saved.read([key])[key]), key
    return trainer.train_step()[0]["loss"]


@pytest.fixture(scope="module")
def deepspeed():
    """Imported once rather than on every forked rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    return pytest.importorskip("deepspeed.runtime.bf16_optimizer")


@pytest.mark.parametrize(
    ("world", "parallel", "moments", "num_steps"),
    [
        (2, {"pp": 2, "schedule": "dualpipe"}, "fp32", 3),
        pytest.param(2, {"pp": 2, "schedule": "dualpipe"}, "fp32", 20, marks=SLOW),
        pytest.param(1, {}, "fp32", 20, marks=SLOW),
        pytest.param(4, {"ep": 2, "dispatcher": "all_to_all"}, "bf16", 20, marks=SLOW),
        pytest.param(
            4,
            {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "all_to_all"},
            "fp32",
            20,
            marks=SLOW,
        ),
        pytest.param(3, {"pp": 3, "schedule": "1f1b"}, "fp32", 20, marks=SLOW),
    ],
)
def test_deepspeed_does_as_torch_does(deepspeed, data, tmp_path, world, parallel, moments, num_steps):
    """Losses to BF16 rounding, masters and moments to 1e-6 of their largest element; each in 1 / copies of the memory
    that whole states take, within 5 %; and each continues what the other has saved.
    """

    def settings(backend):
        changed = config(data, precision="bf16", **parallel, zero_stage=1, zero_backend=backend)
        changed.optim.moments = moments
        return changed

    results = {
        b: run_ranks(world, _train_and_save, settings(b), tmp_path / b, num_steps) for b in ("torch", "deepspeed")
    }
    for (ours, held), (theirs, held_there) in zip(*results.values(), strict=True):
        assert theirs == pytest.approx(ours, rel=2**-8)
        assert held == held_there
        whole = sum(numel * {"fp32": 12, "bf16": 8}[moments] / copies for _, numel, copies in held)
        assert sum(num_bytes for num_bytes, *_ in held) == pytest.approx(whole, rel=0.05)
    ours, theirs = (Checkpoint(tmp_path / backend / f"step_{num_steps}") for backend in results)
    assert ours.keys == theirs.keys
    for key, tensor in ours.read(ours.keys).items():
        assert (tensor - theirs.read([key])[key]).abs().max() <= 1e-6 * tensor.abs().max(), key
    (a, *_), (b, *_) = (run_ranks(world, _load_and_step, settings(name), theirs.folder) for name in results)
    assert a == pytest.approx(b, rel=2**-8)
