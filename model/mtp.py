"""Multi-token prediction: after the main model, one block per further token to predict, each fed by the one before.

Depth k joins the state of depth k - 1 with the embedding of the token k places on, runs a block of its own over that,
and predicts, through the shared head, the token after: h'_i = M [RMSNorm(h_i); RMSNorm(Emb(t_{i+k}))], complete
causal chains at every depth. V3 report, section 2.2, equations 21 to 25. Depth 0 is the main model's state after its
final norm, as the engines that serve the published weights take it.

Shapes: B batch, L length, T = B L tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.block import Block, BlockOutput
from model.config import ModelConfig
from model.linear import Linear
from model.loss import cross_entropy
from model.norm import RMSNorm


class MTPBlock(Block):
    """One depth: a MoE block and what joins a state with a later token's embedding. Embedding and head are shared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, is_moe=True)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def join(self, h_BLD: Tensor, embedded_BLD: Tensor) -> Tensor:
        """The block's input. The published `eh_proj` has the embedding's half first."""
        return self.eh_proj(torch.cat((self.enorm(embedded_BLD), self.hnorm(h_BLD)), dim=-1))


def mtp_losses(
    depths: Sequence[MTPBlock],
    h_BLD: Tensor,
    tokens_BL: Tensor,
    labels_BL: Tensor,
    embed_tokens: nn.Module,
    head: Linear,
    num_tokens: float,
    document_ids_BL: Tensor | None = None,
) -> tuple[list[Tensor], list[BlockOutput]]:
    """The loss of each depth, and what each depth's block gave.

    At depth k a sequence has L - k positions that know both the token k places on and the one after, but the loss is
    divided by all T tokens (equation 24); the weight lambda / D of the sum is the caller's.

    Args:
        h_BLD: the main model's state after its norm. tokens_BL, labels_BL: as the main model's, labels[i] is
            tokens[i + 1]. num_tokens: of the whole global batch.
    """
    losses, outputs = [], []
    for k, depth in enumerate(depths, start=1):
        embedded = embed_tokens(tokens_BL[:, k:])
        ids = None if document_ids_BL is None else document_ids_BL[:, :-k]
        outputs.append(depth(depth.join(h_BLD[:, :-1], embedded), ids))
        h_BLD = outputs[-1].h_BLD
        normed = depth.shared_head["norm"](h_BLD)
        losses.append(cross_entropy(normed.flatten(0, 1), head, labels_BL[:, k:].flatten(), num_tokens))
    return losses, outputs
