"""A slot of two: the forward of one microbatch laid over the backward of another.

Both are generators that say which phase is next. The published order of a steady pair (V3 report, section 3.2.1 and
figure 4; the profiler trace that DeepSeek released) is the table below, gone through again and again. Travel starts as
soon as its input exists, in the order dispatch(F), dispatch(B), combine(F), combine(B), and is waited for by the phase
that reads it; in between the other microbatch computes, in the order MLP(B), MLP(W), MLP(F), attention(B),
attention(W), attention(F). A recomputation waits for no gradient, so it fills the time in which one travels.

The two need not align: what a generator has not reached is passed over. What the table does not name - a dense layer,
the ends of the model - runs before its side's next row, and so puts nobody out of step. When one side is through, the
other goes on through the table alone: its travel then hides behind its own weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from torch import Tensor

ORDER = (
    ("B", "combine"),
    ("B", "weight_grad"),  # of attention
    ("F", "send"),
    ("F", "attend"),
    ("F", "dispatch"),
    ("B", "recompute"),
    ("B", "shared"),
    ("B", "recompute"),
    ("B", "experts"),
    ("B", "dispatch"),
    ("B", "weight_grad"),  # of the experts
    ("F", "shared"),
    ("F", "experts"),
    ("F", "combine"),
    ("B", "recompute"),
    ("B", "attend"),
)
NAMES = {phase for _, phase in ORDER}


class Side:
    """One of the two: its phases, what to do with its result, and how to catch up with its weight gradients."""

    def __init__(
        self,
        phases: Generator[str, None, Tensor | None],
        finish: Callable[[Tensor | None], None],
        weight_grad: Callable[[], None] | None = None,
    ):
        self._phases, self._finish, self.weight_grad = phases, finish, weight_grad
        self.next: str | None = None
        self.advance()

    def advance(self) -> None:
        """Runs the phase that is next; after the last one, finishes."""
        try:
            self.next = next(self._phases)
        except StopIteration as done:
            self.next = None
            self._finish(done.value)


def run_pair(forward: Side, backward: Side) -> None:
    """Interleaves two sides in the published order."""
    sides = {"F": forward, "B": backward}
    while forward.next or backward.next:
        for name, phase in ORDER:
            side = sides[name]
            if phase == "weight_grad":
                if side.weight_grad:
                    side.weight_grad()
                continue
            if side.next and side.next not in NAMES:
                side.advance()
            if side.next == phase:
                side.advance()
