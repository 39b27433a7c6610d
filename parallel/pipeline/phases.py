"""The phases of a stage: pieces of a forward that are cut apart, so that two microbatches' pieces can be interleaved.

A phase maps named values to named values. `Compute` runs under autograd between leaves of its own, so its backward is
its own affair. `Dispatch` and `Combine` are communication: they start and return at once with values that are
`Pending`; whoever reads one first waits for it. Nothing else knows that anything travels. Gradients go from phase to
phase in a dict, by the names of the values that they are gradients of, and may be pending too.

    attend -> dispatch -> shared -> experts -> combine           a MoE layer; `shared` computes while tokens travel
    dense                                                        a dense layer

Shapes: B batch, L length, T = B L tokens, D model, K experts per token, R rows received here, E experts here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from infra.fp8.quantize import Quantized
from model.block import Block
from parallel.expert.dispatcher import Dispatcher
from parallel.expert.lane import Pending
from parallel.expert.payload import values_of
from parallel.recompute import Regions, Tape

Value = Any  # a Tensor, a Pending, or whatever else a phase hands on


class Phase(Protocol):
    """`inputs` and `outputs` are names. `forward` also returns what `backward` needs; `backward` gets a gradient or
    None for each output and returns one for each input. Where `reruns`, what forward left goes through `rerun` first:
    that needs no gradient, so it can run while the gradients travel."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def reruns(self) -> bool: ...

    def forward(self, inputs: Sequence[Value], training: bool) -> tuple[Sequence[Value], Any]: ...
    def rerun(self, saved: Any) -> Any: ...
    def backward(self, saved: Any, grads: Sequence[Tensor | None]) -> Sequence[Value | None]: ...


@dataclass
class Compute:
    """A phase that autograd differentiates.

    full: it keeps its inputs alone, and `rerun` computes everything again. regions: it keeps what the model's regions
    (parallel/recompute.py) leave, and `rerun` computes the rest.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., Sequence[Value]]
    full: bool = False
    regions: Regions | None = None

    @property
    def reruns(self) -> bool:
        return self.full or self.regions is not None

    def forward(self, inputs: Sequence[Value], training: bool) -> tuple[Sequence[Value], Any]:
        if training and not self.full:
            outputs, saved = self._record(inputs)
            return [value.detach() if isinstance(value, Tensor) else value for value in outputs], saved
        with torch.no_grad():
            return self.run(*inputs), [_kept(value) for value in inputs] if training else None

    def rerun(self, saved: Any) -> Any:
        if self.full:
            return self._record([values_of(*value) if isinstance(value, _InFp8) else value for value in saved])[1]
        saved.tape.rerun()
        return saved

    def _record(self, inputs: Sequence[Value]) -> tuple[Sequence[Value], _Graph]:
        starts, entered = zip(*(_entered(value) for value in inputs), strict=True)
        recording = self.regions.recording() if self.regions else nullcontext()
        with torch.enable_grad(), recording as tape:
            outputs = self.run(*entered)
        ends = [get_gradient_edge(v) if isinstance(v, Tensor) and v.requires_grad else None for v in outputs]
        return outputs, _Graph(starts, ends, tape)

    def backward(self, saved: _Graph, grads: Sequence[Tensor | None]) -> Sequence[Value | None]:
        known = [(end, g) for end, g in zip(saved.ends, grads, strict=True) if end is not None and g is not None]
        torch.autograd.backward([end for end, _ in known], [g for _, g in known])
        if saved.tape is not None:
            saved.tape.release()
        return [None if start is None else start.grad for start in saved.starts]


class _Graph(NamedTuple):
    """What a forward leaves: where its graph starts and ends. Neither keeps values: only what the backward of some
    operation in between reads is kept, and that by autograd."""

    starts: Sequence[Tensor | None]  # leaves of the inputs' shapes that have no elements of their own
    ends: Sequence[GradientEdge | None]
    tape: Tape | None


class _InFp8(NamedTuple):
    """A tensor that came in FP8, without its values in another dtype."""

    rows: Quantized
    dtype: torch.dtype
    power_of_two: bool


def _kept(value: Value) -> Value:
    return _InFp8(value.came_as, value.dtype, hasattr(value, "quantized")) if hasattr(value, "came_as") else value


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def _entered(value: Value) -> tuple[Tensor | None, Value]:
    """A leaf, and the same values behind it; what has no gradient stays as it is."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return None, value
    start = value.new_empty(()).expand(value.shape).requires_grad_()
    entered = _Enter.apply(start, value)
    if hasattr(value, "quantized"):  # see infra/fp8/linear.py
        entered.quantized = value.quantized
    return start, entered


