"""Checks of whole-number arguments, with one wording for all of them."""

from __future__ import annotations

import operator

__all__ = ["whole_number"]


def whole_number(name: str, value: object, *, at_least: int, below: int | None = None, why: str = "") -> int:
    """Return an argument as an int, or raise an error that names it.

    Args:
        name: name of the argument.
        value: what was passed; any integer type is accepted, booleans are not.
        at_least: smallest allowed value.
        below: first value that is too large; ``None`` for no limit.
        why: reason of the lower limit, such as ``" for a standard error"``.

    Raises:
        TypeError: if the value is not an integer.
        ValueError: if it is out of range.

    Example:
        >>> whole_number("seed", 3, at_least=0, below=2**64)
        3
        >>> whole_number("seed", -1, at_least=0, below=2**64)
        Traceback (most recent call last):
        ...
        ValueError: seed must be at least 0, got -1
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}{why}, got {number}")
    if below is not None and number >= below:
        raise ValueError(f"{name} must be below {below}, got {number}")
    return number
