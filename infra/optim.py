"""Parameters in flat buckets: FP32 gradients, FP32 master weights, AdamW, ZeRO-1, and the exact global gradient norm.

A *bucket* holds the parameters that are reduced and updated alike: the same group of ranks holds a copy of each, and
the same weight decay applies. It owns five flat tensors (weight, gradient, master weight, two moments), and every
parameter and its `main_grad` are views into the first two. So a reduction is one collective, an update one fused
kernel, and a gradient norm one dot product per bucket, however many parameters there are.

Every copy *answers for* an equal share of the bucket: it adds up the squares of its gradients and writes it to
checkpoints. Where the bucket is sharded (ZeRO-1: Rajbhandari et al. 2019, P_os) it also holds master weights and
moments of that share alone, and alone updates it: gradients are reduce-scattered, and new weights gathered. Either way
an element sees the same operations on the same numbers, so the two agree to the bit.

Gradients are accumulated in FP32 (FP64 for FP64 runs) over the microbatches of a step, whatever the compute dtype:
linear layers add into `main_grad` themselves; for all other parameters a hook moves `.grad` there at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
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

# Shares begin at multiples of so many elements: vector kernels round the rest of a tensor, which is no full vector,
# differently, so no share may have a rest.
ALIGNMENT = 16

# Their names up to torch 2.12 and from then on.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Bucket:
    """Parameters that share an owner group and a weight decay.

    shapes: by whole-model parameter name, in order. group: the ranks that hold a copy of them (None: this rank alone);
    num_copies: how many ranks that is; copy: which of the copies this rank has. compute_dtype: what the model computes
    with; accumulation_dtype: gradients, master weights and moments. is_sharded: whether each copy holds master weights
    and moments of its share alone.

    places: where the elements of each parameter begin, and its shape.
    params: by name, views of `weight`, each with its `main_grad`, a view of `grad`.
    share: the elements that this copy answers for. held: those whose master weights and moments it holds.
    grad, weight: flat, [num_copies x share], of which the end is padding; weight is in the compute dtype. master: flat,
    [held]; the same storage as `weight[held]` where the two dtypes agree. All are zero at first.
    """

    shapes: dict[str, torch.Size]
    weight_decay: float
    compute_dtype: torch.dtype
    accumulation_dtype: torch.dtype
    device: torch.device
    group: dist.ProcessGroup | None = None
    num_copies: int = 1
    copy: int = 0
    is_sharded: bool = False
    places: dict[str, tuple[int, torch.Size]] = field(init=False)
    params: dict[str, nn.Parameter] = field(init=False)
    share: slice = field(init=False)
    held: slice = field(init=False)
    grad: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    master: Tensor = field(init=False)

    def __post_init__(self) -> None:
        numel = 0
        self.places = {}
        for name, shape in self.shapes.items():
            self.places[name] = (numel, shape)
            numel += shape.numel()
        size = -(-numel // (self.num_copies * ALIGNMENT)) * ALIGNMENT
        self.share = slice(self.copy * size, (self.copy + 1) * size)
        self.held = self.share if self.is_sharded else slice(0, self.num_copies * size)
        self.grad = torch.zeros(self.num_copies * size, dtype=self.accumulation_dtype, device=self.device)
        self.weight = torch.zeros_like(self.grad, dtype=self.compute_dtype)
        self.master = nn.Parameter(self.weight[self.held].to(self.accumulation_dtype))
        self.master.grad = self.grad[self.held]
        self.params = {name: nn.Parameter(view) for name, view in self.views(self.weight).items()}
        for name, grad in self.views(self.grad).items():
            self.params[name].main_grad = grad  # type: ignore[attr-defined]
            self.params[name].register_post_accumulate_grad_hook(_add_to_main_grad)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` (any tensor laid out like `weight`) cut into one view a parameter, by whole-model name."""
        return {name: flat[at : at + shape.numel()].view(shape) for name, (at, shape) in self.places.items()}

    def share_of(self, flat: Tensor) -> Tensor:
        """This copy's share of a tensor that is laid out like `master`."""
        return flat[self.share.start - self.held.start : self.share.stop - self.held.start]

    @torch.no_grad()
    def fill(self, name: str, value: Tensor) -> None:
        """Gives a parameter its value, and as much of its master weight as is held."""
        at, shape = self.places[name]
        self.params[name].copy_(value)
        start, stop = max(at, self.held.start), min(at + shape.numel(), self.held.stop)
        if start < stop:
            self.master[start - self.held.start : stop - self.held.start] = value.view(-1)[start - at : stop - at]

    def start_reduction(self) -> dist.Work | None:
        """Starts to sum the gradients over all copies: all of them, or those of this copy's share."""
        if self.num_copies == 1:
            return None
        if self.is_sharded:
            return _reduce_scatter(self.grad[self.share], self.grad, group=self.group, async_op=True)
        return dist.all_reduce(self.grad, group=self.group, async_op=True)

    def start_sync(self) -> dist.Work | None:
        """Rounds the master weights into the weights, and starts to gather what other copies hold."""
        if self.weight.dtype != self.master.dtype:
            self.weight[self.held].copy_(self.master.data)
        if self.is_sharded and self.num_copies > 1:
            return _all_gather(self.weight, self.weight[self.share], group=self.group, async_op=True)
        return None


