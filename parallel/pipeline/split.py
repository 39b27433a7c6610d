"""Which layers stand on which stage: even by cost, or as told. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from model.config import ModelConfig


def split_layers(
    config: ModelConfig, num_stages: int, layers_per_stage: Sequence[int] | None = None
) -> list[list[int]]:
    """The layers of each stage by whole-model number, in order; the modules of MTP follow the last layer on the last
    stage.

    layers_per_stage: how many layers (MTP not counted) each stage gets; None makes the costliest stage as cheap as can
    be. Raises ValueError where the layers do not go round.
    """
    num_layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers
    if num_stages > num_layers:
        raise ValueError(
            f"{num_layers} layers (model.num_hidden_layers) cannot fill {num_stages} stages: "
            f"use parallel.pp or a schedule with at most {num_layers} stages"
        )
    if layers_per_stage is None:
        layers_per_stage = _balanced(_costs(config), num_stages)
    elif len(layers_per_stage) != num_stages or sum(layers_per_stage) != num_layers or min(layers_per_stage) < 1:
        raise ValueError(
            f"parallel.layers_per_stage={list(layers_per_stage)} has {len(layers_per_stage)} stages and "
            f"{sum(layers_per_stage)} layers, but the schedule has {num_stages} stages, the model {num_layers} layers"
        )
    ends = [0, *accumulate(layers_per_stage)]
    stages = [list(range(first, end)) for first, end in pairwise(ends)]
    stages[-1] += range(num_layers, num_layers + depths)
    return stages


def _costs(config: ModelConfig) -> list[float]:
    """Training cost of each layer in FLOPs per token; the last layer carries the head and MTP, which stay with it."""
    flops = {name: part.flops_per_token_causal for name, part in config.parts().items()}
    moe = flops["router"] + flops["shared_experts"] + flops["routed_experts"]
    costs = []
    for layer in range(config.num_hidden_layers):
        is_dense = layer < config.first_k_dense_replace
        ffn = flops["dense_ffn"] / config.first_k_dense_replace if is_dense else moe / config.num_moe_layers
        costs.append(flops["attention"] / config.num_hidden_layers + ffn)
    costs[-1] += flops["mtp"] + flops["head"] * (1 + config.num_nextn_predict_layers)
    return costs


def _balanced(costs: Sequence[float], num_stages: int) -> list[int]:
    """Layers per stage such that the costliest stage is as cheap as possible."""
    num = len(costs)
    prefix = [0.0, *accumulate(costs)]
    best = [prefix]  # best[k][end]: the cheapest maximum of k + 1 stages over layers [0, end)
    cut = [[0] * (num + 1)]
    for k in range(1, num_stages):
        row, cuts = [float("inf")] * (num + 1), [0] * (num + 1)
        for end in range(k + 1, num + 1):
            for first in range(k, end):
                worst = max(best[k - 1][first], prefix[end] - prefix[first])
                if worst < row[end]:
                    row[end], cuts[end] = worst, first
        best.append(row)
        cut.append(cuts)
    sizes, end = [], num
    for k in reversed(range(num_stages)):
        first = cut[k][end] if k else 0
        sizes.append(end - first)
        end = first
    return sizes[::-1]
