"""How long a step takes: stages from layers, the schedule replayed exactly, then gradients summed and weights updated.

The terms are those that the published step is told in (ISCA paper, table 4), seconds of the mean rank:

    forward, backward, weight   what runs alone      pair   overlapped F&B      bubble   idle
    reduce    gradients summed over copies, new weights gathered        update   the optimizer's own work

`simulate` replays the very schedule; `estimate` is its closed form, a few thousand a second, which chooses what is
worth replaying. Results leave when the executor sends them: the input gradient of a full B before its W, those of an
overlapped pair when it ends (in the published order both are ready last, but for one W of attention). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from infra.hardware import ClusterConfig
from model.config import ModelConfig
from parallel.pipeline.actions import Op, Schedule
from parallel.pipeline.dualpipe import phase_counts
from parallel.pipeline.replay import replay
from parallel.pipeline.split import split_layers
from parallel.plan.cost import Kernels, LayerTimes, Times, pair_time
from parallel.plan.counts import Group, rank_groups
from parallel.plan.layout import OVERLAPPING, Layout
from parallel.plan.measured import row_for


@dataclass(frozen=True)
class StepTime:
    """Seconds of the mean rank; `total` is the step. Adds up by construction."""

    forward: float
    backward: float
    weight: float
    pair: float
    bubble: float
    reduce: float
    update: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


class StageTimes(NamedTuple):
    """single [op, stage], pair [0: with B, 1: with I; stage of F; stage of the backward], send: seconds."""

    single: np.ndarray
    pair: np.ndarray
    send: float
    mean_f: float  # over stages, as those below
    mean_i: float
    mean_w: float
    mean_pair: float
    uneven: float  # the most loaded rank over the mean one


@dataclass
class StepModel:
    """Times of the steps of one model on one cluster; what layouts share is computed once.

    moments: dtype of the optimizer's moments. imbalance: a factor on everything that computes or travels, 1 unless it
    is fitted, and then a plan says so. expert_load: [layers, experts], rows of each expert as a run counted them; None:
    the cluster's `expert_imbalance`. slower, travels: factors on computing, and on journeys that were measured.
    even_stages: as if all stages took the mean time.
    """

    model: ModelConfig
    cluster: ClusterConfig
    sequence_length: int = 4096
    moments: str = "bf16"
    imbalance: float = 1.0
    expert_load: np.ndarray | None = None
    slower: float = 1.0
    travels: float = 1.0
    even_stages: bool = False
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # by what an answer depends on

    def layers(self, layout: Layout) -> tuple[Kernels, LayerTimes, LayerTimes]:
        """The kernels of a layout, a layer with experts, and a dense one; they do not depend on pp."""
        key = (layout.ep, layout.dispatcher, layout.microbatch_size, layout.precision, layout.recompute, layout.world)
        if key not in self.cache:
            load, row = 1 + self.load_excess(layout.ep), self.measured(layout)
            kernels = Kernels(self.model, self.cluster, layout, self.sequence_length, load)
            moe, dense = (self._layer(kernels, row["seconds"] if row else {}, is_moe) for is_moe in (True, False))
            self.cache[key] = kernels, moe, dense
        return self.cache[key]

    def _layer(self, kernels: Kernels, measured: dict[str, Any], is_moe: bool) -> LayerTimes:
        """From kernels, or as measured: evenly loaded, so that the load comes on top."""
        if not measured:
            return kernels.layer(is_moe).scaled(self.slower)
        part = measured.get("moe" if is_moe else "dense")
        if part is None:  # the model has no such layer
            return LayerTimes((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
        journeys = {name: seconds for name, seconds in part.items() if name not in "fiw"}
        load = kernels.load if is_moe else 1.0
        f, i, w = ((attend, load * experts) for attend, experts in (part[name] for name in "fiw"))
        hidden = None
        if is_moe and "pair" in measured and (travel := sum(journeys.values())):
            hidden = (sum(sum(part[name]) for name in "fiw") + travel - measured["pair"]) / travel
        there = {name: self.travels * load * seconds for name, seconds in journeys.items()}
        return LayerTimes(f, i, w, **there, hidden=hidden).scaled(self.slower)

    def load_excess(self, ep: int) -> float:
        """How far the most loaded of `ep` ranks stands above the mean, as a share."""
        if ep == 1 or self.expert_load is None:
            return self.cluster.expert_imbalance * (ep > 1)
        load_LP = self.expert_load.reshape(len(self.expert_load), ep, -1).sum(2)
        return float((load_LP.max(1) / load_LP.mean(1)).mean() - 1)

    def measured(self, layout: Layout) -> dict[str, Any] | None:
        """What the cluster measured of this very layer; None where kernels have to be added up."""
        return row_for(self.model, self.cluster, layout, self.sequence_length)

    def ends(self, layout: Layout) -> tuple[Times, Times]:
        """(F, I, W) of what the first and the last stage do besides their layers."""
        kernels, _, _ = self.layers(layout)
        if row := self.measured(layout):
            first, last = row["seconds"]["first"], row["seconds"]["last"]
        else:
            depths, head, join = self.model.num_nextn_predict_layers, kernels.head(), kernels.join()
            first = kernels.embedding(), 0.0, kernels.embedding()
            last = [(1 + depths) * of_head + depths * of_join for of_head, of_join in zip(head, join, strict=True)]
        (a, b, c), (d, e, f) = ([self.slower * seconds for seconds in end] for end in (first, last))
        return (a, b, c), (d, e, f)

    def stages(self, layout: Layout) -> StageTimes:
        key = (
            "stages", layout.schedule, layout.pp, layout.ep, layout.dispatcher, layout.microbatch_size,
            layout.precision, layout.recompute, layout.world, layout.pairs,
        )  # fmt: skip
        if key not in self.cache:
            self.cache[key] = self._stages(layout)
        return self.cache[key]

    def _stages(self, layout: Layout) -> StageTimes:
        kernels, moe, dense = self.layers(layout)
        send = kernels.send(layout.dp) if layout.pp > 1 else 0.0
        split = self.split(layout.num_stages)
        num_dense_S = np.array([sum(n < self.model.first_k_dense_replace for n in layers) for layers in split])
        num_moe_S = np.array([len(layers) for layers in split]) - num_dense_S
        f, i, w = (
            num_moe_S * getattr(moe, name) + num_dense_S * getattr(dense, name)
            for name in ("forward", "input_grad", "weight_grad")
        )
        for times, first, last in zip((f, i, w), *self.ends(layout), strict=True):
            times[0], times[-1] = times[0] + first, times[-1] + last
        if self.even_stages:
            f, i, w, num_moe_S = (np.full(len(split), counted.mean()) for counted in (f, i, w, num_moe_S))
        single = np.stack((f, i + w, i, w))
        pair = np.stack((f[:, None] + single[1], f[:, None] + single[2]))
        if (
            layout.pairs and moe.dispatch
        ):  # as many layers with experts as both stages have overlap; the rest runs alone
            shared_SS = np.minimum(num_moe_S[:, None], num_moe_S)
            for k, is_split in enumerate((False, True)):
                alone = moe.forward + moe.input_grad + (0.0 if is_split else moe.weight_grad)
                quiet, sending = (pair_time(moe, moe, self.cluster.sm_contention, s, is_split) for s in (0.0, 2 * send))
                pair[k] += shared_SS * (quiet - alone) + (shared_SS > 0) * (sending - quiet)
        single, pair = self.imbalance * single, self.imbalance * pair
        mean_f, mean_i, mean_w = (float(single[k].mean()) for k in (Op.F, Op.I, Op.W))
        uneven = _unevenness(layout, f + i + w)
        return StageTimes(single, pair, send, mean_f, mean_i, mean_w, float(pair[0].mean()), uneven)

    def uncovered(self, layout: Layout) -> list[str]:
        """Shapes of this layout that no measured rate is near; none where its layers were measured whole."""
        if self.measured(layout):
            return []
        found = shapes_asked(self.model, self.cluster, layout, self.sequence_length).uncovered()
        at = self.cluster.rates.attention_length
        if at and not at / 4 <= self.sequence_length <= 4 * at:
            found.append(f"attention over {self.sequence_length} tokens (measured over {at})")
        return found

    def doubts(self, layout: Layout) -> list[str]:
        """What the times of this layout rest on without its having been measured, a line each."""
        cluster, found = self.cluster, []
        if not self.measured(layout):
            if cluster.measured:
                found.append("no layers of this shape were measured whole: its kernels are added up")
            if cluster.rates.device not in cluster.device:
                where = cluster.rates.device
                found.append(f"kernel rates were measured on {where} and are scaled to {cluster.device} by its peaks")
            if shapes := self.uncovered(layout):
                found.append(f"shapes outside the measured tables: {', '.join(shapes)}")
        for what in cluster.calibrated.get("not_measured", []):
            if layout.world > (1 if what == "messages between ranks" else cluster.ranks_per_node):
                found.append(f"{what} were not measured")
        if self.imbalance != 1:
            found.append(f"imbalance={self.imbalance:g} is fitted, not predicted")
        return found

    def split(self, num_stages: int) -> list[list[int]]:
        """The layers of each stage, as a run lays them."""
        key = ("split", num_stages)
        if key not in self.cache:
            self.cache[key] = split_layers(self.model, num_stages)
        return self.cache[key]

    def replayed(
        self, layout: Layout, global_batch_size: int, factor_S: np.ndarray | None = None
    ) -> tuple[Schedule, np.ndarray, np.ndarray]:
        """The very schedule, and when each of its slots starts and ends: exact, given the times of the stages (and
        what disturbs each slot)."""
        times = self.stages(layout)
        M = layout.num_microbatches(global_batch_size)
        schedule = layout.make_schedule(M)
        duration_S = slot_seconds(schedule, times)
        if factor_S is not None:
            duration_S = duration_S * factor_S
        start_S, *_ = replay(schedule, duration_S, leaving_seconds(schedule, times, duration_S), times.send)
        return schedule, start_S, start_S + duration_S

    def simulate(self, layout: Layout, global_batch_size: int) -> StepTime:
        """The step in its terms, from the replayed schedule."""
        schedule, start_S, end_S = self.replayed(layout, global_batch_size)
        duration_S, length = end_S - start_S, float(end_S.max())
        _, slot_S1, actions_A3 = schedule.columns
        first = slot_S1[:-1]
        stage_S, kind_S = actions_A3[first, 0], np.where(np.diff(slot_S1) == 2, 4, actions_A3[first, 1])
        sums = np.bincount(kind_S, duration_S, minlength=5) / schedule.num_ranks
        forward, full, inputs, weights, pairs = map(float, sums)
        weight_of_full = self.stages(layout).single[Op.W, stage_S[kind_S == Op.B]]
        of_full = float(weight_of_full.sum()) / schedule.num_ranks
        reduce, update = self.optimizer(layout)
        bubble = length - float(sums.sum())
        return StepTime(forward, full - of_full + inputs, weights + of_full, pairs, bubble, reduce, update)

    def estimate(self, layout: Layout, global_batch_size: int) -> float:
        """Seconds of a step in closed form: the work of the mean rank, and formulas of the bubble - DualPipe's as
        published, of the others with input gradients that leave before W is computed. 1f1b and zbv in pairs: counted
        off the schedules, within a pair or two."""
        times, M, pp = self.stages(layout), layout.num_microbatches(global_batch_size), layout.pp
        per_rank = layout.num_stages // pp
        f, i, w = times.mean_f * per_rank, times.mean_i * per_rank, times.mean_w * per_rank
        work, gain = M * (f + i + w), times.mean_f + times.mean_i + times.mean_w - times.mean_pair
        if layout.schedule in OVERLAPPING:
            half, each = (pp, M) if layout.schedule == "dualpipev" else (pp // 2, M // 2)
            _, _, _, main, late, *_ = phase_counts(half, half // 2, max(each, 2 * half))
            pairs = max(0, 2 * main + late - 2 * max(0, 2 * half - each))
            work -= pairs * gain
            bubble = (half - 1) * (times.mean_pair + times.mean_i - 2 * times.mean_w)
        elif layout.pairs:
            work -= max(0.0, per_rank * M - pp * (1.0 if per_rank == 1 else 2.5)) * gain
            bubble = (pp - 1) * (f + i - per_rank * gain)
        else:
            share = {"interleaved_1f1b": (f + i) / 2, "zb1p": f + i - w, "zbv": (f + i - 2 * w) / 2}
            bubble = (pp - 1) * share.get(layout.schedule, f + i)
        return work * times.uneven + max(0.0, bubble) + sum(self.optimizer(layout))

    def groups(self, layout: Layout) -> list[list[Group]]:
        key = ("groups", layout.pp, layout.ep, layout.schedule, layout.world)
        if key not in self.cache:
            num_microbatches = 2 * layout.pp  # placement does not depend on it
            schedule = layout.make_schedule(num_microbatches)
            self.cache[key] = rank_groups(self.model, layout.mesh, schedule, self.split(layout.num_stages))
        return self.cache[key]

    def optimizer(self, layout: Layout) -> tuple[float, float]:
        """(reduce, update): seconds on the slowest rank."""
        key = ("optimizer", layout.pp, layout.ep, layout.schedule, layout.world, layout.zero_stage)
        if key not in self.cache:
            reduce = max(sum(self._collective(g, layout.zero_stage) for g in groups) for groups in self.groups(layout))
            moment = {"fp32": 4, "bf16": 2}[self.moments]
            each = 4 + 8 + 4 * moment + 2  # gradient read, master and two moments read and written, weight written
            update = max(
                sum(g.num_params / (g.copies if layout.zero_stage else 1) for g in groups)
                for groups in self.groups(layout)
            )
            self.cache[key] = reduce, self.cluster.update(each * update)
        return self.cache[key]

    def _collective(self, group: Group, zero_stage: int) -> float:
        """Seconds to sum FP32 gradients over the copies; ZeRO-1 then gathers BF16 weights, else FP32 sums.

        Reduce-scatter inside each node, then between nodes on the part that is left; gathering goes the other way.
        """
        inside, outside = group.inside, group.outside
        per_byte = (inside - 1) / inside / (1e9 * (self.cluster.reduce_gbs or self.cluster.node_gbs))
        per_byte += (outside - 1) / outside / inside / (1e9 * self.cluster.network_gbs)
        return group.num_params * (4 + (2 if zero_stage else 4)) * per_byte


def shapes_asked(model: ModelConfig, cluster: ClusterConfig, layout: Layout, sequence_length: int) -> ClusterConfig:
    """A copy of the cluster that has been asked for every product of this layout, and for nothing else."""
    cluster = replace(cluster)
    kernels = Kernels(model, cluster, layout, sequence_length)
    kernels.layer(True), kernels.layer(False), kernels.head(), kernels.join()
    return cluster


def slot_seconds(schedule: Schedule, times: StageTimes) -> np.ndarray:
    """How long every slot takes."""
    _, slot_S1, actions_A3 = schedule.columns
    first, size = slot_S1[:-1], np.diff(slot_S1)
    stage, op = actions_A3[first, 0], actions_A3[first, 1]
    duration_S = times.single[op, stage]
    pairs = np.flatnonzero(size == 2)
    forward, backward = first[pairs], first[pairs] + 1
    duration_S[pairs] = times.pair[
        (actions_A3[backward, 1] == Op.I).astype(int), actions_A3[forward, 0], actions_A3[backward, 0]
    ]
    return duration_S


def leaving_seconds(schedule: Schedule, times: StageTimes, duration_S: np.ndarray) -> np.ndarray:
    """When each result leaves, counted from the start of its slot: at the end, but for a full B that runs alone, whose
    W comes after its input gradient."""
    _, slot_S1, actions_A3 = schedule.columns
    size_S = np.diff(slot_S1)
    leaves_A = np.repeat(duration_S, size_S)
    stage, op = actions_A3[slot_S1[:-1], 0], actions_A3[slot_S1[:-1], 1]
    alone = (size_S == 1) & (op == Op.B)
    share = times.single[Op.I] / times.single[Op.B]
    leaves_A[slot_S1[:-1][alone]] *= share[stage[alone]]
    return leaves_A


def _unevenness(layout: Layout, work_S: np.ndarray) -> float:
    """The most loaded rank over the mean one, from the work of each stage."""
    if layout.schedule in ("zbv", "dualpipev", "dualpipe"):
        work_S = work_S + work_S[::-1]
    elif layout.schedule == "interleaved_1f1b":
        work_S = work_S[: layout.pp] + work_S[layout.pp :]
    return float(work_S.max() / work_S.mean())
