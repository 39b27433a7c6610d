"""A model small enough for float64, with every feature on."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer, init_model_


def small_config(**changes: object) -> ModelConfig:
    """Four layers of width 32; YaRN, compressed queries, groups, one depth of multi-token prediction."""
    keys: dict[str, object] = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=8,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        max_position_embeddings=64,
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16),
        initializer_range=0.2,
    )
    return ModelConfig(**(keys | changes))  # type: ignore[arg-type]


def small_model(seed: int = 0, **changes: object) -> Transformer:
    """That model in float64, its routing biases not zero."""
    model = init_model_(Transformer(small_config(**changes)), seed).double()
    generator = torch.Generator().manual_seed(seed)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    return model


def text(batch_size: int, length: int, vocab_size: int = 61, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens that follow them."""
    tokens = torch.randint(vocab_size, (batch_size, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]
