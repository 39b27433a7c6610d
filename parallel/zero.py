"""Who steps the optimizer: our own AdamW on the buckets, or DeepSpeed's ZeRO-1 optimizer under the same buckets.

DeepSpeed's `BF16_Optimizer` keeps V3's precision (report, section 3.3): FP32 master shares and gradients, an AdamW of
ours on the shares, BF16 weights that it rounds and gathers. It is used by itself, without DeepSpeed's engine, which
would bring one data-parallel group, hooks in the modules and a gradient norm that is wrong for experts. Here every
bucket keeps its own group of owners (mirrored ranks of DualPipe, copies of experts, a shared embedding); gradients are
reduced, their norm taken and clipped as everywhere (infra/optim.py), and states are found in the buckets as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from infra.optim import MOMENTS, Bucket, make_adamw, start_moments


def deepspeed_adamw(
    buckets: Sequence[Bucket], lr: float, betas: Sequence[float], eps: float, moments: str
) -> torch.optim.Optimizer:
    """As `make_adamw`, sharded, stepped and gathered by DeepSpeed; the sharded buckets' tensors are then DeepSpeed's.

    Collective over the world. Raises ValueError where DeepSpeed cannot be imported.
    """
    optimizer_class, config = _load()
    params = [_all_params(bucket) for bucket in buckets]
    groups = [{"params": p, "weight_decay": b.weight_decay} for p, b in zip(params, buckets, strict=True)]
    adamw = MOMENTS[moments](groups, lr=lr, betas=(betas[0], betas[1]), eps=eps)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    owners = [bucket.group or alone for bucket in buckets]
    names = {param: "padding" for group in params for param in group}
    names |= {param: name for bucket in buckets for name, param in bucket.params.items()}

    class Zero1(optimizer_class):  # type: ignore[misc, valid-type]
        """Each group of parameters over its own ranks. Gradients are in its FP32 buffers already."""

        def _setup_for_real_optimizer(self) -> None:
            self.real_dp_process_group = owners
            super()._setup_for_real_optimizer()

        def step(self, closure: Any = None) -> None:
            self.fp32_groups_has_gradients = [[True] * len(group) for group in self.bf16_groups]
            super().step(closure)

    masters = [bucket.master.data for bucket in buckets]
    with redirect_stdout(StringIO()):  # it prints the memory in use, at every step of its set-up
        zero1 = Zero1(adamw, names, config, grad_acc_dtype=torch.float32)
    for i, (bucket, master) in enumerate(zip(buckets, masters, strict=True)):
        bucket.weight, bucket.grad = zero1.bf16_groups_flat[i], zero1.fp32_groups_gradients_flat[i]
        bucket.master = zero1.fp32_groups_flat_partition[i]
        bucket.master.data.copy_(master)  # DeepSpeed starts from rounded weights
        for name, grad in bucket.views(bucket.grad).items():
            bucket.params[name].main_grad = grad  # type: ignore[attr-defined]
    start_moments(buckets, adamw, moments)
    return zero1


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"torch": make_adamw, "deepspeed": deepspeed_adamw}


def _all_params(bucket: Bucket) -> list[nn.Parameter]:
    """The bucket's parameters and its padding, so that DeepSpeed, which pads otherwise, cuts the same shares."""
    end = sum(param.numel() for param in bucket.params.values())
    padding = [nn.Parameter(bucket.weight[end:])] if end < bucket.weight.numel() else []
    return [*bucket.params.values(), *padding]


def _load() -> tuple[type, Any]:
    """DeepSpeed's optimizer class and its BF16 settings."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it warns of having had to find out
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"parallel.zero_backend=deepspeed: {error}: pip install deepspeed, or parallel.zero_backend=torch"
        ) from None
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}  # else it probes for all its kernels, and compiles one under a lock
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    return BF16_Optimizer, DeepSpeedBF16Config(enabled=True)
