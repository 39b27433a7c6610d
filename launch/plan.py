"""Says which layout to train a model with on a cluster: how long a step takes, whether it fits, what the run costs.

    python launch/plan.py model=671b cluster=h800_2048 train.global_batch_size=15360
    python launch/plan.py parallel.pp=16 parallel.schedule=1f1b precision=bf16        # these words told, the rest found
    python launch/plan.py cluster=h100 worlds=[256,512,1024] train.global_batch_size=4096 out=DIR
    python launch/plan.py -m cluster=h100,h200 cluster.num_ranks=256,512 train.global_batch_size=4096 out=DIR

It takes every legal layout, drops what does not fit, replays the schedules of the best exactly, and prints them ranked,
each with the line that starts it; the winner beside its neighbours; the Pareto front of time, memory and ranks; and
days and dollars for `train.tokens`. With out=DIR it writes plan.json, plan.csv and plan.html.

The step is an interval: what no table settles - the load of experts, a slow rank, jitter, kernels, the network - is
moved through the ranges of `doubt`, and the term that moves it most is named. `expert_load=RUN` takes the load from the
histograms of a run of your own. `memory=true` prints what every pipeline rank of the winner holds, and with out=DIR
writes DIR/memory_snapshot.pickle for torch's memory viewer. `imbalance` is a factor on all computing and travelling: 1
unless you fit it to a run of your own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from infra.hardware import ClusterConfig
from launch.errors import one_line_errors
from launch.expert_load import read_expert_load
from launch.files import check_folder
from launch.plan_report import SPARE, as_row, line_of, report
from launch.sweep import is_asked, is_sweep, leave_row, row_or_note, sweep, swept_words
from launch.told import BesideConfig, ToldConfig, told
from model.config import ModelConfig
from parallel.config import check_at_least, check_choice
from parallel.plan.goodput import Goodput, goodput, work_hours
from parallel.plan.interval import Ranges, interval
from parallel.plan.layout import PRECISIONS
from parallel.plan.memory import MemoryModel
from parallel.plan.search import Plan, Planner, Row
from parallel.plan.step import StepModel


@dataclass
class ToldPrecision:
    """`precision` of a run; its back end and recipe change no plan."""

    name: str | None = None
    backend: str = "reference"
    recipe: str = "deepseek_v3"

    def __post_init__(self) -> None:
        if self.name is not None:
            check_choice("precision", self.name, PRECISIONS)


@dataclass
class BatchConfig:
    """tokens: of the whole run. ramp_from: sequences of the first batch, which grows over `ramp_tokens`."""

    global_batch_size: int = 15360
    microbatch_size: int | None = None
    tokens: float = 14.8e12
    ramp_from: int | None = None
    ramp_tokens: float = 469e9

    def __post_init__(self) -> None:
        check_at_least("train.global_batch_size", self.global_batch_size)
        check_at_least("train.tokens", self.tokens)
        if self.microbatch_size is not None:
            check_at_least("train.microbatch_size", self.microbatch_size)
        check_at_least("train.ramp_tokens", self.ramp_tokens)
        if self.ramp_from is not None:
            check_at_least("train.ramp_from", self.ramp_from)
            for name, most in (("ramp_from", "global_batch_size"), ("ramp_tokens", "tokens")):
                if getattr(self, name) > getattr(self, most):
                    what = f"train.{name}={getattr(self, name):g} is above train.{most}={getattr(self, most):g}"
                    raise ValueError(f"{what}, where the ramp ends: lower it")


@dataclass
class LengthConfig:
    sequence_length: int = 4096

    def __post_init__(self) -> None:
        check_at_least("data.sequence_length", self.sequence_length)


@dataclass
class PlanConfig:
    """worlds: a number of ranks to try, or a list of them; null: all of the cluster. show: rows printed. exact:
    schedules replayed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ToldConfig = field(default_factory=ToldConfig)
    precision: ToldPrecision = field(default_factory=ToldPrecision)
    train: BatchConfig = field(default_factory=BatchConfig)
    data: LengthConfig = field(default_factory=LengthConfig)
    worlds: Any = None  # int | list[int] | None, a union that OmegaConf does not know
    beside: BesideConfig | None = None
    moments: str = "bf16"  # dtype of the optimizer's moments
    ema: bool = True
    imbalance: float = 1.0
    expert_load: str | None = None  # a run folder
    doubt: Ranges = field(default_factory=Ranges)
    exact: int = 200
    show: int = 12
    memory: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        check_choice("moments", self.moments, ("fp32", "bf16"))
        check_folder("out", self.out)
        check_at_least("exact", self.exact)
        check_at_least("show", self.show)
        if not 0.01 <= self.imbalance <= 100:
            raise ValueError(f"imbalance={self.imbalance}: a factor on times, from 0.01 to 100")
        for world in self.tried:
            if type(world) is not int or world < 1:
                raise ValueError(f"worlds={self.worlds}: numbers of ranks, 1 or more each, as in worlds=[256,512]")

    @property
    def tried(self) -> list[int]:
        """Numbers of ranks."""
        worlds: Any = self.cluster.num_ranks if self.worlds is None else self.worlds
        return worlds if isinstance(worlds, list) and worlds else [worlds]

    @property
    def told(self) -> dict[str, Any]:
        return told(self.parallel) | {"precision": self.precision.name, "microbatch_size": self.train.microbatch_size}


