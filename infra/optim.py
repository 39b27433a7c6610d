"""Parameters in flat buckets: FP32 gradients, FP32 master weights, AdamW, and the exact global gradient norm.

A *bucket* holds the parameters that are reduced and updated alike: the same group of ranks holds a copy of each, and
the same weight decay applies. It owns four flat tensors (gradient, master weight, two moments), and every parameter's
`main_grad` is a view into the first. So a reduction is one collective, an update one fused kernel, and a gradient norm
one dot product per bucket, however many parameters there are.

Gradients are accumulated in FP32 (FP64 for FP64 runs) over the microbatches of a step, whatever the compute dtype:
linear layers add into `main_grad` themselves; for all other parameters a hook moves `.grad` there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.adamw import LowPrecisionAdamW

# What the optimizer's moments are kept in, and the AdamW that does so.
MOMENTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fp32": partial(torch.optim.AdamW, fused=True),
    "bf16": LowPrecisionAdamW,
}


@dataclass
class Bucket:
    """Parameters that share an owner group and a weight decay.

    shapes: by whole-model parameter name, in order. group: the ranks that hold a copy of them (None: this rank alone);
    num_copies: how many ranks that is. compute_dtype: what the model computes with; accumulation_dtype: gradients,
    master weights and moments. copy: which of the copies this rank has; copy 0 writes checkpoints.

    grad, master: flat, [num elements]. weight: flat, in the compute dtype, what the parameters are views of (the same
    storage as `master` where the two dtypes agree). All are allocated, none is initialised but `grad`, which is zero.
    """

    shapes: dict[str, torch.Size]
    weight_decay: float
    compute_dtype: torch.dtype
    accumulation_dtype: torch.dtype
    device: torch.device
    group: dist.ProcessGroup | None = None
    num_copies: int = 1
    copy: int = 0
    grad: Tensor = field(init=False)
    master: nn.Parameter = field(init=False)
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        numel = sum(shape.numel() for shape in self.shapes.values())
        self.grad = torch.zeros(numel, dtype=self.accumulation_dtype, device=self.device)
        self.master = nn.Parameter(torch.empty(numel, dtype=self.accumulation_dtype, device=self.device))
        self.master.grad = self.grad
        if self.compute_dtype == self.accumulation_dtype:
            self.weight = self.master.data
        else:
            self.weight = torch.empty(numel, dtype=self.compute_dtype, device=self.device)

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """A parameter for every name, a view of `weight`, with its `main_grad`."""
        grads = self.views(self.grad)
        params = {}
        for name, weight in self.views(self.weight).items():
            params[name] = param = nn.Parameter(weight)
            param.main_grad = grads[name]  # type: ignore[attr-defined]
            param.register_post_accumulate_grad_hook(_add_to_main_grad)
        return params

    @property
    def share(self) -> slice:
        """The part of the flat tensors that falls to this copy, where the copies share out what one of them can do."""
        size = -(-self.grad.numel() // self.num_copies)
        return slice(self.copy * size, (self.copy + 1) * size)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` (any tensor laid out like `master`) cut into one view a parameter, by whole-model name."""
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def sync_weights(self) -> None:
        """Rounds the master weights into the parameters that the model computes with."""
        if self.weight.dtype != self.master.dtype:
            self.weight.copy_(self.master.data)


def _add_to_main_grad(param: Tensor) -> None:
    """Post-accumulate hook: moves what autograd left in `.grad` into the accumulating `main_grad`."""
    if param.grad is not None:  # a linear layer has put its gradient into main_grad itself
        param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
        param.grad = None


def reduce_gradients(buckets: Iterable[Bucket]) -> None:
    """Sums the gradients over every rank that holds a copy."""
    works = [
        dist.all_reduce(bucket.grad, group=bucket.group, async_op=True) for bucket in buckets if bucket.num_copies > 1
    ]
    for work in works:
        work.wait()


def global_grad_norm(buckets: Iterable[Bucket], world_size: int) -> float:
    """The L2 norm of the whole model's gradient, each parameter counted once; call after `reduce_gradients`, on all
    ranks.

    Every rank adds its squares divided by the number of copies, and one sum over the world makes the total.
    """
    total = torch.zeros((), dtype=torch.float64)
    for bucket in buckets:
        total += bucket.grad.norm().double().cpu().square() / bucket.num_copies
    if world_size > 1:
        dist.all_reduce(total)
    return total.sqrt().item()


def clip_gradients(buckets: Iterable[Bucket], norm: float, max_norm: float) -> None:
    """Scales all gradients so that their global norm is at most `max_norm`."""
    if norm > max_norm > 0:
        for bucket in buckets:
            bucket.grad.mul_(max_norm / norm)


def make_adamw(
    buckets: Sequence[Bucket], lr: float, betas: Sequence[float], eps: float, moments: str = "fp32"
) -> torch.optim.Optimizer:
    """AdamW over the flat master weights: one parameter group, in effect one fused kernel, a bucket.

    moments: one of `MOMENTS`; fp32 stands for the dtype of the master weights.
    """
    groups = [{"params": [b.master], "weight_decay": b.weight_decay} for b in buckets]
    optimizer = MOMENTS[moments](groups, lr=lr, betas=(betas[0], betas[1]), eps=eps)
    for b in buckets:  # what AdamW would make in its first step: a checkpoint may fill it before
        step = torch.zeros((), dtype=torch.float32, device=b.device)
        dtype = torch.bfloat16 if moments == "bf16" else b.accumulation_dtype
        optimizer.state[b.master] = {
            "step": step,
            "exp_avg": torch.zeros_like(b.master, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(b.master, dtype=dtype),
        }
    return optimizer


def update(buckets: Sequence[Bucket], optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One optimizer step at learning rate `lr`; leaves the gradients zero and the computing weights in step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for bucket in buckets:
        bucket.sync_weights()
        bucket.grad.zero_()


def discard_gradients(buckets: Iterable[Bucket]) -> None:
    """Zeroes the gradients of a step that is not taken; weights and moments stay as they are."""
    for bucket in buckets:
        bucket.grad.zero_()
