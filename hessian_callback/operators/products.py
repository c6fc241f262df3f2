r"""Hessian-vector products of one rank: three engines for :math:`v \mapsto \sum_i w_i \nabla^2 L_i(\theta)\, v`.

`DoubleBackward` differentiates a gradient graph that is built once and kept. `Linearize` traces the gradient
function forward over reverse once and folds what does not depend on the direction into constants.
`FiniteDifference` needs first derivatives only and is not exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hessian_callback.operators.batches import tensors
from hessian_callback.operators.derivatives import (
    DoubleBackwardError,
    check_twice_differentiable,
    exact_derivatives,
    explained,
    graph_nodes,
)
from hessian_callback.operators.memory import count_saved_tensors
from hessian_callback.operators.tracing import TracedProduct, signature

__all__ = [
    "BatchLoss",
    "DoubleBackward",
    "FiniteDifference",
    "Linearize",
    "ProductEngine",
    "check_agreement",
    "trial_directions",
]


class BatchLoss:
    """The mean loss of a batch as a function of chosen parameters.

    Args:
        model: the module that holds the parameters.
        loss_fn: ``(model, batch) -> scalar``.
        parameters: the tensors to differentiate with respect to, each once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self.model = model
        self.parameters = list(parameters)
        self.sizes = [parameter.numel() for parameter in parameters]
        self._loss_fn = loss_fn

    def value(self, batch: Any) -> Tensor:
        """Evaluate the loss, and check that it can be differentiated.

        Raises:
            TypeError: if the loss is not a tensor.
            ValueError: if it is not a scalar, or does not depend on any parameter.
            ArithmeticError: if it is NaN or infinite.
        """
        loss = self._loss_fn(self.model, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss must be a tensor, got {type(loss).__name__}; return the mean loss of the batch")
        if loss.numel() != 1:
            raise ValueError(
                f"the loss must be a scalar, got shape {tuple(loss.shape)}; return its mean over the batch"
            )
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter that requires grad; do not detach it, nor compute it "
                "under torch.no_grad, nor choose parameters that are frozen"
            )
        return loss.reshape(())

    def gradient(self, batch: Any, *, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its gradient; parameters it does not depend on get zeros."""
        loss = self.value(batch)
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=create_graph, materialize_grads=True)
        return loss.detach(), list(gradients)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Cut a flat vector ``(P,)`` into the parameters' shapes."""
        pieces = vector.split(self.sizes)
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Make second derivatives possible and their errors readable; see `derivatives`."""
        with exact_derivatives(self.model), explained():
            yield


class ProductEngine(ABC):
    """One way to form ``sum_i w_i H_i v`` over this rank's batches.

    Args:
        loss: the loss and its parameters.
        batches: this rank's batches.
        weights: the weight of each.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]

    def __init__(self, loss: BatchLoss, batches: Sequence[Any], weights: Sequence[float]) -> None:
        self.loss = loss
        self.batches = list(batches)
        self.weights = list(weights)

    @abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Multiply, ``(P,) -> (P,)``."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything that was kept between products."""

    def _accumulate(self, total: Tensor, pieces: Sequence[Tensor | None], weight: float) -> None:
        with torch.no_grad():
            for part, piece in zip(self.loss.split(total), pieces, strict=True):
                if piece is not None:
                    part.add_(piece, alpha=weight)


