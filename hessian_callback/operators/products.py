r"""Hessian-vector products of one rank: three engines for :math:`v \mapsto \sum_i w_i \nabla^2 L_i(\theta)\, v`.

`DoubleBackward` differentiates a gradient graph that is built once and kept. `Linearize` traces the gradient
function forward over reverse once and folds what does not depend on the direction into constants.
`FiniteDifference` needs first derivatives only and is not exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hessian_callback.operators.batches import tensors
from hessian_callback.operators.cuda_graphs import RecordedProduct, recorded
from hessian_callback.operators.derivatives import (
    DoubleBackwardError,
    check_twice_differentiable,
    differentiate,
    graph_nodes,
)
from hessian_callback.operators.displaced_loss import displaced, parameter_values
from hessian_callback.operators.functional_loss import FunctionalLoss
from hessian_callback.operators.loss import BatchLoss, LossModule
from hessian_callback.operators.memory import (
    Results,
    SavedTensors,
    count_saved_tensors,
    is_out_of_memory,
    refuses_to_be_counted,
)
from hessian_callback.operators.padding import constant_padding
from hessian_callback.operators.substitution import substituted
from hessian_callback.operators.tracing import TracedProduct, signature

__all__ = [
    "DoubleBackward",
    "FiniteDifference",
    "Linearize",
    "ProductEngine",
    "check_agreement",
    "trial_directions",
    "trial_vector",
]


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
        """Release everything that was kept between products."""


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
        self._recorded: RecordedProduct | None = None
        self._searched: set[int] = set()
        with loss.differentiable():
            self._graphs: list[list[Tensor] | None] = [self._gradient(index) for index in range(len(keep))]

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes of the first kept graph, from which the time of a trace is estimated."""
        kept = next((graph for graph in self._graphs if graph is not None), None)
        return [] if kept is None else [node.name() for node in graph_nodes(kept)]

    @property
    def num_cached(self) -> int:
        """Batches whose gradient graph is kept."""
        if self._recorded is not None:
            return len(self.batches)
        return sum(graph is not None for graph in self._graphs)

    @staticmethod
    def graph_size(loss: BatchLoss, batch: Any) -> int:
        """Build a batch's gradient graph once, check it, and return the bytes that it holds.

        Raises:
            DoubleBackwardError: if the graph ends in a function that can't be differentiated again.
        """
        present = [*loss.model.parameters(), *loss.model.buffers(), *tensors(batch)]
        try:
            return DoubleBackward._counted(loss, batch, count_saved_tensors(present))
        except Exception as error:
            if not refuses_to_be_counted(error):
                raise
        return DoubleBackward._counted(loss, batch, Results())

    @staticmethod
    def _counted(loss: BatchLoss, batch: Any, counting: AbstractContextManager[SavedTensors | Results]) -> int:
        with loss.differentiable(), counting as saved:
            _, gradients = loss.gradient(batch, create_graph=True)
            for gradient in gradients:
                saved.add(gradient)
            check_twice_differentiable(gradients)
        return saved.num_bytes

    def product(self, vector: Tensor) -> Tensor:
        """Differentiate ``g . v``: one backward pass a batch, and the gradient first if it was not kept."""
        if self._recorded is not None:
            return self._recorded(vector)
        with self.loss.differentiable():
            total, directions = torch.zeros_like(vector), self.loss.split(vector)
            for index, weight in enumerate(self.weights):
                self.loss.accumulate(total, self._part(index, directions), weight)
        return total

    def record(self) -> bool:
        """Record the product as a CUDA graph where that makes it faster; return whether it is recorded now.

        All graphs must be kept. They are built again on the stream of recordings and take the place of the former ones.
        They end in aliases of the parameters, because autograd would wait for the streams of whoever else
        differentiates the parameters, as ``DistributedDataParallel`` does.
        """
        if self._recorded is None and self.batches and self.num_cached == len(self.batches) and not self.loss.draws:
            self._recorded = recorded(self.product, trial_vector(self.loss), self._recordable)
            if self._recorded is not None:
                self._graphs = []
        return self._recorded is not None

    def _recordable(self) -> Callable[[Tensor], Tensor]:
        loss, weights = self.loss, self.weights
        names = {id(parameter): name for name, parameter in loss.model.named_parameters()}
        chosen = [names[id(parameter)] for parameter in loss.parameters]
        with loss.differentiable():
            aliases = [parameter.detach().requires_grad_() for parameter in loss.parameters]
        values = dict(zip(chosen, aliases, strict=True))
        with loss.differentiable(), substituted(loss.model, values):
            graphs = [
                torch.autograd.grad(loss.value(batch), aliases, create_graph=True, materialize_grads=True)
                for batch in self.batches
            ]

        def product(vector: Tensor) -> Tensor:
            # Activation checkpointing evaluates modules in backward passes.
            with loss.differentiable(), substituted(loss.model, values):
                total, directions = torch.zeros_like(vector), loss.split(vector)
                for graph, weight in zip(graphs, weights, strict=True):
                    loss.accumulate(total, differentiate(graph, aliases, directions, keep=True), weight)
            return total

        return product

    def part(self, index: int, directions: list[Tensor]) -> Sequence[Tensor]:
        """Multiply with the Hessian of one batch, unweighted, in the parameters' shapes."""
        with self.loss.differentiable():
            return self._part(index, directions)

    def release(self, index: int) -> None:
        """Release one batch's graph; it is rebuilt from now on."""
        if index < len(self._graphs):
            self._graphs[index] = None

    def _part(self, index: int, directions: list[Tensor]) -> Sequence[Tensor]:
        kept = self._graphs[index] if index < len(self._graphs) else None
        if kept is not None:
            return self._differentiate(kept, directions, keep=True)
        return self._differentiate(self._gradient(index), directions, keep=False)

    def _gradient(self, index: int) -> list[Tensor]:
        gradients = self.loss.gradient(self.batches[index], create_graph=True)[1]
        if index not in self._searched:
            check_twice_differentiable(gradients)
            self._searched.add(index)
        return gradients

    def _differentiate(self, gradients: list[Tensor], directions: list[Tensor], keep: bool) -> Sequence[Tensor]:
        return differentiate(gradients, self.loss.parameters, directions, keep=keep)

    def close(self) -> None:
        """Release the graphs."""
        self._graphs = []
        self._recorded = None


