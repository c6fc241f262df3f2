"""Which slopes of a run may be compared."""

from __future__ import annotations

from collections.abc import Sequence

from hessian_callback.measurement.measurement import Measurement

__all__ = ["incomparable"]


def incomparable(history: Sequence[Measurement], measurement: Measurement) -> str | None:
    """Return why a logged slope must not be compared with the last one of a history; ``None`` if it may be.

    Args:
        history: earlier measurements, in order of time.
        measurement: the new one.
    """
    last = next((entry for entry in reversed(history) if entry.logged and entry.fit is not None), None)
    if last is None or not measurement.logged or measurement.fit is None:
        return None
    now, before = ((entry.num_fitted, entry.mode) for entry in (measurement, last))
    if now != before:
        return (
            f"this slope is of {now[0]} eigenvalues (mode={now[1]!r}), the one before was of {before[0]} "
            f"(mode={before[1]!r}), and they must not be compared: the slope of one spectrum depends on the number "
            "of eigenvalues. Keep num_eigenvalues and solver within a run, and allow_fewer=False"
        )
    if last.num_parameters is not None and measurement.num_parameters != last.num_parameters:
        return (
            f"this slope is of the Hessian of {measurement.num_parameters} parameters, the one before of "
            f"{last.num_parameters}, for example because some were unfrozen, so they must not be compared. Choose "
            "the same ones with parameters="
        )
    return None
