r"""Hessian-vector products of one rank: three engines for :math:`v \mapsto \sum_i w_i \nabla^2 L_i(\theta)\, v`.

`DoubleBackward` differentiates a gradient graph that is built once and kept. `Linearize` traces the gradient
function forward over reverse once and folds what does not depend on the direction into constants.
`FiniteDifference` needs first derivatives only and is not exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hessian_callback.batches import tensors
from hessian_callback.derivatives import check_twice_differentiable, exact_derivatives, explained
from hessian_callback.memory import count_saved_tensors

__all__ = ["BatchLoss", "DoubleBackward", "FiniteDifference", "Linearize", "ProductEngine"]


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

    def _accumulate(self, total: Tensor, pieces: Sequence[Tensor], weight: float) -> None:
        with torch.no_grad():
            for part, piece in zip(self.loss.split(total), pieces, strict=True):
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
            self._graphs = [loss.gradient(batch, create_graph=True)[1] for batch in keep]

    @property
    def num_cached(self) -> int:
        """Batches whose gradient graph is kept."""
        return len(self._graphs)

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
            for index, (batch, weight) in enumerate(zip(self.batches, self.weights, strict=True)):
                if index < len(self._graphs):
                    gradients, keep = self._graphs[index], True
                else:
                    gradients, keep = self.loss.gradient(batch, create_graph=True)[1], False
                self._accumulate(total, self._differentiate(gradients, directions, keep), weight)
        return total

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
    """Exact products by ``torch.func.linearize`` of the gradient function: forward over reverse, traced once.

    Tracing takes seconds and fails for operations without a forward derivative and for control flow that
    depends on values; a product then costs as little as any.
    """

    name = "linearize"
    exact = True

    def __init__(self, loss: BatchLoss, batches: Sequence[Any], weights: Sequence[float]) -> None:
        super().__init__(loss, batches, weights)
        module = _Loss(loss)
        names = module.names()
        # Detached: the traced function must not reach into the autograd graph of the training.
        point = tuple(parameter.detach() for parameter in loss.parameters)

        def gradient_of(batch: Any) -> Callable[..., tuple[Tensor, ...]]:
            def value(parameters: tuple[Tensor, ...]) -> Tensor:
                chosen = dict(zip(names, parameters, strict=True))
                result = torch.func.functional_call(module, chosen, (batch,))
                assert isinstance(result, Tensor)
                return result

            return lambda *parameters: torch.func.grad(value)(parameters)

        # Functionalized: the backward of some operations (SiLU) works in place on what becomes a folded constant,
        # which would be right in the first product and wrong in the others.
        with loss.differentiable():
            gradients = [torch.func.functionalize(gradient_of(batch)) for batch in self.batches]
            self._linear_maps = [torch.func.linearize(gradient, *point)[1] for gradient in gradients]

    def product(self, vector: Tensor) -> Tensor:
        """Evaluate the traced linear maps."""
        with self.loss.differentiable(), torch.no_grad():
            total, directions = torch.zeros_like(vector), self.loss.split(vector)
            for linear_map, weight in zip(self._linear_maps, self.weights, strict=True):
                self._accumulate(total, linear_map(*directions), weight)
        return total

    def close(self) -> None:
        """Let go of the traced functions and their constants."""
        self._linear_maps = []


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
            length = float(vector.norm())
            if length == 0:
                return total
            parameters = self.loss.parameters
            originals = [parameter.detach().clone() for parameter in parameters]
            scale = float(torch.stack([original.norm() for original in originals]).norm())
            step = torch.finfo(vector.dtype).eps ** 0.5 * max(1.0, scale) / length
            try:
                for sign in (1.0, -1.0):
                    with torch.no_grad():
                        for parameter, original, direction in zip(parameters, originals, directions, strict=True):
                            parameter.copy_(original).add_(direction, alpha=sign * step)
                    for batch, weight in zip(self.batches, self.weights, strict=True):
                        gradients = self.loss.gradient(batch, create_graph=False)[1]
                        self._accumulate(total, gradients, sign * weight / (2 * step))
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

    def names(self) -> list[str]:
        by_identity = {id(parameter): name for name, parameter in self.named_parameters()}
        return [by_identity[id(parameter)] for parameter in self._loss[0].parameters]

    def forward(self, batch: Any) -> Tensor:
        return self._loss[0].value(batch)