def _add_to_main_grad(param: Tensor) -> None:
    """Post-accumulate hook: moves what autograd left in `.grad` into the accumulating `main_grad`."""
    if param.grad is not None:  # a linear layer has put its gradient into main_grad itself
        param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
        param.grad = None


class Reduction:
    """Sums the gradients over every rank that holds a copy; of a sharded bucket, those of this rank's share.

    Starts when it is made, and goes on beside what the caller does until it waits.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._start = self._end = time.perf_counter()
        self._devices = {bucket.device for bucket in buckets if bucket.device.type == "cuda"}
        self._works = [work for bucket in buckets if (work := bucket.start_reduction())]
        self._watch = threading.Thread(target=self._note_end, daemon=True)
        if self._works:
            self._watch.start()

    def _note_end(self) -> None:
        """On a thread, because gloo's reduce-scatter neither calls back nor says whether it is complete."""
        with suppress(RuntimeError):  # `wait` raises it
            for work in self._works:
                work.wait()
            for device in self._devices:  # there `wait` has only queued the wait
                torch.cuda.current_stream(device).synchronize()
        self._end = time.perf_counter()

    def wait(self) -> tuple[float, float]:
        """(seconds from its start to its end, those of them for which this call waited)."""
        called = time.perf_counter()
        if self._works:
            self._watch.join()
        for work in self._works:
            work.wait()  # again: on CUDA it is the stream of this thread that has to wait
        return self._end - self._start, max(0.0, self._end - called)


def sync_weights(buckets: Iterable[Bucket]) -> None:
    """Brings the weights that the model computes with in step with the master weights; collective."""
    for work in [bucket.start_sync() for bucket in buckets]:
        if work is not None:
            work.wait()


def global_grad_norm(buckets: Iterable[Bucket], world_size: int) -> float:
    """The L2 norm of the whole model's gradient, each parameter counted once; call after the `Reduction`, on all
    ranks.

    Every copy adds the squares of its share, and one sum over the world makes the total.
    """
    total = torch.zeros((), dtype=torch.float64)
    for bucket in buckets:
        total += bucket.grad[bucket.share].norm().double().cpu().square()
    if world_size > 1:
        dist.all_reduce(total)
    return total.sqrt().item()


def clip_gradients(buckets: Iterable[Bucket], norm: float, max_norm: float) -> None:
    """Scales all gradients so that their global norm is at most `max_norm`."""
    if norm > max_norm > 0:
        for bucket in buckets:
            bucket.grad[bucket.held].mul_(max_norm / norm)


def make_adamw(
    buckets: Sequence[Bucket], lr: float, betas: Sequence[float], eps: float, moments: str = "fp32"
) -> torch.optim.Optimizer:
    """AdamW over the flat master weights: one parameter group, in effect one fused kernel, a bucket. Its step also
    syncs the weights.

    moments: one of `MOMENTS`; fp32 stands for the dtype of the master weights.
    """
    groups = [{"params": [b.master], "weight_decay": b.weight_decay} for b in buckets]
    optimizer = MOMENTS[moments](groups, lr=lr, betas=(betas[0], betas[1]), eps=eps)
    start_moments(buckets, optimizer, moments)
    optimizer.register_step_post_hook(lambda *_: sync_weights(buckets))
    return optimizer


def start_moments(buckets: Iterable[Bucket], optimizer: torch.optim.Optimizer, moments: str) -> None:
    """Makes what AdamW would make in its first step: a checkpoint may fill it before."""
    for b in buckets:
        step = torch.zeros((), dtype=torch.float32, device=b.device)
        dtype = torch.bfloat16 if moments == "bf16" else b.accumulation_dtype
        optimizer.state[b.master] = {
            "step": step,
            "exp_avg": torch.zeros_like(b.master, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(b.master, dtype=dtype),
        }


def update(buckets: Sequence[Bucket], optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One optimizer step at learning rate `lr`; leaves the gradients zero."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    discard_gradients(buckets)


def discard_gradients(buckets: Iterable[Bucket]) -> None:
    """Zeroes the gradients, of a step that was taken or of one that will not be."""
    for bucket in buckets:
        bucket.grad.zero_()
