"""The training state on this rank, by whole-model name: views to save from and to load into.

Keys are `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `bias/NAME`. Stacked experts are taken apart, and numbered
as in the whole model (`...mlp.experts.7.down_proj`): so a key never depends on the layout, and any layout finds what it
needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from infra.checkpoint import Checkpoint
from infra.optim import Bucket
from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer
from parallel.parallelize import Replica, is_expert


def held(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every named tensor that this rank holds; writing into one changes the state."""
    state = {key: view for bucket in replica.buckets for key, view in _bucket_state(bucket, replica, optimizer)}
    return state | _biases(replica)


def saved(replica: Replica, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Tensor]:
    """The part of `held` that world rank `rank` writes into a checkpoint: over all ranks, every key exactly once."""
    first = [bucket for bucket in replica.buckets if bucket.copy == 0]
    state = {key: view for bucket in first for key, view in _bucket_state(bucket, replica, optimizer)}
    return state | (_biases(replica) if rank == 0 else {})


@torch.no_grad()
def load(checkpoint: Checkpoint, replica: Replica, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Fills this rank's state from a checkpoint of any layout, made after `step` steps.

    Before the first step all moments are zero, and a checkpoint need not have them. Raises CheckpointError when the
    models differ.
    """
    state = held(replica, optimizer)
    moments = [key for key in state if key.startswith("exp_avg")] if step == 0 else []
    for key in moments:
        state.pop(key).zero_()
    for key, tensor in checkpoint.read(state).items():
        state[key].copy_(tensor)
    for bucket in replica.buckets:
        optimizer.state[bucket.master]["step"].fill_(step)
        bucket.sync_weights()


def model_config(saved: Checkpoint) -> ModelConfig:
    """Of the model that a checkpoint holds."""
    keys = dict(saved.meta["model"])
    keys["rope_scaling"] = keys["rope_scaling"] and RopeScaling(**keys["rope_scaling"])
    return ModelConfig(**keys)


def whole_tensor(saved: Checkpoint, name: str, shape: torch.Size) -> Tensor:
    """One parameter (its master weight) or routing bias of the whole model, experts stacked."""
    if name.endswith("e_score_correction_bias"):
        keys = [f"bias/{name}"]
    elif is_expert(name):
        stem, leaf = name.rsplit(".", 1)
        keys = [f"master/{stem}.{e}.{leaf}" for e in range(shape[0])]
    else:
        keys = [f"master/{name}"]
    read = saved.read(keys)
    return torch.stack([read[key] for key in keys]).view(shape)


def whole_model(saved: Checkpoint) -> Transformer:
    """The model of a checkpoint of any layout, whole, in this process; multi-token prediction is part of it."""
    with torch.device("meta"):
        model = Transformer(model_config(saved))
    tensors = {name: whole_tensor(saved, name, meta.shape) for name, meta in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model


def _bucket_state(bucket: Bucket, replica: Replica, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    adam = optimizer.state[bucket.master]
    for kind, flat in (
        ("master", bucket.master.data),
        ("exp_avg", adam["exp_avg"]),
        ("exp_avg_sq", adam["exp_avg_sq"]),
    ):
        for name, view in bucket.views(flat).items():
            if is_expert(name):
                stem, leaf = name.rsplit(".", 1)
                for i, expert in enumerate(view):
                    yield f"{kind}/{stem}.{replica.first_expert + i}.{leaf}", expert
            else:
                yield f"{kind}/{name}", view


def _biases(replica: Replica) -> dict[str, Tensor]:
    return {
        f"bias/model.layers.{n}.mlp.gate.e_score_correction_bias": replica.bias_LE[n] for n in replica.biased_layers
    }
