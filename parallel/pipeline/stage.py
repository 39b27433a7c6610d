"""A piece of the transformer as the executor wants it: phases that run one microbatch forward and backward.

A stage holds, by microbatch, what its forward left for its backward - and nothing when it only evaluates. A name that
two phases read collects the sum of both gradients; a loss is an output whose gradient is known in advance.

Shapes: M microbatches, B batch, L length, T = B L tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.block import Block
from model.linear import Linear, run_region
from model.loss import cross_entropy
from model.mtp import MTPBlock
from parallel.expert.lane import Pending
from parallel.pipeline.executor import Phases
from parallel.pipeline.p2p import Spec
from parallel.pipeline.phases import Compute, Phase, Value, layer_phases
from parallel.pipeline.weight_grad import WeightGrads
from parallel.recompute import Regions


class BatchScale(NamedTuple):
    """What makes losses of microbatches add up to that of the global batch, and how they are weighted."""

    num_tokens: int  # of the global batch
    weights: Mapping[str, float]  # of lm_loss, mtp_loss and balance_loss in the sum that is minimised


class TransformerStage:
    """A run of layers; the first stage has the embedding, the last the norm, the head and the modules of MTP.

    layers: by whole-model number. output: what it hands on. is_first: whether tokens come in rather than hidden states.
    embed: for the first stage, and for the last where there is MTP. norm, head: for the last.
    recompute: what backward computes again instead of keeping it: `none`, `selective` (the model's regions) or `full`.
    """

    def __init__(
        self,
        layers: Mapping[int, Block],
        output: Spec,
        *,
        is_first: bool,
        embed: Callable[[Tensor], Tensor] | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        head: Linear | None = None,
        recompute: str = "none",
    ):
        self.output, self._is_first = output, is_first
        self._recompute_all = recompute == "full"
        self._regions = Regions() if recompute == "selective" else None
        self._embed, self._norm, self._head = embed, norm, head
        self._weight_grads = WeightGrads()
        for module in [*layers.values(), *([head] if head is not None else [])]:
            for layer in module.modules():
                if hasattr(layer, "weight_grad"):
                    layer.weight_grad = self._weight_grads  # type: ignore[assignment]
                if getattr(layer, "region", None) is run_region and self._regions is not None:
                    layer.region = self._regions  # type: ignore[assignment]
        self._forward: list[Phase] = []
        self._backward: list[Phase] = []
        self._make_phases(layers)
        self._saved: dict[int, dict[int, Any]] = {}  # by microbatch, by the phase's id
        self.begin(torch.empty(0), BatchScale(1, {}), training=False)

    def begin(self, tokens_MBL: Tensor, scale: BatchScale, training: bool, documents_MBL: Tensor | None = None) -> None:
        """Starts a step: `tokens_MBL` [M, B, L + 1], of which the last stage predicts [..., 1:]."""
        self._tokens_MBL, self._documents_MBL = tokens_MBL, documents_MBL
        self._scale, self._training = scale, training
        self.losses: dict[str, Tensor] = {}  # sums over this stage's microbatches
        self.loads: dict[int, Tensor] = {}  # tokens per expert, by layer

    def forward(self, mb: int, x: Tensor | None) -> Phases:
        tokens_BL = self._tokens_MBL[mb]
        values: dict[str, Value] = {
            "h": x,
            "tokens": tokens_BL[:, :-1],
            "labels": tokens_BL[:, 1:],
            "documents": None if self._documents_MBL is None else self._documents_MBL[mb, :, :-1],
        }
        saved: dict[int, Any] = {}
        for phase in self._forward:
            yield phase.name
            inputs = [_arrived(values, name) for name in phase.inputs]
            outputs, kept = phase.forward(inputs, self._training)
            for name, output in zip(phase.outputs, outputs, strict=True):
                values[name] = output
                self._count(name, output)
            if self._training:
                saved[id(phase)] = kept
        if self._training:
            self._saved[mb] = saved
        if self._head is not None:
            return None
        yield "send"  # the last combine may still be under way
        return _arrived(values, "h")

    def backward(self, mb: int, grad: Tensor | None, split: bool) -> Phases:
        saved = self._saved.pop(mb)
        grads: dict[str, list[Value]] = {} if grad is None else {"h": [grad]}
        for phase in self._backward:
            kept = saved.pop(id(phase))
            if phase.reruns:
                yield "recompute"
                kept = phase.rerun(kept)
            yield phase.name
            incoming = [self._seed(name, grads) for name in phase.outputs]
            with self._weight_grads.deferred(mb) if split else nullcontext():
                outgoing = phase.backward(kept, incoming)
            for name, value in zip(phase.inputs, outgoing, strict=True):
                if value is not None:
                    grads.setdefault(name, []).append(value)
            del kept, incoming, outgoing, value
        return None if self._is_first else _sum(grads["h"])

    def weight_grad(self, mb: int) -> None:
        self._weight_grads.run(mb)

    @property
    def live(self) -> int:
        """Microbatches whose activations are held here."""
        return len(self._saved)

    def _seed(self, name: str, grads: dict[str, list[Value]]) -> Tensor | None:
        """The gradient of an output: a loss's weight, or the sum that its readers left; None where nobody asks."""
        if name in self._scale.weights:
            return torch.tensor(self._scale.weights[name], dtype=self.losses[name].dtype)
        return _sum(grads.pop(name)) if name in grads else None

    def _count(self, name: str, value: Value) -> None:
        if name.endswith("_loss"):
            self.losses[name] = self.losses.get(name, 0.0) + value.double()
        elif name.startswith("load."):
            layer = int(name.removeprefix("load."))
            self.loads[layer] = self.loads.get(layer, 0) + value

    def _make_phases(self, layers: Mapping[int, Block]) -> None:
        """Fills the forward order, and the backward order from its end."""

        def add(forward: list[Phase], backward: list[Phase]) -> None:
            self._forward += forward
            self._backward[:0] = backward

        def add_one(phase: Phase) -> None:
            add([phase], [phase])

        if self._is_first:
            add_one(Compute("embed", ("tokens",), ("h",), lambda tokens: (self._embed_tokens(tokens),)))
        for n, block in layers.items():
            if not isinstance(block, MTPBlock):
                add(*layer_phases(block, n, self._recompute_all, self._regions))
        if self._head is not None:
            add_one(Compute("head", ("h", "labels"), ("h", "lm_loss"), self._predict_next))
        depths = {n: block for n, block in layers.items() if isinstance(block, MTPBlock)}
        for k, (n, depth) in enumerate(depths.items(), start=1):
            join, predict = self._mtp_ends(k, depth)
            add_one(join)
            add(*layer_phases(depth, n, self._recompute_all, self._regions))
            add_one(predict)

    def _mtp_ends(self, k: int, depth: MTPBlock) -> tuple[Phase, Phase]:
        """What stands before and after the block of depth k of multi-token prediction (see model/mtp.py)."""

        def join(h_BLD: Tensor, tokens_BL: Tensor, documents_BL: Tensor | None) -> tuple:
            documents_BL = None if documents_BL is None else documents_BL[:, :-1]
            return depth.join(h_BLD[:, :-1], self._embed_tokens(tokens_BL[:, k:])), documents_BL

        def predict(h_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
            norm: Any = depth.shared_head.norm
            return h_BLD, self._cross_entropy("mtp_loss", norm(h_BLD), labels_BL[:, k:])

        return (
            Compute("join", ("h", "tokens", "documents"), ("h", "documents"), join),
            Compute("predict", ("h", "labels"), ("h", "mtp_loss"), predict),
        )

    def _embed_tokens(self, tokens_BL: Tensor) -> Tensor:
        assert self._embed is not None
        return self._embed(tokens_BL)

    def _predict_next(self, h_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        assert self._norm is not None
        h_BLD = self._norm(h_BLD)
        return h_BLD, self._cross_entropy("lm_loss", h_BLD, labels_BL)

    def _cross_entropy(self, name: str, h_BLD: Tensor, labels_BL: Tensor) -> Tensor:
        assert self._head is not None
        scale = self._scale
        return cross_entropy(
            h_BLD.flatten(0, 1), self._head, labels_BL.flatten(), scale.num_tokens, scale.weights.get(name)
        )


def _arrived(values: dict[str, Value], name: str) -> Value:
    """The value, waited for if it is still under way."""
    if isinstance(values[name], Pending):
        values[name] = values[name].wait()
    return values[name]


def _sum(parts: list[Value]) -> Tensor:
    """The sum of gradients, those under way waited for last."""
    parts = sorted(parts, key=lambda part: isinstance(part, Pending))
    total, *rest = (part.wait() if isinstance(part, Pending) else part for part in parts)
    for part in rest:
        total = total + part
    return total
