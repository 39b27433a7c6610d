"""What runs is what was simulated: the order, what is live, the bytes - and a step that fails says where, and ends."""

import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.linear import Linear
from parallel.pipeline.actions import Op, depends_on
from parallel.pipeline.auto import auto
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.passes import in_turn, lower, pair_up
from parallel.pipeline.phases import Compute
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.synthetic import SyntheticStage
from parallel.pipeline.weight_grad import WeightGrads
from parallel.plan.measured import in_flight
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SPEC = Spec((4, 8), torch.float64)
EVERY = {**SCHEDULES, "auto": lambda pp, num_microbatches: auto(pp, num_microbatches, Costs())}


def executor_of(schedule, rank, stages, groups):
    p2p = P2P(range(schedule.num_ranks), rank, *groups, CPU)
    return Executor(schedule, lower(schedule).programs[rank], rank, stages, p2p)


class Counting(SyntheticStage):
    """Takes no time, and notes what is live over all stages of its rank, and how many at most."""

    def __init__(self, index, live, counts):
        super().__init__(0, 0, 0, SPEC, CPU, lambda seconds: None)
        self.index, self.live, self.counts = index, live, counts

    def forward(self, mb, x):
        self.live.add((self.index, mb))
        self.counts.append(len(self.live))
        return super().forward(mb, x)

    def backward(self, mb, grad, split):
        if not split:
            self.live.remove((self.index, mb))
        return super().backward(mb, grad, split)

    def weight_grad(self, mb):
        self.live.discard((self.index, mb))  # in a pair it is asked for whenever there is time


class Posted(SyntheticStage):
    """Takes no time, and notes how many receives of its rank are posted when each action runs."""

    def __init__(self, index, p2p, noted):
        super().__init__(0, 0, 0, SPEC, CPU, lambda seconds: None)
        self.index, self.p2p, self.noted = index, p2p, noted

    def forward(self, mb, x):
        self.noted[self.index, True, mb] = self.p2p.posted
        return super().forward(mb, x)

    def backward(self, mb, grad, split):
        self.noted[self.index, False, mb] = self.p2p.posted
        return super().backward(mb, grad, split)


class CountingP2P(P2P):
    posted = 0

    def receive(self, src, spec):
        self.posted += 1
        return super().receive(src, spec)


def posted_in_steps(rank, world, cases):
    groups = (dist.new_group(), dist.new_group())
    result = []
    for schedule, ahead in cases:
        p2p, noted = CountingP2P(range(world), rank, *groups, CPU), {}
        p2p.ahead = ahead
        stages = {s: Posted(s, p2p, noted) for s in schedule.stages_of(rank)}
        Executor(schedule, lower(schedule).programs[rank], rank, stages, p2p).step()
        result.append(noted)
    return result


def test_the_planner_counts_the_receives_that_are_posted():
    """Those under way, by `in_flight`, and those that have been read."""
    cases = [
        (schedule, ahead)
        for schedule in (SCHEDULES["1f1b"](4, 8), SCHEDULES["dualpipev"](4, 10), pair_up(SCHEDULES["zbv"](4, 8)))
        for ahead in (1, 8)
    ]
    at_once = []
    for rank, found in enumerate(run_ranks(4, posted_in_steps, cases)):
        for (schedule, ahead), noted in zip(cases, found, strict=True):
            under_way = in_flight(schedule, rank, ahead, window=0).tolist()
            actions, read, expected = [a for slot in schedule.programs[rank] for a in slot], 0, {}
            for action, count in zip(actions, under_way, strict=True):
                if action.op is Op.W:
                    continue
                sources = [s for s in depends_on(action, schedule) if s.stage != action.stage]
                read += any(schedule.rank_of(s.stage, s.mb) != rank for s in sources)
                expected[action.stage, action.op is Op.F, action.mb] = count + read
            assert noted == expected
            at_once.append(max(np.diff([0, *dict.fromkeys(expected.values())]), default=0))
    assert max(at_once) >= 8


def ran(spans):
    """The order of what ran, and the bytes that each action sent."""
    return [(span.slot, str(span.action), span.sent) for span in spans]


