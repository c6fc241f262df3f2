"""Products and differences of gradients over all ranks, as a reference for those of an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hessian_callback.linalg.distributed import Partition, Ranks
from hessian_callback.operators.displaced_loss import DisplacedLoss
from hessian_callback.operators.functional_loss import FunctionalLoss
from hessian_callback.operators.micro_batches import MicroBatches

__all__ = ["ReferenceProducts"]

# Step of a difference in float64, relative to the norm of the parameters. It crosses few kinks.
_SHORT_STEP = 1e-7


class ReferenceProducts:
    """Products that others are compared with, summed over the ranks' batches.

    Args:
        function: the loss as a function of parameter values.
        parts: this rank's batches and their weights.
        ranks: the processes that hold the other batches.
        partition: how vectors are cut over them.

    Attributes:
        dtype: dtype of the results.
        failure: the error of this rank that made the last result ``None``.
    """

    def __init__(
        self, function: FunctionalLoss | DisplacedLoss, parts: MicroBatches, ranks: Ranks, partition: Partition
    ) -> None:
        self.failure: Exception | None = None
        self.function = function
        self.dtype = function.dtype
        self._loss = function.loss
        self._parts = parts
        self._ranks = ranks
        self._partition = partition

    def products(self, vectors: Sequence[Tensor], *, moved: Tensor | None = None) -> list[Tensor] | None:
        """Multiply with whole vectors, ``(P,)``; return this rank's slices, ``(slice_length,)``.

        Args:
            vectors: the vectors, the same on all ranks.
            moved: added to the parameters, ``(P,)``.

        Returns:
            ``None`` on all ranks if the loss cannot be evaluated or differentiated in this precision on any.
        """
        displacement = None if moved is None else self._loss.split(moved)

        def own() -> list[Tensor]:
            totals = [self._zeros(vector) for vector in vectors]
            directions = [self._loss.split(vector) for vector in vectors]
            for batch, weight in zip(self._parts.batches, self._parts.weights, strict=True):
                for total, product in zip(totals, self.function.products(batch, directions, displacement), strict=True):
                    self._loss.accumulate(total, product, weight)
            return totals

        return self._summed(own)

    def difference(self, vector: Tensor, share: float = _SHORT_STEP) -> Tensor | None:
        """Return a central difference of gradients along a whole vector; this rank's slice of it.

        Args:
            vector: the direction, ``(P,)``.
            share: the step along a vector of length 1, relative to the norm of the parameters or to 1.
        """
        length = float(torch.linalg.vector_norm(vector))
        step = share * max(1.0, self.function.parameter_norm) / (length or 1.0)

        def own() -> list[Tensor]:
            total = self._zeros(vector)
            for sign in (1.0, -1.0):
                moved = self._loss.split(vector * (sign * step))
                for batch, weight in zip(self._parts.batches, self._parts.weights, strict=True):
                    self._loss.accumulate(total, self.function.gradient(batch, moved), sign * weight / (2 * step))
            return [total]

        summed = self._summed(own)
        return None if summed is None else summed[0]

    def _zeros(self, vector: Tensor) -> Tensor:
        return torch.zeros_like(vector, dtype=self.dtype)

    def _summed(self, own: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        totals: list[Tensor] | None = None
        try:
            totals = own()
        except Exception as error:
            error.__traceback__ = None  # Its frames hold tensors.
            self.failure = error
        if self._ranks.failed_ranks(totals is None) or totals is None:
            return None
        return [
            self._ranks.reduce_scatter(
                total,
                self._partition,
                dtype=total.dtype,
                device=total.device,
                stage="computing a reference for a Hessian-vector product",
            )
            for total in totals
        ]
