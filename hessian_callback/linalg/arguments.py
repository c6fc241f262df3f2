"""Check arguments that several solvers share."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["checked_integer"]


def checked_integer(name: str, value: Any, least: int) -> int:
    """Return an argument as an integer.

    Args:
        name: name of the argument, for the error message.
        value: the argument; integers of NumPy are accepted, floating-point numbers are not.
        least: its smallest allowed value.

    Raises:
        ValueError: if the argument is not an integer or too small.

    Example:
        >>> checked_integer("k", 3, 1)
        3
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
