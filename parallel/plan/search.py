"""The search: every legal layout, those that fit, the fastest of them replayed exactly - and why the winner wins.

    layouts()            all that the mesh, the model, the schedules and the batch allow
      -> fullest()       those whose fullest rank fits
      -> estimate()      closed form, to choose the best few hundred
      -> simulate()      the very schedule, replayed

No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from parallel.expert import default_dispatcher
from parallel.plan.layout import Layout, illegal, layouts
from parallel.plan.memory import MemoryModel, RankMemory, smallest_change
from parallel.plan.step import StepModel, StepTime

Progress = Callable[[str, int, int], None]  # what is being done, how far, of how many


@dataclass(frozen=True)
class Row:
    """One layout with its step, replayed, and its fullest rank."""

    layout: Layout
    num_microbatches: int
    time: StepTime
    memory: RankMemory


@dataclass(frozen=True)
class Plan:
    """What a search found: rows by step time, then memory. num_legal layouts, of which num_fitting fit."""

    rows: list[Row]
    num_legal: int
    num_fitting: int


class Planner:
    """Searches for one model, cluster and batch. memory_gb: what a rank may fill.

    Raises ValueError, with the nearest request that is possible, where nothing is.
    """

    def __init__(self, step: StepModel, memory: MemoryModel, global_batch_size: int):
        self.step, self.memory, self.global_batch_size = step, memory, global_batch_size
        self.limit = 1e9 * step.cluster.memory_gb

    def row(self, layout: Layout) -> Row:
        M, batch = layout.num_microbatches(self.global_batch_size), self.global_batch_size
        return Row(layout, M, self.step.simulate(layout, batch), self.memory.fullest(layout, batch))

    def search(
        self, worlds: Sequence[int], fixed: dict[str, Any], num_exact: int = 200, progress: Progress | None = None
    ) -> Plan:
        """The best layouts on each of `worlds` ranks, with the words of `fixed` as they are told."""
        tell = progress or (lambda *_: None)
        legal = [one for world in worlds for one in self._legal(world, fixed)]
        if not legal:
            raise ValueError(self._nearest_legal(worlds, fixed))
        fitting = []
        for k, layout in enumerate(legal):
            if k % 500 == 0:
                tell("weighing layouts", k, len(legal))
            if self.memory.fullest(layout, self.global_batch_size).total <= self.limit:
                fitting.append((self.step.estimate(layout, self.global_batch_size), k))
        if not fitting:
            raise ValueError(self._nearest_fitting(legal))
        rows = []
        chosen = sorted(fitting)[:num_exact]
        for done, (_, k) in enumerate(chosen):
            tell("replaying schedules", done, len(chosen))
            rows.append(self.row(legal[k]))
        tell("replaying schedules", len(chosen), len(chosen))
        rows.sort(key=lambda row: (round(row.time.total, 6), row.memory.total))
        return Plan(rows, len(legal), len(fitting))

    def _legal(self, world: int, fixed: dict[str, Any]) -> Iterable[Layout]:
        return layouts(self.step.model, self.step.cluster, world, self.global_batch_size, fixed)

    def neighbours(self, winner: Layout) -> list[tuple[str, Row | None, str]]:
        """(the one word changed, its row, why it cannot be): of every legal layout one word away from the winner.

        A dispatcher follows `ep`. The row is None, with the reason, for what does not fit.
        """
        result: list[tuple[str, Row | None, str]] = []
        for other in self._one_word_away(winner):
            changed = {name: mine for name, (mine, _) in other.differs(winner).items() if name != "world"}
            words = " ".join(f"{name}={_show(value)}" for name, value in changed.items())
            fullest = self.memory.fullest(other, self.global_batch_size)
            if fullest.total > self.limit:
                why = f"does not fit: {fullest.total / 1e9:.1f} of {self.step.cluster.memory_gb:g} GB"
                if found := smallest_change(self.memory, other, self.global_batch_size):
                    change = " ".join(f"{name}={_show(new)}" for name, (_, new) in other.differs(found[0]).items())
                    why += f"; {change} would make it {found[1].total / 1e9:.1f}"
                result.append((words, None, why))
            else:
                result.append((words, self.row(other), ""))
        return sorted(result, key=lambda item: item[1].time.total if item[1] else float("inf"))

    def _one_word_away(self, winner: Layout) -> Iterable[Layout]:
        words = asdict(winner)
        words.pop("ranks_per_node")
        world = words.pop("world")
        for name in words:
            fixed = {key: value for key, value in words.items() if key != name}
            if name == "ep":
                fixed["dispatcher"] = None
            if name == "schedule":
                fixed["overlap"] = None
            for other in self._legal(world, fixed):
                differs = set(other.differs(winner)) - {name}
                allowed = {"ep": {"dispatcher"}, "schedule": {"overlap"}}.get(name, set())
                if other != winner and differs <= allowed and getattr(other, name) != getattr(winner, name):
                    yield other

    def _nearest_legal(self, worlds: Sequence[int], fixed: dict[str, Any]) -> str:
        """Why nothing is legal, and the nearest value of one told word that would be."""
        told = {name: value for name, value in fixed.items() if value is not None}
        world, model = worlds[0], self.step.model
        deepest = max(pp for pp in range(1, model.num_hidden_layers + 1) if world % pp == 0)
        words: dict[str, Any] = {"pp": deepest, "dispatcher": default_dispatcher(told.get("ep", 1))} | told
        probe = replace(Layout(world, min(self.step.cluster.ranks_per_node, world)), **words)
        why = illegal(model, probe, self.global_batch_size)
        if why is None:
            given = " ".join(f"{_word(name)}={_show(value)}" for name, value in told.items())
            why = f"no layout has all of {given}"
        for name in told:
            values = {getattr(one, name) for w in worlds for one in self._legal(w, {**fixed, name: None})}
            if values:
                near = " or ".join(f"{_word(name)}={_show(value)}" for value in _nearest(told[name], values))
                return f"{why}; nearest with all else as told: {near}"
        return why

    def _nearest_fitting(self, legal: Sequence[Layout]) -> str:
        fullest = [(self.memory.fullest(layout, self.global_batch_size).total, k) for k, layout in enumerate(legal)]
        total, k = min(fullest)
        cluster, smallest = self.step.cluster, legal[k]
        why = (
            f"none of {len(legal)} layouts fits {cluster.memory_gb:g} GB on {smallest.world} ranks: the smallest needs "
            f"{total / 1e9:.1f} GB ({' '.join(smallest.words())}); "
        )
        if found := smallest_change(self.memory, smallest, self.global_batch_size):
            changes = (f"{_word(name)}={_show(new)}" for name, (_, new) in smallest.differs(found[0]).items())
            return why + f"{' '.join(changes)} would make it {found[1].total / 1e9:.1f}"
        needed = str(ceil(total / 1e9)) if total > 1e9 else f"{total / 1e9:.2g}"
        return why + f"use devices of at least {needed} GB, more ranks (cluster.num_ranks), or a smaller model"


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in step time, memory and ranks at once, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (round(r.time.total, 6), r.memory.total, r.layout.world)):
        if not any(f.memory.total <= row.memory.total and f.layout.world <= row.layout.world for f in front):
            front.append(row)
    return front


def terms(row: Row, than: Row) -> dict[str, float]:
    """How many seconds each term of `row` takes longer than that of `than`, the largest difference first."""
    mine, other = asdict(row.time), asdict(than.time)
    difference = {name: mine[name] - other[name] for name in mine}
    return dict(sorted(difference.items(), key=lambda item: -abs(item[1])))


def _nearest(wanted: Any, values: Iterable[Any]) -> list[Any]:
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        below, above = [v for v in values if v < wanted], [v for v in values if v > wanted]
        return [*([max(below)] if below else []), *([min(above)] if above else [])]
    return sorted(values, key=str)


def _word(name: str) -> str:
    return {"precision": "precision", "microbatch_size": "train.microbatch_size"}.get(name, f"parallel.{name}")


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
