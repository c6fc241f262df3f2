"""Checks of the type and range of constructor options.

Each check takes the option's name and value, returns the value as a plain Python object, and raises `OptionError`, a
``ValueError`` whose message contains the name, the allowed values and the given value. Integers and floats of numpy and
torch are accepted as numbers. Booleans are not numbers, numbers are not booleans, and a string is neither.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

__all__ = [
    "MAX_SEED",
    "OptionError",
    "check_bool",
    "check_callable",
    "check_choice",
    "check_each",
    "check_int",
    "check_mapping",
    "check_number",
    "check_path",
    "check_str",
    "optional",
]

#: Largest seed of the generators of numpy and torch.
MAX_SEED = 2**64 - 1

T = TypeVar("T")
P = ParamSpec("P")


class OptionError(ValueError):
    """An option of the wrong type, or out of range.

    Args:
        name: the option's name.
        wanted: the allowed values, as words that follow "must be".
        value: the given value.

    Example:
        >>> print(OptionError("patience", "an integer of at least 1", 0))
        patience must be an integer of at least 1, got 0
    """

    def __init__(self, name: str, wanted: str, value: object) -> None:
        super().__init__(name, wanted, value)
        self.name, self.wanted, self.value = name, wanted, value

    def __str__(self) -> str:
        """Return the message, in one line whatever the value's own representation is."""
        try:
            given = " ".join(reprlib.repr(self.value).split())
        except ValueError:  # An integer with too many digits to be printed.
            given = f"{type(self.value).__name__} with too many digits"
        return f"{self.name} must be {self.wanted}, got {given}"


