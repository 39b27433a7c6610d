"""Measures this machine, and writes what launch/plan.py and launch/simulate.py take as `cluster=NAME`.

    torchrun --nproc-per-node=2 launch/calibrate.py out=cluster/mine.yaml
    python launch/plan.py cluster=mine model=debug data.sequence_length=256 train.global_batch_size=32

Matrix products (dense, grouped, weight gradients), attention, memory-bound kernels, permutation, the optimizer, copies,
all-to-all, transfers and sums, at the shapes that the planner asks of the model; with layers=true whole layers too. All
ranks measure at once, since they share memory and links in a run. The file says on what, with what, when, and at which
shapes; what was asked of a plan and not measured, every report flags.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from infra.hardware import DTYPE_BYTES, ClusterConfig, KernelRates
from infra.precision import PrecisionConfig
from launch.errors import one_line_errors
from launch.files import save
from model.config import ModelConfig
from parallel.config import RECOMPUTES, check_choice
from parallel.mesh import Mesh, MeshConfig
from parallel.plan.layout import Layout
from parallel.plan.step import shapes_asked

LATENCY_ROWS = 1  # of a message whose time is all latency
BYTES_A_PARAMETER = 30  # of the optimizer: as `StepModel.optimizer` counts them, with FP32 moments
TRAINED = 16  # bytes a parameter of a layer that is run: weight, gradient, master, moments


@dataclass
class LengthConfig:
    sequence_length: int = 256


@dataclass
class NodeConfig:
    ranks_per_node: int | None = None


@dataclass
class CalibrateConfig:
    """seconds: for each kernel. recompute, dispatchers: of the whole layers that layers=true measures."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: LengthConfig = field(default_factory=LengthConfig)
    parallel: NodeConfig = field(default_factory=NodeConfig)
    microbatch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4])
    layers: bool = False
    recompute: list[str] = field(default_factory=lambda: list(RECOMPUTES))
    dispatchers: list[str] = field(default_factory=lambda: ["all_to_all", "two_hop"])
    seconds: float = 0.05
    out: str = "cluster/mine.yaml"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision.name, ("bf16", "fp32"))
        for name in self.recompute:
            check_choice("recompute", name, RECOMPUTES)
        for name in self.dispatchers:
            check_choice("dispatchers", name, ("all_to_all", "two_hop"))
        if not self.microbatch_sizes or min(self.microbatch_sizes) < 1:
            raise ValueError(f"microbatch_sizes={self.microbatch_sizes}: one at least, each at least 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be above 0")
        if Path(self.out).suffix != ".yaml":
            raise ValueError(f"out={self.out}: a cluster file is named NAME.yaml")


