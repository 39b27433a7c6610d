"""THE order in which a model is laid over ranks: stages -> experts -> precision -> data parallel -> values.

`parallelize` takes the whole model on the meta device, keeps what this rank's stages need, and gives exactly that real
memory and the values that it has on a single rank. The modules know nothing of it: they find parameters, a dispatcher
and a `main_grad` where they always were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from infra.optim import Bucket
from infra.precision import PrecisionConfig
from model.block import Block
from model.config import ModelConfig
from model.fp8 import use_fp8
from model.mtp import MTPBlock
from model.transformer import Transformer, init_parameter_
from parallel.config import ParallelConfig
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig, Dispatcher
from parallel.mesh import Mesh
from parallel.pipeline.actions import Schedule
from parallel.pipeline.p2p import Spec
from parallel.pipeline.split import split_layers
from parallel.pipeline.stage import TransformerStage


@dataclass
class Replica:
    """What one rank holds: its stages by index, and their parameters in buckets.

    bias_LE: the routing biases of all layers of the model, [layers, experts], the same on every rank; the layers here
    have views of it. biased_layers: those that have such biases. first_expert: the whole-model number of the first
    expert here.
    """

    stages: dict[int, TransformerStage]
    buckets: list[Bucket]
    bias_LE: Tensor
    biased_layers: list[int]
    first_expert: int
    dispatcher: Dispatcher


def parallelize(
    config: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    schedule: Schedule,
    *,
    precision: PrecisionConfig,
    device: torch.device,
    seed: int,
    weight_decay: float,
    microbatch: tuple[int, int],
) -> Replica:
    """Builds this rank's part of the model; collective over the world.

    microbatch: (sequences, tokens of each) of one microbatch. Raises ValueError where the model does not fit the
    layout.
    """
    with torch.device("meta"):
        model = Transformer(config)

    # Stages: every layer, and the ends of the model, to the ranks that the placement names.
    layers_of = split_layers(config, schedule.num_stages, parallel.layers_per_stage)
    owners = _owners(model, schedule, layers_of)
    held = schedule.stages_of(mesh.at.pp)
    mine = [n for stage in held for n in layers_of[stage]]

    # Experts: this rank's share of every MoE layer, behind the dispatcher that reaches the others.
    num_local = config.n_routed_experts // mesh.config.ep
    dispatcher = DISPATCHERS[parallel.dispatcher](
        mesh,
        DispatchConfig(
            config.n_routed_experts,
            config.n_group,
            config.topk_group,
            parallel.dispatch_dtype,
            parallel.force_balance,
        ),
    )
    for n in mine:
        block = cast(Block, model.model.layers[n])
        if block.is_moe:
            _keep_experts(block, num_local)
            block.mlp.dispatcher = dispatcher

    # Precision: what is computed with, and what is accumulated in; FP8 fills holes of the layers.
    compute_dtype: torch.dtype = getattr(torch, precision.compute_dtype)
    accumulation_dtype: torch.dtype = getattr(torch, precision.accumulation_dtype)
    if precision.name == "fp8":
        for n in mine:
            use_fp8(model.model.layers[n], f"model.layers.{n}", precision.backend, precision.recipe)

    # Data parallel: parameters with the same owners in one bucket, whose gradients are summed over those owners.
    meta = {name: p for name, p in model.named_parameters() if mesh.at.pp in owners[name]}
    buckets = [
        Bucket(
            {name: meta[name].shape for name in names},
            weight_decay=weight_decay if decays else 0.0,
            compute_dtype=compute_dtype,
            accumulation_dtype=accumulation_dtype,
            device=device,
            group=group.pg,
            num_copies=group.size,
            copy=group.rank,
            is_sharded=parallel.zero_stage == 1,
        )
        for (names, decays, group) in _bucket_plan(meta, owners, mesh)
    ]

    # Values: those of the whole model.
    first_expert = mesh.at.ep * num_local
    for bucket in buckets:
        for name, param in bucket.params.items():
            value = torch.empty_like(param, dtype=accumulation_dtype, requires_grad=False)
            bucket.fill(name, init_parameter_(name, value, seed, first_expert, config.initializer_range))
            _replace(model, name, param)
    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    bias_LE = torch.zeros(num_layers, config.n_routed_experts, device=device)
    has_bias = config.topk_method == "noaux_tc"
    biased_layers = [n for n, block in enumerate(model.model.layers) if has_bias and cast(Block, block).is_moe]
    for n in set(biased_layers) & set(mine):
        cast(Block, model.model.layers[n]).mlp.gate.e_score_correction_bias = bias_LE[n]

    spec = Spec((*microbatch, config.hidden_size), compute_dtype)
    stages = {s: _stage(model, config, s, layers_of, schedule, spec, parallel.recompute) for s in held}
    return Replica(stages, buckets, bias_LE, biased_layers, first_expert, dispatcher)


def _stage(
    model: Transformer,
    config: ModelConfig,
    stage: int,
    layers_of: Sequence[Sequence[int]],
    schedule: Schedule,
    spec: Spec,
    recompute: str,
) -> TransformerStage:
    is_first, is_last = stage == 0, stage == schedule.num_stages - 1
    return TransformerStage(
        {n: cast(Block, model.model.layers[n]) for n in layers_of[stage]},
        spec,
        is_first=is_first,
        embed=model.model.embed_tokens if is_first or (is_last and config.num_nextn_predict_layers) else None,
        norm=model.model.norm if is_last else None,
        head=model.lm_head if is_last else None,
        recompute=recompute,
    )


def _owners(model: Transformer, schedule: Schedule, layers_of: Sequence[Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The pipeline ranks that hold each parameter, by whole-model name."""
    last = schedule.num_stages - 1
    stage_of_layer = {n: stage for stage, layers in enumerate(layers_of) for n in layers}
    has_mtp = any(isinstance(block, MTPBlock) for block in model.model.layers)

    def stages(name: str) -> set[int]:
        if name.startswith("model.layers."):
            return {stage_of_layer[int(name.split(".")[2])]}
        if name.startswith("model.embed_tokens."):
            return {0, last} if has_mtp else {0}
        return {last}

    return {
        name: tuple(sorted({route[s] for route in schedule.placement for s in stages(name)}))
        for name, _ in model.named_parameters()
    }


