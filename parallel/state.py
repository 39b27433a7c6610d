"""The training state on this rank, by whole-model name: views to save from and to load into.

Keys are `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/NAME` and `bias/NAME`. Stacked experts are taken apart,
and numbered as in the whole model (`...mlp.experts.7.down_proj`): so a key never depends on the layout, and any layout
finds what it needs. What the copies of a bucket share out among them is cut anywhere: `ema/NAME#START` is the part from
element START on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from infra.checkpoint import Checkpoint, CheckpointError
from infra.ema import Ema
from infra.optim import Bucket
from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer
from parallel.parallelize import Replica, is_expert

WEIGHTS = ("master", "ema")  # what a model can be made of: the weights, or their moving average


def held(replica: Replica, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Tensor]:
    """Every named tensor, or part of one, that this rank holds; writing into one changes the state."""
    state = {key: view for bucket in replica.buckets for key, view in _bucket_state(bucket, replica, optimizer)}
    return state | _averages(replica, ema) | _biases(replica)


def saved(replica: Replica, optimizer: torch.optim.Optimizer, ema: Ema, rank: int) -> dict[str, Tensor]:
    """The part of `held` that world rank `rank` writes into a checkpoint: over all ranks, every key exactly once."""
    first = [bucket for bucket in replica.buckets if bucket.copy == 0]
    state = {key: view for bucket in first for key, view in _bucket_state(bucket, replica, optimizer)}
    return state | _averages(replica, ema) | (_biases(replica) if rank == 0 else {})


@torch.no_grad()
def load(checkpoint: Checkpoint, replica: Replica, optimizer: torch.optim.Optimizer, ema: Ema, step: int) -> None:
    """Fills this rank's state from a checkpoint of any layout, made after `step` steps.

    Before the first step all moments are zero, and a checkpoint need not have them. One without averages starts them
    from its weights. Raises CheckpointError when the models differ.
    """
    state = held(replica, optimizer, ema)
    moments = [key for key in state if key.startswith("exp_avg")] if step == 0 else []
    for key in moments:
        state.pop(key).zero_()
    has_averages = any(key.startswith("ema/") for key in checkpoint.keys)
    if has_averages and not ema.sources:
        warnings.warn(f"{checkpoint.folder} holds averages that end here: train.ema_decay=0 keeps none", stacklevel=2)
    if not has_averages:
        state = {key: view for key, view in state.items() if not key.startswith("ema/")}
    whole = checkpoint.read({key.partition("#")[0] for key in state})
    for key, view in state.items():
        name, _, start = key.partition("#")
        view.copy_(whole[name].flatten()[int(start or 0) :][: view.numel()].view_as(view))
    for bucket in replica.buckets:
        optimizer.state[bucket.master]["step"].fill_(step)
        bucket.sync_weights()
    if not has_averages:
        ema.restart()


def model_config(saved: Checkpoint) -> ModelConfig:
    """Of the model that a checkpoint holds."""
    keys = dict(saved.meta["model"])
    keys["rope_scaling"] = keys["rope_scaling"] and RopeScaling(**keys["rope_scaling"])
    return ModelConfig(**keys)


def whole_tensor(saved: Checkpoint, name: str, shape: torch.Size, weights: str = "master") -> Tensor:
    """One parameter or routing bias of the whole model, experts stacked. weights: one of `WEIGHTS`.

    Raises CheckpointError where there are no averages.
    """
    if weights == "ema" and not any(key.startswith("ema/") for key in saved.keys):
        raise CheckpointError(f"{saved.folder} holds no averages: train with train.ema_decay=0.999, or weights=master")
    if name.endswith("e_score_correction_bias"):
        keys = [f"bias/{name}"]
    elif is_expert(name):
        stem, leaf = name.rsplit(".", 1)
        keys = [f"{weights}/{stem}.{e}.{leaf}" for e in range(shape[0])]
    else:
        keys = [f"{weights}/{name}"]
    read = saved.read(keys)
    return torch.stack([read[key].flatten() for key in keys]).view(shape)


def whole_model(saved: Checkpoint, weights: str = "master") -> Transformer:
    """The model of a checkpoint of any layout, whole, in this process; multi-token prediction is part of it."""
    with torch.device("meta"):
        model = Transformer(model_config(saved))
    tensors = {name: whole_tensor(saved, name, meta.shape, weights) for name, meta in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model


def _bucket_state(bucket: Bucket, replica: Replica, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    adam = optimizer.state[bucket.master]
    yield from _named("master", bucket.master.data, 0, bucket, replica)
    for kind in ("exp_avg", "exp_avg_sq"):
        yield from _named(kind, adam[kind], 0, bucket, replica)


def _averages(replica: Replica, ema: Ema) -> dict[str, Tensor]:
    averages = ema.averages  # of every bucket, or none
    return {
        key: view
        for bucket, average in zip(replica.buckets, averages, strict=bool(averages))
        for key, view in _named("ema", average, bucket.share.start, bucket, replica)
    }


def _named(kind: str, flat: Tensor, first: int, bucket: Bucket, replica: Replica) -> Iterator[tuple[str, Tensor]]:
    """Views of `flat`, which holds the elements of a bucket from `first` on, by whole-model key."""
    start = -first  # of the tensor at hand, in `flat`
    for name, shape in _whole_model_shapes(bucket, replica):
        begin, end = max(start, 0), min(start + shape.numel(), flat.numel())
        if end - begin == shape.numel():
            yield f"{kind}/{name}", flat[begin:end].view(shape)
        elif end > begin:
            yield f"{kind}/{name}#{begin - start}", flat[begin:end]
        start += shape.numel()


def _whole_model_shapes(bucket: Bucket, replica: Replica) -> Iterator[tuple[str, torch.Size]]:
    """Of the tensors of a bucket, in order, experts taken apart."""
    for name, shape in bucket.shapes.items():
        if is_expert(name):
            stem, leaf = name.rsplit(".", 1)
            yield from ((f"{stem}.{replica.first_expert + i}.{leaf}", shape[1:]) for i in range(shape[0]))
        else:
            yield name, shape


def _biases(replica: Replica) -> dict[str, Tensor]:
    return {
        f"bias/model.layers.{n}.mlp.gate.e_score_correction_bias": replica.bias_LE[n] for n in replica.biased_layers
    }
