"""The operator protocol of the eigenvalue solvers: a symmetric matrix given by its size and its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hessian_callback.linalg.distributed import Partition, Ranks

__all__ = ["MatvecOperator", "SymmetricOperator"]


class SymmetricOperator(Protocol):
    r"""A symmetric matrix of size ``P`` whose vectors are cut over the ranks.

    An operator may also have a method ``precise_products(vectors: Tensor) -> Tensor | None``. It gets this rank's
    slices of m vectors, ``(slice_length, m)``, and returns this rank's slices of their products, computed in higher
    precision. It is called on all ranks together, and returns ``None`` on all if higher precision is not available.

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
        """A-priori error of a product, relative to the largest eigenvalue."""
        ...

    def matvec_slice(self, vector: Tensor) -> Tensor:
        """Multiply: this rank's slice of ``v`` to its slice of ``A v``, both ``(slice_length,)``."""
        ...


class MatvecOperator:
    """A symmetric matrix given by its product with a whole vector, in one process.

    Args:
        matvec: ``(P,) -> (P,)``; must be linear and symmetric.
        size: ``P``.
        dtype: dtype of the vectors, a real floating-point type.
        device: device of the vectors.

    Raises:
        ValueError: if the size or the dtype is unusable, or if a product has another shape, dtype, device or layout.

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
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an integer of at least 1, got {size!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a real floating-point type, got {dtype}; use torch.float64")
        self._matvec = matvec
        self.ranks = Ranks()
        self.partition = self.ranks.partition(size)
        self.dtype = dtype
        self.device = torch.device(device)
        self.relative_error = 8 * torch.finfo(dtype).eps

    def matvec_slice(self, vector: Tensor) -> Tensor:
        """Multiply with the whole vector, which is the slice of the only rank."""
        image = self._matvec(vector)
        if not isinstance(image, Tensor) or image.layout != torch.strided:
            kind = image.layout if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"the product must be a dense tensor, got {kind}; convert it in the function")
        if image.shape != vector.shape or image.dtype != vector.dtype or image.device != vector.device:
            raise ValueError(
                f"the product must have shape {tuple(vector.shape)}, {vector.dtype} on {vector.device}, got "
                f"{tuple(image.shape)}, {image.dtype} on {image.device}; pass the matrix's own dtype and size to "
                "MatvecOperator"
            )
        return image.detach()
