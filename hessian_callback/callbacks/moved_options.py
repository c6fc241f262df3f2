"""Options of earlier versions, and where they are now."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

__all__ = ["MOVED_OPTIONS", "moved_options"]

MOVED_OPTIONS = {
    "rtol": "solver=Lanczos(rtol=...)",
    "stop_on": "solver=Lanczos(stop_on=...)",
    "slope_rtol": "solver=Lanczos(slope_rtol=...)",
    "max_hvps": "solver=Lanczos(max_hvps=...)",
    "hvp": "solver=Lanczos(hvp=...)",
    "memory_budget": "solver=Lanczos(memory_budget=...)",
    "allow_fewer": "solver=Lanczos(allow_fewer=...)",
    "solver_checkpoint": "solver=Lanczos(checkpoint=...)",
    "mode": "solver=PublishedProtocol() for 'paper', solver=Lanczos() for 'strict'",
    "paper_runs": "solver=PublishedProtocol(runs=...)",
    "paper_steps": "solver=PublishedProtocol(steps=...)",
    "trace_hvps": "extras=[Trace(num_hvps=...)]",
    "density_hvps": "extras=[Density(num_hvps=...)]",
    "subspace_dimension": "extras=[Subspace(dimension=...)]",
    "num_classes": "extras=[OutlierRatio(num_classes=...)]",
    "layout": "figures=..., which turns pictures and the layout on or off",
}

Self = TypeVar("Self")
Options = ParamSpec("Options")


def moved_options(
    init: Callable[Concatenate[Self, Options], None],
) -> Callable[Concatenate[Self, Options], None]:
    """Let a constructor raise a `TypeError` that names the new place of an option that has moved.

    Example:
        >>> class Callback:
        ...     @moved_options
        ...     def __init__(self, *, seed: int = 0) -> None: ...
        >>> Callback(rtol=0.1)
        Traceback (most recent call last):
        ...
        TypeError: the option rtol is now solver=Lanczos(rtol=...)
    """

    @functools.wraps(init)
    def checked(self: Self, *args: Options.args, **options: Options.kwargs) -> None:
        for name in MOVED_OPTIONS.keys() & options.keys():
            raise TypeError(f"the option {name} is now {MOVED_OPTIONS[name]}")
        init(self, *args, **options)

    return checked  # type: ignore[return-value]
