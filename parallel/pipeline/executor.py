"""Runs one rank's lowered program: compute, send what is ready, receive early, wait late.

The executor knows stages through three verbs; the first two are generators that yield at each phase border, so that a
slot of one and a slot of two run alike:

    stage.forward(mb, x)              runs microbatch `mb`; returns what the next stage needs
    stage.backward(mb, grad, split)   returns the gradient of `x`; split=True leaves W for later
    stage.weight_grad(mb)             the W that a split backward left

What an action waits for is `actions.depends_on`, and where sends and receives stand is `passes.lower`: the same
schedule object that was validated and simulated. A full B is its I and then its W, so that its input gradient leaves
between the two. A send leaves as soon as its tensor exists, in the lowered order of its channel; a receive is posted
at least one slot before the lowered program has it, and waited for by the action that first reads it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from parallel.pipeline.actions import Action, Op, Program, Schedule, Slot, depends_on
from parallel.pipeline.clock import clock_of
from parallel.pipeline.overlap import Side, run_pair
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.timeline import Span
from parallel.pipeline.validate import ScheduleError

_RECEIVES = (Op.RECV_F, Op.RECV_B)
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
        self._receives = [(index, a) for index, slot in enumerate(lowered) for a in slot if a.op in _RECEIVES]
        self._posted = 0  # how many of them are posted
        self._num_computed = 0
        self._clock = clock_of(p2p.device)
        self._marks: list[_Marks] = []

    def step(self) -> None:
        """Runs the whole program once. `spans` then says what ran when.

        Raises PipelineError, which shows the slot in the grid, when an action fails or a neighbour is lost.
        """
        self._marks, self._num_computed, self._posted = [], 0, 0
        self._clock.begin()
        self._unsent = defaultdict(deque)
        for slot in self._program:
            for a in slot:
                if a.op in (Op.SEND_F, Op.SEND_B):
                    self._unsent[self._peer(a)].append(a)
        try:
            for index, slot in enumerate(self._program):
                self._post_receives(index + 2)
                self._run(slot)
            self._p2p.drain()
        except Exception as error:
            raise PipelineError(self.schedule, self.rank, self._num_computed, error) from error
        assert not self._values, "every result has one reader"

    @property
    def spans(self) -> list[Span]:
        """What ran in the last step, in seconds of `perf_counter`; waits for the device.

        Both actions of an interleaved pair carry the times of the pair; two that ran in turn count as two slots.
        """
        spans: list[Span] = []
        seconds = self._clock.seconds
        for marks in self._marks:
            start, waited_for = seconds(marks.due), None
            for source, arrival in marks.arrivals:
                waited, start = seconds(arrival) - start, seconds(arrival)
                waited_for = source if waited > _A_WAIT else waited_for
            times = (start, seconds(marks.end), seconds(marks.left))
            spans.append(Span(self.rank, marks.slot, marks.action, *times, waited_for))
        return spans

    @property
    def waited(self) -> float:
        """Seconds for which the last step stood still for receives: travel, and work that others had not done yet."""
        seconds, slots = self._clock.seconds, {marks.slot: marks for marks in self._marks if marks.arrivals}
        return sum(seconds(marks.arrivals[-1][1]) - seconds(marks.due) for marks in slots.values())

    @property
    def position(self) -> str:
        """Which slot of its program this rank is at, marked in the grid."""
        slot = self._num_computed
        done = slot == len(self.schedule.programs[self.rank])
        doing = (
            "has computed all, and waits until it is sent" if done else "is at this slot, or waits for what it reads"
        )
        return str(ScheduleError(self.schedule.name, self.schedule.programs, self.rank, slot, doing))

    def _run(self, slot: Slot) -> None:
        if slot[0].op > Op.W:
            return
        if len(slot) == 2 and self._overlap:
            self._run_pair(*slot)
        else:
            for action in slot:
                self._run_alone(action)
        self._num_computed += 1

    def _run_alone(self, action: Action) -> None:
        stage, mark = self.stages[action.stage], self._clock.mark
        due = mark()
        x, source = self._take(action)
        arrivals = [(source, mark())] if source else []
        if action.op is Op.W:
            stage.weight_grad(action.mb)
        else:
            split = action.op is Op.I or action.stage > 0  # stage 0 has nobody to hurry for
            self._finish(action, _exhaust(self._phases(action, x, split)))
        left = end = mark()
        if action.op is Op.B and split:
            stage.weight_grad(action.mb)
            end = mark()
        slot = self._marks[-1].slot + 1 if self._marks else 0
        self._marks.append(_Marks(slot, action, due, arrivals, left, end))

    def _run_pair(self, f: Action, b: Action) -> None:
        mark = self._clock.mark
        due = mark()
        inputs, arrivals, left = {}, [], {}
        for action in (f, b):
            inputs[action], source = self._take(action)
            arrivals.append((source, mark()))

        def side(action: Action) -> Side:
            def finish(result: Tensor | None) -> None:
                self._finish(action, result)
                left[action] = mark()

            is_full = action.op is Op.B
            weight_grad = partial(self.stages[action.stage].weight_grad, action.mb) if is_full else None
            return Side(self._phases(action, inputs[action], split=True), finish, weight_grad)

        run_pair(side(f), side(b))
        if b.op is Op.B:
            self.stages[b.stage].weight_grad(b.mb)
        end = mark()
        slot = self._marks[-1].slot + 1 if self._marks else 0
        self._marks += (_Marks(slot, action, due, arrivals, left[action], end) for action in (f, b))

    def _phases(self, action: Action, x: Tensor | None, split: bool) -> Phases:
        """The part of an F, B or I that others may wait for; the W of a split B comes after it, or between."""
        stage = self.stages[action.stage]
        if action.op is Op.F:
            return stage.forward(action.mb, x)
        return stage.backward(action.mb, x, split)

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
        try:
            work.wait()
        except RuntimeError as error:
            rank = self.schedule.rank_of(source.stage, source.mb)
            raise ConnectionError(f"{source} of rank {rank} did not come: {error}") from error
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
        """Posts the receives of all slots before `end` - and where one is due, the next few with it."""
        if self._posted < len(self._receives) and self._receives[self._posted][0] < end:
            batch = self._receives[self._posted : self._posted + self._p2p.ahead]
            for _, receive in batch:
                self._post(receive)
            self._posted += len(batch)

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


class _Marks(NamedTuple):
    """What the clock was asked to remember of an action; `arrivals` are (what came from another rank, when it was
    there), in the order in which they were waited for."""

    slot: int
    action: Action
    due: Any
    arrivals: Sequence[tuple[Action | None, Any]]
    left: Any
    end: Any


class PipelineError(RuntimeError):
    """An action failed, or a neighbour was lost: says in which slot and why, and shows the slot in the grid."""

    def __init__(self, schedule: Schedule, rank: int, slot: int, cause: Exception):
        reason = str(cause) or type(cause).__name__
        super().__init__(str(ScheduleError(schedule.name, schedule.programs, rank, slot, reason)))


def _exhaust(phases: Phases) -> Tensor | None:
    """Runs all phases in turn; what a slot of one does."""
    while True:
        try:
            next(phases)
        except StopIteration as done:
            return done.value
