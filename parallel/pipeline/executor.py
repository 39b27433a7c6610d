"""Runs one rank's lowered program: compute, send what is ready, receive early, wait late.

The executor knows stages through three verbs; the first two are generators that yield at each phase border, so that a
slot of one and a slot of two run alike:

    stage.forward(mb, x)              runs microbatch `mb`; returns what the next stage needs
    stage.backward(mb, grad, split)   returns the gradient of `x`; split=True leaves W for later
    stage.weight_grad(mb)             the W that a split backward left

What an action waits for is `actions.depends_on`, and where sends and receives stand is `passes.lower`: the same
schedule object that was validated and simulated. A full B is its I and then its W, so that its input gradient leaves
between the two. A send leaves as soon as its tensor exists, in the lowered order of its channel; a receive is posted
one slot before the lowered program has it, and waited for by the action that first reads it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Mapping
from functools import partial
from time import perf_counter
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from parallel.pipeline.actions import Action, Op, Program, Schedule, Slot, depends_on
from parallel.pipeline.overlap import Side, run_pair
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.timeline import Span

_A_WAIT = 1e-4  # seconds from which a receive counts as waited for

Phases = Generator[str, None, Tensor | None]  # yields the name of the phase it will run next


class PipelineStage(Protocol):
    @property
    def output(self) -> Spec:
        """What `forward` returns, and the gradient that `backward` is given, looks like; unused for the last stage."""
        ...

    def forward(self, mb: int, x: Tensor | None) -> Phases: ...
    def backward(self, mb: int, grad: Tensor | None, split: bool) -> Phases: ...
    def weight_grad(self, mb: int) -> None: ...


class Executor:
    """One rank of a schedule, with the stages that it holds.

    lowered: this rank's program after `passes.lower`. rank: my pipeline rank. stages: by stage index, exactly those
    that the schedule places here. p2p: the channels to the other pipeline ranks. overlap: whether a slot of two
    interleaves its phases (overlap.py) or runs them in turn. Raises ValueError when the stages are not those of the
    placement.
    """

    def __init__(
        self,
        schedule: Schedule,
        lowered: Program,
        rank: int,
        stages: Mapping[int, PipelineStage],
        p2p: P2P,
        overlap: bool = False,
    ):
        if tuple(sorted(stages)) != schedule.stages_of(rank):
            raise ValueError(
                f"rank {rank} has stages {sorted(stages)}, but {schedule.name} places {schedule.stages_of(rank)} there"
            )
        self.schedule, self.rank, self.stages = schedule, rank, stages
        self._program, self._p2p, self._overlap = lowered, p2p, overlap
        self._outputs = {index: stage.output for index, stage in stages.items()}
        self._inputs = p2p.negotiate(schedule, self._outputs)
        self._source = {a: self._source_of(a) for slot in lowered for a in slot if a.op in (Op.F, Op.B, Op.I)}
        self._values: dict[Action, Tensor] = {}  # by the action that made it, until the one action that reads it
        self._arriving: dict[Action, tuple[Tensor, dist.Work]] = {}
        self._unsent: dict[int, deque[Action]] = {}  # SEND actions by destination, in lowered order
        self._posted = 0  # slots of the program whose receives are posted
        self._num_computed = 0
        self.spans: list[Span] = []

    def step(self) -> None:
        """Runs the whole program once. `spans` then says what ran when, in seconds of `perf_counter`."""
        self.spans, self._num_computed = [], 0
        self._unsent = defaultdict(deque)
        for slot in self._program:
            for a in slot:
                if a.op in (Op.SEND_F, Op.SEND_B):
                    self._unsent[self._peer(a)].append(a)
        self._posted = 0
        for index, slot in enumerate(self._program):
            try:
                self._run(index, slot)
            except Exception as error:
                where = f"{self.schedule.name} rank {self.rank}, slot {index} ({' '.join(map(str, slot))})"
                raise PipelineError(f"{where}: {error}") from error
        self._p2p.drain()
        assert not self._values, "every result has one reader"

    def _run(self, index: int, slot: Slot) -> None:
        self._post_receives(index + 2)
        if slot[0].op > Op.W:
            return
        if len(slot) == 2 and self._overlap:
            self._run_pair(*slot)
        else:
            for action in slot:
                self._run_alone(action)
        self._num_computed += 1

    def _run_alone(self, action: Action) -> None:
        due = perf_counter()
        x, source = self._take(action)
        start = perf_counter()
        if action.op is Op.W:
            self.stages[action.stage].weight_grad(action.mb)
        else:
            split = action.op is Op.I or action.stage > 0  # stage 0 has nobody to hurry for
            self._finish(action, _exhaust(self._phases(action, x, split)))
        left = perf_counter()
        if action.op is Op.B:
            self.stages[action.stage].weight_grad(action.mb)
        self._record(action, start, perf_counter(), left, source if start - due > _A_WAIT else None)

    def _run_pair(self, f: Action, b: Action) -> None:
        due = perf_counter()
        inputs = {action: self._take(action) for action in (f, b)}
        start = perf_counter()
        left = {}

        def side(action: Action) -> Side:
            def finish(result: Tensor | None) -> None:
                self._finish(action, result)
                left[action] = perf_counter()

            is_full = action.op is Op.B
            weight_grad = partial(self.stages[action.stage].weight_grad, action.mb) if is_full else None
            return Side(self._phases(action, inputs[action][0], split=True), finish, weight_grad)

        run_pair(side(f), side(b))
        if b.op is Op.B:
            self.stages[b.stage].weight_grad(b.mb)
        end = perf_counter()
        for action in (f, b):
            self._record(action, start, end, left[action], inputs[action][1] if start - due > _A_WAIT else None)

    def _phases(self, action: Action, x: Tensor | None, split: bool) -> Phases:
        """The part of an F, B or I that others may wait for; the W of a split B comes after it, or between."""
        stage = self.stages[action.stage]
        if action.op is Op.F:
            return stage.forward(action.mb, x)
        return stage.backward(action.mb, x, split)

    def _record(self, action: Action, start: float, end: float, left: float, waited_for: Action | None) -> None:
        self.spans.append(Span(self.rank, self._num_computed, action, start, end, left, waited_for))

    def _source_of(self, action: Action) -> Action | None:
        """The action of the neighbouring stage whose tensor `action` reads."""
        return next((d for d in depends_on(action, self.schedule) if d.stage != action.stage), None)

    def _take(self, action: Action) -> tuple[Tensor | None, Action | None]:
        """The tensor that `action` reads, waited for if need be, and the action that made it, if on another rank."""
        source = self._source.get(action)
        if source is None:
            return None, None
        if source in self._values:
            return self._values.pop(source), None
        tensor, work = self._arriving.pop(source)
        work.wait()
        return tensor, source

    def _finish(self, action: Action, result: Tensor | None) -> None:
        """Keeps the result for its reader on this rank, or sends all that its channel's order now allows."""
        reader = action.stage + (1 if action.op is Op.F else -1)
        if result is None or not 0 <= reader < self.schedule.num_stages:
            return
        self._values[action] = result
        dst = self.schedule.rank_of(reader, action.mb)
        if dst == self.rank:
            return
        unsent = self._unsent[dst]
        while unsent and (made := self._made_by(unsent[0])) in self._values:
            unsent.popleft()
            self._p2p.send(self._values.pop(made), dst)

    def _made_by(self, send: Action) -> Action:
        """The compute action on this rank whose result `send` sends."""
        if send.op is Op.SEND_F:
            return Action(send.stage, Op.F, send.mb)
        split = (send.stage, send.mb) in self.schedule.split_backwards
        return Action(send.stage, Op.I if split else Op.B, send.mb)

    def _post_receives(self, end: int) -> None:
        """Posts the receives of all slots before `end` that are not posted yet."""
        for slot in self._program[self._posted : end]:
            for a in slot:
                if a.op in (Op.RECV_F, Op.RECV_B):
                    self._post(a)
        self._posted = max(self._posted, end)

    def _post(self, receive: Action) -> None:
        stage, op, mb = receive
        if op is Op.RECV_F:
            source, spec = Action(stage - 1, Op.F, mb), self._inputs[stage]
        else:
            split = (stage + 1, mb) in self.schedule.split_backwards
            source, spec = Action(stage + 1, Op.I if split else Op.B, mb), self._outputs[stage]
        self._arriving[source] = self._p2p.receive(self._peer(receive), spec)

    def _peer(self, action: Action) -> int:
        step = 1 if action.op in (Op.SEND_F, Op.RECV_B) else -1
        return self.schedule.rank_of(action.stage + step, action.mb)


class PipelineError(RuntimeError):
    """An action failed; the message names schedule, rank, slot and cause."""


def _exhaust(phases: Phases) -> Tensor | None:
    """Runs all phases in turn; what a slot of one does."""
    while True:
        try:
            next(phases)
        except StopIteration as done:
            return done.value
