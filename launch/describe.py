"""Says what a model is without building it: parameters, those a token activates, FLOPs and cache, part by part.

    python launch/describe.py model=671b
    python launch/describe.py model=671b model.n_routed_experts=512 format=json

Options: `model=debug|16b|236b|671b` and any `model.<published key>=...`; `format=table|json`; `sequence_length` (4096),
the span whose attention is counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from launch.errors import one_line_errors
from model.config import ModelConfig


@dataclass
class DescribeConfig:
    """What to describe, and how."""

    model: ModelConfig = field(default_factory=ModelConfig)
    format: str = "table"
    sequence_length: int = 4096

    def __post_init__(self) -> None:
        if self.format not in ("table", "json"):
            raise ValueError(f"format is '{self.format}'; known: table, json")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length is {self.sequence_length}; it must be at least 1")


def describe(model: ModelConfig, sequence_length: int = 4096) -> dict[str, Any]:
    """The figures of a model as one dictionary of plain numbers; `parts` has those of each part."""
    parts = model.parts(sequence_length)
    return {
        "num_params": model.num_params(),
        "num_activated_params": model.num_activated_params(),
        "flops_per_token": model.flops_per_token(causal=False, sequence_length=sequence_length),
        "flops_per_token_causal": model.flops_per_token(causal=True, sequence_length=sequence_length),
        "kv_cache_bytes_per_token": model.kv_cache_bytes_per_token(),
        "sequence_length": sequence_length,
        "parts": {name: part._asdict() for name, part in parts.items()},
    }


def as_table(figures: dict[str, Any]) -> Table:
    """The same figures for reading: one row per part, then the main model."""
    table = Table()
    for column in ("part", "parameters", "activated", "GFLOP/token", "causal"):
        table.add_column(column, justify="left" if column == "part" else "right")

    def add(name: str, row: dict[str, int]) -> None:
        gflops = [row[key] / 1e9 for key in ("flops_per_token", "flops_per_token_causal")]
        flops = [f"{value:,.2f}" if value >= 1 or not value else f"{value:.4f}" for value in gflops]
        table.add_row(name, f"{row['num_params']:,}", f"{row['num_activated_params']:,}", *flops)

    for name, row in figures["parts"].items():
        add(name, row)
    table.add_section()
    add("main model", figures)
    return table


ConfigStore.instance().store(name="describe_schema", node=DescribeConfig)


@one_line_errors()
@hydra.main("pkg://conf", "describe", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    config = cast(DescribeConfig, OmegaConf.to_object(composed))
    figures = describe(config.model, config.sequence_length)
    if config.format == "json":
        print(json.dumps(figures, indent=2))
        return
    console = Console()
    console.print(as_table(figures))
    console.print(f"FLOPs of training, attention over {config.sequence_length} tokens; mtp is not in the total")
    console.print(f"latent KV cache, BF16: {figures['kv_cache_bytes_per_token']:,} bytes per token")


if __name__ == "__main__":
    main()
