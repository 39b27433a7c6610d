"""A piece of the transformer as the executor wants it: phases that run one microbatch forward and backward.

Each phase is a function from named tensors to named tensors. Its inputs are cut off the autograd graph, so a phase's
backward is its own affair: gradients live in a dict beside the graph, by the same names. That is what lets a slot of
two interleave the phases of two microbatches, and lets every phase be recomputed or split by itself. A name that two
phases read collects the sum of both gradients; a loss is an output whose gradient is known in advance.

A stage holds, by microbatch, what its forward left for its backward - and nothing when it only evaluates.

Shapes: B batch, L length, T = B L tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.linear import Linear
from model.loss import cross_entropy
from model.mtp import MTPBlock
from model.transformer import Block
from parallel.pipeline.executor import Phases
from parallel.pipeline.p2p import Spec
from parallel.pipeline.weight_grad import WeightGrads

Values = dict[str, Any]


class Phase(NamedTuple):
    """`run(*inputs)` returns the outputs as a tuple; both are names of the values that phases hand to each other."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., Sequence[Any]]


class _Done(NamedTuple):
    """A phase that ran: the cut-off inputs and the outputs between which its graph lies."""

    phase: Phase
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


def block_phases(block: Block, layer: int) -> list[Phase]:
    """The phases of one layer: h -> h. A MoE layer also gives its balance loss and, by its number, its load."""
    if not block.is_moe:
        return [Phase("dense", ("h", "documents"), ("h",), lambda h, documents: (block(h, documents).h_BLD,))]

    def attend(h: Tensor, documents: Tensor | None) -> tuple:
        a = block.attend(h, documents)
        return a.h_BLD, a.x_TD, a.topk_weights_TK, a.balance_loss, a.topk_idx_TK, a.load_E

    def experts(x_RD: Tensor, weights_R: Tensor, num_tokens_per_expert_E: Tensor, x_TD: Tensor) -> tuple:
        return block.experts(x_RD, weights_R, num_tokens_per_expert_E), block.shared_expert(x_TD)

    attended = ("h", "x", "topk_weights", "balance_loss", "topk_idx", f"load.{layer}")
    routed = ("x_R", "weights_R", "num_tokens_per_expert", "handle")
    return [
        Phase("attend", ("h", "documents"), attended, attend),
        Phase("dispatch", ("x", "topk_idx", "topk_weights"), routed, block.dispatch),
        Phase("experts", (*routed[:3], "x"), ("y_R", "shared"), experts),
        Phase("combine", ("h", "y_R", "shared", "handle"), ("h",), lambda *inputs: (block.combine(*inputs),)),
    ]


class BatchScale(NamedTuple):
    """What makes losses of microbatches add up to that of the global batch, and how they are weighted."""

    num_tokens: int  # of the global batch
    weights: Mapping[str, float]  # of lm_loss, mtp_loss and balance_loss in the sum that is minimised


