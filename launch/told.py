"""A layout told on the command line: words that are null are not told. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from parallel.config import check_at_least, check_choice
from parallel.plan.layout import CHOICES


@dataclass
class _Words:
    ep: int | None = None
    dispatcher: str | None = None
    overlap: bool | None = None
    recompute: str | None = None
    zero_stage: int | None = None

    def check(self, option: str) -> None:
        """Raises ValueError naming the word of `option` that no layout has."""
        for name, value in told(self).items():
            if name in CHOICES:
                check_choice(f"{option}.{name}", value, CHOICES[name])
            else:
                check_at_least(f"{option}.{name}", value)


@dataclass
class ToldConfig(_Words):
    """Words of `parallel` that a plan is told; it searches the others."""

    pp: int | None = None
    schedule: str | None = None

    def __post_init__(self) -> None:
        self.check("parallel")


@dataclass
class BesideConfig(ToldConfig):
    """In what a layout beside the winner differs from it."""

    precision: str | None = None
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        self.check("beside")


@dataclass
class LayoutConfig(_Words):
    """How a cluster runs the schedule that is simulated; `world`: all its ranks."""

    world: int | None = None
    ranks_per_node: int | None = None
    precision: str | None = None
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        self.check("layout")


def told(words: _Words) -> dict[str, Any]:
    """Those that are not null; nor is `dispatcher=auto`, a run's default, told."""
    said = {name: value for name, value in asdict(words).items() if value is not None}
    return said if words.dispatcher != "auto" else {name: said[name] for name in said if name != "dispatcher"}
