"""Settings for exact derivatives of a loss, and errors if they don't exist."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.operators.memory import is_out_of_memory

__all__ = [
    "DoubleBackwardError",
    "check_twice_differentiable",
    "differentiate",
    "exact_derivatives",
    "explained",
    "graph_nodes",
    "without_reentrant_checkpoints",
]


class DoubleBackwardError(RuntimeError):
    """An operation of the model cannot be differentiated twice; the message names it and the remedy."""


@contextmanager
def exact_derivatives(model: nn.Module) -> Iterator[None]:
    """Evaluate and differentiate a model so that second derivatives exist, in its full precision.

    Inside the block gradients are on and autocast is off. Attention runs on the math kernel, and layers of
    `nn.TransformerEncoder` run one by one, because the fused ones have no double backward. Compiled modules run eagerly
    for the same reason. Weights with `weight_norm` on the CPU are composed of other operations, because PyTorch's own
    has a wrong second derivative there. Float32 is not rounded to TF32. Embeddings have dense gradients. cuDNN is off
    if the model holds a recurrent layer on a GPU. All settings are as before when the block is left.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(full_float32())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Layers whose parameters are not chosen would take it, and give nested tensors to those behind them.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
                stack.callback(setattr, module, "sparse", True)
                module.sparse = False
        if any(map(_has_weight_norm, model.modules())):
            stack.enter_context(_ComposedWeightNorm())
        if _is_compiled(model):
            # Imports the compiler, which takes a second.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()) and torch.cuda.is_available():
            # `torch.backends.cudnn.flags` would reset five other settings to their defaults.
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        yield


def _has_weight_norm(module: nn.Module) -> bool:
    kinds = [type(module), *map(type, module._forward_pre_hooks.values())]
    return any(kind.__name__ in ("_WeightNorm", "WeightNorm") for kind in kinds)


class _ComposedWeightNorm(TorchFunctionMode):
    """Form weights with `weight_norm` as :math:`g v / |v|`, by operations that can be differentiated twice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm and args[0].device.type == "cpu":
            return _composed_weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _composed_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The dimension -1 stands for the whole weight, see `torch.norm_except_dim`.
    others = None if dim == -1 else [other for other in range(v.dim()) if other != dim]
    length: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1)
    return v * (g / length)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def check_twice_differentiable(gradients: Sequence[Tensor]) -> None:
    """Search the graph behind gradients for functions that forbid a second derivative.

    Autograd raises if it executes one. But `torch.autograd.grad` prunes the branch that leads to it, and returns
    a Hessian in which these terms are missing.

    Raises:
        DoubleBackwardError: if there is such a function.
    """
    for node in graph_nodes(gradients):
        if node.name() in ("torch::autograd::Error", "DelayedError", "NotImplemented"):
            raise DoubleBackwardError(
                "a custom autograd function of the model has no double backward (its backward is marked "
                "once_differentiable): replace it, or " + _ALTERNATIVE
            )


def without_reentrant_checkpoints(evaluate: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Evaluate a loss, and refuse it if there is reentrant checkpointing, which hides parameters from autograd.

    `torch.autograd.grad` does not support such a checkpoint. It leaves no trace in the graph if only parameters lie
    behind it, and no input that requires grad; gradients and products then lack their parts. So the evaluation is
    observed as well, unless the loss raises an error under observation.

    Raises:
        DoubleBackwardError: if a reentrant checkpoint is in the graph, or uses one of the parameters.
    """
    hidden = _HiddenParameters(parameters)
    try:
        with hidden:
            loss = evaluate()
    except Exception as error:
        if hidden.found:  # The error may be that no parameter is used.
            raise DoubleBackwardError(_REENTRANT) from error
        if is_out_of_memory(error):
            raise
        loss = evaluate()
    if hidden.found or any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes([loss])):
        raise DoubleBackwardError(_REENTRANT)
    return loss


class _HiddenParameters(TorchFunctionMode):
    """Notices whether an operation inside of a reentrant checkpoint takes one of some parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.found = False
        self._hidden = {id(parameter) for parameter in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The forward pass of a reentrant checkpoint has no gradients; so have others, which are left alone.
        if not self.found and not torch.is_grad_enabled():
            given = [*args, *(kwargs or {}).values()]
            parts = [part for value in given for part in (value if isinstance(value, (list, tuple)) else [value])]
            self.found = any(id(part) in self._hidden for part in parts) and _inside_reentrant_checkpoint()
        return func(*args, **(kwargs or {}))


def _inside_reentrant_checkpoint() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def differentiate(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], directions: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor]:
    """Differentiate ``g . v`` with respect to the parameters.

    Args:
        gradients: with their graphs.
        parameters: the tensors that they were taken with respect to.
        directions: ``v`` in the parameters' shapes.
        keep: whether the graphs are needed again.
    """
    # The gradient of a parameter that the loss is linear in is a constant without a graph.
    pairs = [
        (gradient, direction)
        for gradient, direction in zip(gradients, directions, strict=True)
        if gradient.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(parameter) for parameter in parameters]
    outputs, grad_outputs = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, parameters, grad_outputs=grad_outputs, retain_graph=keep, materialize_grads=True
    )


def graph_nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """Yield the nodes of the graph behind some tensors, each once."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


_REENTRANT = (
    "reentrant activation checkpointing has no double backward: pass use_reentrant=False to "
    "torch.utils.checkpoint.checkpoint"
)
_ALTERNATIVE = "use hvp='finite_difference', which needs first derivatives only"

# (message of PyTorch, meaning and remedy); {0} is the pattern's first group.
_CAUSES = [
    (
        r"derivative for (\S+) is not implemented",
        "{0} has no double backward: replace it, or " + _ALTERNATIVE,
    ),
    (
        r"differentiate twice a function that was marked with @once_differentiable",
        "a custom autograd function of the model is marked once_differentiable and has no double backward "
        "(torch.nn.SyncBatchNorm in training mode and several fused kernels are such): replace it, or " + _ALTERNATIVE,
    ),
    (
        r"checkpoint.*(?:use_reentrant=True|is incompatible with \.grad\(\))",
        _REENTRANT,
    ),
    (
        r"aot_autograd does not currently support double backward",
        "a compiled function inside the loss has no double backward: call the uncompiled function when measuring, or "
        + _ALTERNATIVE,
    ),
    (
        r"(?:[Ss]parse.*(?:not implemented|not supported|unsupported)|layout.*[Ss]parse)",
        "sparse gradients have no double backward: call F.embedding with sparse=False, or leave its weight out with "
        "parameters=",
    ),
    (
        r"[Vv]iew.*inplace|modified by an inplace operation",
        "the loss changes a tensor in place that its second derivative needs: replace the in-place operation, or "
        + _ALTERNATIVE,
    ),
]


@contextmanager
def explained() -> Iterator[None]:
    """Replace autograd's errors about second derivatives by a `DoubleBackwardError` with the remedy.

    Raises:
        DoubleBackwardError: instead of an error that means a missing second derivative.

    Example:
        >>> with explained():
        ...     raise RuntimeError("derivative for aten::foo_backward is not implemented")
        Traceback (most recent call last):
        ...
        hessian_callback.operators.derivatives.DoubleBackwardError: aten::foo_backward has no double backward: ...
    """
    try:
        yield
    except DoubleBackwardError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        for pattern, meaning in _CAUSES:
            match = re.search(pattern, str(error), flags=re.DOTALL)
            if match:
                groups = [group.strip("'\"`,.") for group in match.groups()]
                raise DoubleBackwardError(meaning.format(*groups)) from error
        raise
