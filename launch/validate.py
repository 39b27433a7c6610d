"""Writes docs/validation.md: every published figure that the planner speaks of, ours beside it, and the error.

    python launch/validate.py [FILE]

Nothing here is measured on this machine, so the file is the same everywhere; a test holds it against what this writes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from launch.files import save
from launch.plan import PlanConfig, bill_of, planner_of
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.plan.cost import pair_time
from parallel.plan.layout import Layout
from parallel.plan.search import Row
from parallel.plan.step import StepModel, StepTime

V3 = Layout(2048, 8, 16, 64, "dualpipe", "two_hop", True, "selective", 1, "fp8", 1)
BATCH = 15360
# ISCA paper, table 4: seconds, in its words, under the multi-plane and the multi-rail network.
PUBLISHED = {
    "time/step": (19.926, 19.946),
    "1F": (1.13, 1.13),
    "bubble": (2.06, 2.03),
    "1B": (1.99, 1.99),
    "1W": (0.48, 0.48),
    "1F1B": (13.95, 14.00),
    "opt": (0.29, 0.31),
}
# The published profile: mean busy time of each phase of a layer, ms. Weight gradients of experts ran on two streams:
# 31.08 ms a layer that the compute streams are busy, less the other phases.
PROFILE = {
    "attend F": 4.37,
    "experts F": 4.60,
    "experts B": 5.31,
    "experts W": 5.07,
    "attend B": 9.34,
    "attend W": 2.39,
}


@dataclass(frozen=True)
class Line:
    what: str
    source: str
    published: float
    ours: float
    unit: str = ""

    def __str__(self) -> str:
        error = 100 * (self.ours / self.published - 1)
        shown = [f"{value:,.0f}" if value > 1e6 else f"{value:,.6g}" for value in (self.published, round(self.ours, 3))]
        sign = "exact" if self.ours == self.published else f"{error:+.2f} %"
        return f"| {self.what} | {self.source} | {shown[0]} | {shown[1]} | {self.unit} | {sign} |"


def config_of(*overrides: str) -> PlanConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return cast(PlanConfig, OmegaConf.to_object(compose("plan", list(overrides))))


def counts() -> list[Line]:
    v3, v2 = config_of("model=671b").model, config_of("model=236b").model
    return [
        Line("parameters", "config.json", 671_026_419_200, v3.num_params()),
        Line("activated parameters", "config.json", 37_552_275_456, v3.num_activated_params()),
        Line("training, causal", "ISCA table 2", 250, v3.flops_per_token(causal=True) / 1e9, "GFLOP/token"),
        Line("training, V2", "ISCA table 2", 155, v2.flops_per_token(causal=True) / 1e9, "GFLOP/token"),
        Line("latent cache", "ISCA table 1", 70_272, v3.kv_cache_bytes_per_token(), "B/token"),
    ]


def bubbles() -> list[Line]:
    """The published formulas, on the middle rank, with F = 1, B = 2, W = 1, F&B = 3."""
    f, b, w, fb, pp, half = 1.0, 2.0, 1.0, 3.0, 8, 4
    costs = Costs(f=f, i=b - w, w=w, fb=fb, send_when="slot_end")
    formulas = {
        "1f1b": (pp - 1) * (f + b),
        "zb1p": (pp - 1) * (f + b - 2 * w),
        "dualpipe": (half - 1) * (fb + b - 3 * w),
    }
    return [
        Line(f"bubble of {name}, 8 ranks, 20 microbatches", "V3 report, table 2", formula,
             float(simulate(SCHEDULES[name](pp, 20), costs).bubble_R[half]), "F")
        for name, formula in formulas.items()
    ]  # fmt: skip


def profile(model: StepModel) -> list[Line]:
    """The F&B of four layers, balanced, from stand-alone rates of kernels."""
    even = StepModel(model.model, replace(model.cluster, expert_imbalance=0.0), model.sequence_length)
    _, layer, _ = even.layers(V3)
    slower = 1e3 * even.cluster.sm_contention
    ours = {
        f"{phase} {op}": slower * getattr(layer, op_name)[k]
        for k, phase in enumerate(("attend", "experts"))
        for op, op_name in (("F", "f"), ("B", "i"), ("W", "w"))
    }
    whole = 4e3 * pair_time(layer, layer, even.cluster.sm_contention, 0.0, False)
    lines = [Line(f"phase {name} of a layer", "profile-data", PROFILE[name], ours[name], "ms") for name in PROFILE]
    return [Line("F&B of four layers", "profile-data", 129.0, whole, "ms"), *lines]


def in_published_words(time: StepTime) -> dict[str, float]:
    return {
        "time/step": time.total, "1F": time.forward, "bubble": time.bubble, "1B": time.backward, "1W": time.weight,
        "1F1B": time.pair, "opt": time.reduce + time.update,
    }  # fmt: skip


def step_lines(time: StepTime, column: int) -> list[Line]:
    source = ("ISCA table 4, multi-plane", "ISCA table 4, multi-rail")[column]
    ours = in_published_words(time)
    return [Line(name, source, values[column], ours[name], "s") for name, values in PUBLISHED.items()]


def fitted(model: StepModel, target: float) -> StepModel:
    """The imbalance that brings the step to `target` seconds."""
    low, high = 1.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        slow = replace(model, imbalance=middle).simulate(V3, BATCH).total > target
        low, high = (low, middle) if slow else (middle, high)
    return replace(model, imbalance=round(low, 4))


def cost_lines(imbalance: float) -> list[Line]:
    """The whole run: pre-training as planned, context extension and post-training as published."""
    config = config_of(f"imbalance={imbalance}", "train.ramp_from=3072", "cluster.mtbf_hours=1e9")
    planner = planner_of(config)
    row = Row(V3, 120, planner.step.simulate(V3, BATCH), planner.memory.fullest(V3, BATCH))
    bill = bill_of(config, planner, row)
    published = {"pre-training": 2664.0, "all training": 2788.0}
    ours = {"pre-training": bill.useful_hours * V3.world / 1e3}
    ours["all training"] = ours["pre-training"] + 119 + 5
    lines = [Line(name, "V3 report, table 1", published[name], ours[name], "K GPU-hours") for name in published]
    tokens_a_day = BATCH * 4096 / row.time.total * 86400 / 1e9
    return [
        *lines,
        Line("all training", "V3 report, table 1", 5.576, 2e-3 * ours["all training"], "M$ at $2"),
        Line("tokens a day", "ISCA table 4", 272.80, tokens_a_day, "B"),
    ]


HEAD = "| figure | source | published | ours | unit | error |\n|---|---|---|---|---|---|"


def table(lines: list[Line]) -> str:
    return "\n".join([HEAD, *map(str, lines)])


def document() -> str:
    config = config_of("model=671b")
    planner = planner_of(config)
    time = planner.step.simulate(V3, BATCH)
    fit = fitted(planner.step, PUBLISHED["time/step"][0])
    plan = planner.search([config.cluster.num_ranks], {})
    place, winner = next(n for n, row in enumerate(plan.rows, 1) if row.layout == V3), plan.rows[0]
    own = planner.row(V3)
    missing_s, missing = max(
        (PUBLISHED[name][0] - value, name) for name, value in in_published_words(time).items() if name != "time/step"
    )
    return f"""# Validation

