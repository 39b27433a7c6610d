"""Which layouts a run can take: a mesh of its ranks with experts on all of them and layers on every stage, and batches
of whole microbatches on every pipeline, enough of them for its schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from conf.schema import Config, TrainConfig
from parallel.config import check_divides
from parallel.mesh import MeshConfig
from parallel.pipeline.actions import Schedule
from parallel.pipeline.split import split_layers

_MANY = 1 << 10  # microbatches: more than any schedule needs


def checked_mesh(config: Config, world: int) -> MeshConfig:
    """The mesh of `world` ranks. Raises ValueError where the run cannot be laid over them."""
    parallel, train, model = config.parallel, config.train, config.model
    mesh = MeshConfig(parallel.pp, parallel.ep, parallel.ranks_per_node, world)
    mesh.check_experts(model.n_routed_experts, model.n_group)
    make_schedule = lru_cache(maxsize=None)(parallel.make_schedule)
    check_batches(train, make_schedule, mesh.dp)
    schedule = make_schedule(train.global_batch_size // (mesh.dp * train.microbatch_size))
    split_layers(model, schedule.num_stages, parallel.layers_per_stage)
    return mesh


def check_batches(train: TrainConfig, make_schedule: Callable[[int], Schedule], dp: int) -> None:
    """Raises ValueError naming the option whose batch does not divide, or is too small for the schedule."""
    sizes = {"train.global_batch_size": train.global_batch_size, "train.eval_samples": train.eval_samples}
    if train.batch_ramp.start:
        sizes["train.batch_ramp.start"] = train.batch_ramp.start
        sizes["train.batch_ramp.multiple_of"] = train.batch_ramp.multiple_of
    unit = train.microbatch_size * dp
    for name, size in sizes.items():
        check_divides(name, size, train.microbatch_size, dp)
        if size and not name.endswith("multiple_of"):
            try:
                make_schedule(size // unit)
            except ValueError as error:
                make_schedule(_MANY)  # a schedule that suits no batch says so by itself
                raise ValueError(
                    f"{error} ({name}={size} makes {size // unit} microbatches of train.microbatch_size="
                    f"{train.microbatch_size} on each of dp={dp} pipelines)"
                ) from None
