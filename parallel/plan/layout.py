"""A layout: every word on the command line that says how a step is laid over the ranks - and which layouts are legal.

What is legal is asked of those who enforce it: `MeshConfig` for the mesh, `split_layers` for the stages, the schedules
for their ranks and microbatches. Nothing here repeats their rules. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

from infra.hardware import ClusterConfig
from model.config import ModelConfig
from parallel.config import RECOMPUTES, ParallelConfig, check_divides
from parallel.expert import default_dispatcher
from parallel.mesh import MeshConfig
from parallel.pipeline.actions import Schedule
from parallel.pipeline.passes import PAIRABLE
from parallel.pipeline.schedules import SCHEDULES

PRECISIONS = ("bf16", "fp8")
CHOICES: dict[str, tuple[Any, ...]] = {  # of the words that are one of a few
    "schedule": tuple(SCHEDULES),
    "dispatcher": ("local", "all_to_all", "two_hop"),
    "overlap": (True, False),
    "recompute": RECOMPUTES,
    "zero_stage": (0, 1),
    "precision": PRECISIONS,
}
TWO_STAGES_A_RANK = ("interleaved_1f1b", "zbv", "dualpipev")
WORDS = ("pp", "ep", "ranks_per_node", "schedule", "dispatcher", "overlap", "recompute", "zero_stage")  # of `parallel`
OVERLAPPING = ("dualpipe", "dualpipev")  # the schedules that have slots of two by themselves


@dataclass(frozen=True)
class Layout:
    """One candidate. `world` ranks; the other words are those of `ParallelConfig`, `precision` and `train`."""

    world: int
    ranks_per_node: int
    pp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    dispatcher: str = "two_hop"
    overlap: bool = True
    recompute: str = "none"
    zero_stage: int = 1
    precision: str = "bf16"
    microbatch_size: int = 1

    @cached_property
    def mesh(self) -> MeshConfig:
        return MeshConfig(self.pp, self.ep, self.ranks_per_node, self.world)

    @property
    def dp(self) -> int:
        return self.world // self.pp

    @property
    def num_stages(self) -> int:
        return self.pp * (2 if self.schedule in TWO_STAGES_A_RANK else 1)

    @property
    def pairs(self) -> bool:
        """Whether slots of two interleave their phases."""
        return self.overlap and (self.schedule in OVERLAPPING or (self.ep > 1 and self.schedule in PAIRABLE))

    def make_schedule(self, num_microbatches: int) -> Schedule:
        """The very schedule that a run executes."""
        return schedule_of(self.schedule, self.pp, num_microbatches, self.pairs)

    @property
    def least_batch(self) -> int:
        """Sequences of the smallest batch that this layout can run; every other is a multiple of those of a microbatch
        on each pipeline."""
        return self.dp * self.microbatch_size * (2 if self.schedule == "dualpipe" else 1)

    def num_microbatches(self, global_batch_size: int) -> int:
        return global_batch_size // (self.dp * self.microbatch_size)

    def words(self) -> list[str]:
        """The overrides of launch/pretrain.py that ask for this layout."""
        words = [f"parallel.{name}={_text(getattr(self, name))}" for name in WORDS]
        if self.precision == "fp8":
            words.append("parallel.dispatch_dtype=fp8")
        return [*words, f"precision={self.precision}", f"train.microbatch_size={self.microbatch_size}"]

    def differs(self, other: Layout) -> dict[str, tuple[Any, Any]]:
        """The words that differ: {name: (mine, the other's)}."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@lru_cache(maxsize=1024)
def schedule_of(name: str, pp: int, num_microbatches: int, paired: bool) -> Schedule:
    """By its name; paired: as it runs under overlap."""
    return ParallelConfig(pp, 2, 1, name, "two_hop", overlap=paired).make_schedule(num_microbatches)


def illegal(model: ModelConfig, layout: Layout, global_batch_size: int) -> str | None:
    """Why this layout cannot run, in one line; None if it can."""
    try:
        layout.mesh.check_experts(model.n_routed_experts, model.n_group)
        ParallelConfig(layout.pp, layout.ep, layout.ranks_per_node, layout.schedule, layout.dispatcher)
        check_divides("train.global_batch_size", global_batch_size, layout.microbatch_size, layout.dp)
    except ValueError as error:
        return str(error)
    if layout.num_stages > model.num_hidden_layers:
        return (
            f"{layout.schedule} on parallel.pp={layout.pp} has {layout.num_stages} stages, but the model "
            f"{model.num_hidden_layers} layers: lower parallel.pp"
        )
    num_microbatches = layout.num_microbatches(global_batch_size)
    if layout.schedule == "dualpipe" and (layout.pp % 2 or num_microbatches < 2):
        return "dualpipe needs an even parallel.pp and two microbatches at least: use dualpipev"
    if layout.schedule == "zbv" and layout.pp < 2:
        return "zbv needs parallel.pp of at least 2: use 1f1b"
    return None


def layouts(
    model: ModelConfig, cluster: ClusterConfig, world: int, global_batch_size: int, fixed: dict[str, Any]
) -> Iterator[Layout]:
    """Every legal layout that agrees with `fixed` (words that are not None are not searched).

    Layouts that another one equals by construction are left out: one rank needs no schedule but 1f1b, ep=1 no
    dispatcher but local, what has no pairs no overlap.
    """
    base = Layout(world, min(cluster.ranks_per_node, world))
    per_rank = global_batch_size // world * 64 or 64
    choices: dict[str, Sequence[Any]] = {
        "pp": [pp for pp in range(1, model.num_hidden_layers + 1) if world % pp == 0],
        "ep": [ep for ep in range(1, model.n_routed_experts + 1) if model.n_routed_experts % ep == 0],
        **CHOICES,
        "precision": PRECISIONS if cluster.fp8_tflops else PRECISIONS[:1],
        "microbatch_size": [b for b in (1, 2, 3, 4, 6, 8) if b <= per_rank],
    }
    choices |= {name: [value] for name, value in fixed.items() if value is not None}
    outer = ("pp", "ep", "schedule", "microbatch_size")
    inner = [name for name in choices if name not in outer]
    for values in product(*(choices[name] for name in outer)):
        shape = replace(base, **dict(zip(outer, values, strict=True)))
        probe = replace(shape, dispatcher=default_dispatcher(shape.ep))
        if (shape.pp == 1 and shape.schedule != "1f1b" and not fixed.get("schedule")) or illegal(
            model, probe, global_batch_size
        ):
            continue
        for rest in product(*(choices[name] for name in inner)):
            words = dict(zip(inner, rest, strict=True))
            if (words["dispatcher"] == "local") != (shape.ep == 1):
                continue
            found = replace(shape, **words)
            if words["overlap"] and not fixed.get("overlap") and not found.pairs:
                continue
            if words["dispatcher"] == "all_to_all" and shape.mesh.ep_nodes == 1 and not fixed.get("dispatcher"):
                continue  # inside one node both hops are one
            yield found
