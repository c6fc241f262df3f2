"""Hooks that observe training, removed while derivatives are taken for something else."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["suspend_hooks"]

_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)


@contextmanager
def suspend_hooks(model: nn.Module) -> Iterator[None]:
    """Remove hooks that observe training inside the block, and restore them afterwards.

    Removed are the hooks of parameters and buffers on their gradients, also those that run after accumulation, the
    backward hooks and backward pre-hooks of modules, and the global hooks of `torch.nn`, which are meant for
    debugging. They would see the gradients of a measurement as gradients of training. Forward hooks and forward
    pre-hooks of modules stay: pruning, weight norm and spectral norm are made of them.

    Handles stay valid: a hook that is removed through its handle inside the block, or after it, stays removed.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> handle = weight.register_hook(print)
        >>> with suspend_hooks(nn.ParameterList([weight])):
        ...     _ = torch.autograd.grad(2 * weight, weight)
        >>> _ = torch.autograd.grad(2 * weight, weight)
        tensor([2.])
    """
    tensors: list[tuple[Any, Any, Any]] = []
    modules: list[tuple[dict[str, Any], dict[str, Any]]] = []
    everywhere = vars(torch.nn.modules.module)
    global_hooks = {name: everywhere[name] for name in _GLOBAL_HOOKS if everywhere.get(name)}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        of_gradient = tensor._backward_hooks
        # Absent before torch 2.1.
        accumulated = getattr(tensor, "_post_accumulate_grad_hooks", None)
        if of_gradient is not None or accumulated is not None:
            tensors.append((tensor, of_gradient, accumulated))
    for module in model.modules():
        attributes = module.__dict__
        hooks = {name: attributes[name] for name in _BACKWARD_HOOKS if attributes.get(name)}
        if hooks:
            modules.append((attributes, hooks))
    try:
        # Handles refer to the dictionaries, so other dictionaries take their places for the time of the block.
        everywhere.update({name: OrderedDict() for name in global_hooks})
        for attributes, hooks in modules:
            attributes.update({name: OrderedDict() for name in hooks})
        for tensor, of_gradient, accumulated in tensors:
            if of_gradient is not None:
                tensor._backward_hooks = None
            if accumulated is not None:
                # `None` would be ignored.
                tensor._post_accumulate_grad_hooks = OrderedDict()
        yield
    finally:
        everywhere.update(global_hooks)
        for attributes, hooks in modules:
            attributes.update(hooks)
        for tensor, of_gradient, accumulated in tensors:
            tensor._backward_hooks = of_gradient
            if accumulated is not None:
                tensor._post_accumulate_grad_hooks = accumulated