class DoubleBackward(ProductEngine):
    """Exact products by differentiating the gradient once more.

    The graphs of the first ``num_cached`` batches are kept; those of the others are rebuilt in every product,
    which costs one more gradient each.
    """

    name = "double_backward"
    exact = True

    def __init__(
        self,
        loss: BatchLoss,
        batches: Sequence[Any],
        weights: Sequence[float],
        *,
        num_cached: int | None = None,
    ) -> None:
        super().__init__(loss, batches, weights)
        keep = self.batches if num_cached is None else self.batches[:num_cached]
        with loss.differentiable():
            self._graphs: list[list[Tensor] | None] = [loss.gradient(batch, create_graph=True)[1] for batch in keep]

    @property
    def num_nodes(self) -> int:
        """Nodes of the first kept graph, by which the time of a trace is guessed; 0 where none is kept."""
        kept = next((graph for graph in self._graphs if graph is not None), None)
        return 0 if kept is None else sum(1 for _ in graph_nodes(kept))

    @property
    def num_cached(self) -> int:
        """Batches whose gradient graph is kept."""
        return sum(graph is not None for graph in self._graphs)

    @staticmethod
    def graph_size(loss: BatchLoss, batch: Any) -> int:
        """Build a batch's gradient graph once, check it, and return the bytes that it holds.

        Raises:
            DoubleBackwardError: if the graph ends in a function that can't be differentiated again.
        """
        with loss.differentiable(), count_saved_tensors([*loss.parameters, *tensors(batch)]) as saved:
            _, gradients = loss.gradient(batch, create_graph=True)
            for gradient in gradients:
                saved.add(gradient)
            check_twice_differentiable(gradients)
        return saved.num_bytes

    def product(self, vector: Tensor) -> Tensor:
        """Differentiate ``g . v``: one backward pass a batch, and the gradient first where it was not kept."""
        with self.loss.differentiable():
            total, directions = torch.zeros_like(vector), self.loss.split(vector)
            for index, weight in enumerate(self.weights):
                self._accumulate(total, self._part(index, directions), weight)
        return total

    def part(self, index: int, directions: list[Tensor]) -> Sequence[Tensor]:
        """Multiply with the Hessian of one batch, unweighted, in the parameters' shapes."""
        with self.loss.differentiable():
            return self._part(index, directions)

    def release(self, index: int) -> None:
        """Let go of one batch's graph; it is rebuilt from now on."""
        if index < len(self._graphs):
            self._graphs[index] = None

    def _part(self, index: int, directions: list[Tensor]) -> Sequence[Tensor]:
        kept = self._graphs[index] if index < len(self._graphs) else None
        if kept is not None:
            return self._differentiate(kept, directions, keep=True)
        gradients = self.loss.gradient(self.batches[index], create_graph=True)[1]
        return self._differentiate(gradients, directions, keep=False)

    def _differentiate(self, gradients: list[Tensor], directions: list[Tensor], keep: bool) -> Sequence[Tensor]:
        # The gradient of a parameter that the loss is linear in is a constant without a graph.
        pairs = [
            (gradient, direction)
            for gradient, direction in zip(gradients, directions, strict=True)
            if gradient.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(parameter) for parameter in self.loss.parameters]
        outputs, grad_outputs = zip(*pairs, strict=True)
        return torch.autograd.grad(
            outputs,
            self.loss.parameters,
            grad_outputs=grad_outputs,
            retain_graph=keep,
            materialize_grads=True,
        )

    def close(self) -> None:
        """Let go of the graphs."""
        self._graphs = []


class Linearize(ProductEngine):
    """Exact products forward over reverse: the gradient function's derivative, traced once for each shape of a batch.

    Tracing takes seconds and fails for operations without a forward derivative and for control flow that
    depends on values; a product then costs as little as any. Each batch's traced product is compared with double
    backward, because some forward derivatives of PyTorch are wrong.

    Args:
        loss: the loss and its parameters.
        batches: this rank's batches.
        weights: the weight of each.
        reference: double backward for the same batches, whose graph of each batch is let go of as soon as the
            traced product takes its place; default: graphs are built one at a time.
        first: a trace that is there already.

    Raises:
        DoubleBackwardError: if a traced product differs from double backward.
    """

    name = "linearize"
    exact = True

    def __init__(
        self,
        loss: BatchLoss,
        batches: Sequence[Any],
        weights: Sequence[float],
        *,
        reference: DoubleBackward | None = None,
        first: tuple[Hashable, TracedProduct] | None = None,
    ) -> None:
        super().__init__(loss, batches, weights)
        reference = reference or DoubleBackward(loss, batches, weights, num_cached=0)
        traces = dict([first] if first is not None else [])
        self._traced: list[tuple[TracedProduct, list[Tensor]]] = []
        with loss.differentiable():
            for index, batch in enumerate(self.batches):
                key = signature(batch)
                traced = traces.get(key) if key is not None else None
                if traced is None:
                    traced, can_be_shared = self.trace(loss, batch)
                    if can_be_shared:
                        traces[key] = traced
                constants = traced.constants(batch)
                check_agreement(self.name, traced.product(constants, trial_directions(loss)), reference, index)
                self._traced.append((traced, constants))
                reference.release(index)

    @staticmethod
    def trace(loss: BatchLoss, batch: Any) -> tuple[TracedProduct, bool]:
        """Trace the product of a batch, and say whether batches of its signature may share the trace."""
        # Tensors in structures of unknown kind are as good as constants, for this batch alone.
        shared = signature(batch) is not None
        return TracedProduct(_Loss(loss), loss.parameters, batch, shared=shared), shared

    def product(self, vector: Tensor) -> Tensor:
        """Evaluate the traced linear maps."""
        with self.loss.differentiable():
            total, directions = torch.zeros_like(vector), self.loss.split(vector)
            for (traced, constants), weight in zip(self._traced, self.weights, strict=True):
                self._accumulate(total, traced.product(constants, directions), weight)
        return total

    def close(self) -> None:
        """Let go of the traced functions and their constants."""
        self._traced = []


