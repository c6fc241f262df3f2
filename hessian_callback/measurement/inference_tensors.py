"""Ordinary tensors in the place of those that a model made in inference mode, such as cached masks and tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hessian_callback.measurement.state_records import attributes_of, is_user_made

__all__ = ["ordinary_tensors"]

# Attributes of a LightningModule behind which the run is, and not the model.
_LEFT_OUT = frozenset({"_trainer", "_fabric"})
# Longer containers hold data, and are not searched.
_MANY_ITEMS = 1_000


@contextmanager
def ordinary_tensors(model: nn.Module) -> Iterator[None]:
    """Replace a model's inference tensors by copies inside the block, because autograd cannot save them.

    ``trainer.validate()`` runs in inference mode, and a constant that a model makes then at its first use remains an
    inference tensor. Attributes of modules and of the user's objects, and short lists, tuples and dictionaries in them,
    are searched. Parameters are left alone.

    Args:
        model: the model.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> with torch.inference_mode():
        ...     layer.mask = torch.ones(2)
        >>> with ordinary_tensors(layer):
        ...     layer.mask.is_inference()
        False
        >>> layer.mask.is_inference()
        True
    """
    copies: dict[int, Tensor] = {}
    replaced: list[tuple[Any, Any, Any, Any]] = []
    seen: set[int] = set()
    waiting: list[Any] = [model]

    def ordinary(value: Any) -> Any:
        if isinstance(value, Tensor):
            if isinstance(value, nn.Parameter) or not value.is_inference():
                return value
            return copies.setdefault(id(value), value.clone())
        if isinstance(value, tuple) and len(value) <= _MANY_ITEMS:
            items = [ordinary(item) for item in value]
            if all(item is before for item, before in zip(items, value, strict=True)):
                return value
            return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
        waiting.append(value)
        return value

    try:
        while waiting:
            owner = waiting.pop()
            container = _container_of(owner)
            if container is None or id(owner) in seen or len(container) > _MANY_ITEMS:
                continue
            seen.add(id(owner))
            for key, value in _items(container):
                new = ordinary(value)
                if new is not value:
                    container[key] = new
                    replaced.append((container, key, value, new))
        yield
    finally:
        for container, key, value, new in replaced:
            present = key in container if isinstance(container, dict) else key < len(container)
            if present and container[key] is new:
                container[key] = value


def _container_of(owner: Any) -> Any:
    """Return the dictionary or sequence that holds an object's values; ``None`` if it is not searched."""
    if isinstance(owner, (dict, list, deque)):
        return owner
    searched = isinstance(owner, nn.Module) or is_user_made(type(owner))
    return attributes_of(owner) if searched else None


def _items(container: Any) -> list[tuple[Any, Any]]:
    items = list(container.items() if isinstance(container, dict) else enumerate(container))
    return [(key, value) for key, value in items if not (isinstance(key, str) and key in _LEFT_OUT)]
