"""The structure of a batch: its containers, and the number of dimensions and the kind of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["structure_difference", "structure_of"]


def structure_of(batch: Any) -> Any:
    """Return the structure of a batch: dictionaries, lists, and a text in place of every other value.

    Example:
        >>> import torch
        >>> structure_of({"x": torch.ones(8, 3), "more": (torch.arange(8), "text")})
        {'x': 'a tensor of 2 dimensions', 'more': ['an integer tensor of 1 dimension', 'a str']}
    """
    if isinstance(batch, Tensor):
        kind = "a tensor" if batch.is_floating_point() or batch.is_complex() else "an integer tensor"
        return f"{kind} of {batch.ndim} dimension{'s' * (batch.ndim != 1)}"
    if isinstance(batch, Mapping):
        return {key: structure_of(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [structure_of(value) for value in batch]
    return f"a {type(batch).__name__}"


def structure_difference(one: Any, other: Any) -> tuple[str, str, str] | None:
    """Return the first difference between two structures of `structure_of`; ``None`` if they are alike.

    Sizes of dimensions are not compared, and neither are the lengths of lists of samples: a list of containers, and a
    list of tensors inside a batch.

    Returns:
        The path of the differing part, the part in one structure, and the part in the other, in words.

    Example:
        >>> image, label = "a tensor of 2 dimensions", "an integer tensor of 1 dimension"
        >>> structure_difference([[image, image], label], [image, label])
        ('batch[0]', 'a list', 'a tensor of 2 dimensions')
        >>> structure_difference({"x": image}, {"x": image, "y": label})
        ('batch', "a mapping with the keys 'x'", "a mapping with the keys 'x', 'y'")
        >>> structure_difference([image, label], [image, label]) is None
        True
    """
    return _difference(one, other, "batch")


def _difference(one: Any, other: Any, path: str) -> tuple[str, str, str] | None:
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return path, _with_keys(one), _with_keys(other)
        parts = [(value, other[key], f"{path}[{key!r}]") for key, value in one.items()]
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other) and not (_lists_samples(one, path) and _lists_samples(other, path)):
            return path, f"a list of {len(one)} entries", f"a list of {len(other)} entries"
        pairs = enumerate(zip(one, other, strict=False))
        parts = [(first, second, f"{path}[{number}]") for number, (first, second) in pairs]
    elif one != other:
        return path, _in_words(one), _in_words(other)
    return next((found for part in parts if (found := _difference(*part)) is not None), None)


def _lists_samples(structure: list[Any], path: str) -> bool:
    """Whether a list may have an entry for each sample, so that its length is that of a batch."""
    alike = all(entry == structure[0] for entry in structure)
    return alike and (path != "batch" or not any("tensor" in entry for entry in structure if isinstance(entry, str)))


def _in_words(structure: Any) -> str:
    if isinstance(structure, str):
        return structure
    return "a mapping" if isinstance(structure, dict) else "a list"


def _with_keys(structure: dict[Any, Any]) -> str:
    return f"a mapping with the keys {', '.join(map(repr, structure))}"
