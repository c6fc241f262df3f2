r"""The product of a batch's Hessian with a vector as a traced function: forward over reverse, the primal part folded.

Of the derivative of :math:`\nabla L` along a direction, most depends on the parameters and the batch only. It is
traced once for all batches of one shape; what does not depend on the direction is evaluated once for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from hessian_callback.operators.batches import tensors
from hessian_callback.operators.substitution import substituted

__all__ = ["TracedProduct", "signature"]

_PLAIN = (str, bytes, int, float, bool, type(None))


def signature(batch: Any) -> Hashable | None:
    """Return what two batches must have in common to share a trace; ``None`` for a batch that can share none.

    Structure, shapes, strides, dtypes and devices of the tensors, and all other values.

    Example:
        >>> signature((torch.zeros(3), "a")) == signature((torch.ones(3), "a"))
        True
        >>> signature((torch.zeros(3), "a")) == signature((torch.zeros(3), "b"))
        False
    """
    leaves, structure = tree_flatten(batch)
    parts: list[Hashable] = [str(structure)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            parts.append((tuple(leaf.shape), leaf.stride(), leaf.dtype, str(leaf.device)))
        elif isinstance(leaf, _PLAIN):
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts)


class TracedProduct:
    """The traced product with the Hessian of one batch, for all batches of its `signature`.

    Args:
        value: a module: ``value(batch)`` is the batch's mean loss.
        parameters: those of its parameters to differentiate with respect to.
        batch: the batch to trace.
        shared: whether to keep the batch's tensors apart from the trace, for other batches of its `signature`.

    Raises:
        RuntimeError: where an operation has no forward derivative, control flow depends on traced values, or the
            traced product would change in place what it rests on. PyTorch raises other types as well.
    """

    def __init__(
        self, value: nn.Module, parameters: Sequence[nn.Parameter], batch: Any, *, shared: bool = True
    ) -> None:
        names = {id(parameter): name for name, parameter in value.named_parameters()}
        chosen = [names[id(parameter)] for parameter in parameters]
        # Detached: a trace must not reach into the autograd graph of the training.
        self._point = [parameter.detach() for parameter in parameters]
        leaves, structure = tree_flatten(batch)
        self._places = [place for place, leaf in enumerate(leaves) if shared and isinstance(leaf, Tensor)]

        def derivative(point: list[Tensor], data: list[Tensor], directions: list[Tensor]) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for place, tensor in zip(self._places, data, strict=True):
                filled[place] = tensor
            whole = tree_unflatten(filled, structure)

            def loss(parameters: tuple[Tensor, ...]) -> Tensor:
                with substituted(value, dict(zip(chosen, parameters, strict=True))):
                    result = value(whole)
                assert isinstance(result, Tensor)
                return result

            def gradient(*parameters: Tensor) -> tuple[Tensor, ...]:
                result: tuple[Tensor, ...] = torch.func.grad(loss)(parameters)
                return result

            along = torch.func.jvp(gradient, tuple(point), tuple(directions))[1]
            return tuple(along)

        data = [leaves[place] for place in self._places]
        # Functionalized: the backward of some operations (SiLU) works in place on what is folded here, which would be
        # right in the first product and wrong in the others.
        functional = torch.func.functionalize(derivative)
        with _ComposedLosses():
            graph = make_fx(functional)(self._point, data, [torch.zeros_like(part) for part in self._point])
        self._primal, self._tangent, self._used = _split(graph, len(self._point))

    def constants(self, batch: Any) -> list[Tensor]:
        """Evaluate what depends on the parameters and a batch only."""
        leaves = tree_flatten(batch)[0]
        with torch.no_grad():
            constants: list[Tensor] = self._primal(*self._point, *[leaves[place] for place in self._places])
        return constants

    def size(self, batch: Any, constants: Sequence[Tensor]) -> int:
        """Return the bytes that constants hold beside the parameters and the batch."""
        present = {tensor.untyped_storage().data_ptr() for tensor in [*self._point, *tensors(batch)]}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in constants}
        return sum(size for storage, size in storages.items() if storage not in present)

    def product(self, constants: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply; parts are ``None`` where the Hessian's rows are zero."""
        with torch.no_grad():
            results = iter(self._tangent(*constants, *directions))
        return [next(results) if used else None for used in self._used]


class _ComposedLosses(TorchFunctionMode):
    """Compute the mean squared error from elementary operations.

    Forward derivatives of ``mse_loss``'s backward end the process with a segmentation fault while they are traced
    (PyTorch 2.13).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "mse_loss" and func is not nn.functional.mse_loss:
            return _mean_squared_error(*args, **(kwargs or {}))
        if func is nn.functional.mse_loss:
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            given = {name: value for name, value in bound.arguments.items() if value is not None}
            if given.keys() <= {"input", "target", "reduction"}:
                number = {"none": 0, "mean": 1, "sum": 2}.get(given.pop("reduction", "mean"), -1)
                return _mean_squared_error(**given, reduction=number)
            raise RuntimeError("mse_loss with weights or deprecated options cannot be traced")
        return func(*args, **(kwargs or {}))


def _mean_squared_error(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    if reduction not in (0, 1, 2):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    squares = (input - target).square()
    return (squares, squares.mean(), squares.sum())[reduction]


def _split(traced: fx.GraphModule, num_directions: int) -> tuple[fx.GraphModule, fx.GraphModule, list[bool]]:
    """Cut a trace where values begin to depend on the directions, its last inputs.

    Returns:
        From all other inputs to constants; from constants and directions to results; and which results depend
        on the directions (the others are zero, because results are linear in the directions).
    """
    traced.graph.eliminate_dead_code()
    nodes = list(traced.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    output = nodes[-1]
    dependent = set(inputs[len(inputs) - num_directions :])
    for node in nodes[:-1]:
        if any(argument in dependent for argument in node.all_input_nodes):
            dependent.add(node)
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                raise RuntimeError(f"{node.target} works in place in the traced product, which would not be repeatable")
    results = list(output.args[0])
    used = [result in dependent for result in results]
    kept = [result for result in results if result in dependent]
    needed = {
        argument: None
        for node in nodes[:-1]
        if node in dependent
        for argument in node.all_input_nodes
        if argument not in dependent
    }
    primal, tangent = fx.Graph(), fx.Graph()
    before: dict[fx.Node, fx.Node] = {}
    after: dict[fx.Node, fx.Node] = {node: tangent.placeholder(f"constant_{n}") for n, node in enumerate(needed)}
    for node in nodes[:-1]:
        target, copies = (tangent, after) if node in dependent else (primal, before)
        copies[node] = target.node_copy(node, lambda argument, copies=copies: copies[argument])  # type: ignore[misc]
        copies[node].meta = {}
    primal.output([before[node] for node in needed])
    tangent.output([after[node] for node in kept])
    for graph in (primal, tangent):
        graph.eliminate_dead_code()
    return fx.GraphModule(traced, primal), fx.GraphModule(traced, tangent), used
