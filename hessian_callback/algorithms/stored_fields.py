"""Checks of a state that was read from a file, field by field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_fields", "each", "is_count", "is_finite", "is_level", "is_tensor"]

Predicate = Callable[[Any], bool]


def check_fields(state: Any, usable: Mapping[str, Predicate]) -> None:
    """Raise a `ValueError` that names a field of a stored state that is missing or unusable.

    Args:
        state: the state; fields without a predicate are ignored.
        usable: a predicate for each required field.

    Example:
        >>> check_fields({"size": 3, "norm": 1.5}, {"size": is_count, "norm": is_level})
        >>> check_fields({"size": -3}, {"size": is_count})
        Traceback (most recent call last):
        ...
        ValueError: the field 'size' holds an unusable value
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the state is {type(state).__name__} and not a mapping")
    for name, predicate in usable.items():
        if name not in state:
            raise ValueError(f"the field {name!r} is missing")
        if not predicate(state[name]):
            raise ValueError(f"the field {name!r} holds an unusable value")


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least 0."""
    return type(value) is int and value >= 0


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite float."""
    return type(value) is float and math.isfinite(value)


def is_level(value: Any) -> bool:
    """Return whether a value is a finite float of at least 0."""
    return is_finite(value) and value >= 0


def is_tensor(*shape: int, dtype: torch.dtype) -> Predicate:
    """Return a predicate of finite tensors with a shape and a dtype; -1 stands for any length.

    Example:
        >>> is_tensor(2, -1, dtype=torch.float32)(torch.ones(2, 7))
        True
    """

    def matches(value: Any) -> bool:
        if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape):
            return False
        if any(wanted not in (-1, length) for wanted, length in zip(shape, value.shape, strict=True)):
            return False
        return bool(torch.isfinite(value).all())

    return matches


def each(*predicates: Predicate) -> Predicate:
    """Return a predicate of tuples whose entries fulfil one predicate each.

    Example:
        >>> each(is_count, is_level)((1, 0.5)), each(is_count, is_level)((1,))
        (True, False)
    """

    def matches(value: Any) -> bool:
        return (
            type(value) is tuple
            and len(value) == len(predicates)
            and all(predicate(entry) for predicate, entry in zip(predicates, value, strict=True))
        )

    return matches
