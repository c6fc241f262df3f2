"""Checks of values that come from a file or a checkpoint, driven by the annotations of the dataclass that they fill."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from reprlib import Repr
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

__all__ = ["MAX_INTEGER", "checked_fields", "shortened"]

#: Integers beyond it don't fit into a tensor or an event file.
MAX_INTEGER = 2**63 - 1

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 60


def shortened(value: object) -> str:
    """Return the ``repr`` of a value, cut to a length that an error message can hold.

    Example:
        >>> shortened([1, 2]), len(shortened("x" * 10_000)) < 100
        ('[1, 2]', True)
    """
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {value.dtype}"
    try:
        return _REPR.repr(value)
    except ValueError:  # An integer of more digits than Python prints.
        return f"a value of type {type(value).__name__}"


def checked_fields(kind: type[Any], values: object) -> dict[str, Any]:
    """Return values for the fields of a dataclass, after a check of their names and types.

    Args:
        kind: the dataclass. Annotations may be made of ``int``, ``float``, ``bool``, ``str``, ``None``, tensors,
            dataclasses, ``Literal``, unions, and ``Mapping`` with string keys.
        values: a mapping from names to values. Fields with a default may be missing.

    Raises:
        ValueError: if ``values`` is not a mapping, a name is missing or unknown, or a value has another type.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Point:
        ...     x: float
        ...     name: str | None = None
        >>> checked_fields(Point, {"x": 1})
        {'x': 1.0}
        >>> checked_fields(Point, {"x": "1"})
        Traceback (most recent call last):
        ...
        ValueError: x must be float, got '1'
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"the state of a {kind.__name__} must be a mapping, got {shortened(values)}")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}
    if unknown := values.keys() - known.keys():
        raise ValueError(f"a {kind.__name__} has no {shortened(min(unknown))}")
    needed = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
    if missing := needed - values.keys():
        raise ValueError(f"the state of a {kind.__name__} lacks {min(missing)}")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _matches(value, hints[name]):
            raise ValueError(f"{name} must be {_words(hints[name])}, got {shortened(value)}")
    return {name: _as_float(value) if _is_float(hints[name]) else value for name, value in values.items()}


def _matches(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER
    if hint is float:
        return isinstance(value, float) or _matches(value, int)
    if origin is not None:
        _, part = get_args(hint)
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and _matches(entry, part) for name, entry in value.items()
        )
    return isinstance(value, hint)


def _is_float(hint: Any) -> bool:
    return hint is float or float in get_args(hint)


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


def _words(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")
