"""What the eigenvalue solver needs to know of a matrix: its size, and how to multiply with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hessian_callback.linalg.distributed import Partition, Ranks

__all__ = ["MatvecOperator", "SymmetricOperator"]


class SymmetricOperator(Protocol):
    """A symmetric matrix of size ``P`` whose vectors are cut over the ranks.

    Attributes:
        ranks: the processes that share the matrix.
        partition: how a vector of ``P`` coordinates is cut over them.
        dtype: the dtype of its vectors.
        device: the device of its vectors.
        relative_error: a-priori error of one product relative to the largest eigenvalue: a small
            multiple of eps for exact products.
    """

    ranks: Ranks
    partition: Partition
    dtype: torch.dtype
    device: torch.device

    @property
    def relative_error(self) -> float:
        """A-priori error of a product."""
        ...

    def matvec_slice(self, vector: Tensor) -> Tensor:
        """Multiply: this rank's slice of ``v`` to its slice of ``A v``, both ``(slice_length,)``."""
        ...


class MatvecOperator:
    """A symmetric matrix given by its product with a whole vector, in one process.

    Args:
        matvec: ``(P,) -> (P,)``; must be linear and symmetric.
        size: ``P``.
        dtype: dtype of the vectors.
        device: device of the vectors.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> operator = MatvecOperator(A.mv, 3)
        >>> operator.matvec_slice(torch.ones(3, dtype=torch.float64))
        tensor([3., 2., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        size: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        """Wrap the function."""
        self._matvec = matvec
        self.ranks = Ranks()
        self.partition = self.ranks.partition(size)
        self.dtype = dtype
        self.device = torch.device(device)
        self.relative_error = 8 * torch.finfo(dtype).eps

    def matvec_slice(self, vector: Tensor) -> Tensor:
        """Multiply with the whole vector, which is the slice of the only rank."""
        return self._matvec(vector)
