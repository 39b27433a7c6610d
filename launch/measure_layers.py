"""Runs the layers of a model phase by phase, for as many microbatches as it takes, and says what each took and held.

The stages are those of a run: a chain of four on one pipeline rank - the embedding and a layer, a layer, a MoE layer,
and a MoE layer with the head and the modules of MTP - whose differences are the layers and the two ends; the MoE layer
also runs as an overlapped pair. All ranks run at once, as they do in training; what is returned is the mean over them.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from infra.distributed import World
from infra.live_bytes import LiveBytes
from infra.precision import PrecisionConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.expert.dispatcher import Dispatcher
from parallel.expert.lane import Lane
from parallel.expert.travel import intersection
from parallel.mesh import Mesh, MeshConfig
from parallel.parallelize import parallelize
from parallel.pipeline import p2p
from parallel.pipeline.executor import Phases
from parallel.pipeline.overlap import Side, run_pair
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.stage import BatchScale, TransformerStage
from parallel.plan.layout import Layout
from parallel.plan.measured import key

# Journeys in the order in which a pass starts them; the experts wait for the first, what comes after for the second.
_JOURNEYS = {"f": ("dispatch", "combine"), "i": ("combine_back", "dispatch_back")}
WARM_UPS = 2


def measure_layer(
    model: ModelConfig, layout: Layout, sequence_length: int, world: World, turns: int = 7
) -> dict[str, Any]:
    """A row for `ClusterConfig.measured`: mean times of `turns` microbatches, then the bytes of one. Collective.

    Means, since a step is a sum: what holds up a microbatch now and then holds up a step a little each time.
    """
    run = chain(model, layout, sequence_length, world)
    return {
        "of": key(model, layout, sequence_length),
        "seconds": run.seconds(turns),
        "bytes": run.bytes() | run.between_stages(),
    }


def chain(model: ModelConfig, layout: Layout, sequence_length: int, world: World) -> Chain:
    """The layers of `model` as `layout` runs them. Collective."""
    num_dense = 2 if model.first_k_dense_replace else 0
    four = replace(model, num_hidden_layers=4, first_k_dense_replace=num_dense)
    parallel = ParallelConfig(
        1, layout.ep, layout.ranks_per_node, "interleaved_1f1b", layout.dispatcher, force_balance=True, overlap=False,
        recompute=layout.recompute, layers_per_stage=[1] * 4,
    )  # fmt: skip
    mesh = Mesh(MeshConfig(1, layout.ep, layout.ranks_per_node, world.size), world.timeout)
    replica = parallelize(
        four,
        parallel,
        mesh,
        SCHEDULES["interleaved_1f1b"](1, 1, 4),
        precision=PrecisionConfig(layout.precision),
        device=world.device,
        seed=0,
        weight_decay=0.0,
        microbatch=(layout.microbatch_size, sequence_length),
    )
    return Chain(four, replica.stages, replica.dispatcher, (layout.microbatch_size, sequence_length), world)


class Chain:
    """Four stages on one pipeline rank - of `model`, which has four layers - and microbatches [B, L] for them."""

    def __init__(
        self,
        model: ModelConfig,
        stages: Mapping[int, TransformerStage],
        dispatcher: Dispatcher,
        microbatch: tuple[int, int],
        world: World,
    ):
        B, L = microbatch
        generator = torch.Generator().manual_seed(world.rank)
        tokens_MBL = torch.randint(model.vocab_size, (2, B, L + 1), generator=generator).to(world.device)
        self.tokens_MBL, self.world = tokens_MBL, world
        self.stages = [stages[s] for s in range(4)]
        self.dispatcher = dispatcher
        self.has_dense, self.depths = model.first_k_dense_replace > 0, model.num_nextn_predict_layers
        weights = {"lm_loss": 1.0, "mtp_loss": 0.3 / max(1, self.depths), "balance_loss": model.aux_loss_alpha}
        self.scale = BatchScale(B * L, weights)

    def seconds(self, turns: int, warm_ups: int = WARM_UPS) -> dict[str, Any]:
        """`seconds` of a row: means of `turns` microbatches. Collective."""
        spent: dict[tuple[int, str], list[float]] = defaultdict(list)
        for turn in range(warm_ups + turns):
            if self.world.size > 1:
                dist.barrier()
            for name, seconds in (self._timed() | {(2, "pair"): self._pair()}).items():
                if turn >= warm_ups:
                    spent[name].append(seconds)
        names = sorted(spent)
        times = self._mean_over_ranks([fmean(spent[name]) for name in names])
        return _seconds(dict(zip(names, times.tolist(), strict=True)), self.has_dense, self.depths)

    def bytes(self) -> dict[str, Any]:
        """`bytes` of a row, but for those between stages. Collective."""
        return _bytes(self._mean_over_ranks(self._weighed()).round().tolist(), self.has_dense, self.depths)

    def _mean_over_ranks(self, values: list[Any]) -> torch.Tensor:
        total = torch.tensor(values, dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(total)
        return total / self.world.size

    def _begin(self) -> None:
        for stage in self.stages:
            stage.begin(self.tokens_MBL, self.scale, training=True)

    def _timed(self) -> dict[tuple[int, str], float]:
        """Seconds by (stage, name of phase and pass); journeys by what was waited for them."""
        self._begin()
        found: dict[tuple[int, str], float] = defaultdict(float)
        x: Any = None
        for s, stage in enumerate(self.stages):
            x = self._walk(stage.forward(0, x), s, "f", found)
        grad: Any = None
        for s, stage in reversed(list(enumerate(self.stages))):
            grad = self._walk(stage.backward(0, grad, split=True), s, "i", found)
            began = self._now()
            stage.weight_grad(0)
            found[s, "w"] += self._now() - began
        return found

    def _pair(self) -> float:
        """Seconds of the MoE layer's F of one microbatch laid over its backward of another."""
        stage, shape, dtype = self.stages[2], *self.stages[2].output
        x = torch.randn(shape, device=self.world.device).to(dtype)
        _exhaust(stage.forward(0, x))
        began = self._now()
        weight_grad = partial(stage.weight_grad, 0)
        run_pair(
            Side(stage.forward(1, x), lambda _: None),
            Side(stage.backward(0, x, split=True), lambda _: None, weight_grad),
        )
        weight_grad()
        took = self._now() - began
        _exhaust(stage.backward(1, x, split=False))
        return took

    def _walk(self, phases: Phases, s: int, way: str, found: dict[tuple[int, str], float]) -> Any:
        """Runs a generator of phases to its end, and charges the time of each to its name: a wait to the journey that
        it waits for, recomputation to what is computed again."""
        name, result, following = "", None, ""
        first, second = _JOURNEYS[way]
        where = {"experts": f"{way} experts", "shared": f"{way} experts", "dispatch": "dispatch", "combine": "combine"}
        if way == "i":
            where |= {"dispatch": "dispatch_back", "combine": "combine_back"}
        self.dispatcher.times.take()
        began, ended = self._now(), False
        while not ended:
            try:
                following = next(phases)
            except StopIteration as end:
                ended, result = True, end.value
            now = self._now()
            waited = sum(b - a for a, b in intersection(self.dispatcher.times.waits, [(began, now)]))
            found[s, first if name == "experts" else second] += waited
            whose = following if name == "recompute" else name
            found[s, where.get(whose, f"{way} attend")] += now - began - waited
            name, began = following, now
        return result

    def _now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def between_stages(self) -> dict[str, int]:
        """Bytes that one stage hands another, and how many such tensors a rank keeps under way."""
        shape, dtype = self.stages[0].output
        on_cuda = self.world.device.type == "cuda"
        ahead, window = (1, 1) if on_cuda else (p2p.AHEAD, p2p.WINDOW)
        return {"border": math.prod(shape) * dtype.itemsize, "ahead": ahead, "window": window}

    def _weighed(self) -> list[list[float]]:
        """Bytes of each stage: kept after F, kept after I, rises of F, I, W and of a B in one piece. Inputs count, as
        if they had come from another rank; so outputs, once sent, do not."""
        self._begin()
        live = LiveBytes()
        with lane_counted(live):
            self._bytes_of_pass(live, split=True)  # the first time also makes what stays
            rows, whole = self._bytes_of_pass(live, split=True), self._bytes_of_pass(live, split=False)
        return [[*row, one[3]] for row, one in zip(rows, whole, strict=True)]

    def _bytes_of_pass(self, live: LiveBytes, split: bool) -> list[list[float]]:
        rows = [[0.0] * 5 for _ in self.stages]

        def grown(start: Callable[[Any], Phases], given: Any) -> tuple[Any, float, float]:
            """(what came out, bytes that stay, and the most on the way there)"""
            before = live.now
            live.restart_peak()
            with live.counting():
                made = _exhaust(start(None if given is None else given.clone()))
            made = None if made is None else made.clone()  # made outside, and so not counted
            return made, live.now - before, live.peak - before

        x: Any = None
        for row, stage in zip(rows, self.stages, strict=True):
            x, row[0], row[2] = grown(partial(stage.forward, 0), x)
        grad: Any = None
        for row, stage in reversed(list(zip(rows, self.stages, strict=True))):
            grad, more, row[3] = grown(partial(stage.backward, 0, split=split), grad)
            row[1] = row[0] + more
            before = live.now
            live.restart_peak()
            with live.counting():
                stage.weight_grad(0)
            row[4] = live.peak - before
        return rows


