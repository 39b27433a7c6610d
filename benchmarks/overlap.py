"""What overlap hides and what it gains, on an emulated cluster; and what it costs where there is nothing to hide.

    sudo .venv/bin/python benchmarks/overlap.py [--parts cost computing sleeping] [--rounds 3] [--out overlap.json]

Every rank is a node with a network card of its own, as H800 nodes have one a GPU; ranks that shared a card, or a core,
would fill each other's waits. Links are set so that the all-to-alls of a step take 30, 60 and 100 % of its compute
time. Everything that is compared runs in turn, in the same processes.

computing: 2 ranks, ep 2, no pipeline, one thread each: 4 MoE layers, 1F1B in pairs, real compute and real travel.
sleeping:  4 and 8 ranks, pp x ep 2: attention and experts sleep for given times, F = I = W, while real rows travel over
           the links; so few cores can play many ranks. DualPipe and 1F1B, with and without overlap, beside the
           simulator's prediction, which knows the sleeps, the bytes and the rate of the links and nothing else.
cost:      1 rank, local dispatcher: phases against plain autograd over the same model, and pairs against the same
           slots in turn.

Hidden is 1 - exposed / communication, in the pairs: the part of the lane's time in which its rank did not stand still.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from infra import distributed
from infra.precision import PrecisionConfig
from model.config import ModelConfig
from model.linear import Linear, at_once
from model.transformer import Transformer, init_model_
from parallel.config import ParallelConfig
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig, Dispatcher
from parallel.mesh import Mesh, MeshConfig
from parallel.parallelize import parallelize
from parallel.pipeline.actions import Schedule
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.passes import lower, pair_up
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.stage import BatchScale, TransformerStage

SHARES = (0.3, 0.6, 1.0)  # of the compute time that the all-to-alls take
WEIGHTS = {"lm_loss": 1.0, "mtp_loss": 0.0, "balance_loss": 0.0}
CPU = torch.device("cpu")


class Variant:
    """One way to run a step, and what was measured of it."""

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, TransformerStage],
        mesh: Mesh,
        dispatcher: Dispatcher,
        overlap: bool,
    ):
        up, down = (mesh.group(mesh.config.partition("pp")).pg for _ in range(2))
        p2p = P2P(mesh.pp.ranks, mesh.pp.rank, up, down, CPU)
        program = lower(schedule).programs[mesh.at.pp]
        self.executor = Executor(schedule, program, mesh.at.pp, stages, p2p, overlap)
        self.stages, self.dispatcher = stages, dispatcher
        self.seconds: list[float] = []
        self.hidden: list[float] = []
        self.comm: list[float] = []
        self.bytes_sent: list[int] = []

    def step(self, tokens_MBL: Tensor) -> None:
        """Of the slowest rank; what is hidden, and what all-to-alls take, is the mean over ranks."""
        for stage in self.stages.values():
            stage.begin(tokens_MBL, BatchScale(tokens_MBL[..., 1:].numel(), WEIGHTS), training=True)
        _barrier()
        began = time.perf_counter()
        self.executor.step()
        seconds = time.perf_counter() - began
        times, traffic = self.dispatcher.times, self.dispatcher.traffic
        travels, waits = list(times.travels), list(times.waits)
        whole = times.take()
        times.travels, times.waits = travels, waits
        pairs = [(a.start, a.end) for a, b in pairwise(self.executor.spans) if a.slot == b.slot]
        inside = times.take(within=pairs)
        sent = sum(traffic.bytes_across_nodes.values())
        traffic.__init__()  # type: ignore[misc]
        figures = torch.tensor(
            [_total(whole, "time"), _total(inside, "time"), _total(inside, "exposed"), sent]
        ).double()
        slowest = torch.tensor(seconds, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            dist.all_reduce(figures)
            figures /= dist.get_world_size()
        comm, in_pairs, exposed, num_bytes = figures.tolist()
        self.seconds.append(slowest.item())
        self.comm.append(comm)
        self.hidden.append(1 - exposed / in_pairs if in_pairs else 0.0)
        self.bytes_sent.append(int(num_bytes))

    def forget(self) -> None:
        for figures in (self.seconds, self.hidden, self.comm, self.bytes_sent):
            figures.clear()

    def report(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "hidden": self.hidden, "comm": self.comm, "bytes": self.bytes_sent[-1]}


def _total(figures: Mapping[str, float], what: str) -> float:
    return sum(value for name, value in figures.items() if name.startswith(f"comm_{what}_"))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def in_turn(variants: Mapping[str, Variant], tokens_MBL: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Every variant once to warm up, then `rounds` times, turn about."""
    for turn in range(rounds + 1):
        for variant in variants.values():
            if turn == 1:
                variant.forget()
            variant.step(tokens_MBL)
    return {name: variant.report() for name, variant in variants.items()}


