"""Memory by rank: the bytes of live tensors in a training step, beside what the planner counts, for every saving.

    python benchmarks/memory.py [--report FILE.md] [--json FILE.json]
    python benchmarks/memory.py --times          # instead: what recomputation costs in time, settings in turn

Every storage that an operation makes is followed until it is freed (infra/live_bytes.py). Held is what
lives after an action of the schedule and was not there when the step began, less what lies in send and receive buffers;
its largest value is compared with `parallel/plan/memory.py`. The peak has the temporaries of operations in it too, on
a CPU those of the FP8 reference, whose operands are FP32. States are the flat tensors of the buckets, of the optimizer
and of the moving average. The routing is forced to be even, so that every rank receives as many rows as planned.

The model has V3's proportions: see `model_config`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import measuring  # noqa: F401  finds tests/
from infra.ema import Ema
from infra.hardware import ClusterConfig
from infra.live_bytes import LiveBytes
from infra.optim import make_adamw, update
from infra.precision import PrecisionConfig
from launch.measure_layers import lane_counted
from measuring.ratios import ratios, setting, shown
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, MeshConfig
from parallel.parallelize import Replica, parallelize
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P
from parallel.pipeline.passes import lower
from parallel.pipeline.stage import BatchScale
from parallel.pipeline.tasks import Task
from parallel.plan.layout import Layout
from parallel.plan.memory import MemoryModel
from parallel.plan.step import StepModel
from tests.ranks import run_ranks

LENGTH, MICROBATCHES = 1024, 4  # up to 512 tokens the attention on a CPU keeps its weights, which no plan counts
ALLOWED = 0.03  # between what is measured and what is planned
CPU = torch.device("cpu")


def model_config(num_hidden_layers: int) -> ModelConfig:
    """V3's proportions at 1/14 of its width: heads of the published size, eight experts a token, one depth of MTP."""
    return ModelConfig(
        vocab_size=320,
        hidden_size=512,
        intermediate_size=1280,
        moe_intermediate_size=128,
        num_hidden_layers=num_hidden_layers,
        num_nextn_predict_layers=1,
        num_attention_heads=8,
        q_lora_rank=128,
        kv_lora_rank=128,
        n_routed_experts=16,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        rope_scaling=None,
    )


class Setting(NamedTuple):
    """One way to run; the words are those of the command line."""

    precision: str = "bf16"
    recompute: str = "none"
    moments: str = "fp32"
    ema: bool = False
    zero_stage: int = 0

    def __str__(self) -> str:
        given = [f"{k}={v}" for k, v in self._asdict().items() if v != self._field_defaults[k]]
        return " ".join(given) or "everything off"


SETTINGS = [
    *(Setting(precision, recompute) for precision in ("bf16", "fp8") for recompute in ("none", "selective", "full")),
    Setting(moments="bf16"),
    Setting(ema=True),
    Setting(zero_stage=1),
    Setting("fp8", "selective", "bf16", True, 1),
]
LAYOUTS = {
    "1 rank": (1, {"schedule": "1f1b", "dispatcher": "local"}),
    "4 ranks, 1f1b": (4, {"pp": 4, "schedule": "1f1b", "dispatcher": "local"}),
    "4 ranks, dualpipe": (4, {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "all_to_all"}),
}


class Rank:
    """One rank's part of a run, ready to step."""

    def __init__(self, world: int, words: dict[str, Any], setting: Setting):
        config = model_config(5 if words.get("pp", 1) == 4 else 3)
        parallel = ParallelConfig(
            **words,
            recompute=setting.recompute,
            force_balance=True,
            zero_stage=setting.zero_stage,
            dispatch_dtype="fp8" if setting.precision == "fp8" else "native",
        )
        self.mesh = mesh = Mesh(MeshConfig(parallel.pp, parallel.ep, parallel.ranks_per_node, world))
        schedule = parallel.make_schedule(MICROBATCHES)
        self.replica: Replica = parallelize(
            config,
            parallel,
            mesh,
            schedule,
            precision=PrecisionConfig(setting.precision),
            device=CPU,
            seed=0,
            weight_decay=0.1,
            microbatch=(1, LENGTH),
        )
        buckets = self.replica.buckets
        self.optimizer = make_adamw(buckets, 1e-3, (0.9, 0.95), 1e-8, setting.moments)
        self.ema = Ema([b.share_of(b.master.data) for b in buckets] if setting.ema else [], 0.999)
        up, down = (mesh.group(mesh.config.partition("pp")).pg for _ in range(2))
        self._p2p = P2P(mesh.pp.ranks, mesh.pp.rank, up, down, CPU)
        program = lower(schedule).programs[mesh.at.pp]
        self.executor = Executor(schedule, program, mesh.at.pp, self.replica.stages, self._p2p, parallel.overlap)
        generator = torch.Generator().manual_seed(0)
        self._tokens_MBL = torch.randint(320, (MICROBATCHES, 1, LENGTH + 1), generator=generator)

    def step(self) -> None:
        scale = BatchScale(MICROBATCHES * LENGTH, {"lm_loss": 1.0, "mtp_loss": 0.3, "balance_loss": 1e-4})
        for stage in self.replica.stages.values():
            stage.begin(self._tokens_MBL, scale, training=True)
        self.executor.step()
        self.ema.before_step()
        update(self.replica.buckets, self.optimizer, 1e-3)
        self.ema.update()

    def in_buffers(self) -> int:
        """Bytes that wait to be sent, to be received, or for a reader on this rank."""
        tasks = [task for _, slot in self.executor._tied.slots for task in slot]
        tensors = [t for task in tasks for t in (task.x, task.result) if t is not None]
        tensors += [tensor for sends in self._p2p._sending.values() for _, tensor in sends]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def measure(rank: int, world: int, words: dict[str, Any], setting: Setting) -> dict[str, float]:
    """Bytes on this rank, by the names of `RankMemory`; activations are what is held, and the peak of all."""
    this = Rank(world, words, setting)
    buckets = this.replica.buckets
    moments = [t for s in this.optimizer.state.values() for t in s.values() if t.dim()]
    live = LiveBytes()
    with lane_counted(live), live.counting():
        this.step()  # what a first step makes once and for all
        held, began = [0], live.now

        def watched(run: Callable[..., None]) -> Callable[..., None]:
            def then_count(*tasks: Task) -> None:
                run(*tasks)
                held.append(live.now - began - this.in_buffers())

            return then_count

        this.executor._run_alone = watched(this.executor._run_alone)  # type: ignore[method-assign]
        this.executor._run_pair = watched(this.executor._run_pair)  # type: ignore[method-assign]
        live.restart_peak()
        this.step()
    assert held[-1] < 1e5, f"{held[-1]} bytes are left after the step"
    return {
        "weights": sum(b.weight.nbytes for b in buckets if b.weight.data_ptr() != b.master.data_ptr()),
        "gradients": sum(b.grad.nbytes for b in buckets),
        "optimizer": sum(b.master.nbytes for b in buckets) + sum(t.nbytes for t in moments),
        "host": sum(t.nbytes for t in this.ema.averages),
        "activations": max(held),
        "peak": live.peak - began,
    }