def planner_of(config: PlanConfig) -> Planner:
    load = None
    if config.expert_load is not None:
        load = read_expert_load(Path(config.expert_load))
        if load.shape[1] != config.model.n_routed_experts:
            raise ValueError(
                f"expert_load={config.expert_load} has {load.shape[1]} experts a layer, but model.n_routed_experts="
                f"{config.model.n_routed_experts}: take a run of the same model"
            )
    step = StepModel(config.model, config.cluster, config.data.sequence_length, config.moments, config.imbalance, load)
    return Planner(step, MemoryModel(step, config.ema), config.train.global_batch_size)


def bill_of(config: PlanConfig, planner: Planner, row: Row) -> Goodput:
    """The whole run with this layout."""
    layout, train = row.layout, config.train

    def seconds(size: int) -> float:
        return planner.step.simulate(layout, size).total

    hours = work_hours(
        train.tokens, config.data.sequence_length, train.global_batch_size, seconds, train.ramp_from,
        train.ramp_tokens, multiple_of=layout.least_batch,
    )  # fmt: skip
    per_param = 4 + 2 * {"fp32": 4, "bf16": 2}[config.moments]
    return goodput(config.cluster, layout.world, hours, per_param * config.model.num_params())


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


def search(config: PlanConfig) -> tuple[Planner, Plan]:
    """The planner and what it found, with a progress bar on the way."""
    planner = planner_of(config)
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done)

        return planner, planner.search(config.tried, config.told, config.exact, tell)


def row_of_sweep(config: PlanConfig, model: str) -> dict[str, Any]:
    """The winner of one job of a sweep, its bill, and the line that starts it."""
    planner, plan = search(config)
    winner, bill = plan.rows[0], bill_of(config, planner, plan.rows[0])
    span = interval(planner.step, winner.layout, config.train.global_batch_size, config.doubt)
    found = as_row(config, 1, winner, span)
    found.pop("row")
    bill_row = {"days": round(bill.days, 2), "GPU-hours": round(bill.gpu_hours), "dollars": round(bill.dollars)}
    return found | bill_row | {"line": line_of(config, model, winner.layout)}


@one_line_errors()
@hydra.main("pkg://conf", "plan", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    model = HydraConfig.get().runtime.choices["model"]
    if is_sweep():
        return leave_row(row_or_note(partial(row_of_sweep, model=model), composed, swept_words()))
    config = cast(PlanConfig, OmegaConf.to_object(composed))
    planner, plan = search(config)
    overrides = list(HydraConfig.get().overrides.task)
    report(config, model, planner, plan, bill_of(config, planner, plan.rows[0]), overrides, Console())


if __name__ == "__main__":
    if is_asked(sys.argv):
        sweep(main, "out", "plans", by=("step_s",), scatter=("memory_GB", "step_s"), always=("layout",), spare=SPARE)
    else:
        main()