def run_every(rank, world, shapes):
    groups = (dist.new_group(), dist.new_group())
    result = {}
    for name, num_microbatches in shapes:
        schedule = EVERY[name](world, num_microbatches)
        live, counts = set(), []
        stages = {s: Counting(s, live, counts) for s in schedule.stages_of(rank)}
        executor = executor_of(schedule, rank, stages, groups)
        for _ in range(2):  # a second step starts from a clean table
            executor.step()
            assert not live
        result[name, num_microbatches] = (ran(executor.spans), max(counts))
    return result


@pytest.mark.parametrize("pp", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_executed_order_bytes_and_peak_live_are_the_simulated(pp):
    names = [name for name in EVERY if pp > 1 or name != "dualpipe"]  # which has two ends
    shapes = [(name, n) for name in names for n in (2 * pp, 2 * pp + 3)]
    ranks = run_ranks(pp, run_every, shapes)
    for name, n in shapes:
        timeline = simulate(EVERY[name](pp, n), Costs(p2p_bytes=SPEC.num_bytes))
        for rank in range(pp):
            order, peak = ranks[rank][name, n]
            assert order == ran(timeline.spans[rank]), (name, n, rank)
            assert peak == timeline.peak_live(rank), (name, n, rank)


class Recording(P2P):
    """Notes which channels are used: with NCCL each first use of one waits for the peer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.used = set()

    def _group(self, peer, receiving=False):
        group = super()._group(peer, receiving)
        self.used.add((group is self._up, peer))
        return group


def first_uses(rank, world, names):
    result = {}
    for name in names:
        schedule = SCHEDULES[name](world, 2 * world)
        stages = {s: Counting(s, set(), []) for s in schedule.stages_of(rank)}
        p2p = Recording(range(world), rank, dist.new_group(), dist.new_group(), CPU)
        executor = Executor(schedule, lower(schedule).programs[rank], rank, stages, p2p)
        before = set(p2p.used)
        executor.step()
        result[name] = p2p.used - before
    return result


def test_no_channel_is_first_used_in_a_step():
    for rank in run_ranks(4, first_uses, ["1f1b", "interleaved_1f1b", "zbv", "dualpipe"]):
        assert not any(rank.values()), rank


# Bytes


class Held:
    """A tensor that autograd keeps; alive as long as autograd keeps it."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self, tensor):
        self.tensor = tensor
        Held.alive.add(self)


class MLPStage:
    """Equal layers, so that every stage of every microbatch keeps the same; no embedding, no loss."""

    def __init__(self, is_first, layers=6):
        torch.manual_seed(0)
        modules = [Linear(64, 64) for _ in range(layers)]
        for module in modules:
            nn.init.normal_(module.weight, std=0.1)
        self.parameters = [module.weight for module in modules]
        self.is_first, self.output = is_first, Spec((16, 64), torch.float32)
        net = nn.Sequential(*(part for module in modules for part in (module, nn.GELU())))
        self.phase = Compute("layers", ("x",), ("y",), lambda x: (net(x),))
        self.saved, self.weight_grads = {}, WeightGrads()
        for module in modules:
            module.weight_grad = self.weight_grads

    def forward(self, mb, x):
        yield "layers"
        x = torch.randn(16, 64) if x is None else x
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            (y,), self.saved[mb] = self.phase.forward([x], True)
        return y

    def backward(self, mb, grad, split):
        yield "layers"
        grad = torch.ones(16, 64) if grad is None else grad
        if split:
            with self.weight_grads.deferred(mb):
                (dx,) = self.phase.backward(self.saved.pop(mb), [grad])
        else:
            (dx,) = self.phase.backward(self.saved.pop(mb), [grad])
        return None if self.is_first else dx

    def weight_grad(self, mb):
        self.weight_grads.run(mb)


def held_bytes(stages):
    """Of unique storages that autograd or a weight gradient to come keeps alive, parameters left out."""
    tensors = [held.tensor for held in Held.alive]
    for stage in stages:
        for queue in stage.weight_grads._deferred.values():
            cells = [cell.cell_contents for compute in queue for cell in compute.__closure__]
            tensors += [value for value in cells if isinstance(value, torch.Tensor)]
    owned = {p.untyped_storage().data_ptr() for stage in stages for p in stage.parameters}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in owned)


