"""A symmetric operator that is scaled from both sides by a diagonal matrix, and shifted by another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from hessian_callback.linalg.linear_operator import SymmetricOperator

__all__ = ["PreconditionedOperator"]


class PreconditionedOperator:
    r"""The matrix :math:`A = \pm\, S H S + D` with diagonal :math:`S \ge 0` and :math:`D`.

    With :math:`S = P^{-1/2}` its eigenvalues are those of :math:`P^{-1} H`. A product costs one product with
    :math:`H`, which the ranks share, and no further collective.

    Args:
        operator: the operator of :math:`H`. A `HessianOperator` also has products in float64.
        scale: the diagonal of :math:`S`, ``(P,)``, the same on all ranks.
        shift: the diagonal of :math:`D`, ``(P,)``; ``None`` for zero.
        negative: whether :math:`H` enters with the negative sign.
        relative_error: the error of a product relative to the largest eigenvalue, if it is known from another
            measurement. ``None``: the operator's own value, and `precise_products` measures it.

    Attributes:
        ranks: the processes that share the matrix.
        partition: how a vector is cut over them.
        dtype: the dtype of vectors.
        device: the device of vectors.

    Raises:
        ValueError: if a diagonal does not have ``P`` entries.

    Example:
        >>> import torch
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> scale = torch.tensor([1.0, 0.5], dtype=torch.float64)
        >>> operator = PreconditionedOperator(MatvecOperator(H.mv, 2), scale)
        >>> operator.matvec_slice(torch.ones(2, dtype=torch.float64))
        tensor([2.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        scale: Tensor,
        shift: Tensor | None = None,
        *,
        negative: bool = False,
        relative_error: float | None = None,
    ) -> None:
        self._operator = operator
        self.ranks = operator.ranks
        self.partition = operator.partition
        self.dtype = operator.dtype
        self.device = operator.device
        self._scale = self._own_slice(scale)
        self._shift = None if shift is None else self._own_slice(shift)
        self._negative = negative
        self._known_error = relative_error

    def _own_slice(self, diagonal: Tensor) -> Tensor:
        return self.partition.cut(diagonal.to(self.device, self.dtype))

    @property
    def relative_error(self) -> float:
        """A-priori error of a product relative to the largest eigenvalue."""
        return self._operator.relative_error if self._known_error is None else self._known_error

    def matvec_slice(self, vector: Tensor) -> Tensor:
        """Multiply: this rank's slice of ``v`` to its slice of ``A v``; a collective."""
        product: Tensor = self._around(self._operator.matvec_slice, vector, self._scale, self._shift)
        return product

    def precise_products(self, vectors: Tensor) -> Tensor | None:
        """Multiply in float64, see `HessianOperator.precise_products`.

        Args:
            vectors: this rank's slices, ``(slice_length, m)``.

        Returns:
            This rank's slices of the products; ``None`` on all ranks if float64 is not available, or the error of
            products is known already.
        """
        precise = getattr(self._operator, "precise_products", None)
        if precise is None or self._known_error is not None:
            return None
        # The scale is that of this precision: it belongs to the matrix.
        scale = self._scale.double()[:, None]
        shift = None if self._shift is None else self._shift.double()[:, None]
        products: Tensor | None = self._around(precise, vectors, scale, shift)
        return products

    def _around(self, multiply: Any, vector: Tensor, scale: Tensor, shift: Tensor | None) -> Any:
        product = multiply(scale * vector)
        if product is None:
            return None
        product = scale * product
        if self._negative:
            product = -product
        return product if shift is None else product + shift * vector
