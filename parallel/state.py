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
    return state | {_bias_key(n): bias for n, bias in replica.biases.items()}


def saved(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The part of `held` that this rank writes into a checkpoint: over all ranks, every key exactly once."""
    first = [bucket for bucket in replica.buckets if bucket.copy == 0]
    state = {key: view for bucket in first for key, view in _bucket_state(bucket, replica, optimizer)}
    return state | {_bias_key(n): replica.biases[n] for n in replica.saved_biases}


@torch.no_grad()
def load(checkpoint: Checkpoint, replica: Replica, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Fills this rank's state from a checkpoint of any layout. Raises CheckpointError when the models differ."""
    state = held(replica, optimizer)
    for key, tensor in checkpoint.read(state).items():
        state[key].copy_(tensor)
    for bucket in replica.buckets:
        optimizer.state[bucket.master]["step"].fill_(step)
        bucket.sync_weights()


def whole_model(saved: Checkpoint) -> Transformer:
    """The model of a checkpoint of any layout, whole, in this process, with its master weights. Multi-token prediction
    is part of it."""
    keys = dict(saved.meta["model"])
    keys["rope_scaling"] = keys["rope_scaling"] and RopeScaling(**keys["rope_scaling"])
    with torch.device("meta"):
        model = Transformer(ModelConfig(**keys))
    tensors: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensors |= saved.read([f"bias/{name}"])
            tensors[name] = tensors.pop(f"bias/{name}")
        elif is_expert(name):
            stem, leaf = name.rsplit(".", 1)
            parts = [f"master/{stem}.{e}.{leaf}" for e in range(meta.shape[0])]
            read = saved.read(parts)
            tensors[name] = torch.stack([read[part] for part in parts])
        else:
            tensors[name] = saved.read([f"master/{name}"])[f"master/{name}"]
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


def _bias_key(layer: int) -> str:
    return f"bias/model.layers.{layer}.mlp.gate.e_score_correction_bias"