def one_microbatch():
    """Bytes after F and after I of one stage."""
    stage = MLPStage(is_first=False)
    _ = list(stage.forward(0, torch.randn(16, 64)))
    full = held_bytes([stage])
    _ = list(stage.backward(0, None, split=True))
    kept = held_bytes([stage])
    stage.weight_grad(0)
    assert held_bytes([stage]) == 0
    return full, kept


def measure_bytes(rank, world, name, num_microbatches):
    groups = (dist.new_group(), dist.new_group())
    full, kept = one_microbatch()
    schedule = in_turn(SCHEDULES[name](world, num_microbatches))
    stages = {s: MLPStage(s == 0) for s in schedule.stages_of(rank)}
    executor = executor_of(schedule, rank, stages, groups)
    curve, run_alone = [], executor._run_alone

    def watched(action):
        run_alone(action)
        curve.append(held_bytes(stages.values()))

    executor._run_alone = watched
    executor.step()
    return full, kept / full, curve


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe"])
def test_bytes_follow_the_simulated_memory(name):
    pp, num_microbatches = 4, 10
    schedule = in_turn(SCHEDULES[name](pp, num_microbatches))
    for rank, (full, kept, curve) in enumerate(run_ranks(pp, measure_bytes, name, num_microbatches)):
        timeline = simulate(schedule, Costs(kept_after_i=kept))
        expected, total = [], 0.0
        for op in (span.action.op.name for span in timeline.spans[rank]):
            total += {"F": 1.0, "B": -1.0, "I": kept - 1, "W": -kept}[op]
            expected.append(total * full)
        assert curve == pytest.approx(expected, rel=0.05, abs=0.05 * full)
        peak = timeline.peak_memory(rank) / timeline.activation * full
        assert max(curve) == pytest.approx(peak, rel=0.05)


# What fails


class Failing(SyntheticStage):
    def backward(self, mb, grad, split):
        if mb == 2:
            raise ArithmeticError("out of luck")
        return super().backward(mb, grad, split)


def fail_on_one_rank(rank, world):
    schedule = SCHEDULES["1f1b"](world, 4)
    kind = Failing if rank == 1 else SyntheticStage
    stages = {s: kind(0, 0, 0, SPEC, CPU) for s in schedule.stages_of(rank)}
    executor_of(schedule, rank, stages, (dist.new_group(), dist.new_group())).step()


def test_a_failing_action_is_shown_in_the_grid():
    with pytest.raises(AssertionError, match=r"1f1b: rank 1, slot \d+: ArithmeticError: out of luck") as error:
        run_ranks(3, fail_on_one_rank)
    assert "[1B2]" in str(error.value)


class Deceiving(SyntheticStage):
    """Hands on another tensor than it announced."""

    def forward(self, mb, x):
        yield from super().forward(mb, x)
        return None if self.output.dtype is torch.float64 else torch.zeros(SPEC.shape, dtype=torch.float64)


def deceive(rank, world, dtype):
    schedule, output = SCHEDULES["1f1b"](world, 2), Spec(SPEC.shape, dtype)
    stages = {s: Deceiving(0, 0, 0, output, CPU) for s in schedule.stages_of(rank)}
    executor_of(schedule, rank, stages, (dist.new_group(), dist.new_group())).step()


@pytest.mark.parametrize(
    ("announced", "made"), [("float32", r"float64 of \(4, 8\)"), ("float64", "None")], ids=["dtype", "nothing"]
)
def test_a_tensor_that_was_not_announced_is_not_sent(announced, made):
    told = rf"0F0 made {made}, but rank 1 was told to expect {announced} of \(4, 8\)"
    with pytest.raises(AssertionError, match=told):
        run_ranks(2, deceive, getattr(torch, announced))
