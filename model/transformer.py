"""The model: embedding, blocks, norm, head, and the modules of multi-token prediction.

Everything builds under `torch.device("meta")` at once; `init_parameter_` gives a parameter its values afterwards.
They depend on the seed, the whole-model name and, for experts, the expert's number - not on who asks - so every
layout starts from the same model.

Shapes: B batch, L length, T = B L tokens, D model, K experts per token, R rows received here, E experts, V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.attention import LatentCache
from model.block import Block, BlockOutput
from model.config import ModelConfig
from model.linear import Linear
from model.loss import cross_entropy
from model.mtp import MTPBlock, mtp_losses
from model.norm import RMSNorm


class Losses(NamedTuple):
    """A microbatch's losses, each already divided by its normaliser, and the loads of its MoE layers, MTP's last."""

    lm_loss: Tensor
    mtp_losses_K: Tensor
    balance_loss: Tensor
    load_ME: Tensor


class Decoder(nn.Module):
    """All that bears a name starting with `model.`; `layers` holds the blocks and, after them, the MTP modules."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        empty_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty_VD, freeze=False)
        blocks = [Block(config, is_moe=i >= config.first_k_dense_replace) for i in range(config.num_hidden_layers)]
        depths = [MTPBlock(config) for _ in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList([*blocks, *depths])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """DeepSeek-V3 or V2, whole. A pipeline takes its children apart; their names stay the whole model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def blocks(self) -> list[Block]:
        """The main model's layers."""
        return cast(list[Block], list(self.model.layers)[: self.config.num_hidden_layers])

    @property
    def mtp(self) -> list[MTPBlock]:
        """The modules of multi-token prediction, shallowest first."""
        return cast(list[MTPBlock], list(self.model.layers)[self.config.num_hidden_layers :])

    def hidden(self, tokens_BL: Tensor, document_ids_BL: Tensor | None = None) -> tuple[Tensor, list[BlockOutput]]:
        """The main model's last hidden state after its norm (B, L, D), and what each block gave."""
        h_BLD = self.model.embed_tokens(tokens_BL)
        outputs = []
        for block in self.blocks:
            outputs.append(block(h_BLD, document_ids_BL))
            h_BLD = outputs[-1].h_BLD
        return self.model.norm(h_BLD), outputs

    def forward(self, tokens_BL: Tensor, document_ids_BL: Tensor | None = None) -> Tensor:
        """Logits of the next token: (B, L, V)."""
        return self.lm_head(self.hidden(tokens_BL, document_ids_BL)[0])

    def losses(
        self,
        tokens_BL: Tensor,
        labels_BL: Tensor,
        num_tokens: float,
        num_sequences: float,
        document_ids_BL: Tensor | None = None,
    ) -> Losses:
        """Every loss of a microbatch, on one device and without a pipeline - the reference for all else.

        Args:
            labels_BL: the next tokens; -100 has no loss. num_tokens, num_sequences: of the whole global batch.
        """
        h_BLD, outputs = self.hidden(tokens_BL, document_ids_BL)
        lm_loss = cross_entropy(h_BLD.flatten(0, 1), self.lm_head, labels_BL.flatten(), num_tokens)
        per_depth, mtp_outputs = mtp_losses(
            self.mtp, h_BLD, tokens_BL, labels_BL, self.model.embed_tokens, self.lm_head, num_tokens, document_ids_BL
        )
        outputs += mtp_outputs
        balance_losses = [output.balance_loss for output in outputs if output.balance_loss is not None]
        return Losses(
            lm_loss,
            torch.stack(per_depth) if per_depth else lm_loss.new_zeros(0),
            torch.stack(balance_losses).sum() / num_sequences,
            torch.stack([output.load_E for output in outputs if output.load_E is not None]),
        )

    def new_caches(self, batch_size: int, length: int) -> list[LatentCache]:
        """One empty latent cache per block."""
        weight = self.model.embed_tokens.weight
        return [block.self_attn.new_cache(weight, batch_size, length) for block in self.blocks]

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor, caches: list[LatentCache]) -> Tensor:
        """Logits after the last of L new tokens, (B, V); `caches` hold what came before and take the new ones in."""
        h_BLD = self.model.embed_tokens(tokens_BL)
        for block, cache in zip(self.blocks, caches, strict=True):
            h_BLD = block.decode(h_BLD, cache)
        return self.lm_head(self.model.norm(h_BLD[:, -1]))


@torch.no_grad()
def init_parameter_(
    name: str, tensor: Tensor, seed: int, first_expert: int = 0, initializer_range: float = 0.006
) -> Tensor:
    """Fills a parameter or buffer, in place, with the values its whole-model name has under `seed`.

    Norms are 1, routing biases 0, everything else normal with std `initializer_range`, drawn in float32 whatever the
    tensor's dtype. Experts are drawn one by one, so a slice that starts at `first_expert` gets what the whole model
    has.
    """
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    if name.endswith("bias"):
        return tensor.zero_()
    if ".mlp.experts." in name:
        for i, expert in enumerate(tensor):
            expert.copy_(_draw(f"{name}/{first_expert + i}", expert.shape, seed, initializer_range))
        return tensor
    return tensor.copy_(_draw(name, tensor.shape, seed, initializer_range))


def _draw(key: str, shape: torch.Size, seed: int, std: float) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


def init_model_(model: Transformer, seed: int) -> Transformer:
    """Gives every parameter and buffer of a whole model its initial values."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        init_parameter_(name, tensor, seed, initializer_range=model.config.initializer_range)
    return model
