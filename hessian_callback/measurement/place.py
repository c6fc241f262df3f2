"""Where in a run a measurement is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hessian_callback.measurement.measurement import When

__all__ = ["Place", "Placed"]


class Placed(Protocol):
    """Anything that was made at a place in a training run, such as a `Measurement`."""

    @property
    def epoch(self) -> int:
        """Epochs completed before the current one."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        ...

    @property
    def when(self) -> When:
        """The kind of place."""
        ...


@dataclass(frozen=True)
class Place:
    """A place in a training run.

    Attributes:
        epoch: epochs completed before the current one.
        step: optimizer steps taken.
        when: ``"fit_start"`` (before the first step), ``"epoch"``, ``"step"``, ``"fit_end"`` or ``"validate"``.
    """

    epoch: int
    step: int
    when: When
