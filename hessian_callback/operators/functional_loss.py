"""The loss as a function of parameter values that need not be those of the module, in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessian_callback.linalg.free_memory import free_memory
from hessian_callback.operators.batches import map_tensors
from hessian_callback.operators.derivatives import check_twice_differentiable, differentiate, graph_nodes
from hessian_callback.operators.loss import BatchLoss, LossModule
from hessian_callback.operators.memory import is_out_of_memory
from hessian_callback.operators.padding import constant_padding
from hessian_callback.operators.pieces import Decision, FollowedPieces, RecordedPieces
from hessian_callback.operators.substitution import substituted

__all__ = ["FunctionalLoss"]

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
# A tenth of the graph in lower precision is a reserve for temporaries.
_ROOM = 1.1


_Result = TypeVar("_Result")

# Names of functions that change their first argument.
_IN_PLACE = re.compile(r"(?:[a-z0-9]_|^__setitem__|^__i(?:add|sub|mul|truediv|floordiv|mod|pow)__)$")


class FunctionalLoss:
    """The loss of a batch as a function of parameter values.

    The module is not copied. Other tensors take the place of its parameters and buffers during an evaluation. In
    float64, batches are converted, and casts to lower precision inside of the loss become casts to float64. At the
    parameters themselves, it is then evaluated on the piece (see `pieces`) of the evaluation in lower precision.

    Args:
        loss: the loss, in the precision of its parameters.

    Attributes:
        dtype: real dtype of gradients, float64.
        parameter_norm: norm of the chosen parameters.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0)
        >>> loss = BatchLoss(model, lambda m, x: m(x).float().pow(3).mean(), [model.weight])
        >>> FunctionalLoss(loss).gradient(torch.full((1, 1), 0.1))
        [tensor([[0.0270]], dtype=torch.float64)]
    """

    def __init__(self, loss: BatchLoss) -> None:
        self.loss = loss
        self._module = LossModule(loss)
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        self._chosen = [names[id(parameter)] for parameter in loss.parameters]
        with torch.inference_mode(False):
            self._point = {name: self._converted(parameter) for name, parameter in self._module.named_parameters()}
            self._buffers = {name: self._converted(buffer) for name, buffer in self._module.named_buffers()}
        norms = [float(torch.linalg.vector_norm(self._point[name])) for name in self._chosen]
        self.parameter_norm = math.hypot(*norms)
        self.dtype = self._point[self._chosen[0]].real.dtype

    @classmethod
    def of(cls, loss: BatchLoss, *, bytes_per_graph: int = 0, sharing: int = 1) -> FunctionalLoss | None:
        """Return the function in float64; ``None`` if that does not fit the free memory or is not supported.

        Args:
            loss: the loss, in the precision of its parameters.
            bytes_per_graph: size of the gradient graph of the largest batch in that precision.
            sharing: number of processes that share the free memory.
        """
        device = loss.parameters[0].device
        if device.type not in ("cpu", "cuda") or _is_sharded(loss):
            return None
        model = loss.model
        narrow = [t for t in [*model.parameters(), *model.buffers()] if t.dtype in _WIDE]
        # The widened tensors, a direction, a gradient and a product; a graph, and temporaries while it is built.
        needed = sum(8 * tensor.numel() for tensor in narrow) + 8 * 3 * sum(loss.sizes) + 4 * _ROOM * bytes_per_graph
        free = free_memory(device)
        if free is not None and needed > free / sharing:
            return None
        return cls(loss)

    def value(self, batch: Any, displacement: Sequence[Tensor] | None = None) -> float:
        """Return the loss of one batch; see `gradient`."""

        def compute(leaves: list[Tensor], own: Any, decisions: Sequence[Decision]) -> float:
            return float(self._value(batch, own, decisions).detach())

        return self._substituted(compute, batch, displacement)

    def gradient(self, batch: Any, displacement: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the gradient of one batch.

        Args:
            batch: the batch, in any precision.
            displacement: added to the parameters; in their shapes.

        Raises:
            TypeError: if the loss is not computed in float64 throughout, or uses the module's own parameters.
        """

        def compute(leaves: list[Tensor], own: Any, decisions: Sequence[Decision]) -> list[Tensor]:
            value = self._value(batch, own, decisions)
            with _InFloat64():
                return list(torch.autograd.grad(value, leaves, materialize_grads=True))

        return self._substituted(compute, batch, displacement)

    def products(
        self, batch: Any, directions: Sequence[Sequence[Tensor]], displacement: Sequence[Tensor] | None = None
    ) -> list[list[Tensor]]:
        """Multiply the Hessian of one batch with several directions, each in the parameters' shapes."""

        def compute(leaves: list[Tensor], own: Any, decisions: Sequence[Decision]) -> list[list[Tensor]]:
            value = self._value(batch, own, decisions)
            with _InFloat64():
                gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            check_twice_differentiable(gradients)
            results = []
            for number, direction in enumerate(directions):
                wide = [self._converted(part) for part in direction]
                keep = number < len(directions) - 1
                with _InFloat64():
                    results.append(list(differentiate(gradients, leaves, wide, keep=keep)))
            return results

        return self._substituted(compute, batch, displacement)

    def _value(self, batch: Any, own: Any, decisions: Sequence[Decision]) -> Tensor:
        followed = FollowedPieces(decisions) if decisions else None
        with self.loss.fixed(batch), _InFloat64(), followed or nullcontext():
            loss: Tensor = self._module(own)
        if followed is not None:
            followed.check_all_followed()
        self._check_reached(loss)
        _check_precision(loss)
        return loss

    def _check_reached(self, loss: Tensor) -> None:
        own = {id(parameter) for parameter in self.loss.parameters}
        if any(id(getattr(node, "variable", None)) in own for node in graph_nodes([loss])):
            raise TypeError("the loss finds a parameter elsewhere than in its module, such as in a list")

    def _substituted(
        self,
        compute: Callable[..., _Result],
        batch: Any,
        displacement: Sequence[Tensor] | None,
    ) -> _Result:
        """Call a function while other tensors are in the place of the parameters, buffers and the batch.

        Backward passes belong inside, because activation checkpointing evaluates modules in them.
        """
        # Displaced parameters may lie on other pieces.
        decisions = self._decisions(batch) if displacement is None else []
        if decisions:
            try:
                return self._evaluated(partial(compute, decisions=decisions), batch, displacement)
            except Exception as error:  # The two evaluations take different paths.
                if is_out_of_memory(error):
                    raise
        return self._evaluated(partial(compute, decisions=[]), batch, displacement)

    def _decisions(self, batch: Any) -> list[Decision]:
        """Return on which sides of its kinks the loss is evaluated in lower precision; see `pieces`."""
        recorded = RecordedPieces()
        try:
            with self.loss.differentiable():
                buffers = {name: buffer.detach().clone() for name, buffer in self._module.named_buffers()}
                own = map_tensors(batch, torch.clone)
                with substituted(self._module, buffers), self.loss.fixed(batch), recorded:
                    self._module(own)
        except Exception as error:  # Without decisions it is evaluated as it is.
            if is_out_of_memory(error):
                raise
            return []
        return recorded.decisions

    def _evaluated(self, compute: Callable[..., _Result], batch: Any, displacement: Sequence[Tensor] | None) -> _Result:
        with torch.inference_mode(False):
            points = [self._point[name] for name in self._chosen]
            if displacement is not None:
                points = [point + part.to(point.dtype) for point, part in zip(points, displacement, strict=True)]
            leaves = [point.detach().requires_grad_() for point in points]
            values = {
                **self._point,
                **dict(zip(self._chosen, leaves, strict=True)),
                **{name: buffer.clone() for name, buffer in self._buffers.items()},
            }
            own = map_tensors(batch, lambda tensor: self._converted(tensor).clone())
        # The padding rows of the module's own parameters, which are not displaced.
        with self.loss.differentiable(), constant_padding(self.loss.model), substituted(self._module, values):
            return compute(leaves, own)

    def _converted(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.to(_WIDE.get(tensor.dtype, tensor.dtype))


class _InFloat64(TorchFunctionMode):
    """Replace lower precision by float64 in the arguments of all operations.

    Backward passes belong inside as well, because checkpointing evaluates modules in them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        # A change of a constant that the loss keeps, such as a running mean, would be lost on a copy.
        changed = 1 if args and _IN_PLACE.search(getattr(func, "__name__", "")) else 0
        given = {name: value if name == "out" else _widened(value) for name, value in (kwargs or {}).items()}
        return func(*args[:changed], *map(_widened, args[changed:]), **given)


def _widened(value: Any) -> Any:
    """Replace tensors and dtypes of lower precision in an argument of an operation."""
    if isinstance(value, Tensor):
        return value.to(_WIDE[value.dtype]) if value.dtype in _WIDE else value
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    # Operations take no other containers. Subclasses of tuple are sizes.
    if type(value) in (list, tuple):
        return type(value)(map(_widened, value))
    if type(value) is dict:
        return {name: _widened(part) for name, part in value.items()}
    return value


def _check_precision(loss: Tensor) -> None:
    if loss.dtype != torch.float64 or any(
        metadata.dtype in _WIDE for node in graph_nodes([loss]) for metadata in getattr(node, "_input_metadata", ())
    ):
        raise TypeError("the loss computes in lower precision than float64")


def _is_sharded(loss: BatchLoss) -> bool:
    bases = {base.__name__ for module in loss.model.modules() for base in type(module).__mro__}
    return "FSDPModule" in bases
