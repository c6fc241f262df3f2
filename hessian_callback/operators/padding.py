"""The padding row of an embedding, which its gradient leaves out."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["constant_padding", "padding_rows"]


def padding_rows(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> list[slice]:
    """Return where the flat vector holds the padding row of an embedding that no other module uses."""
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    paddings = {
        id(module.weight): module.padding_idx
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    }
    rows, first = [], 0
    for parameter in chosen.values():
        padding = paddings.get(id(parameter))
        if padding is not None and users[id(parameter)] == 1:
            width = parameter.shape[1]
            rows.append(slice(first + padding * width, first + (padding + 1) * width))
        first += parameter.numel() * (2 if parameter.is_complex() else 1)
    return rows


@contextmanager
def constant_padding(model: nn.Module, originals: Mapping[nn.Parameter, Tensor] | None = None) -> Iterator[None]:
    """Make embeddings at padding indices independent of the parameters inside the block.

    The backward pass of ``F.embedding`` leaves the padding row out, the forward pass does not. A displacement of
    the parameters, or a forward derivative, would therefore find a dependence that the gradient doesn't have. Other
    uses of the row, such as a penalty on the weights or a tied output layer, are not affected.

    Args:
        model: the module, whose parameters may be substituted inside the block.
        originals: values of parameters that differ from those they have now.

    Example:
        >>> layer = nn.Embedding(3, 1, padding_idx=0)
        >>> before = layer.weight.detach().clone()
        >>> with torch.no_grad(), constant_padding(layer, {layer.weight: before}):
        ...     _ = layer.weight.fill_(7.0)
        ...     output = layer(torch.tensor([0, 1]))
        >>> bool(output[0] == before[0]), output[1].item()
        (True, 7.0)
    """
    with ExitStack() as stack:
        stack.enter_context(_ConstantPadding(model, originals or {}))
        for module in model.modules():
            # A parametrization computes another tensor each time.
            if (
                isinstance(module, nn.Embedding)
                and module.padding_idx is not None
                and "weight" not in module._parameters
            ):
                row = module.weight.detach()[module.padding_idx].clone()
                stack.callback(module.register_forward_hook(_with_constant(row), prepend=True, with_kwargs=True).remove)
        yield


class _ConstantPadding(TorchFunctionMode):
    """Put the original rows of parameters in the place of what is looked up at padding indices."""

    def __init__(self, model: nn.Module, originals: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__()
        self._places = [
            (owner._parameters, name, originals.get(parameter, parameter.detach()))
            for owner in model.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None and parameter.dim() == 2
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding:
            given = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
            index, weight, indices = given.get("padding_idx"), given["weight"], given["input"]
        elif func is torch.embedding:
            given = {**dict(zip(("weight", "indices", "padding_idx"), args, strict=False)), **(kwargs or {})}
            index, weight, indices = given.get("padding_idx", -1), given["weight"], given["indices"]
            index = None if index < 0 else index
        else:
            return result
        if index is None:
            return result
        for entries, name, original in self._places:
            if entries.get(name) is weight:  # Another tensor may stand in the parameter's place.
                return _replaced(result, indices, index % len(original), original[index])
        return result


def _replaced(output: Tensor, indices: Tensor, index: int, row: Tensor) -> Tensor:
    return torch.where(torch.eq(indices, index).unsqueeze(-1), row.to(output.dtype), output)


def _with_constant(row: Tensor) -> Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    def replace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        indices = args[0] if args else kwargs["input"]
        return _replaced(output, indices, module.padding_idx, row)

    return replace
