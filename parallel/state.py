"""The training state on this rank, by whole-model name: views to save from and to load into.

Keys are `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/NAME` and `bias/NAME`. Stacked experts are taken apart,
and numbered as in the whole model (`...mlp.experts.7.down_proj`): so a key never depends on the layout, and any layout
finds what it needs. Where the borders of shares (infra/optim.py) cut a tensor, each copy has a piece of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from infra.checkpoint import Checkpoint, CheckpointError, piece
from infra.ema import Ema
from infra.optim import Bucket, sync_weights
from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer
from parallel.parallelize import Replica, is_expert

WEIGHTS = ("master", "ema")  # what a model can be made of: the weights, or their moving average


def held(replica: Replica, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Tensor]:
    """Every named tensor, or piece of one, that this rank holds; writing into one changes the state."""
    state = _averages(replica, ema) | _biases(replica)
    for bucket in replica.buckets:
        for kind, flat in _flats(bucket, optimizer).items():
            state |= _named(kind, flat, bucket.held.start, bucket, replica)
    return state


def saved(replica: Replica, optimizer: torch.optim.Optimizer, ema: Ema, rank: int) -> dict[str, Tensor]:
    """What world rank `rank` writes into a checkpoint, its shares: over all ranks, every element exactly once."""
    state = _averages(replica, ema) | (_biases(replica) if rank == 0 else {})
    for bucket in replica.buckets:
        for kind, flat in _flats(bucket, optimizer).items():
            state |= _named(kind, bucket.share_of(flat), bucket.share.start, bucket, replica)
    return state


@torch.no_grad()
def load(checkpoint: Checkpoint, replica: Replica, optimizer: torch.optim.Optimizer, ema: Ema, step: int) -> None:
    """Fills this rank's state from a checkpoint of any layout, made after `step` steps.

    Before the first step all moments are zero, and a checkpoint need not have them. One without averages starts them
    from its weights. Raises CheckpointError when the models differ, or a parameter or an expert is missing.
    """
    check_complete(checkpoint)
    state = held(replica, optimizer, ema)
    moments = [key for key in state if key.startswith("exp_avg")] if step == 0 else []
    for key in moments:
        state.pop(key).zero_()
    has_averages = any(key.startswith("ema/") for key in checkpoint.keys)
    if has_averages and not ema.sources:
        warnings.warn(f"{checkpoint.folder} holds averages that end here: train.ema_decay=0 keeps none", stacklevel=2)
    if not has_averages:
        state = {key: view for key, view in state.items() if not key.startswith("ema/")}
    for key, tensor in checkpoint.read(state).items():
        state[key].copy_(tensor)
    for bucket in replica.buckets:
        optimizer.state[bucket.master]["step"].fill_(step)
    sync_weights(replica.buckets)
    if not has_averages:
        ema.restart()


def model_config(saved: Checkpoint) -> ModelConfig:
    """Of the model that a checkpoint holds."""
    keys = dict(saved.meta["model"])
    keys["rope_scaling"] = keys["rope_scaling"] and RopeScaling(**keys["rope_scaling"])
    return ModelConfig(**keys)


def check_complete(saved: Checkpoint) -> None:
    """Raises CheckpointError naming a parameter, or an expert's, that the checkpoint lacks or that its model has not.

    That each is there only once was checked when it was saved.
    """
    with torch.device("meta"):
        model = Transformer(model_config(saved))
    expected = set()
    for name, param in model.named_parameters():
        names = [_of_expert(name, e) for e in range(len(param))] if is_expert(name) else [name]
        expected |= {f"master/{name}" for name in names}
    found = {key for key in saved.keys if key.startswith("master/")}
    if wrong := sorted(expected ^ found):
        what = "lacks" if wrong[0] in expected else "is not of its own model: it has"
        raise CheckpointError(f"{saved.folder} {what} {wrong[0]}")


def _of_expert(name: str, expert: int) -> str:
    """The whole-model name of one of the stacked experts."""
    stem, leaf = name.rsplit(".", 1)
    return f"{stem}.{expert}.{leaf}"


def whole_tensor(saved: Checkpoint, name: str, shape: torch.Size, weights: str = "master") -> Tensor:
    """One parameter or routing bias of the whole model, experts stacked. weights: one of `WEIGHTS`.

    Raises CheckpointError where there are no averages.
    """
    if weights == "ema" and not any(key.startswith("ema/") for key in saved.keys):
        raise CheckpointError(f"{saved.folder} holds no averages: train with train.ema_decay=0.999, or weights=master")
    if name.endswith("e_score_correction_bias"):
        keys = [f"bias/{name}"]
    elif is_expert(name):
        keys = [f"{weights}/{_of_expert(name, e)}" for e in range(shape[0])]
    else:
        keys = [f"{weights}/{name}"]
    read = saved.read(keys)
    return torch.stack([read[key] for key in keys]).view(shape)


def whole_model(saved: Checkpoint, weights: str = "master") -> Transformer:
    """The model of a checkpoint of any layout, whole, in this process; multi-token prediction is part of it."""
    with torch.device("meta"):
        model = Transformer(model_config(saved))
    tensors = {name: whole_tensor(saved, name, meta.shape, weights) for name, meta in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model


def _flats(bucket: Bucket, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is held of a bucket, by kind."""
    adam = optimizer.state[bucket.master]
    return {"master": bucket.master.data, "exp_avg": adam["exp_avg"], "exp_avg_sq": adam["exp_avg_sq"]}


def _averages(replica: Replica, ema: Ema) -> dict[str, Tensor]:
    averages = ema.averages  # of every bucket, or none
    return {
        key: view
        for bucket, average in zip(replica.buckets, averages, strict=bool(averages))
        for key, view in _named("ema", average, bucket.share.start, bucket, replica).items()
    }


def _named(kind: str, flat: Tensor, first: int, bucket: Bucket, replica: Replica) -> dict[str, Tensor]:
    """Views of `flat`, which holds the elements of a bucket from `first` on, by whole-model key."""
    views = {}
    for name, at, shape in _whole_model_tensors(bucket, replica):
        numel, offset = shape.numel(), at - first
        begin, end = max(offset, 0), min(offset + numel, flat.numel())
        if end - begin == numel:
            views[f"{kind}/{name}"] = flat[begin:end].view(shape)
        elif end > begin:
            views[piece(f"{kind}/{name}", begin - offset, end - offset, shape)] = flat[begin:end]
    return views


def _whole_model_tensors(bucket: Bucket, replica: Replica) -> Iterator[tuple[str, int, torch.Size]]:
    """(name, where its elements begin in the bucket, shape), experts taken apart."""
    for name, (at, shape) in bucket.places.items():
        if is_expert(name):
            for i in range(shape[0]):
                yield _of_expert(name, replica.first_expert + i), at + i * shape[1:].numel(), shape[1:]
        else:
            yield name, at, shape


def _biases(replica: Replica) -> dict[str, Tensor]:
    return {
        f"bias/model.layers.{n}.mlp.gate.e_score_correction_bias": replica.bias_LE[n] for n in replica.biased_layers
    }
