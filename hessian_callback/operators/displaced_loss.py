"""The loss as a function of parameter values, in the module's own parameters and in their precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessian_callback.operators.derivatives import check_twice_differentiable, differentiate
from hessian_callback.operators.loss import BatchLoss
from hessian_callback.operators.padding import constant_padding

__all__ = ["DisplacedLoss", "displaced", "parameter_values"]


class DisplacedLoss:
    """The loss of a batch as a function of parameter values, which are changed in place and put back.

    It has the methods of `FunctionalLoss`, and reaches parameters wherever the loss finds them.

    Args:
        loss: the loss.

    Attributes:
        dtype: real dtype of the parameters.
        parameter_norm: norm of the chosen parameters.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> loss = BatchLoss(model, lambda m, x: m(x).pow(3).mean(), [model.weight])
        >>> DisplacedLoss(loss).gradient(torch.ones(1, 1), [torch.ones(1, 1)]), model.weight.item()
        ([tensor([[27.]])], 2.0)
    """

    def __init__(self, loss: BatchLoss) -> None:
        self.loss = loss
        self.dtype = loss.parameters[0].real.dtype
        norms = [torch.linalg.vector_norm(parameter.detach()) for parameter in loss.parameters]
        self.parameter_norm = float(torch.stack(norms).norm())

    def value(self, batch: Any, displacement: Sequence[Tensor] | None = None) -> float:
        """Return the loss of one batch."""
        with self._moved(displacement):
            return float(self.loss.value(batch).detach())

    def gradient(self, batch: Any, displacement: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the gradient of one batch."""
        with self._moved(displacement):
            return self.loss.gradient(batch, create_graph=False)[1]

    def products(
        self, batch: Any, directions: Sequence[Sequence[Tensor]], displacement: Sequence[Tensor] | None = None
    ) -> list[list[Tensor]]:
        """Multiply the Hessian of one batch with several directions, each in the parameters' shapes."""
        with self._moved(displacement):
            gradients = self.loss.gradient(batch, create_graph=True)[1]
            check_twice_differentiable(gradients)
            return [
                list(differentiate(gradients, self.loss.parameters, direction, keep=number < len(directions)))
                for number, direction in enumerate(directions, 1)
            ]

    @contextmanager
    def _moved(self, displacement: Sequence[Tensor] | None) -> Iterator[None]:
        with self.loss.differentiable():
            if displacement is None:
                yield
                return
            originals = parameter_values(self.loss)
            with constant_padding(self.loss.model, originals), displaced(originals, displacement):
                yield


def parameter_values(loss: BatchLoss) -> dict[nn.Parameter, Tensor]:
    """Return copies of the parameters' values."""
    return {parameter: parameter.detach().clone() for parameter in loss.parameters}


@contextmanager
def displaced(originals: Mapping[nn.Parameter, Tensor], displacement: Iterable[Tensor]) -> Iterator[None]:
    """Move parameters inside the block; afterwards they have their original bits again.

    Args:
        originals: copies of the parameters' values.
        displacement: what is added to them, in their shapes.
    """
    try:
        # Changes of `data` are not counted, so graphs that others keep stay valid.
        for parameter, part in zip(originals, displacement, strict=True):
            parameter.data.add_(part)
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data.copy_(original)