def is_expert(name: str) -> bool:
    """Whether the parameter of this whole-model name is stacked over routed experts, and so shared out by ep."""
    return ".mlp.experts." in name


def _bucket_plan(meta: Mapping[str, Tensor], owners: Mapping[str, tuple[int, ...]], mesh: Mesh) -> list:
    """(names, whether weights decay, group of ranks with copies) of each bucket of this rank.

    Every rank makes the groups of all owner sets, its own or not, in the same order: making a group is collective.
    """
    groups = {}
    for owner in sorted(set(owners.values())):
        for expert in (False, True):
            together: dict[tuple[int, ...], list[int]] = {}
            for rank in range(mesh.config.world):
                at = mesh.config.coordinates(rank)
                alone = at.pp not in owner
                key = (1, rank) if alone else (0, at.ep) if expert else (0,)
                together.setdefault(key, []).append(rank)
            groups[owner, expert] = mesh.group(list(together.values()))
    names: dict[tuple, list[str]] = {}
    for name, tensor in meta.items():
        names.setdefault((owners[name], is_expert(name), tensor.dim() > 1), []).append(name)
    return [(names[key], key[2], groups[key[0], key[1]]) for key in sorted(names)]


def _keep_experts(block: Block, num_local: int) -> None:
    """Leaves `num_local` experts in a meta block."""
    experts = block.mlp.experts
    for name, param in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(param.new_empty(num_local, *param.shape[1:])))


def _replace(model: nn.Module, name: str, param: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, param)
