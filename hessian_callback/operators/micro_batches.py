"""Weighted batches that give way to smaller ones when memory is short, with the same weighted mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hessian_callback.operators.batches import halves, leading_dimension, tensors

__all__ = ["MicroBatches"]


@dataclass(frozen=True)
class MicroBatches:
    r"""Batches with their weights in a mean :math:`\sum_i w_i L_i`, where :math:`L_i` is a mean over batch i.

    A batch that is cut in two shares its weight among the halves in proportion to what :math:`L_i` averages over.

    Attributes:
        batches: the batches as they are evaluated.
        weights: the weight of each.
        batch_weight: what a batch's mean loss averages over; ``None``: its samples.

    Example:
        >>> import torch
        >>> whole = MicroBatches([torch.arange(3.0), torch.arange(4.0)], [3, 4])
        >>> parts = whole.halved()
        >>> parts.batches
        [tensor([0., 1.]), tensor([2.]), tensor([0., 1.]), tensor([2., 3.])]
        >>> parts.weights
        [2.0, 1.0, 2.0, 2.0]
    """

    batches: Sequence[Any]
    weights: Sequence[float]
    batch_weight: Callable[[Any], float] | None = None

    @property
    def largest(self) -> Any:
        """The batch with the most numbers in it."""
        return max(self.batches, key=lambda batch: sum(tensor.numel() for tensor in tensors(batch)))

    def halved(self) -> MicroBatches:
        """Cut what holds more than half of the largest batch's samples; parts that weigh nothing are left out.

        Raises:
            ValueError: if the batches can't be cut; the message is a clause that says why.
        """
        try:
            sizes = [int(leading_dimension(batch)) for batch in self.batches]
        except ValueError as error:
            raise ValueError(
                "the tensors of a batch share no leading dimension to cut it along (use a loader with smaller batches)"
            ) from error
        if max(sizes, default=0) < 2:
            raise ValueError("no batch holds more than one sample")
        limit = (max(sizes) + 1) // 2
        batches: list[Any] = []
        weights: list[float] = []
        for batch, weight, size in zip(self.batches, self.weights, sizes, strict=True):
            for part, share in self._parts(batch) if size > limit else [(batch, 1.0)]:
                batches.append(part)
                weights.append(weight * share)
        return MicroBatches(batches, weights, self.batch_weight)

    def _parts(self, batch: Any) -> list[tuple[Any, float]]:
        weigh = self.batch_weight or leading_dimension
        parts = [(part, float(weigh(part))) for part in halves(batch)]
        total = sum(weight for _, weight in parts)
        if not 0 < total < float("inf"):
            raise ValueError(
                f"batch_weight gives the halves of a batch {total} together (it must count what they hold)"
            )
        return [(part, weight / total) for part, weight in parts if weight > 0]