def _seconds(found: dict[tuple[int, str], float], has_dense: bool, depths: int) -> dict[str, Any]:
    def layer(s: int) -> dict[str, Any]:
        f, i = ([found.get((s, f"{way} {part}"), 0.0) for part in ("attend", "experts")] for way in "fi")
        w = [found[s, "w"] * share / sum(i) for share in i]  # W runs as one: shared out as I is
        return {"f": f, "i": i, "w": w} | {name: found.get((s, name), 0.0) for way in "fi" for name in _JOURNEYS[way]}

    def passes(s: int) -> list[float]:
        f, i = (
            sum(found.get((s, name), 0.0) for name in (f"{way} attend", f"{way} experts", *_JOURNEYS[way]))
            for way in "fi"
        )
        return [f, i, found[s, "w"]]

    first, second, moe, last = map(passes, range(4))
    return {
        "dense": layer(1) if has_dense else None,
        "moe": layer(2),
        "first": [max(0.0, a - b) for a, b in zip(first, second, strict=True)],
        "last": [max(0.0, a - (1 + depths) * b) for a, b in zip(last, moe, strict=True)],
        "pair": found[2, "pair"],
    }


def _bytes(rows: list[list[float]], has_dense: bool, depths: int) -> dict[str, Any]:
    first, second, moe, last = rows
    return {
        "dense": second if has_dense else None,
        "moe": moe,
        "first": [*(a - b for a, b in zip(first[:2], second[:2], strict=True)), *first[2:]],
        "last": [*(a - (1 + depths) * b for a, b in zip(last[:2], moe[:2], strict=True)), *last[2:]],
    }


def _exhaust(phases: Phases) -> Any:
    while True:
        try:
            next(phases)
        except StopIteration as end:
            return end.value


@contextmanager
def lane_counted(live: LiveBytes) -> Iterator[None]:
    """While it lasts, what a dispatcher's lane makes on its thread is counted too."""
    start = Lane.start

    def counted(lane: Lane, task: Callable[..., Any], *args: torch.Tensor, kind: str = "") -> Any:
        def run(*args: torch.Tensor) -> Any:
            with live.counting():
                return task(*args)

        return start(lane, run, *args, kind=kind)

    Lane.start = counted  # type: ignore[assignment]
    try:
        yield
    finally:
        Lane.start = start  # type: ignore[method-assign]