# Computing


def computing_config(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **dict(
            vocab_size=512,
            hidden_size=256,
            moe_intermediate_size=768,
            num_hidden_layers=4,
            num_nextn_predict_layers=0,
            num_attention_heads=8,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=0,
            n_group=1,
            topk_group=1,
            aux_loss_alpha=0.0,
            initializer_range=0.02,
            rope_scaling=None,
        )
        | changes
    )


def computing_variants(length: int, num_microbatches: int, ep: int) -> tuple[dict[str, Variant], Tensor]:
    """1F1B in pairs, in turn and overlapped."""
    mesh = Mesh(MeshConfig(ep=ep, ranks_per_node=1, world=ep))
    parallel = ParallelConfig(ep=ep, ranks_per_node=1, dispatcher="two_hop" if ep > 1 else "local")
    schedule = pair_up(SCHEDULES["1f1b"](1, num_microbatches))
    config = computing_config()
    replica = parallelize(
        config,
        parallel,
        mesh,
        schedule,
        precision=PrecisionConfig("fp32"),
        device=CPU,
        seed=0,
        weight_decay=0.0,
        microbatch=(1, length),
    )
    variants = {
        name: Variant(schedule, replica.stages, mesh, replica.dispatcher, overlap)
        for name, overlap in (("in turn", False), ("overlap", True))
    }
    generator = torch.Generator().manual_seed(mesh.rank)
    return variants, torch.randint(config.vocab_size, (num_microbatches, 1, length + 1), generator=generator)


def computing_rank(rounds: int) -> dict[str, Any]:
    world = distributed.start()
    variants, tokens_MBL = computing_variants(512, 8, world.size)
    results = in_turn(variants, tokens_MBL, rounds)
    distributed.stop()
    return results


# Sleeping

HIDDEN, TOKENS, TOP_K, NUM_EXPERTS = 256, 64, 8, 16  # half of a token's experts are on the other node
LAYER = 0.12  # seconds of compute of one layer: F, I and W of attention and of the experts
PHASE = LAYER / 6


class _Sleep(torch.autograd.Function):
    """Sleeps through F and I; offers a W that sleeps."""

    @staticmethod
    def forward(ctx, x, weight, weight_grad):
        ctx.weight, ctx.weight_grad = weight, weight_grad
        time.sleep(PHASE)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(PHASE)
        ctx.weight_grad(ctx.weight, lambda: time.sleep(PHASE))
        return grad, None, None


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_grad = at_once
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, self.weight_grad)