def trial_directions(loss: BatchLoss) -> list[Tensor]:
    """Return the direction along which engines are compared, in the parameters' shapes."""
    first = loss.parameters[0]
    return loss.split(torch.linspace(-1, 1, sum(loss.sizes), dtype=first.dtype, device=first.device))


def check_agreement(name: str, found: Sequence[Tensor | None], reference: DoubleBackward, index: int) -> None:
    """Hold an engine's product of one batch along `trial_directions` against double backward.

    Raises:
        DoubleBackwardError: if they differ by more than rounding explains.
    """
    expected = reference.part(index, trial_directions(reference.loss))
    pairs = list(zip(found, expected, strict=True))
    error = torch.stack([(part if one is None else part - one).norm() for one, part in pairs]).norm()
    norm = torch.stack([part.norm() for part in expected]).norm()
    if not float(error) <= 1e4 * torch.finfo(norm.dtype).eps * float(norm):
        raise DoubleBackwardError(
            f"hvp={name!r} gave a product that differs from double backward by {float(error):.1e} in norm "
            f"{float(norm):.1e}: an operation of the model has a wrong or missing forward derivative. "
            "Use hvp='double_backward'"
        )


class FiniteDifference(ProductEngine):
    r"""Products by a central difference of gradients, :math:`(g(\theta + hv) - g(\theta - hv)) / 2h`.

    The step is :math:`h = \epsilon^{1/2} \max(1, \|\theta\|) / \|v\|`. For a smooth loss
    :math:`\epsilon^{1/3}` would balance truncation, of order :math:`h^2`, against cancellation, of order
    :math:`\epsilon / h`; but a long step crosses the kinks of ReLU units, and each adds a jump. The parameters are
    changed for the time of two gradients and then get their former bits back.

    No step suits ReLU networks in float32: a shorter one crosses fewer kinks, and divides the jump at each by less.
    With 16 units and 32 samples the largest eigenvalue, .87, came out as .65 with a bound of 1.4 (as .82 with steps
    ten times as long, as .88 with a hundred times), while tanh networks lost no more than 2e-5 of theirs. The
    solver's bounds hold all the same, because such products are not symmetric and it measures that. What helps is
    float64, whose step is 1e-4 of this one, or an exact product.
    """

    name = "finite_difference"
    exact = False

    def close(self) -> None:
        """Nothing was kept."""

    def product(self, vector: Tensor) -> Tensor:
        """Form two gradients a batch."""
        with self.loss.differentiable():
            total, directions = torch.zeros_like(vector), self.loss.split(vector)
            parameters = self.loss.parameters
            originals = [parameter.detach().clone() for parameter in parameters]
            # Tensors, not numbers: a GPU would have to be waited for. Along zero, any step gives the product zero.
            length = vector.norm()
            scale = torch.stack([original.norm() for original in originals]).norm().clamp(min=1.0)
            step = torch.finfo(vector.dtype).eps ** 0.5 * scale / torch.where(length > 0, length, 1.0)
            try:
                for sign in (1.0, -1.0):
                    with torch.no_grad():
                        for parameter, original, direction in zip(parameters, originals, directions, strict=True):
                            parameter.copy_(original).addcmul_(direction, step, value=sign)
                    for batch, weight in zip(self.batches, self.weights, strict=True):
                        gradients = self.loss.gradient(batch, create_graph=False)[1]
                        self._accumulate(total, gradients, sign * weight)
                total.div_(2 * step)
            finally:
                with torch.no_grad():
                    for parameter, original in zip(parameters, originals, strict=True):
                        parameter.copy_(original)
        return total


class _Loss(nn.Module):
    """The loss as a module, so that ``functional_call`` can replace parameters anywhere inside the model."""

    def __init__(self, loss: BatchLoss) -> None:
        super().__init__()
        self.model = loss.model
        self._loss = [loss]  # in a list: the loss is not a submodule

    def forward(self, batch: Any) -> Tensor:
        return self._loss[0].value(batch)