class Calibration:
    """One rank's part in measuring; all ranks make one. `jobs` are done in order, and fill `cluster`."""

    def __init__(self, config: CalibrateConfig, world: Any):
        import torch

        from launch.measure_kernels import Stopwatch

        self.config, self.world = config, world
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        self.ranks_per_node = min(config.parallel.ranks_per_node or here, world.size)
        self.mesh = Mesh(MeshConfig(1, world.size, self.ranks_per_node, world.size), world.timeout)
        self.dtype = getattr(torch, config.precision.compute_dtype)
        self.watch = Stopwatch(world, config.seconds)
        self.on_cuda = world.device.type == "cuda"
        name, memory = _device(self.on_cuda, self.ranks_per_node)
        rates = KernelRates(device=name, dtype=config.precision.name, attention_length=config.data.sequence_length)
        self.cluster = ClusterConfig(
            name=Path(config.out).stem, device=name, num_ranks=world.size, ranks_per_node=self.ranks_per_node,
            memory_gb=memory, host_memory_gb=_host_memory_gb(), fp8_tflops=0.0, num_sms=_multiprocessors(self.on_cuda),
            comm_sms=20 if self.on_cuda else 0, dollars_per_hour=0.0, rates=rates,
        )  # fmt: skip
        self.not_measured = [
            what
            for what, missing in (
                ("messages between ranks", world.size == 1),
                ("messages between nodes", world.size == self.ranks_per_node),
            )
            if missing
        ]

    def jobs(self) -> Iterator[tuple[str, Any]]:
        """(what, function): peaks first, since shares of them are what a plan interpolates."""
        yield "peaks", self.peaks
        tokens = self.config.data.sequence_length * self.config.microbatch_sizes[-1]
        yield "memory-bound kernels", partial(self.moves, tokens)
        yield "attention", self.attention
        for kind, m, n, k, groups in self.shapes():
            yield f"{kind} {m} x {n} x {k}", partial(self.product, kind, m, n, k, groups)
        if self.world.size > 1:
            yield "messages", partial(self.messages, tokens)
        if self.config.layers:
            for layout in self.layer_layouts():
                yield f"layers, {layout.recompute} ep {layout.ep}", partial(self.layer, layout)

    def layout(self, ep: int, microbatch_size: int, dispatcher: str = "", recompute: str = "none") -> Layout:
        dispatcher = dispatcher or ("local" if ep == 1 else "all_to_all")
        return Layout(
            self.world.size, self.ranks_per_node, ep=ep, dispatcher=dispatcher,
            recompute=recompute, zero_stage=0, precision=self.config.precision.name, microbatch_size=microbatch_size,
        )  # fmt: skip

    def shapes(self) -> list[tuple[str, int, int, int, int]]:
        """Every product that the planner asks for, of the model under any expert parallelism."""
        model, found = self.config.model, dict[tuple[str, int, int, int, int], None]()
        for ep, size in product(range(1, model.n_routed_experts + 1), self.config.microbatch_sizes):
            if model.n_routed_experts % ep == 0:
                layout = replace(self.layout(ep, size), world=ep, ranks_per_node=ep)
                asked = shapes_asked(model, self._any_rates(), layout, self.config.data.sequence_length).asked()
                found |= {(kind, m, n, k, groups): None for kind, m, n, k, dtype, groups in asked}
        return list(found)

    def _any_rates(self) -> ClusterConfig:
        rates = KernelRates(bf16_tflops=1, fp8_tflops=1, hbm_gbs=1, dense=[[1, 1, 1, 1]], stream_gbs=1)
        rates.attention_forward = rates.attention_backward = 1.0
        return ClusterConfig(rates=rates)

    def layer_layouts(self) -> list[Layout]:
        model, found = self.config.model, []
        for ep in (e for e in range(1, self.world.size + 1) if self.world.size % e == 0):
            for dispatcher in ["local"] if ep == 1 else self.config.dispatchers:
                layouts = product(self.config.microbatch_sizes, self.config.recompute)
                candidates = [self.layout(ep, size, dispatcher, recompute) for size, recompute in layouts]
                try:
                    MeshConfig(1, ep, self.ranks_per_node, self.world.size).check_experts(
                        model.n_routed_experts, model.n_group
                    )
                except ValueError:
                    continue
                found += candidates
        experts = max(0, min(4, model.num_hidden_layers) * model.n_routed_experts * model.expert_params)
        if found and TRAINED * experts > 1e9 * self.cluster.memory_gb:
            raise ValueError(
                f"layers=true runs four layers of the model, whose experts take {TRAINED * experts / 1e9:.0f} GB, but "
                f"a rank has {self.cluster.memory_gb:.0f} GB: use layers=false, or a smaller model"
            )
        return found

    def peaks(self) -> None:
        import torch

        side, watch, cluster = (8192 if self.on_cuda else 1024), self.watch, self.cluster
        for name in ("bf16", "fp32"):
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
            tflops = 2e-12 * side**3 / watch.product("dense", side, side, side, dtype)
            setattr(cluster, f"{name}_tflops", tflops)
            setattr(cluster.rates, f"{name}_tflops", tflops)
        num_bytes = 2**30 if self.on_cuda else 2**26
        cluster.hbm_gbs = cluster.rates.hbm_gbs = 2e-9 * num_bytes / watch.copy(num_bytes)
        cluster.node_gbs = cluster.network_gbs = cluster.hbm_gbs / 2  # until messages are measured

    def product(self, kind: str, m: int, n: int, k: int, groups: int) -> None:
        seconds = self.watch.product(kind, m, n, k, self.dtype, groups)
        row = [m, n, k, 2e-12 * m * n * k / seconds]
        getattr(self.cluster.rates, kind).append([*row, groups] if kind == "grouped" else row)
        name = f"{self.cluster.rates.dtype}_tflops"
        if row[-1] > getattr(self.cluster, name):  # a peak that a product beats is none
            setattr(self.cluster, name, row[-1])
            setattr(self.cluster.rates, name, row[-1])

    def moves(self, tokens: int) -> None:
        model, rates, size = self.config.model, self.cluster.rates, DTYPE_BYTES[self.config.precision.name]
        width, copies = model.hidden_size, model.num_experts_per_tok
        rates.stream_gbs = 3e-9 * tokens * width * size / self.watch.stream(tokens, width, self.dtype)
        moved = tokens * copies * width * (2 * size + 4)
        rates.permute_gbs = 1e-9 * moved / self.watch.permute(tokens, copies, width, self.dtype)
        from launch.measure_kernels import UPDATED

        rates.update_gbs = 1e-9 * BYTES_A_PARAMETER * UPDATED / self.watch.update(self.dtype)

    def attention(self) -> None:
        model, length = self.config.model, self.config.data.sequence_length
        sequences = self.config.microbatch_sizes[-1]
        forward, backward = self.watch.attention(model, sequences, length, self.dtype)
        flops = sequences * length**2 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
        self.cluster.rates.attention_forward = 1e-12 * flops / forward
        self.cluster.rates.attention_backward = 2.5e-12 * flops / backward

    def messages(self, tokens: int) -> None:
        """Rates of large messages less the latency of small ones; inside a node, and between nodes."""
        cluster, watch, width = self.cluster, self.watch, self.config.model.hidden_size
        row_bytes = width * DTYPE_BYTES[self.config.precision.name]
        rows = tokens * self.config.model.num_experts_per_tok // self.world.size + 1

        def rate(group: Any) -> tuple[float, float]:
            latency = watch.all_to_all(group, LATENCY_ROWS, 1, self.dtype)
            seconds = watch.all_to_all(group, rows, width, self.dtype)
            return 1e-9 * rows * (group.size - 1) * row_bytes / max(seconds - latency, 0.1 * seconds), 1e6 * latency

        if self.mesh.node.size > 1:
            cluster.node_gbs, cluster.node_latency_us = rate(self.mesh.node)
            seconds = watch.p2p(self.mesh.node, tokens, width, self.dtype)
            seconds = max(seconds - 1e-6 * cluster.node_latency_us, 0.1 * seconds)  # which a plan adds again
            cluster.p2p_gbs = 1e-9 * tokens * row_bytes / seconds
            from launch.measure_kernels import UPDATED

            share = (self.mesh.node.size - 1) / self.mesh.node.size
            cluster.reduce_gbs = 8e-9 * UPDATED * share / watch.reduce(self.mesh.node, UPDATED)
        if self.mesh.peers.size > 1:
            cluster.network_gbs, cluster.network_latency_us = rate(self.mesh.peers)
        else:
            cluster.network_gbs, cluster.network_latency_us = cluster.node_gbs, cluster.node_latency_us

    def layer(self, layout: Layout) -> None:
        from launch.measure_layers import measure_layer

        row = measure_layer(self.config.model, layout, self.config.data.sequence_length, self.world)
        self.cluster.measured.append(row)

    def about(self) -> dict[str, Any]:
        import torch

        config = self.config
        return {
            "date": datetime.date.today().isoformat(),
            "device": self.cluster.device,
            "ranks": self.world.size,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "threads_a_rank": torch.get_num_threads(),
            "precision": config.precision.name,
            "sequence_length": config.data.sequence_length,
            "microbatch_sizes": config.microbatch_sizes,
            "not_measured": self.not_measured,
        }


