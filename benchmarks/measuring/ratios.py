"""Medians, quartiles and ratios of what ran in turn, and what they were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import torch


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the first and the third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, first, third


def shown(values: Sequence[float], digits: int = 3) -> str:
    """The median, with the quartiles in brackets."""
    median, first, third = quartiles(values)
    spread = f" ({first:.{digits}f}-{third:.{digits}f})" if len(values) > 1 else ""
    return f"{median:.{digits}f}{spread}"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Of each turn by itself, so that what slows the machine for a while slows both sides of it."""
    return [a / b for a, b in zip(over, under, strict=True)]


def setting() -> dict[str, Any]:
    """The date and the machine, for the head of a report."""
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    return {"date": datetime.date.today().isoformat(), "hardware": hardware}
