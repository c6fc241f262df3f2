"""Checks of options that the models and data modules share."""

from __future__ import annotations

__all__ = ["check_at_least"]


def check_at_least(smallest: int, **options: int | None) -> None:
    """Check that numbers are not too small; ``None`` passes.

    Raises:
        ValueError: if one is.

    Example:
        >>> check_at_least(1, batch_size=16, train_size=None)
        >>> check_at_least(1, batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: batch_size must be at least 1, got 0
    """
    for name, value in options.items():
        if value is not None and value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
