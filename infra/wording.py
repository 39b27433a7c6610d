"""How numbers are said to people."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """1 step, 1,000 steps, 2 microbatches."""
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")


def duration(seconds: float) -> str:
    """1:02:03, of hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