class _Travel:
    """What both journeys share: they keep no activation, so there is nothing to compute again."""

    reruns = False

    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher

    def rerun(self, saved: Any) -> Any:
        return saved


class Dispatch(_Travel):
    """Takes tokens to their experts; backward brings the sums of their copies' gradients home."""

    name: str = "dispatch"
    inputs: tuple[str, ...] = ("x", "topk_idx", "topk_weights")
    outputs: tuple[str, ...] = ("x_R", "weights_R", "num_tokens_per_expert", "handle")

    def forward(self, inputs: Sequence[Value], training: bool) -> tuple[Sequence[Value], Any]:
        routed = self.dispatcher.start_dispatch(*inputs)
        parts = [_part(routed, i) for i in range(4)]
        return parts, parts[3]

    def backward(self, saved: Any, grads: Sequence[Tensor | None]) -> Sequence[Value | None]:
        home = self.dispatcher.start_dispatch_backward(grads[0], grads[1], saved.wait())  # type: ignore[arg-type]
        return _part(home, 0), None, _part(home, 1)


class Combine(_Travel):
    """Brings the experts' outputs home and closes the residual; backward takes its gradient to the experts."""

    name: str = "combine"
    inputs: tuple[str, ...] = ("h", "y_R", "shared", "handle")
    outputs: tuple[str, ...] = ("h",)

    def forward(self, inputs: Sequence[Value], training: bool) -> tuple[Sequence[Value], Any]:
        h_BLD, y_RD, shared_TD, handle = inputs
        routed = self.dispatcher.start_combine(y_RD, handle)
        return [Pending(lambda: h_BLD + (routed.wait() + shared_TD).view_as(h_BLD))], handle

    def backward(self, saved: Any, grads: Sequence[Tensor | None]) -> Sequence[Value | None]:
        gh_BLD = grads[0]
        assert gh_BLD is not None
        gy_TD = gh_BLD.reshape(-1, gh_BLD.shape[-1])
        return gh_BLD, self.dispatcher.start_combine_backward(gy_TD, saved), gy_TD, None


def _part(pending: Pending, index: int) -> Pending:
    """One of several results. Waited for, it lets go of the others: a handle is kept long after the rows it moved."""
    whole: Pending | None = pending
    part: Any = None

    def wait() -> Any:
        nonlocal whole, part
        if whole is not None:
            part, whole = whole.wait()[index], None
        return part

    del pending
    return Pending(wait)


def layer_phases(block: Block, layer: int, full: bool, regions: Regions | None) -> tuple[list[Phase], list[Phase]]:
    """A layer, h -> h, as its phases in forward and in backward order; each way `shared` hides a journey.

    A MoE layer also gives its balance loss and, by its number, its load.
    """
    if not block.is_moe:

        def dense(h_BLD: Tensor, documents_BL: Tensor | None) -> tuple[Tensor]:
            return (block(h_BLD, documents_BL).h_BLD,)

        only: list[Phase] = [Compute("dense", ("h", "documents"), ("h",), dense, full, regions)]
        return only, only

    def attend(h_BLD: Tensor, documents_BL: Tensor | None) -> tuple:
        a = block.attend(h_BLD, documents_BL)
        return a.h_BLD, a.x_TD, a.topk_weights_TK, a.balance_loss, a.topk_idx_TK, a.load_E

    attended = ("h", "x", "topk_weights", "balance_loss", "topk_idx", f"load.{layer}")
    attend_phase = Compute("attend", ("h", "documents"), attended, attend, full, regions)
    dispatch = Dispatch(block.mlp.dispatcher)
    shared = Compute("shared", ("x",), ("shared",), lambda x_TD: (block.shared_expert(x_TD),), full, regions)
    experts = Compute("experts", dispatch.outputs[:3], ("y_R",), lambda *rows: (block.experts(*rows),), full, regions)
    combine = Combine(block.mlp.dispatcher)
    return [attend_phase, dispatch, shared, experts, combine], [combine, shared, experts, dispatch, attend_phase]