def check_int(name: str, value: object, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """Return an integer option as ``int``.

    Args:
        name: the option's name.
        value: an integer of Python, numpy or torch.
        at_least: smallest allowed value.
        at_most: largest allowed value.

    Returns:
        The value.

    Raises:
        OptionError: if it is not an integer (``1.5``, ``2.0``, ``True`` and ``"2"`` are not), or out of range.

    Example:
        >>> check_int("every_n_epochs", np.int64(2), at_least=1)
        2
        >>> check_int("patience", 1.5, at_least=1)
        Traceback (most recent call last):
        hessian_callback._options.OptionError: patience must be an integer of at least 1, got 1.5
    """
    number = _unwrapped(value)
    if not isinstance(number, bool) and isinstance(number, numbers.Integral):
        found = int(number)
        if (at_least is None or found >= at_least) and (at_most is None or found <= at_most):
            return found
    raise OptionError(name, "an integer" + _range(at_least, None, at_most, None), value)


def check_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> float:
    """Return a real option as ``float``.

    Args:
        name: the option's name.
        value: an integer or a float of Python, numpy or torch.
        at_least: smallest allowed value.
        above: lower bound that is not allowed itself.
        at_most: largest allowed value.
        below: upper bound that is not allowed itself.
        finite: whether infinities are refused.

    Returns:
        The value. NaN is always refused.

    Raises:
        OptionError: if it is not a number, NaN, infinite, or out of range.

    Example:
        >>> check_number("max_overhead", 1, above=0, at_most=1)
        1.0
        >>> check_number("min_delta", float("inf"), at_least=0, finite=False)
        inf
        >>> check_number("rtol", float("nan"), above=0, below=1)
        Traceback (most recent call last):
        hessian_callback._options.OptionError: rtol must be a finite number above 0 and below 1, got nan
    """
    number = _unwrapped(value)
    if not isinstance(number, bool) and isinstance(number, numbers.Real):
        try:
            found = float(number)
        except OverflowError:  # An integer that no float can hold.
            found = -math.inf if number < 0 else math.inf
        allowed = (
            (math.isfinite(found) if finite else not math.isnan(found))
            and (at_least is None or found >= at_least)
            and (above is None or found > above)
            and (at_most is None or found <= at_most)
            and (below is None or found < below)
        )
        if allowed:
            return found
    wanted = ("a finite number" if finite else "a number") + _range(at_least, above, at_most, below)
    raise OptionError(name, wanted, value)


def check_bool(name: str, value: object) -> bool:
    """Return an option that is ``True`` or ``False``; numbers and strings raise an `OptionError`.

    Example:
        >>> check_bool("verbose", "no")
        Traceback (most recent call last):
        hessian_callback._options.OptionError: verbose must be True or False, got 'no'
    """
    found = _unwrapped(value)
    if isinstance(found, bool):
        return found
    raise OptionError(name, "True or False", value)


def check_str(name: str, value: object, *, empty: bool = False) -> str:
    """Return a string option; any other type, and the empty string unless allowed, raise an `OptionError`.

    Example:
        >>> check_str("monitor", "hessian/slope")
        'hessian/slope'
    """
    if isinstance(value, str) and (value or empty):
        return value
    raise OptionError(name, "a string" if empty else "a string that is not empty", value)


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return an option that is one of some strings; any other value raises an `OptionError`.

    Example:
        >>> check_choice("mode", "up", ["min", "max"])
        Traceback (most recent call last):
        hessian_callback._options.OptionError: mode must be 'min' or 'max', got 'up'
    """
    if isinstance(value, str) and value in choices:
        return value
    *others, last = map(repr, choices)
    raise OptionError(name, f"{', '.join(others)} or {last}" if others else last, value)


def check_callable(name: str, value: T) -> T:
    """Return an option that can be called; any other value raises an `OptionError`.

    Example:
        >>> check_callable("loss_fn", "cross_entropy")
        Traceback (most recent call last):
        hessian_callback._options.OptionError: loss_fn must be callable, got 'cross_entropy'
    """
    if callable(value):
        return value
    raise OptionError(name, "callable", value)


def check_path(name: str, value: object) -> str:
    """Return a path as a string; any other type, and an empty path, raise an `OptionError`.

    Example:
        >>> from pathlib import PurePosixPath
        >>> check_path("checkpoint", PurePosixPath("run/solver"))
        'run/solver'
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(path, str) and path and "\0" not in path:
        return path
    raise OptionError(name, "a path that is not empty", value)


def check_mapping(name: str, value: object) -> dict[Any, Any]:
    """Return a mapping option as ``dict``.

    Args:
        name: the option's name.
        value: a mapping, or ``None`` for an empty one.

    Raises:
        OptionError: if it is neither.

    Example:
        >>> check_mapping("groups", ["^head"])
        Traceback (most recent call last):
        hessian_callback._options.OptionError: groups must be a mapping, got ['^head']
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(name, "a mapping", value)
    return dict(value)


def check_each(
    check: Callable[Concatenate[str, Any, P], T], name: str, value: object, *args: P.args, **kwargs: P.kwargs
) -> tuple[T, ...]:
    """Apply a check to each item of an option.

    Args:
        check: one of the checks of this module.
        name: the option's name.
        value: a list, a tuple, a set, or another iterable that is neither a string nor a mapping.
        *args: further arguments of the check.
        **kwargs: further arguments of the check.

    Returns:
        The checked items.

    Raises:
        OptionError: if the value is no such iterable, or an item is refused.

    Example:
        >>> check_each(check_int, "at_steps", [0, 50, -1], at_least=0)
        Traceback (most recent call last):
        hessian_callback._options.OptionError: at_steps[2] must be an integer of at least 0, got -1
        >>> check_each(check_choice, "extras", "trace", ["trace", "density"])
        Traceback (most recent call last):
        hessian_callback._options.OptionError: extras must be a list, got 'trace'
    """
    scalar = isinstance(value, (str, bytes, Mapping)) or getattr(value, "ndim", 1) == 0
    if scalar or not isinstance(value, Iterable):
        raise OptionError(name, "a list", value)
    return tuple(check(f"{name}[{index}]", item, *args, **kwargs) for index, item in enumerate(value))


def optional(
    check: Callable[Concatenate[str, Any, P], T], name: str, value: object, *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """Apply a check to an option that may be ``None``.

    Args:
        check: one of the checks of this module.
        name: the option's name.
        value: ``None``, or a value for the check.
        *args: further arguments of the check.
        **kwargs: further arguments of the check.

    Returns:
        The checked value, or ``None``.

    Raises:
        OptionError: if the check refuses the value; the message contains "None or".

    Example:
        >>> optional(check_int, "batch_size", None, at_least=1) is None
        True
        >>> optional(check_int, "batch_size", 0, at_least=1)
        Traceback (most recent call last):
        hessian_callback._options.OptionError: batch_size must be None or an integer of at least 1, got 0
    """
    if value is None:
        return None
    try:
        return check(name, value, *args, **kwargs)
    except OptionError as error:
        raise OptionError(error.name, f"None or {error.wanted}", error.value) from None


def _unwrapped(value: Any) -> Any:
    """Return the Python number in a scalar of numpy or torch; anything else unchanged."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        try:
            return value.item()
        except RuntimeError:  # A tensor without data, on the meta device or traced.
            return value
    return value


def _range(at_least: float | None, above: float | None, at_most: float | None, below: float | None) -> str:
    if at_least is not None and at_most is not None:
        return f" between {at_least} and {at_most}"
    bounds = {"of at least": at_least, "above": above, "of at most": at_most, "below": below}
    words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    return f" {' and '.join(words)}" if words else ""
