"""Continues text with a trained model, from its latent key-value cache.

    python launch/generate.py checkpoint=runs/first                        # the newest checkpoint of a run
    python launch/generate.py checkpoint=runs/first/checkpoints/step_300 prompt='import os' temperature=0.8

The checkpoint may come from any layout: it is read onto this one process. Its run folder holds the tokenizer;
`tokenizer=` names another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from infra import checkpoint
from infra.tokenizer import check_fits, load_tokenizer
from launch.errors import one_line_errors
from model.generate import generate
from model.transformer import Transformer
from parallel.config import check_at_least, check_choice
from parallel.state import WEIGHTS, whole_model


@dataclass
class GenerateConfig:
    """checkpoint: a run folder, or one of its checkpoints. temperature: 0 always takes the likeliest token.

    weights: `master`, or `ema`, their moving average.
    """

    checkpoint: str = MISSING
    weights: str = "master"
    prompt: str = "def "
    num_tokens: int = 200
    temperature: float = 0.7
    seed: int = 0
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, WEIGHTS)
        if not self.prompt:
            raise ValueError("prompt is empty: give at least one character")
        check_at_least("num_tokens", self.num_tokens)
        check_at_least("temperature", self.temperature, 0)


def find(folder: Path) -> Path:
    """The checkpoint itself, every byte read, or the newest whole one of a run folder.

    Raises CheckpointError where it is damaged.
    """
    if (folder / "index.json").exists():
        checkpoint.Checkpoint(folder).verify()
        return folder
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        raise ValueError(f"checkpoint={folder} is neither a checkpoint nor a run folder that holds one")
    return newest


def load(folder: Path, weights: str) -> Transformer:
    """The whole model on this process, in float32."""
    return whole_model(checkpoint.Checkpoint(folder), weights).eval()


ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


@one_line_errors()
@hydra.main("pkg://conf", "generate", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    config = cast(GenerateConfig, OmegaConf.to_object(composed))
    folder = find(Path(config.checkpoint))
    name = config.tokenizer or folder.parent.parent / "tokenizer.json"
    tokenizer, model = load_tokenizer(name), load(folder, config.weights)
    check_fits(tokenizer, model.config.vocab_size, f"tokenizer={name}")
    prompt_L = torch.tensor(tokenizer.encode([config.prompt])[0].astype("int64"))
    tokens_BL = generate(
        model,
        prompt_L[None],
        config.num_tokens,
        config.temperature,
        torch.Generator().manual_seed(config.seed),
        stop_token=tokenizer.special["eos"],
    )
    new = tokens_BL[0, len(prompt_L) :].tolist()
    if new[-1] == tokenizer.special["eos"]:  # the document ends here; its end is no text
        new.pop()
    text = tokenizer.decode(new)
    Console(highlight=False, soft_wrap=True).print(Text.assemble((config.prompt, "bold"), text))


if __name__ == "__main__":
    main()
