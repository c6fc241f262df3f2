"""What a batch is made of: tensors in any structure, the number of samples in it, and the two halves of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["halves", "leading_dimension", "tensors"]

# Entries of a list that are told from structures: a list of them has one for each sample, or none has.
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
            f"cannot tell how many samples a batch of type {type(batch).__name__} holds: it has {found}. "
            "Pass batch_weight=..., a callable(batch) that returns what its mean loss averages over, for "
            "example lambda batch: len(batch[0]), or the number of counted tokens"
        )
    return float(sizes.pop())


def halves(batch: Any) -> tuple[Any, Any]:
    """Cut a batch in two along its leading dimension; the first half is the larger one.

    Tensors without a dimension, and whatever is no sequence with an entry for each sample, go to both.

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


def _cut(batch: Any, part: slice, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return _changed(batch, ((key, _cut(value, part, size)) for key, value in batch.items()), _set_item)
    if isinstance(batch, (list, tuple)):
        if len(batch) == size and all(isinstance(value, _PLAIN) for value in batch):
            return batch[part]
        cut = [_cut(value, part, size) for value in batch]
        if isinstance(batch, tuple):
            return type(batch)(*cut) if hasattr(batch, "_fields") else tuple(cut)
        return cut
    if is_dataclass(batch) and not isinstance(batch, type):
        values = ((field.name, _cut(getattr(batch, field.name), part, size)) for field in fields(batch))
        return _changed(batch, values, object.__setattr__)
    return batch


def _changed(batch: Any, values: Iterator[tuple[Any, Any]], assign: Callable[[Any, Any, Any], None]) -> Any:
    """Return a copy of a mapping or data class of whatever type, with other values."""
    changed = copy.copy(batch)
    for key, value in list(values):
        assign(changed, key, value)
    return changed


def _set_item(mapping: Any, key: Any, value: Any) -> None:
    mapping[key] = value
