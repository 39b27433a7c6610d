"""Where the simulator's costs come from: options and files, a run that was measured, or a cluster and a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from infra.hardware import ClusterConfig
from model.config import ModelConfig
from parallel.config import check_choice
from parallel.expert import default_dispatcher
from parallel.pipeline.actions import Op, Schedule
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs
from parallel.plan.layout import Layout, illegal
from parallel.plan.step import StepModel, leaving_seconds, slot_seconds


def costs_of(options: dict[str, Any], overrides: list[str]) -> Costs:
    """`Costs` from the options: what `costs.file` says holds, but for what the command line (`overrides`) names."""
    options = dict(options)
    path = options.pop("file")
    if path is not None:
        try:
            found = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise ValueError(f"costs.file={path}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise ValueError(f"costs.file={path}: must hold names and values, as in 'f: 1.5'")
        for name in found:
            check_choice(f"costs.file={path}: option", name, [one.name for one in fields(Costs)])
        given = {override.lstrip("+").partition("=")[0].removeprefix("costs.") for override in overrides}
        options.update({name: value for name, value in found.items() if name not in given})
    slow = options.pop("slow") or {}
    if not isinstance(slow, dict) or not all(str(rank).isdecimal() for rank in slow):
        raise ValueError(f"costs.slow={slow}: expected a factor for each slow rank, as in {{3: 1.07}}")
    return Costs(**options, slow={int(rank): factor for rank, factor in slow.items()})


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # a spreadsheet writes a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None


def named(given: Costs, overrides: list[str]) -> dict[str, Any]:
    """The costs that the command line names; they hold whatever was measured."""
    names = {override.removeprefix("costs.").partition("=")[0] for override in overrides if "costs." in override}
    return {name: getattr(given, name) for name in names - {"file"}}


def measured_costs(
    run: str, make: Callable[[Costs], Schedule], pp: int, given: Costs, overrides: list[str]
) -> tuple[Costs, Schedule]:
    """The schedule that `make` makes over `pp` ranks, under what the run measured (ms), but for what is named."""
    from launch.trace import read_costs  # which imports torch, as does the next
    from parallel.pipeline.measure import per_rank, rescaled

    costs, num_ranks = read_costs(Path(run))
    told = named(given, overrides)
    schedule = make(replace(per_rank(costs, num_ranks, pp), **told))
    return replace(rescaled(costs, num_ranks, schedule), **told), schedule


def measured_shape(run: str) -> dict[str, Any]:
    """{schedule, pp, num_microbatches} of the step that a run measured; only what `simulate` can ask for."""
    from launch.trace import read_measured

    found = read_measured(Path(run))
    shape = {name: found[name] for name in ("schedule", "pp", "num_microbatches")}
    return shape if shape["schedule"] in SCHEDULES else {name: shape[name] for name in ("pp", "num_microbatches")}


class Planned(NamedTuple):
    """costs: seconds by stage, `fb` a mean. slots: those of every slot, exactly. notes: what they rest on."""

    costs: Costs
    schedule: Schedule
    slots: tuple[np.ndarray, np.ndarray]
    notes: list[str]


def planned_costs(
    model: ModelConfig, cluster: ClusterConfig, schedule: Schedule, layout: dict[str, Any], sequence_length: int
) -> Planned:
    """The step of a schedule by its name as the planner has it, in pairs or in turn as the layout runs. layout: other
    words of `parallel.plan.layout.Layout`; all ranks of the cluster where it names no `world`."""
    check_choice("parallel.schedule with cluster=", schedule.name, SCHEDULES)
    world = layout.get("world", cluster.num_ranks)
    words: dict[str, Any] = {"world": world, "ranks_per_node": min(cluster.ranks_per_node, world)} | layout
    words.setdefault("dispatcher", default_dispatcher(words.get("ep", 1)))
    chosen = Layout(pp=schedule.num_ranks, schedule=schedule.name, **words)
    batch = schedule.num_microbatches * (world // schedule.num_ranks) * chosen.microbatch_size
    if why := illegal(model, chosen, batch):
        raise ValueError(why)
    if schedule.num_stages != chosen.num_stages:
        stages = f"{schedule.num_stages} stages on {schedule.num_ranks} ranks"
        raise ValueError(f"{schedule.name} has {stages}, but the planner knows it with {chosen.num_stages}")
    step = StepModel(model, cluster, sequence_length)
    times = step.stages(chosen)
    f, i, w = (times.single[op].tolist() for op in (Op.F, Op.I, Op.W))
    fb = None
    if chosen.pairs:
        alone = times.single[Op.F][:, None] + times.single[Op.B]
        fb = float(times.pair[0].sum() / alone.sum()) * sum(f + i + w) / schedule.num_ranks
    send_when = "ready" if fb is None else "slot_end"  # an overlapped pair has both results at its end
    optimizer = sum(step.optimizer(chosen))
    costs = Costs(f=f, i=i, w=w, fb=fb, p2p=times.send, optimizer=optimizer, send_when=send_when)
    runs, _, _ = step.replayed(chosen, batch)
    duration_S = slot_seconds(runs, times)
    return Planned(costs, runs, (duration_S, leaving_seconds(runs, times, duration_S)), step.doubts(chosen))
