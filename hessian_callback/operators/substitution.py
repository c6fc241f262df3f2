"""Other tensors in the places of a module's parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["substituted"]


@contextmanager
def substituted(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the places of parameters and buffers inside the block.

    A parameter that several modules share is replaced in all of them. ``torch.func.functional_call`` does not put the
    parameters of a submodule back that has several names, such as the embedding that encoder and decoder of a language
    model share, or a layer that a container lists twice.

    Args:
        module: the module.
        values: the tensors by a name of the parameter or buffer.

    Raises:
        KeyError: if there is no such parameter or buffer.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> twice = nn.Sequential(layer, layer)
        >>> with substituted(twice, {"0.weight": layer.weight.new_full((1, 1), 3.0)}):
        ...     twice(layer.weight.new_ones(1)).item()
        9.0
        >>> isinstance(layer.weight, nn.Parameter)
        True
    """
    tensors: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    replacements = {id(tensors[name]): value for name, value in values.items()}
    places: list[tuple[Any, str, Tensor]] = [
        (entries, name, tensor)
        for owner in module.modules()
        for entries in (owner._parameters, owner._buffers)
        for name, tensor in entries.items()
        if tensor is not None and id(tensor) in replacements
    ]
    try:
        for entries, name, tensor in places:
            entries[name] = replacements[id(tensor)]
        yield
    finally:
        for entries, name, tensor in places:
            entries[name] = tensor
