"""Exactly what every rank holds: parameters by layer, and by the group of ranks that shares them. No torch.

Parameters fall into *groups* as in `parallelize`: the same pipeline ranks own them, they are routed experts (copied
over `expert_dp`) or not (copied over `dp`), and matrices, which decay, or vectors. A group's gradients are summed over
its copies, and ZeRO-1 cuts its optimizer states into that many shares. The tests hold these counts against the buckets
of a real run, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.config import ModelConfig
from parallel.mesh import MeshConfig
from parallel.pipeline.actions import Schedule

ALIGNMENT = 16  # elements: every copy's share of a group is a multiple (infra/optim.py)


class Count(NamedTuple):
    """Parameters of a layer: matrices, vectors (of norms: they do not decay), and the routed experts of all ranks."""

    matrices: int
    vectors: int
    experts: int


class Group(NamedTuple):
    """Parameters of one kind on a rank that `copies` ranks hold: `inside` of them on a node, on `outside` nodes."""

    num_params: int
    is_expert: bool
    inside: int
    outside: int

    @property
    def copies(self) -> int:
        return self.inside * self.outside

    @property
    def share(self) -> int:
        """Elements that each copy answers for, with padding."""
        return -(-self.num_params // (self.copies * ALIGNMENT)) * ALIGNMENT


def layer_count(model: ModelConfig, layer: int) -> Count:
    """Of a layer by its whole-model number; those after the last are the modules of MTP."""
    matrices, vectors = model.attention_params, model.norm_params
    if layer < model.first_k_dense_replace:
        return Count(matrices + 3 * model.hidden_size * model.intermediate_size, vectors, 0)
    matrices += model.n_routed_experts * model.hidden_size + model.n_shared_experts * model.expert_params
    if layer >= model.num_hidden_layers:
        matrices += 2 * model.hidden_size**2
        vectors += 3 * model.hidden_size
    return Count(matrices, vectors, model.n_routed_experts * model.expert_params)


def owner_groups(model: ModelConfig, schedule: Schedule, layers_of: list[list[int]]) -> dict[tuple[int, ...], Count]:
    """Parameters by the pipeline ranks that own them."""
    last = schedule.num_stages - 1
    embedding = model.vocab_size * model.hidden_size
    pieces = [({stage}, layer_count(model, n)) for stage, layers in enumerate(layers_of) for n in layers]
    pieces.append(({0, last} if model.num_nextn_predict_layers else {0}, Count(embedding, 0, 0)))
    pieces.append(({last}, Count(embedding, model.hidden_size, 0)))  # the head and the final norm
    groups: dict[tuple[int, ...], Count] = {}
    for stages, count in pieces:
        owners = tuple(sorted({route[s] for route in schedule.placement for s in stages}))
        groups[owners] = Count(*map(sum, zip(groups.get(owners, Count(0, 0, 0)), count, strict=True)))
    return groups


def rank_groups(
    model: ModelConfig, mesh: MeshConfig, schedule: Schedule, layers_of: list[list[int]]
) -> list[list[Group]]:
    """The groups of every pipeline rank. layers_of: the layers of each stage."""
    node = mesh.node_size
    result: list[list[Group]] = [[] for _ in range(mesh.pp)]
    for owners, count in owner_groups(model, schedule, layers_of).items():
        nodes_a_pipeline_rank = max(1, mesh.dp // node)
        dense_inside = min(mesh.dp, node)
        expert_inside = max(1, min(mesh.dp, node) // mesh.ep)
        for rank in owners:
            outside = nodes_a_pipeline_rank * len(owners) if mesh.dp >= node else len(owners)
            dense = [Group(n, False, dense_inside, outside) for n in (count.matrices, count.vectors) if n]
            result[rank] += dense
            if count.experts:
                copies = mesh.expert_dp * len(owners)
                experts = count.experts // mesh.ep
                result[rank].append(Group(experts, True, expert_inside, copies // expert_inside))
    return result


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank, with the padding of shares. weights: what is computed with; optimizer: master weights and
    moments; host: the EMA."""

    num_params: int
    weights: int
    gradients: int
    optimizer: int
    ema_host: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(groups: list[Group], precision: str, zero_stage: int, moments: str, ema: bool) -> StateBytes:
    """Of the groups of one rank. moments: fp32 or bf16 (V3). With zero_stage=1 each copy keeps its share of the states;
    of the EMA it always does.

    The masters are FP32. Runs in FP32 compute with them, so what is held as master takes no memory as weight.
    """
    accumulation = 8 if precision == "fp64" else 4
    each_moment = {"fp32": accumulation, "bf16": 2}[moments]
    shares = sum(group.share for group in groups)
    whole = sum(group.share * group.copies for group in groups)
    held = shares if zero_stage else whole
    return StateBytes(
        num_params=sum(group.num_params for group in groups),
        weights=(whole - held) * accumulation if precision in ("fp32", "fp64") else whole * 2,
        gradients=whole * accumulation,
        optimizer=held * (accumulation + 2 * each_moment),
        ema_host=shares * accumulation if ema else 0,
    )
