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

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from parallel.pipeline.actions import Action, Op, Program, Schedule
from parallel.pipeline.clock import clock_of
from parallel.pipeline.overlap import Side, run_pair
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.tasks import Task, tie
from parallel.pipeline.timeline import Span
from parallel.pipeline.validate import PipelineError, ScheduleError

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

    A slot of two interleaves its phases (overlap.py); `passes.in_turn` makes a schedule without such slots.

    lowered: this rank's program after `passes.lower`. rank: my pipeline rank. stages: by stage index, exactly those
    that the schedule places here. p2p: the channels to the other pipeline ranks. Raises ValueError when the stages are
    not those of the placement.
    """

    def __init__(
        self,
        schedule: Schedule,
        lowered: Program,
        rank: int,
        stages: Mapping[int, PipelineStage],
        p2p: P2P,
    ):
        if tuple(sorted(stages)) != schedule.stages_of(rank):
            raise ValueError(
                f"rank {rank} has stages {sorted(stages)}, but {schedule.name} places {schedule.stages_of(rank)} there"
            )
        self.schedule, self.rank, self.stages = schedule, rank, stages
        self._p2p = p2p
        inputs = p2p.negotiate(schedule, {index: stage.output for index, stage in stages.items()})
        self._tied = tie(schedule, lowered, stages, inputs, p2p.ahead)
        self._unsent: dict[int, deque[Task]] = {}  # what is left of the channels in this step
        self._posted = 0  # how many receives are posted
        self._num_computed = 0
        self._clock = clock_of(p2p.device)
        self._marks: list[_Marks] = []

    def step(self) -> None:
        """Runs the whole program once. `spans` then says what ran when.

        Raises PipelineError, which shows the slot in the grid, when an action fails or a neighbour is lost.
        """
        self._marks, self._num_computed, self._posted = [], 0, 0
        self._clock.begin()
        self._unsent = {dst: deque(makers) for dst, makers in self._tied.channels.items()}
        try:
            for posted, slot in self._tied.slots:
                self._post_receives(posted)
                if len(slot) == 2:
                    self._run_pair(*slot)
                else:
                    self._run_alone(*slot)
                self._num_computed += 1
            self._p2p.drain()
        except Exception as error:
            raise PipelineError(self.schedule, self.rank, self._num_computed, error) from error
        assert not any(self._unsent.values()), "every result has one reader"

    @property
    def spans(self) -> list[Span]:
        """What ran in the last step, in seconds of `perf_counter`; waits for the device.

        Both actions of a pair carry the times of the pair.
        """
        spans: list[Span] = []
        seconds = self._clock.seconds
        for marks in self._marks:
            start, waited_for = seconds(marks.due), None
            for source, arrival in marks.arrivals:
                waited, start = seconds(arrival) - start, seconds(arrival)
                waited_for = source if waited > _A_WAIT else waited_for
            times = (start, seconds(marks.end), seconds(marks.left))
            sent = marks.task.sent.num_bytes if marks.task.sent else 0
            spans.append(Span(self.rank, marks.slot, marks.task.action, *times, waited_for, sent))
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

    def _run_alone(self, task: Task) -> None:
        (stage_index, op, mb), stage, mark = task.action, task.stage, self._clock.mark
        due = mark()
        x, source = self._take(task)
        arrivals = [(source, mark())] if source else []
        split = op is Op.I or stage_index > 0  # stage 0 has nobody to hurry for
        if op is Op.W:
            stage.weight_grad(mb)
        else:
            self._finish(task, _exhaust(_phases(task, x, split)))
        left = end = mark()
        if op is Op.B and split:
            stage.weight_grad(mb)
            end = mark()
        self._marks.append(_Marks(self._num_computed, task, due, arrivals, left, end))

    def _run_pair(self, f: Task, b: Task) -> None:
        mark = self._clock.mark
        due = mark()
        inputs, arrivals, left = [], [], {}
        for task in (f, b):
            x, source = self._take(task)
            inputs.append(x)
            arrivals.append((source, mark()))

        def side(task: Task, x: Tensor | None) -> Side:
            def finish(result: Tensor | None) -> None:
                self._finish(task, result)
                left[task.action] = mark()

            is_full = task.action.op is Op.B
            weight_grad = partial(task.stage.weight_grad, task.action.mb) if is_full else None
            return Side(_phases(task, x, split=True), finish, weight_grad)

        run_pair(side(f, inputs[0]), side(b, inputs[1]))
        if b.action.op is Op.B:
            b.stage.weight_grad(b.action.mb)
        end = mark()
        self._marks += (_Marks(self._num_computed, task, due, arrivals, left[task.action], end) for task in (f, b))

    def _take(self, task: Task) -> tuple[Tensor | None, Action | None]:
        """The tensor that the task reads, waited for if need be, and the action that made it, if on another rank."""
        x, task.x = task.x, None
        if task.source is None:
            return x, None
        assert task.arrival is not None
        try:
            task.arrival.wait()
        except RuntimeError as error:
            rank = self.schedule.rank_of(task.source.stage, task.source.mb)
            raise self._p2p.lost(rank, f"which was to send {task.source} for {task.action}", error) from error
        task.arrival = None
        return x, task.source

    def _finish(self, task: Task, result: Tensor | None) -> None:
        """Hands the result to its reader on this rank, or sends all that its channel's order now allows."""
        if task.reader is not None:
            task.reader.x = result
        elif task.dst is not None:
            looks = None if result is None else Spec(tuple(result.shape), result.dtype)
            if looks != task.sent:  # its reader would take any bytes for what it expects
                raise ValueError(f"{task.action} made {looks}, but rank {task.dst} was told to expect {task.sent}")
            task.result = result
            unsent = self._unsent[task.dst]
            while unsent and (result := unsent[0].result) is not None:
                unsent.popleft().result = None
                self._p2p.send(result, task.dst)

    def _post_receives(self, until: int) -> None:
        """Posts those of the first `until` receives that are not posted yet."""
        for reader, src, spec in self._tied.receives[self._posted : until]:
            reader.x, reader.arrival = self._p2p.receive(src, spec)
        self._posted = until


class _Marks(NamedTuple):
    """What the clock was asked to remember of an action; `arrivals` are (what came from another rank, when it was
    there), in the order in which they were waited for."""

    slot: int
    task: Task
    due: Any
    arrivals: Sequence[tuple[Action | None, Any]]
    left: Any
    end: Any


def _phases(task: Task, x: Tensor | None, split: bool) -> Phases:
    """The part of an F, B or I that others may wait for; the W of a split B comes after it, or between."""
    if task.action.op is Op.F:
        return task.stage.forward(task.action.mb, x)
    return task.stage.backward(task.action.mb, x, split)


def _exhaust(phases: Phases) -> Tensor | None:
    """Runs all phases in turn; what a slot of one does."""
    while True:
        try:
            next(phases)
        except StopIteration as done:
            return done.value