def planned(world: int, words: dict[str, Any], setting: Setting, pp_rank: int) -> dict[str, float]:
    layout = Layout(
        world,
        8,
        pp=words.get("pp", 1),
        ep=words.get("ep", 1),
        schedule=words["schedule"],
        dispatcher=words["dispatcher"],
        recompute=setting.recompute,
        zero_stage=setting.zero_stage,
        precision=setting.precision,
    )
    model = model_config(5 if layout.pp == 4 else 3)
    step = StepModel(model, ClusterConfig(), sequence_length=LENGTH, moments=setting.moments)
    memory = MemoryModel(step, ema=setting.ema).rank(layout, MICROBATCHES * layout.dp, pp_rank)
    return {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "host", "activations")}


def touched(this: Setting) -> list[str]:
    """What to compare: activations always, states where the setting changes them."""
    if this == Setting():
        return ["weights", "gradients", "optimizer", "activations"]
    states = (["optimizer"] if this.moments != "fp32" or this.zero_stage else []) + (["host"] if this.ema else [])
    return states if this.precision == "bf16" and this.recompute == "none" else [*states, "activations"]


def compare(layouts: Sequence[str], settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """One row a layout and setting: of the rank that is furthest off, measured and planned bytes and the difference."""
    rows = []
    for name in layouts:
        world, words = LAYOUTS[name]
        mesh = MeshConfig(words.get("pp", 1), words.get("ep", 1), 8, world)
        for setting_ in settings:
            ranks = run_ranks(world, measure, words, setting_, timeout=600)
            for what in touched(setting_):
                pairs = [
                    (real[what], planned(world, words, setting_, mesh.coordinates(rank).pp)[what])
                    for rank, real in enumerate(ranks)
                ]
                real, plan = max(pairs, key=lambda pair: abs(pair[0] - pair[1]) / max(pair[1], 1))
                off = (real - plan) / plan if plan else float(real > 0)
                rows.append({"layout": name, "setting": str(setting_), "what": what, "real": real, "plan": plan})
                rows[-1] |= {"off": off, "peak": max(rank["peak"] for rank in ranks) if what == "activations" else None}
    return rows


def times(rounds: int) -> dict[str, list[float]]:
    """Seconds of a step on one rank, by recomputation, in turn; BF16."""
    names = ("none", "selective", "full")
    steps = {name: Rank(1, LAYOUTS["1 rank"][1], Setting(recompute=name)) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, this in steps.items():
            began = time.perf_counter()
            this.step()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("layout", "setting", "what", "measured MB", "planned MB", "off", "peak with temporaries MB")
    for row in rows:
        off = f"{row['off']:+.2%}" if abs(row["off"]) <= ALLOWED else f"[red]{row['off']:+.2%}[/red]"
        peak = f"{row['peak'] / 1e6:.2f}" if row["peak"] else ""
        real, plan = (f"{row[key] / 1e6:.3f}" for key in ("real", "plan"))
        table.add_row(row["layout"], row["setting"], row["what"], real, plan, off, peak)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--times", action="store_true", help="instead, time the recomputations in turn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    console, figures = Console(width=160), setting()
    if args.times:
        torch.set_num_threads(1)
        seconds = run_ranks(1, lambda rank, world: times(args.rounds), timeout=600)[0]
        for name in ("selective", "full"):
            console.print(f"{name} / none: {shown(ratios(seconds[name], seconds['none']))}")
        figures["seconds"] = seconds
    else:
        figures["rows"] = rows = compare(args.layouts, SETTINGS)
        show(rows, console)
    if args.json:
        beside = args.json.with_suffix(".partial")
        beside.write_text(json.dumps(figures, indent=2) + "\n")
        beside.replace(args.json)


if __name__ == "__main__":
    main()
