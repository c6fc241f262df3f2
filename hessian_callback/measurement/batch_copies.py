"""Copies of batches of any class: a loss may change its batch, and the next evaluation must not see it."""

from __future__ import annotations

import copy
import types
import weakref
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["copy_batch", "map_tensors"]

# Values of these types have no state that a loss could change, or are no part of the data.
_ATOMIC = (
    type(None),
    str,
    bytes,
    bool,
    int,
    float,
    complex,
    type,
    Enum,
    np.generic,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Size,
    torch.Generator,
    nn.Module,
    Dataset,
    weakref.ref,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)


def copy_batch(batch: Any, shared: set[type] | None = None) -> Any:
    """Return a copy of a batch with new containers and new tensors.

    Lists, tuples, mappings, named tuples, dataclasses, attrs classes and other objects are copied as deep as they
    nest. A tensor that occurs twice is one tensor in the copy as well. Modules, data sets and functions are shared.

    Args:
        batch: any object.
        shared: receives the classes of objects that can't be copied; they are part of the copy as they are.

    Example:
        >>> batch = {"x": torch.zeros(2), "names": ["a", "b"]}
        >>> copied = copy_batch(batch)
        >>> _ = copied["x"].add_(1), copied.pop("names")
        >>> batch
        {'x': tensor([0., 0.]), 'names': ['a', 'b']}
    """
    return map_tensors(batch, Tensor.clone, shared)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor], shared: set[type] | None = None) -> Any:
    """Return a copy of a batch, `copy_batch`, with another tensor in the place of each.

    Args:
        batch: any object.
        function: from a tensor of the batch to its replacement; called once for each tensor.
        shared: receives the classes of objects that can't be copied.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Pair:
        ...     x: Tensor
        ...     y: Tensor
        >>> map_tensors(Pair(torch.zeros(1), torch.ones(1)), lambda tensor: tensor + 1)
        Pair(x=tensor([1.]), y=tensor([2.]))
    """
    return _Copier(function, set() if shared is None else shared).copy(batch)


class _Copier:
    def __init__(self, function: Callable[[Tensor], Tensor], shared: set[type]) -> None:
        self._function = function
        self._shared = shared
        # The originals as well, so that no id is used again.
        self._copies: dict[int, tuple[Any, Any]] = {}

    def copy(self, value: Any) -> Any:
        if isinstance(value, _ATOMIC):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if isinstance(value, Tensor):
            replaced = self._keep(value, self._function(value))
            if type(value) is Tensor and replaced is not value:
                vars(replaced).update((name, self.copy(item)) for name, item in vars(value).items())
            return replaced
        if type(value) is list:
            copied: list[Any] = self._keep(value, [])
            copied.extend(map(self.copy, value))
            return copied
        if type(value) is dict:
            mapping: dict[Any, Any] = self._keep(value, {})
            mapping.update((key, self.copy(item)) for key, item in value.items())
            return mapping
        if isinstance(value, tuple):
            return self._keep(value, _tuple_like(value, [self.copy(item) for item in value]))
        if isinstance(value, np.ndarray):
            return self._keep(value, value.copy())
        return self._object(value)

    def _keep(self, original: Any, copied: Any) -> Any:
        self._copies[id(original)] = original, copied
        return copied

    def _object(self, value: Any) -> Any:
        try:
            copied = _shallow(value)
        except Exception:  # Whatever a class's own copying raises.
            # A library's compiled objects, such as locks, have no state that a loss would change. Iterators have.
            if hasattr(value, "__dict__") or hasattr(value, "__next__"):
                self._shared.add(type(value))
            return self._keep(value, value)
        self._keep(value, copied)
        if copied is value:  # An immutable object's copy is itself.
            return copied
        # Past the class's own assignment, which may convert, count or refuse.
        if isinstance(value, dict):
            for key, item in dict.items(value):
                dict.__setitem__(copied, key, self.copy(item))
        elif isinstance(value, list):
            list.__setitem__(copied, slice(None), [self.copy(item) for item in list.__iter__(value)])
        elif isinstance(value, deque):
            for place, item in enumerate(value):
                copied[place] = self.copy(item)
        for name, item in list(getattr(copied, "__dict__", {}).items()):
            copied.__dict__[name] = self.copy(item)
        for name in _slots(copied):
            object.__setattr__(copied, name, self.copy(getattr(copied, name)))
        return copied


def _shallow(value: Any) -> Any:
    try:
        return copy.copy(value)
    except Exception:
        if not isinstance(value, dict):
            raise
        # A class that refuses assignments can still be filled past them.
        copied = type(value).__new__(type(value))
        dict.update(copied, value)
        vars(copied).update(vars(value))
        return copied


def _tuple_like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    if type(value) is tuple:
        return tuple(items)
    make = getattr(type(value), "_make", None)  # of named tuples
    if make is not None:
        return make(items)  # type: ignore[no-any-return]
    if hasattr(type(value), "n_sequence_fields"):  # results of torch.max and the like
        return type(value)(items)
    copied = tuple.__new__(type(value), items)
    if hasattr(value, "__dict__"):
        copied.__dict__.update(vars(value))
    return copied


def _slots(value: Any) -> list[str]:
    """List the slots of an object that hold something, under their mangled names."""
    found = []
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            mangled = f"_{kind.__name__.lstrip('_')}{name}" if private else name
            if mangled not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                found.append(mangled)
    return found