class SleepingBlock(nn.Module):
    """A MoE layer whose attention and experts sleep; its tokens are routed evenly, and really travel."""

    is_moe = True

    def __init__(self, dispatcher: Dispatcher):
        super().__init__()
        self.attention, self.expert = Sleeper(), Sleeper()
        self.mlp = SimpleNamespace(dispatcher=dispatcher)
        first = torch.arange(TOKENS).unsqueeze(1)
        self.topk_idx_TK = (first + torch.arange(0, NUM_EXPERTS, NUM_EXPERTS // TOP_K)) % NUM_EXPERTS
        self.weights_TK = torch.full((TOKENS, TOP_K), 1 / TOP_K)

    def attend(self, h_BLD: Tensor, documents_BL: Tensor | None) -> SimpleNamespace:
        h_BLD = self.attention(h_BLD)
        x_TD = h_BLD.flatten(0, 1)
        nothing = torch.zeros(())
        return SimpleNamespace(
            h_BLD=h_BLD,
            x_TD=x_TD,
            topk_weights_TK=self.weights_TK,
            balance_loss=nothing,
            topk_idx_TK=self.topk_idx_TK,
            load_E=torch.zeros(NUM_EXPERTS, dtype=torch.int64),
        )

    def shared_expert(self, x_TD: Tensor) -> Tensor:
        return x_TD.view_as(x_TD)

    def experts(self, x_RD: Tensor, weights_R: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return self.expert(x_RD) * weights_R.unsqueeze(1)


def sleeping_stages(
    schedule: Schedule, mesh: Mesh, dispatcher: Dispatcher, num_layers: int
) -> dict[int, TransformerStage]:
    """`num_layers` in the whole model, shared out evenly; the head is next to nothing."""
    each, last = num_layers // schedule.num_stages, schedule.num_stages - 1
    start = nn.Parameter(torch.zeros(1, TOKENS, HIDDEN))
    head = Linear(HIDDEN, 8)
    nn.init.zeros_(head.weight)
    return {
        s: TransformerStage(
            {s * each + n: SleepingBlock(dispatcher) for n in range(each)},  # type: ignore[misc]
            Spec((1, TOKENS, HIDDEN), torch.float32),
            is_first=s == 0,
            embed=(lambda tokens_BL: start.clone()) if s == 0 else None,
            norm=(lambda h_BLD: h_BLD) if s == last else None,
            head=head if s == last else None,
        )
        for s in schedule.stages_of(mesh.at.pp)
    }


SLEEPING = {  # name: (schedule, whether it is paired up, overlap)
    "1f1b, in turn": ("1f1b", False, False),
    "1f1b in pairs, overlap": ("1f1b", True, True),
    "zbv in pairs, overlap": ("zbv", True, True),
    "dualpipe, in turn": ("dualpipe", False, False),
    "dualpipe, overlap": ("dualpipe", False, True),
}


def sleeping_schedule(name: str, pp: int, num_microbatches: int) -> Schedule:
    kind, paired, _ = SLEEPING[name]
    schedule = SCHEDULES[kind](pp, num_microbatches)
    return pair_up(schedule) if paired else schedule


def sleeping_rank(ep: int, num_microbatches: int, rounds: int) -> dict[str, Any]:
    world = distributed.start()
    pp = world.size // ep
    mesh = Mesh(MeshConfig(pp=pp, ep=ep, ranks_per_node=1, world=world.size))
    dispatcher = DISPATCHERS["all_to_all"](mesh, DispatchConfig(NUM_EXPERTS))
    variants = {}
    for name, (_, _, overlap) in SLEEPING.items():
        schedule = sleeping_schedule(name, pp, num_microbatches)
        stages = sleeping_stages(schedule, mesh, dispatcher, num_layers=2 * pp)
        variants[name] = Variant(schedule, stages, mesh, dispatcher, overlap)
    tokens_MBL = torch.zeros(num_microbatches, 1, TOKENS + 1, dtype=torch.int64)
    results = in_turn(variants, tokens_MBL, rounds)
    distributed.stop()
    return results


def sleeping_rate(share: float) -> float:
    """Bits per second at which the four all-to-alls of a layer take `share` of its compute time."""
    row_bytes = HIDDEN * 4
    rows = TOKENS * TOP_K // 2
    return 4 * rows * row_bytes * 8 / (share * LAYER)


def predicted(name: str, pp: int, num_microbatches: int, share: float) -> float:
    """The simulator's step time: alone, a slot's travel is all exposed; in a pair, what the order cannot hide."""
    _, _, overlap = SLEEPING[name]
    third, travel = 2 * LAYER / 3, 2 * share * LAYER / 2  # of the two layers of 1/PP of the model, F or I or W
    whole = 3 * third + 2 * travel
    costs = Costs(f=third + travel, i=third + travel, w=third, fb=3 * third if overlap else whole)
    return simulate(sleeping_schedule(name, pp, num_microbatches), costs).step_time


# Cost


def cost(rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn: plain autograd; phases, one slot of one after the other; pairs in turn; overlapped."""
    length, num_microbatches = 512, 4
    config = computing_config()
    model = init_model_(Transformer(config), seed=0)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]  # as every parameter here has
    variants, tokens_MBL = computing_variants(length, num_microbatches, ep=1)
    schedule = SCHEDULES["1f1b"](1, num_microbatches)
    pairs = variants["overlap"]
    mesh = Mesh(MeshConfig())
    alone = Variant(schedule, pairs.stages, mesh, pairs.dispatcher, overlap=True)

    def plain() -> None:
        for batch_BL in tokens_MBL:
            num_tokens = num_microbatches * length
            model.losses(batch_BL[:, :-1], batch_BL[:, 1:], num_tokens, num_microbatches).lm_loss.backward()

    runs: dict[str, Callable[[], None]] = {
        "plain": plain,
        "slots of one": lambda: alone.step(tokens_MBL),
        "pairs in turn": lambda: variants["in turn"].step(tokens_MBL),
        "pairs overlapped": lambda: variants["overlap"].step(tokens_MBL),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


# On this machine


def on_cluster(nodes: int, rate: float, words: list[str]) -> Any:
    """Runs this script as the ranks of an emulated cluster and returns what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank0.json"
        options = [f"nodes={nodes}", "ranks_per_node=1", f"link.rate={rate / 1e6:.0f}mbit"]
        emulate = Path(__file__).parents[1] / "launch" / "emulate.py"
        command = [sys.executable, str(emulate), *options, "--", __file__, "--out", str(out), "--rank", *words]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(out.read_text())


def quartiles(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.3f} ({first:.3f}-{third:.3f})"


def ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def computing_part(shares: list[float], rounds: int, console: Console) -> list[dict[str, Any]]:
    free = on_cluster(2, 40e9, ["computing", "2"])["in turn"]
    compute = statistics.median(free["seconds"]) - statistics.median(free["comm"])
    table = Table(title="computing: 2 ranks, ep 2, 4 MoE layers, 8 microbatches, 1F1B in pairs")
    for column in ("all-to-all / compute", "links", "in turn", "overlap", "overlap / in turn", "hidden in the pairs"):
        table.add_column(column, justify="right")
    rows = []
    for share in shares:
        rate = free["bytes"] * 8 / (share * compute)
        result = on_cluster(2, rate, ["computing", str(rounds)])
        before, after = result["in turn"], result["overlap"]
        got = statistics.median(before["comm"]) / (
            statistics.median(before["seconds"]) - statistics.median(before["comm"])
        )
        step = ratios(after["seconds"], before["seconds"])
        rows.append({"share": share, "share_measured": got, "mbit": rate / 1e6, **result})
        table.add_row(
            f"{share:.0%}, measured {got:.0%}",
            f"{rate / 1e6:.0f} Mbit/s",
            f"{statistics.median(before['seconds']):.2f} s",
            f"{statistics.median(after['seconds']):.2f} s",
            quartiles(step),
            quartiles(after["hidden"]),
        )
    console.print(table)
    return rows


def sleeping_part(ranks: list[int], shares: list[float], rounds: int, console: Console) -> list[dict[str, Any]]:
    rows = []
    for world in ranks:
        pp = world // 2
        num_microbatches = 8 if pp == 2 else 12
        for share in shares:
            rate = sleeping_rate(share)
            result = on_cluster(world, rate, ["sleeping", "2", str(num_microbatches), str(rounds)])
            rows.append({"world": world, "share": share, "mbit": rate / 1e6, **result})
            title = f"sleeping: pp {pp} x ep 2, {num_microbatches} microbatches, all-to-all {share:.0%} of compute"
            table = Table(title=f"{title}, {rate / 1e6:.0f} Mbit/s")
            for column in (
                "schedule",
                "step",
                "simulated",
                "step / simulated",
                "of 1f1b in turn",
                "hidden in the pairs",
            ):
                table.add_column(column, justify="right")
            base = result["1f1b, in turn"]["seconds"]
            for name, figures in result.items():
                simulated = predicted(name, pp, num_microbatches, share)
                median = statistics.median(figures["seconds"])
                table.add_row(
                    name,
                    f"{median:.2f} s",
                    f"{simulated:.2f} s",
                    f"{median / simulated:.3f}",
                    quartiles(ratios(base, figures["seconds"])),
                    quartiles(figures["hidden"]) if any(figures["hidden"]) else "",
                )
                rows[-1][name]["simulated"] = simulated
            console.print(table)
    return rows


def cost_part(rounds: int, console: Console) -> dict[str, list[float]]:
    seconds = cost(rounds)
    table = Table(title="cost: 1 rank, 4 MoE layers, 4 microbatches, nothing to hide")
    for column in ("", "step", "against"):
        table.add_column(column, justify="right")
    against = {"slots of one": "plain", "pairs in turn": "slots of one", "pairs overlapped": "pairs in turn"}
    for name, values in seconds.items():
        other = against.get(name)
        ratio = f"{quartiles(ratios(values, seconds[other]))} x {other}" if other else ""
        table.add_row(name, f"{statistics.median(values):.3f} s", ratio)
    console.print(table)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["cost", "computing", "sleeping"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(4, 8), default=[4, 8], help="of the sleeping part")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of communication")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("overlap.json"))
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)  # how this script starts itself on the ranks
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank:
        what, *numbers = options.rank
        result = (computing_rank if what == "computing" else sleeping_rank)(*map(int, numbers))
        if os.environ["RANK"] == "0":
            options.out.write_text(json.dumps(result))
        return
    console = Console(width=130)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
    }
    if "cost" in options.parts:
        report["cost"] = cost_part(2 * options.rounds, console)
    if "computing" in options.parts:
        report["computing"] = computing_part(options.shares, options.rounds, console)
    if "sleeping" in options.parts:
        report["sleeping"] = sleeping_part(options.ranks, options.shares, options.rounds, console)
    options.out.write_text(json.dumps(report, indent=1))
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