def _device(on_cuda: bool, ranks_here: int) -> tuple[str, float]:
    """(name, GB of one rank)"""
    import torch

    if on_cuda:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, properties.total_memory / 1e9
    found = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in found.splitlines() if line.startswith("model name")]
    return (
        f"CPU, {len(names) or os.cpu_count()} x {names[0] if names else platform.machine()}",
        _host_memory_gb() / ranks_here,
    )


def _host_memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _multiprocessors(on_cuda: bool) -> int:
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if on_cuda else 1


def as_yaml(cluster: ClusterConfig, about: dict[str, Any]) -> str:
    """The cluster file: figures rounded to five digits, headed by where they come from."""
    content = asdict(cluster) | {"calibrated": about}
    content = {key: _rounded(value) for key, value in content.items()}
    ranks = f"{about['ranks']} ranks at once" if about["ranks"] > 1 else "one rank"
    head = (
        f"# Measured by launch/calibrate.py on {about['date']}: {about['device']}, {ranks}, torch {about['torch']}.\n"
    )
    for group in about["not_measured"]:
        head += f"# Not measured: {group}.\n"
    return head + yaml.safe_dump(content, sort_keys=False, width=160, default_flow_style=None)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < 1e5 else float(round(value))
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)


@one_line_errors()
@hydra.main("pkg://conf", "calibrate", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    config = cast(CalibrateConfig, OmegaConf.to_object(composed))
    from infra import distributed

    world = distributed.start()
    calibration = Calibration(config, world)
    jobs = list(calibration.jobs())
    with Progress(transient=True, console=Console(stderr=True), disable=not world.is_main) as progress:
        task = progress.add_task("", total=len(jobs))
        for what, job in jobs:
            progress.update(task, description=what)
            job()
            progress.advance(task)
    if world.is_main:
        save(Path(config.out), as_yaml(calibration.cluster, calibration.about()))
        cluster = calibration.cluster
        peak = getattr(cluster, f"{cluster.rates.dtype}_tflops")
        Console().print(
            f"{config.out}: {len(jobs)} measurements, {len(cluster.measured)} of them whole layers; "
            f"{cluster.rates.dtype} {peak:.3g} TFLOP/s, memory {cluster.hbm_gbs:.3g} GB/s; use it as "
            f"cluster={cluster.name} in the folder that holds `cluster`",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    distributed.stop()


if __name__ == "__main__":
    main()