Written by `make validation`; do not edit. Published figures, ours, and the error. What each rests on stands in
[conf/cluster/h800_2048.yaml](../conf/cluster/h800_2048.yaml) (rates, each with its source) and
[parallel/plan/cost.py](../parallel/plan/cost.py) (which kernels run, and how many bytes they move).

## Counts

{table(counts())}

## Schedules

{table(bubbles())}

## The profiled pair

Rates of matrix products are DeepGEMM's published ones, of kernels that run alone. Attention and memory-bound rates are
those of single kernels in this very profile, so this checks what is added up and the law of contention (computing takes
132 / 112 as long while 20 SMs communicate), not those two rates.

{table(profile(planner.step))}

## The published step, from components

Nothing is fitted to it. 2,048 H800, PP16, EP64, DualPipe, batch 15,360 of length 4,096. Beyond the profiled pair this
has in it: MTP and both heads on the last stage, three dense layers, {100 * config.cluster.expert_imbalance:g} %
more rows on the most loaded rank (MaxVio of arXiv 2408.15664, table 2), journeys in full where nothing overlaps them,
the transfer between stages, gradients summed in FP32 over two tiers. The input gradient of a full backward leaves
before its weight gradients are computed, as our executor sends it; the published formula takes both as one.

{table(step_lines(time, 0))}

The largest term that is not explained is {missing}, of {missing_s:.2f} s. Which layers stand on which stage was not
published; ours are balanced by FLOPs. Jitter, slow ranks and waits for the network are not in it.

## The published step, fitted

One number is fitted to the first line: `imbalance={fit.imbalance:g}` on all computing and travelling. The second column
is held against the same prediction.

{table(step_lines(fit.simulate(V3, BATCH), 0))}

{table(step_lines(fit.simulate(V3, BATCH), 1)[:1])}

## The bill

With the fitted step, the batch growing from 3,072 over 469 B tokens, 14.8 T tokens in all; context extension (119 K)
and post-training (5 K) are the published figures.

{table(cost_lines(fit.imbalance))}

## The search

`python launch/plan.py model=671b cluster=h800_2048 train.global_batch_size=15360`: {plan.num_legal:,} legal layouts, of
which {plan.num_fitting:,} fit 80 GB. DeepSeek-V3's own is number {place} with {own.time.total:.3f} s and
{own.memory.total / 1e9:.1f} GB, of which {own.memory.margin / 1e9:.1f} are margin.
The first, by {1e3 * (own.time.total - winner.time.total):.0f} ms of bubble, is
`{winner.layout.schedule}` on {winner.layout.pp} pipeline ranks: the same chain of stages, folded.
"""


def main(file: str = "docs/validation.md") -> None:
    save(Path(file), document())


if __name__ == "__main__":
    main(*sys.argv[1:2])
