"""Where in a run a measurement is made."""

from __future__ import annotations

from dataclasses import dataclass

from hessian_callback.measurement.measurement import When

__all__ = ["Place"]


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