class TransformerStage:
    """A run of layers; the first stage has the embedding, the last the norm, the head and the modules of MTP.

    config: of the whole model. layers: by whole-model number. embed: for the first stage, and for the last where there
    is MTP. norm, head: for the last. is_first: whether tokens come in rather than hidden states. output: what it hands
    on.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Mapping[int, Block],
        output: Spec,
        *,
        is_first: bool,
        embed: Callable[[Tensor], Tensor] | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        head: Linear | None = None,
    ):
        self.config, self.output, self._is_first = config, output, is_first
        self._embed, self._norm, self._head = embed, norm, head
        self._layers = dict(layers)
        self._weight_grads = WeightGrads()
        for module in [*layers.values(), *([head] if head is not None else [])]:
            for layer in module.modules():
                if hasattr(layer, "weight_grad"):
                    layer.weight_grad = self._weight_grads  # type: ignore[assignment]
        self._phases = self._make_phases()
        self._done: dict[int, list[_Done]] = {}
        self.begin(torch.empty(0), BatchScale(1, {}), training=False)

    def begin(self, tokens_MBL: Tensor, scale: BatchScale, training: bool, documents_MBL: Tensor | None = None) -> None:
        """Starts a step: `tokens_MBL` [microbatches, B, L + 1], of which the last stage predicts [..., 1:]."""
        self._tokens_MBL, self._documents_MBL = tokens_MBL, documents_MBL
        self._scale, self._training = scale, training
        self.losses: dict[str, Tensor] = {}  # sums over this stage's microbatches
        self.loads: dict[int, Tensor] = {}  # tokens per expert, by layer

    def forward(self, mb: int, x: Tensor | None) -> Phases:
        tokens_BL = self._tokens_MBL[mb]
        values: Values = {
            "h": x,
            "tokens": tokens_BL[:, :-1],
            "labels": tokens_BL[:, 1:],
            "documents": None if self._documents_MBL is None else self._documents_MBL[mb, :, :-1],
        }
        done: list[_Done] = []
        for phase in self._phases:
            inputs = tuple(_cut(values[name], self._training) for name in phase.inputs)
            with torch.set_grad_enabled(self._training):
                outputs = tuple(phase.run(*inputs))
            for name, output in zip(phase.outputs, outputs, strict=True):
                values[name] = output.detach() if isinstance(output, Tensor) else output
                self._count(name, values[name])
            if self._training:
                done.append(_Done(phase, inputs, outputs))
            yield phase.name
        if self._training:
            self._done[mb] = done
        return values["h"] if self._head is None else None

    def backward(self, mb: int, grad: Tensor | None, split: bool) -> Phases:
        done = self._done.pop(mb)
        grads: dict[str, Tensor] = {} if grad is None else {"h": grad}
        while done:
            phase, inputs, outputs = done.pop()
            ends = [
                (output, seed)
                for name, output in zip(phase.outputs, outputs, strict=True)
                if isinstance(output, Tensor) and output.requires_grad
                if (seed := self._seed(name, output, grads)) is not None
            ]
            with self._weight_grads.deferred(mb) if split else nullcontext():
                torch.autograd.backward([output for output, _ in ends], [seed for _, seed in ends])
            for name, leaf in zip(phase.inputs, inputs, strict=True):
                if isinstance(leaf, Tensor) and leaf.grad is not None:
                    grads[name] = grads[name] + leaf.grad if name in grads else leaf.grad
            del inputs, outputs, ends
            yield phase.name
        return None if self._is_first else grads["h"]

    def weight_grad(self, mb: int) -> None:
        self._weight_grads.run(mb)

    @property
    def live(self) -> int:
        """Microbatches whose activations are held here."""
        return len(self._done)

    def _seed(self, name: str, output: Tensor, grads: dict[str, Tensor]) -> Tensor | None:
        """The gradient of an output: what its readers left, or the weight of a loss; None where nobody asks."""
        if name in self._scale.weights:
            return torch.full_like(output, self._scale.weights[name])
        return grads.pop(name, None)

    def _count(self, name: str, value: Any) -> None:
        if name.endswith("_loss"):
            self.losses[name] = self.losses.get(name, 0.0) + value.double()
        elif name.startswith("load."):
            layer = int(name.removeprefix("load."))
            self.loads[layer] = self.loads.get(layer, 0) + value

    def _make_phases(self) -> list[Phase]:
        phases = []
        if self._is_first:
            phases.append(Phase("embed", ("tokens",), ("h",), lambda tokens: (self._embed_tokens(tokens),)))
        depths = {n: b for n, b in self._layers.items() if isinstance(b, MTPBlock)}
        for n, block in self._layers.items():
            if n not in depths:
                phases += block_phases(block, n)
        if self._head is not None:
            phases.append(Phase("head", ("h", "labels"), ("h", "lm_loss"), self._lm_loss))
        for k, (n, depth) in enumerate(depths.items(), start=1):
            phases += self._mtp_phases(k, n, depth)
        return phases

    def _embed_tokens(self, tokens_BL: Tensor) -> Tensor:
        assert self._embed is not None
        return self._embed(tokens_BL)

    def _lm_loss(self, h_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        assert self._norm is not None
        h_BLD = self._norm(h_BLD)
        return h_BLD, self._cross_entropy(h_BLD, labels_BL)

    def _mtp_phases(self, k: int, layer: int, depth: MTPBlock) -> list[Phase]:
        """Depth k of multi-token prediction (see model/mtp.py): joins, runs its block, predicts."""

        def join(h_BLD: Tensor, tokens_BL: Tensor, documents_BL: Tensor | None) -> tuple:
            documents = None if documents_BL is None else documents_BL[:, -h_BLD.shape[1] + 1 :]
            return depth.join(h_BLD[:, :-1], self._embed_tokens(tokens_BL[:, k:])), documents

        def predict(h_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
            return h_BLD, self._cross_entropy(depth.shared_head.norm(h_BLD), labels_BL[:, k:])  # type: ignore[operator]

        return [
            Phase("join", ("h", "tokens", "documents"), ("h", "documents"), join),
            *block_phases(depth, layer),
            Phase("predict", ("h", "labels"), ("h", "mtp_loss"), predict),
        ]

    def _cross_entropy(self, h_BLD: Tensor, labels_BL: Tensor) -> Tensor:
        assert self._head is not None
        return cross_entropy(h_BLD.flatten(0, 1), self._head, labels_BL.flatten(), self._scale.num_tokens)


def _cut(value: Any, training: bool) -> Any:
    """A leaf with the same storage, off the graph; what is no floating-point tensor passes as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_(training)
    return value
