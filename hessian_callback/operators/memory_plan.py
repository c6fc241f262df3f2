"""How batches and their graphs are fitted into the memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hessian_callback.linalg.distributed import PeerError, RankLostError, Ranks
from hessian_callback.linalg.free_memory import free_memory
from hessian_callback.operators.derivatives import DoubleBackwardError
from hessian_callback.operators.displaced_loss import DisplacedLoss
from hessian_callback.operators.functional_loss import FunctionalLoss
from hessian_callback.operators.loss import BatchLoss
from hessian_callback.operators.memory import is_out_of_memory, readable_size
from hessian_callback.operators.micro_batches import MicroBatches
from hessian_callback.operators.products import DoubleBackward, trial_vector

__all__ = ["MemoryPlan"]

# Share of the free memory that cached graphs may take if no budget is given. The rest is for the training
# run's own peak, which may come later than the measurement.
_BUDGET_SHARE = 0.25
# Temporaries of about the size of a graph exist while it is built. The products' own, up to four times a graph, are not
# counted: they are released after each product.
_BUILD_FACTOR = 2.0
# Cutting batches further gains little if most of a graph is as large as the parameters.
_WORTH_CUTTING = 0.75
# Relative difference of two means that are the same function, in float64. A loss that is no mean differs by more: by a
# thousandth if a few of the labels do not count, which is more than a Hessian's error bounds allow.
_VALUE_TOLERANCE = 1e-9
# How far the parameters are moved to compare losses, relative to their norm or to 1.
_SHARE_MOVED = 0.01


class MemoryPlan:
    """The batches as they are evaluated, and the number of them whose graphs are kept.

    Batches are cut into parts if a graph alone exceeds the budget, or if memory has run out. The mean of the parts
    must then be the same function as the mean of the batches: their values at displaced parameters are compared, in
    float64 if that fits, and one product along a random direction. If the whole batches don't fit, the parts are
    compared with their halves. For differences, gradients at displaced parameters stand for the product.

    Args:
        loss: the loss.
        parts: this rank's batches and their weights.
        ranks: the processes that cut their batches together.
        budget: bytes that graphs may take on this rank; ``None``: a quarter of the free memory.
        exact: whether products are exact.

    Attributes:
        parts: the batches as they are evaluated, with their weights.
        budget: bytes that graphs may take.
        bytes_per_graph: size of the largest batch's graph; 0 if it is not known.
        num_halvings: how many times batches were halved because memory had run out.
        mean: the weighted sum of this rank's losses; ``None`` without batches.
    """

    def __init__(self, loss: BatchLoss, parts: MicroBatches, ranks: Ranks, *, budget: int | None, exact: bool) -> None:
        self.parts = parts
        self.budget = 0
        self.bytes_per_graph = 0
        self.num_halvings = 0
        self.mean: float | None = None
        self._loss = loss
        self._ranks = ranks
        self._requested = budget
        self._exact = exact
        self._ceiling: int | None = None  # from the moment that memory ran out
        self._uncompared: MicroBatches | None = None  # the whole batches, until their parts are compared with them
        self._device = loss.parameters[0].device

    def check(self) -> None:
        """Evaluate the batches, and compare them with those that they were cut from.

        Raises:
            ArithmeticError: if a loss is NaN or infinite.
            ValueError: if the loss changes from evaluation to evaluation, or is not the mean of its parts'.
        """
        whole, before = self._uncompared, self.mean
        try:
            values = self._loss.check(self.parts.batches)
        except Exception as error:
            if whole is None or is_out_of_memory(error):
                raise
            raise ValueError(f"{_REFUSAL}: {error}. {_REMEDY}") from error
        terms = [weight * value for weight, value in zip(self.parts.weights, values, strict=True)]
        self.mean = sum(terms)
        if whole is None:
            return
        if before is not None:
            tolerance = self._value_tolerance * sum(map(abs, terms))
            if abs(self.mean - before) > tolerance:
                raise ValueError(
                    f"{_REFUSAL}: the loss of a batch is not the mean of its parts' (with its weight, {before:.9g} "
                    f"and {self.mean:.9g}). {_REMEDY}"
                )
        self._compare_with(whole)
        self._uncompared = None

    def graphs_to_keep(self) -> int:
        """Cut batches whose graph exceeds the budget; return the number of graphs that fit it."""
        # The size of the largest graph stands for the others.
        self.bytes_per_graph = DoubleBackward.graph_size(self._loss, self.parts.largest)
        budget = self._requested
        if budget is None:
            free = free_memory(self._device)
            # Ranks on one machine share the main memory.
            sharing = self._ranks.world_size if self._device.type == "cpu" else 1
            budget = 0 if free is None else int(_BUDGET_SHARE * free / sharing)
        if self._ceiling is not None:
            budget = min(budget, self._ceiling)
        self.budget = budget
        self._cut_to(budget)
        spare = budget - _BUILD_FACTOR * self.bytes_per_graph
        if spare < 0:
            return 0
        return min(len(self.parts.batches), int(spare // max(self.bytes_per_graph, 1)) + 1)

    def make_room(self, error: Exception, release: Callable[[], None]) -> None:
        """Halve the batches on all ranks if a rank ran out of memory; raise the error if not.

        Args:
            error: the error of this rank, or the `PeerError` about another rank's.
            release: releases the memory that is held between products.
        """
        if isinstance(error, RankLostError):
            raise error
        short = is_out_of_memory(error)
        if self._ranks.failed_ranks(not short and not isinstance(error, PeerError)):
            raise error
        if not self._ranks.failed_ranks(short):
            raise error
        message = str(error)
        error.__traceback__ = None  # Its frames hold tensors.
        release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        # With smaller batches alone, as many bytes as before would be kept.
        kept_at_most = min(self.budget, len(self.parts.batches) * self.bytes_per_graph)
        if kept_at_most > 0:
            self._ceiling = kept_at_most // 2
        with self._ranks.propagate_errors("cutting batches, because memory is short"):
            try:
                smaller = self.parts.halved()
                if self.parts.batches:
                    self._uncompared = self._uncompared or self.parts
                self.parts = smaller
            except ValueError as reason:
                if short:  # Otherwise the other ranks' batches can still be cut.
                    raise MemoryError(self._nothing_fits(str(reason), message)) from error
        self.num_halvings += 1

    def _cut_to(self, budget: int) -> None:
        """Halve the batches until a graph can be built within the budget, if they can be cut and if that helps."""
        whole, whole_size = self.parts, self.bytes_per_graph
        while 0 < budget < _BUILD_FACTOR * self.bytes_per_graph:
            smaller = self._halved()
            if smaller is None:
                break  # One whole batch is then built at a time.
            size = DoubleBackward.graph_size(self._loss, smaller.largest)
            if size > _WORTH_CUTTING * self.bytes_per_graph:
                break
            self.parts, self.bytes_per_graph = smaller, size
        if self.parts is not whole:
            if self._loss.draws:
                kept = self.parts.batch_weight is not None
            else:
                try:
                    kept = self._disagreement(whole, self.parts) is None
                except DoubleBackwardError:
                    kept = False  # Small batches may be computed by other operations.
            if not kept:
                self.parts, self.bytes_per_graph = whole, whole_size

    def _halved(self) -> MicroBatches | None:
        """Return the halves of the parts; ``None`` if the loss cannot be evaluated on them."""
        try:
            smaller = self.parts.halved()
            self._loss.check(smaller.batches)
        except Exception as error:  # Such as a matrix that was cut on one of its sides.
            if is_out_of_memory(error):
                raise
            return None
        return smaller

    def _compare_with(self, whole: MicroBatches) -> None:
        """Compare the parts with the batches that they come from or, if those don't fit, with their own halves."""
        if self._loss.draws:  # Parts draw other numbers than the whole.
            compared = False
        else:
            compared = self._compared(whole)
            if not compared:
                halves = self._halved()
                compared = halves is not None and self._compared(halves)
        if not compared and self.parts.batch_weight is None:
            raise ValueError(f"{_REFUSAL}: the parts cannot be compared with anything that fits the memory. {_REMEDY}")

    def _compared(self, others: MicroBatches) -> bool:
        """Compare the parts with others; return whether there was room for it.

        Raises:
            ValueError: if they disagree.
        """
        try:
            disagreement = self._disagreement(others, self.parts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        if disagreement is not None:
            raise ValueError(
                f"{_REFUSAL}: the loss of a batch is not the mean of its parts' ({disagreement}). {_REMEDY}"
            )
        return True

    def _disagreement(self, one: MicroBatches, other: MicroBatches) -> str | None:
        """Return in what the losses over two sets of batches differ; ``None`` if they are the same function."""
        tolerance, (first, second) = self._displaced_values(one, other)
        if not abs(sum(first) - sum(second)) <= tolerance * sum(map(abs, second)):
            return f"its value at displaced parameters is {sum(first):.9g}, and {sum(second):.9g} from the parts"
        difference = _difference(self._response(one), self._response(other))
        return f"its derivatives differ by {difference:.1%}" if difference > self._tolerance else None

    def _displaced_values(self, *sets: MicroBatches) -> tuple[float, list[list[float]]]:
        """Evaluate sets of batches at moved parameters, since at others all values may agree, as at a head of zeros.

        Returns:
            The relative tolerance of a sum, and the weighted losses of the batches of each set.
        """
        own = DisplacedLoss(self._loss)
        displacement = self._displacement(own)

        def values(function: FunctionalLoss | DisplacedLoss) -> list[list[float]]:
            pairs = [zip(parts.batches, parts.weights, strict=True) for parts in sets]
            return [[weight * function.value(batch, displacement) for batch, weight in pair] for pair in pairs]

        sharing = self._ranks.world_size if self._device.type == "cpu" else 1
        precise = FunctionalLoss.of(self._loss, bytes_per_graph=self.bytes_per_graph, sharing=sharing)
        if precise is not None:
            with suppress(Exception):  # There is no room, or the loss does not run in float64.
                return _VALUE_TOLERANCE, values(precise)
        return self._value_tolerance, values(own)

    def _response(self, parts: MicroBatches) -> Tensor:
        """Return a quantity that is linear in the loss and sees all of it: a product along a random direction."""
        direction = trial_vector(self._loss)
        if self._exact:
            return DoubleBackward(self._loss, parts.batches, parts.weights, num_cached=0).product(direction)
        own = DisplacedLoss(self._loss)
        total, displacement = torch.zeros_like(direction), self._displacement(own)
        for batch, weight in zip(parts.batches, parts.weights, strict=True):
            self._loss.accumulate(total, own.gradient(batch, displacement), weight)
        return total

    def _displacement(self, own: DisplacedLoss) -> list[Tensor]:
        """Return the random direction, as long as a share of the parameters' norm, in their shapes."""
        direction = trial_vector(self._loss)
        return self._loss.split(direction * (_SHARE_MOVED * max(1.0, own.parameter_norm) / direction.norm()))

    @property
    def _real_dtype(self) -> torch.dtype:
        return _real(self._loss.parameters[0]).dtype

    @property
    def _value_tolerance(self) -> float:
        return max(_VALUE_TOLERANCE, float(1e3 * torch.finfo(self._real_dtype).eps))

    @property
    def _tolerance(self) -> float:
        return float(30 * torch.finfo(self._real_dtype).eps ** 0.5)

    def _nothing_fits(self, reason: str, message: str) -> str:
        free = free_memory(self._device)
        have = "" if free is None else f", {readable_size(free)} are free"
        need = (
            f"about {readable_size(_BUILD_FACTOR * self.bytes_per_graph)} are needed"
            if self.bytes_per_graph
            else message
        )
        return (
            f"out of memory for a Hessian-vector product, and {reason}: {need}{have}. Choose fewer parameters "
            "(parameters=...), shorter or smaller inputs, or hvp='finite_difference', which needs about as much as a "
            "training step"
        )


_REFUSAL = "memory is short, but batches cannot be cut"
_REMEDY = (
    "Pass batch_weight=..., a callable(batch) that returns the number of terms in its mean loss, or a loader with "
    "smaller batches"
)


def _difference(one: Tensor, other: Tensor) -> float:
    scale = max(float(one.norm()), float(other.norm()))
    return 0.0 if scale == 0 else float((one - other).norm()) / scale


def _real(tensor: Any) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
