"""Lanczos runs in the complement of the first vectors of a decomposition, apart from its basis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hessian_callback.decomposition import Decomposition
from hessian_callback.krylov_basis import KrylovBasis, row_products
from hessian_callback.projection import Projection

__all__ = ["ComplementRun"]


class ComplementRun:
    """A Lanczos run of a Gaussian vector with ``(I - V V^T) A (I - V V^T)``, V being the first basis vectors.

    Every vector is orthogonalised twice against V and all vectors of the run. Products count as the decomposition's.

    Args:
        decomposition: whose basis and operator to use.
        first: how many of its vectors V holds.

    Attributes:
        size: vectors of the run.
        ended: whether it has come to the end of an invariant subspace.
    """

    def __init__(self, decomposition: Decomposition, first: int) -> None:
        self._decomposition = decomposition
        self._first = first
        self._own = KrylovBasis(decomposition.operator)
        self._diagonal: list[float] = []
        self._links: list[float] = []
        self._residual = decomposition.gaussian()
        self._remove(self._residual)
        self._length = decomposition.norm_of(self._residual)
        self.ended = False

    @property
    def size(self) -> int:
        """Vectors of the run."""
        return self._own.size

    def projection(self) -> Projection:
        """Return the small matrices of the run."""
        couplings = [(column + 1, column, link) for column, link in enumerate(self._links[:-1])]
        last = self._links[-1]
        return Projection(np.array(self._diagonal), couplings, [self.size - 1], np.array([[last**2]]))

    def step(self) -> None:
        """Spend a product on the next vector.

        Raises:
            ArithmeticError: when the product holds NaN or infinity.
        """
        decomposition = self._decomposition
        vector = self._residual / self._length
        self._own.append(vector)
        image = decomposition.operator.matvec_slice(vector).clone(memory_format=torch.contiguous_format)
        decomposition.num_hvps += 1
        own = decomposition.reduced(row_products(vector[None], image))
        image.sub_(vector * own.to(vector))
        self._remove(image)
        length = decomposition.norm_of(image)
        if not np.isfinite(length):
            raise ArithmeticError(
                "the product of the operator with a probe vector holds NaN or infinity; check the loss for overflow or "
                "a division by zero on these batches, or use float64"
            )
        self._diagonal.append(float(own))
        self._links.append(length)
        self._residual, self._length = image, length
        self.ended = length <= 8 * decomposition.eps * decomposition.norm

    def _remove(self, vector: Tensor) -> None:
        decomposition = self._decomposition
        for _ in range(2):
            inside = decomposition.basis.coefficients(vector, self._first)
            own = self._own.coefficients(vector) if self._own.size else inside[:0]
            inside, own = decomposition.reduced(torch.cat([inside, own])).split([len(inside), len(own)])
            decomposition.basis.subtract(vector, inside)
            if len(own):
                self._own.subtract(vector, own)