class Linearize(ProductEngine):
    """Exact products forward over reverse: the gradient function's derivative, traced once for each shape of a batch.

    Tracing takes seconds and fails for operations without a forward derivative and for control flow that
    depends on values; a product then costs as little as any. Each batch's traced product is compared with double
    backward, because some forward derivatives of PyTorch are wrong.

    Args:
        loss: the loss and its parameters.
        batches: this rank's batches.
        weights: the weight of each.
        reference: double backward for the same batches, whose graph of each batch is released as soon as the
            traced product takes its place; default: graphs are built one at a time.
        first: a trace that exists already, with its signature.

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
        self._recorded: RecordedProduct | None = None
        if self._traced:
            self._recorded = recorded(partial(_traced_sum, loss, self._traced, self.weights), trial_vector(loss))

    @staticmethod
    def trace(loss: BatchLoss, batch: Any) -> tuple[TracedProduct, bool]:
        """Trace the product of a batch; return it, and whether batches of its signature may share the trace.

        Raises:
            DoubleBackwardError: if the loss can't be traced.
        """
        if loss.draws:
            raise DoubleBackwardError(
                "hvp='linearize' cannot trace a loss that draws random numbers: use hvp='double_backward'"
            )
        if _computes_complex(loss, batch):
            # PyTorch 2.13 ends the process by a segmentation fault in some forward derivatives of complex operations.
            raise DoubleBackwardError("hvp='linearize' cannot trace complex numbers: use hvp='double_backward'")
        # Tensors in structures of unknown kind are as good as constants, for this batch alone.
        shared = signature(batch) is not None
        try:
            with constant_padding(loss.model):
                return TracedProduct(LossModule(loss), loss.parameters, batch, shared=shared), shared
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, DoubleBackwardError):
                raise
            raise DoubleBackwardError(
                f"hvp='linearize' cannot trace the loss ({type(error).__name__}: {_beginning(error)}). It fails if an "
                "operation has no forward derivative, or if the loss reads values of tensors (.item(), float(), if). "
                "Use hvp='double_backward'"
            ) from error
        finally:
            loss.restore()

    def product(self, vector: Tensor) -> Tensor:
        """Evaluate the traced linear maps."""
        if self._recorded is not None:
            return self._recorded(vector)
        return _traced_sum(self.loss, self._traced, self.weights, vector)

    def close(self) -> None:
        """Release the traced functions and their constants."""
        self._traced = []
        self._recorded = None


def _traced_sum(
    loss: BatchLoss, parts: Sequence[tuple[TracedProduct, list[Tensor]]], weights: Sequence[float], vector: Tensor
) -> Tensor:
    with loss.differentiable():
        total, directions = torch.zeros_like(vector), loss.split(vector)
        for (traced, constants), weight in zip(parts, weights, strict=True):
            loss.accumulate(total, traced.product(constants, directions), weight)
    return total


def _computes_complex(loss: BatchLoss, batch: Any) -> bool:
    with loss.differentiable():
        return any(
            metadata.dtype.is_complex
            for node in graph_nodes([loss.value(batch)])
            for metadata in getattr(node, "_input_metadata", ())
        )


def _beginning(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 100 else text[:97] + "..."


def trial_directions(loss: BatchLoss) -> list[Tensor]:
    """Return the random direction along which engines are compared, in the parameters' shapes."""
    return loss.split(trial_vector(loss))


