"""Which slopes of a run may be compared."""

from __future__ import annotations

from collections.abc import Sequence

from hessian_callback.measurement.measurement import Measurement

__all__ = ["incomparable"]


# A warning names so many parameters.
_SHOWN = 3


def incomparable(
    history: Sequence[Measurement],
    measurement: Measurement,
    *,
    names: Sequence[str] = (),
    names_before: Sequence[str] = (),
) -> str | None:
    """Return why a logged slope must not be compared with the last one of a history; ``None`` if it may be.

    Args:
        history: earlier measurements, in order of time.
        measurement: the new one.
        names: names of its parameters, if they are known.
        names_before: names of the parameters of the last measurement, if they are known.

    Example:
        >>> from hessian_callback.measurement.measure import measure
        >>> import torch
        >>> def loss(model, batch):
        ...     return model(batch).square().mean()
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).double()
        >>> before, now = (
        ...     measure(model, loss, [torch.randn(9, 3).double()], num_eigenvalues=3, parameters=name)
        ...     for name in ("0", "1")
        ... )
        >>> incomparable([before], now)
        'this slope is of the Hessian of 5 parameters, the one before was of 16, ...'
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
    difference = _other_size("the Hessian", last, measurement)
    if difference is None and names and names_before:
        difference = _other_names(names_before, names)
    for group, part in measurement.groups.items():
        if difference is None and group in last.groups:
            difference = _other_size(f"the block of groups[{group!r}]", last.groups[group], part)
    if difference is None:
        return None
    return (
        f"{difference}, for example because some were frozen or unfrozen, so they must not be compared. Choose the "
        "same ones with parameters= or groups="
    )


def _other_size(matrix: str, last: Measurement, measurement: Measurement) -> str | None:
    before, now = last.num_parameters, measurement.num_parameters
    if before is None or now is None or before == now:
        return None
    return f"this slope is of {matrix} of {now} parameters, the one before was of {before}"


def _other_names(before: Sequence[str], now: Sequence[str]) -> str | None:
    added = [name for name in now if name not in set(before)]
    removed = [name for name in before if name not in set(now)]
    if not added and not removed:
        return None
    parts = (("with", added), ("without", removed))
    changed = " and ".join(f"{word} {_listed(names)}" for word, names in parts if names)
    return f"this slope is of the Hessian of other parameters than the one before, {changed}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
