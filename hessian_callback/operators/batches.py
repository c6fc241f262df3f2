"""Batches: the tensors in them, the number of samples, and their halves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["halves", "leading_dimension", "map_tensors", "tensors"]

# Entries of a list that has one entry for each sample.
_PLAIN = (str, bytes, int, float, bool, type(None))


def tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch: of lists, tuples, mappings (``UserDict`` included) and data classes.

    Example:
        >>> import torch
        >>> [t.item() for t in tensors({"x": torch.tensor(1), "more": [torch.tensor(2), "text"]})]
        [1, 2]
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors(getattr(batch, field.name, None))


def leading_dimension(batch: Any) -> float:
    """Return the number of samples of a batch: the leading dimension that all its tensors share.

    Args:
        batch: tensors in any structure that `tensors` looks into; those without a dimension do not count.

    Raises:
        ValueError: if there is no such tensor, or they disagree.

    Example:
        >>> import torch
        >>> leading_dimension({"x": torch.zeros(8, 3), "y": torch.zeros(8), "scale": torch.tensor(2.0)})
        8.0
    """
    sizes = {tensor.shape[0] for tensor in tensors(batch) if tensor.dim()}
    if len(sizes) != 1:
        found = "no tensor with a leading dimension" if not sizes else f"leading dimensions {sorted(sizes)}"
        raise ValueError(
            f"cannot count the samples in a batch of type {type(batch).__name__}: it has {found}. "
            "Pass batch_weight=..., a callable(batch) that returns the number of terms in its mean loss, for "
            f"example lambda batch: {_count_of(batch)}, or the number of counted tokens"
        )
    return float(sizes.pop())


def _count_of(batch: Any) -> str:
    """Return an expression for the number of terms of a batch, from a tensor that it has if there is one."""
    if isinstance(getattr(batch, "num_graphs", None), int):
        return "batch.num_graphs"
    if isinstance(batch, Mapping):
        entries = {f"batch[{key!r}]": value for key, value in batch.items()}
    elif isinstance(batch, (list, tuple)):
        names = getattr(batch, "_fields", None)
        entries = {f"batch.{names[n]}" if names else f"batch[{n}]": value for n, value in enumerate(batch)}
    else:
        attributes = getattr(batch, "__dict__", {})
        entries = {f"batch.{name}": value for name, value in attributes.items() if not name.startswith("_")}
    counted = [name for name, value in entries.items() if isinstance(value, Tensor) and value.dim()]
    return f"len({counted[0] if counted else 'batch.targets'})"


def halves(batch: Any) -> tuple[Any, Any]:
    """Cut a batch in two along its leading dimension; the first half is the larger one.

    Tensors without a dimension, and all values but sequences with an entry for each sample, go to both halves.

    Raises:
        ValueError: if the leading dimension is not clear, or is 1.

    Example:
        >>> import torch
        >>> first, second = halves({"x": torch.arange(5), "names": list("abcde"), "scale": 2.0})
        >>> first
        {'x': tensor([0, 1, 2]), 'names': ['a', 'b', 'c'], 'scale': 2.0}
        >>> second
        {'x': tensor([3, 4]), 'names': ['d', 'e'], 'scale': 2.0}
    """
    size = int(leading_dimension(batch))
    if size < 2:
        raise ValueError("a batch of one sample has no halves")
    middle = (size + 1) // 2
    return _cut(batch, slice(0, middle), size), _cut(batch, slice(middle, size), size)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch in new containers, with a function applied to each tensor.

    Containers that cannot be copied, and objects of other kinds, are returned as they are.

    Example:
        >>> import torch
        >>> batch = {"x": torch.tensor(1), "more": [torch.tensor(2), "text"]}
        >>> map_tensors(batch, lambda tensor: tensor + 1)
        {'x': tensor(2), 'more': [tensor(3), 'text']}
    """

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        try:
            return _rebuilt(value, mapped)
        except TypeError:  # such as a mapping without item assignment
            return value

    return mapped(batch)


def _cut(batch: Any, part: slice, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.dim() else batch
    if isinstance(batch, (list, tuple)) and len(batch) == size and all(isinstance(value, _PLAIN) for value in batch):
        return batch[part]
    return _rebuilt(batch, lambda value: _cut(value, part, size))


def _rebuilt(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of a container with a function applied to its entries; other objects as they are."""
    if isinstance(batch, Mapping):
        return _changed(batch, ((key, function(value)) for key, value in batch.items()), _set_item)
    if type(batch) is list or isinstance(batch, tuple):
        entries = [function(value) for value in batch]
        if isinstance(batch, tuple):
            return type(batch)(*entries) if hasattr(batch, "_fields") else tuple(entries)
        return entries
    if isinstance(batch, list):
        return _changed(batch, enumerate([function(value) for value in batch]), _set_item)
    if is_dataclass(batch) and not isinstance(batch, type):
        values = (
            (field.name, function(getattr(batch, field.name))) for field in fields(batch) if hasattr(batch, field.name)
        )
        return _changed(batch, values, object.__setattr__)
    return batch


def _changed(batch: Any, values: Iterable[tuple[Any, Any]], assign: Callable[[Any, Any, Any], None]) -> Any:
    """Return a copy of a mapping, list or data class of any type, with other values."""
    changed = copy.copy(batch)
    for key, value in list(values):
        assign(changed, key, value)
    return changed


def _set_item(mapping: Any, key: Any, value: Any) -> None:
    mapping[key] = value