def trial_vector(loss: BatchLoss) -> Tensor:
    """Return the random direction along which engines are compared, ``(P,)``."""
    first = loss.parameters[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(loss.sizes), generator=generator, device="cpu").to(first.device, first.real.dtype)


def check_agreement(name: str, found: Sequence[Tensor | None], reference: DoubleBackward, index: int) -> None:
    """Compare an engine's product of one batch along `trial_directions` with double backward.

    If the two differ by more than rounding usually explains, a product in float64 decides: at small losses both
    carry large rounding errors.

    Raises:
        DoubleBackwardError: if the engine's product is wrong.
    """
    loss, directions = reference.loss, trial_directions(reference.loss)
    expected = reference.part(index, directions)
    error, norm = _distance(found, expected), _distance(expected)
    eps = torch.finfo(expected[0].dtype).eps
    if error <= 1e4 * eps * norm:
        return
    precise = FunctionalLoss.of(loss) if eps > torch.finfo(torch.float64).eps else None
    try:
        truth = None if precise is None else precise.products(reference.batches[index], [directions])[0]
    except Exception:  # The loss does not run in float64.
        truth = None
    if truth is not None and _distance(found, truth) <= 4 * _distance(expected, truth) + 1e4 * eps * _distance(truth):
        return
    raise DoubleBackwardError(
        f"hvp={name!r} gave a product that differs from double backward by {error:.1e} in norm "
        f"{norm:.1e}: an operation of the model has a wrong or missing forward derivative. "
        "Use hvp='double_backward'"
    )


def _distance(one: Sequence[Tensor | None], other: Sequence[Tensor] | None = None) -> float:
    """Return the norm of the difference of two vectors in pieces, or of one vector."""
    squared = 0.0
    for number, piece in enumerate(one):
        difference = piece if other is None else other[number] if piece is None else piece - other[number]
        if difference is not None:
            squared += float(torch.linalg.vector_norm(difference)) ** 2
    return math.sqrt(squared)


class FiniteDifference(ProductEngine):
    r"""Products by a central difference of gradients, :math:`(g(\theta + hv) - g(\theta - hv)) / 2h`.

    The step is :math:`h = \epsilon^{1/2} \max(1, \|\theta\|) / \|v\|`. For a smooth loss
    :math:`\epsilon^{1/3}` would balance truncation, of order :math:`h^2`, against cancellation, of order
    :math:`\epsilon / h`; but a long step crosses the kinks of ReLU units, and each adds a jump. The parameters are
    changed for the time of two gradients and then get their former bits back.

    No step suits ReLU networks in float32: a shorter one crosses fewer kinks, and divides the jump at each by less.
    With 16 units and 32 samples the largest eigenvalue, .87, came out as .65 (as .82 with steps
    ten times as long, as .88 with a hundred times), while tanh networks lost at most 2e-5 of theirs. Such products
    are not symmetric, and the solver adds their measured asymmetry to its bounds. That is an estimate of the error
    and no bound of it. `HessianOperator.precise_products` shows the error. In float64 the step is 1e-4 of this one.
    """

    name = "finite_difference"
    exact = False

    def close(self) -> None:
        """Do nothing: nothing was kept."""

    def product(self, vector: Tensor) -> Tensor:
        """Form two gradients a batch."""
        loss = self.loss
        originals = parameter_values(loss)
        with loss.differentiable(), constant_padding(loss.model, originals):
            total, directions = torch.zeros_like(vector), loss.split(vector)
            # Tensors, not numbers: a GPU would have to be waited for. Along zero, any step gives the product zero.
            length = _length(vector)
            step = torch.finfo(vector.dtype).eps ** 0.5 * _scale(loss) / torch.where(length > 0, length, 1.0)
            for sign in (1.0, -1.0):
                with displaced(originals, (sign * step * direction for direction in directions)):
                    for batch, weight in zip(self.batches, self.weights, strict=True):
                        gradients = loss.gradient(batch, create_graph=False)[1]
                        self.loss.accumulate(total, gradients, sign * weight)
            total.div_(2 * step)
        return total


def _length(vector: Tensor) -> Tensor:
    """Return the norm of a vector whose squares may overflow or vanish."""
    largest = vector.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0)
    length: Tensor = (vector / unit).norm() * unit
    return length


def _scale(loss: BatchLoss) -> Tensor:
    norms = [torch.linalg.vector_norm(parameter.detach()) for parameter in loss.parameters]
    norm: Tensor = torch.stack(norms).norm()
    return norm.clamp(min=1.0)
