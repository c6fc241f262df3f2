"""Contestants that take turns, so that whatever else the machine does meets all of them alike; ratios, not seconds."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hessian_callback.operators.memory import readable_size

DISTRIBUTIONS = (
    "torch",
    "numpy",
    "scipy",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
)


def pin_threads(num_threads: int = 1) -> None:
    """Hold this process, and those that it starts, to so many threads."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(num_threads)
    torch.set_num_threads(num_threads)


def timed(function: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds a call."""
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


def in_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, *, seconds_a_turn: float = 0.2
) -> dict[str, list[float]]:
    """Seconds a call of each contestant, round by round; who begins changes from round to round.

    A turn repeats its call for about ``seconds_a_turn``. A first call of each is not counted.
    """
    names = list(contestants)
    repeats = {}
    for name in names:
        contestants[name]()
        repeats[name] = max(1, round(seconds_a_turn / timed(contestants[name])))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(contestants[name], repeats[name]))
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Quotients of values that belong to the same round."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and range where there are several values."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def milliseconds(values: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(values):.3g}"


def processor() -> str:
    """The processor's model name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def circumstances(num_threads: int) -> str:
    """Date, machine and versions, for the head of a report."""
    installed = {str(one.metadata["Name"]).lower(): one.version for one in metadata.distributions()}
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {installed.get(name, 'missing')}" for name in DISTRIBUTIONS]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; {processor()}, {os.cpu_count()} cores, "
        f"{readable_size(pages)} of memory; {num_threads} thread a process; {', '.join(versions)}."
    )
