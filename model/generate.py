"""Continues token sequences, one token at a time, from the latent cache: greedy or at a temperature.

Shapes: B batch, L length of the prompt, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens_BL: Tensor,
    num_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """The prompts and what follows them: (B, L + num_new_tokens) at most, int64.

    Args:
        tokens_BL: at least one token. temperature: 0 takes the likeliest token, 1 samples the model's distribution.
        stop_token: generation ends when every sequence has produced it; a sequence that has repeats it.
    Raises:
        ValueError: for an empty prompt, a negative number of tokens or temperature, or a token outside the vocabulary.
    """
    B, L = tokens_BL.shape
    vocab_size = model.config.vocab_size
    if L == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if num_new_tokens < 0 or temperature < 0:
        raise ValueError(f"num_new_tokens is {num_new_tokens} and temperature {temperature}; neither may be negative")
    if B and not 0 <= int(tokens_BL.min()) <= int(tokens_BL.max()) < vocab_size:
        raise ValueError(f"the prompt holds token {int(tokens_BL.max())}, but the vocabulary has {vocab_size}")
    caches = model.new_caches(B, L + num_new_tokens)
    done_B = torch.zeros_like(tokens_BL[:, 0], dtype=torch.bool)
    new_BL = tokens_BL
    for _ in range(num_new_tokens):
        logits_BV = model.decode(new_BL, caches)
        if temperature == 0:
            next_B = logits_BV.argmax(-1)
        else:
            probs_BV = (logits_BV.float() / temperature).softmax(-1)
            next_B = torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
        if stop_token is not None:
            next_B = next_B.masked_fill(done_B, stop_token)
            done_B = done_B | (next_B == stop_token)
        new_BL = next_B[:, None]
        tokens_BL = torch.cat((tokens_BL, new_BL), 1)
        if stop_token is not None and bool(done_B.all()):
            break
    return tokens_BL
