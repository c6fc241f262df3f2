"""The projected matrices of a Krylov decomposition: their eigenvalues bound those of the operator on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["Projection"]

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """The small matrices of ``A V = V H + R``: ``H``, and the inner products of R's columns.

    Attributes:
        diagonal: of ``H``.
        couplings: its other entries, as (row, column, value) with row > column.
        columns: the columns in which ``R`` is not zero.
        gram: inner products of these columns.
    """

    diagonal: _Array
    couplings: list[tuple[int, int, float]]
    columns: list[int]
    gram: _Array

    @property
    def size(self) -> int:
        """Rows of ``H``."""
        return len(self.diagonal)

    @cached_property
    def _off_diagonal(self) -> _Array | None:
        """The off-diagonal, if ``H`` is one unbroken chain and only its last column has a residual."""
        links = self.couplings
        if len(links) != self.size - 1 or any(row != column + 1 for row, column, _ in links):
            return None
        if self.columns not in ([], [self.size - 1]):
            return None
        return np.array([value for _, _, value in links])

    def dense(self) -> _Array:
        """Return ``H`` as a dense matrix."""
        matrix = np.diag(self.diagonal)
        for row, column, value in self.couplings:
            matrix[row, column] = matrix[column, row] = value
        return matrix

    def bordered(self, border: float) -> _Array:
        """Return ``[[H, R^T], [R, border I]]``, which bounds ``A`` from above if ``border`` bounds the complement."""
        # R = W L with orthonormal W: the border holds L^T, a root of the Gram matrix.
        values, vectors = np.linalg.eigh(self.gram)
        root = vectors * np.sqrt(np.maximum(values, 0))
        size, width = self.size, len(self.columns)
        matrix = np.zeros((size + width, size + width))
        matrix[:size, :size] = self.dense()
        matrix[self.columns, size:] = root
        matrix[size:, self.columns] = root.T
        matrix[range(size, size + width), range(size, size + width)] = border
        return matrix

    @cached_property
    def ritz_values(self) -> _Array:
        """Eigenvalues of ``H``, descending: lower bounds of the operator's."""
        if self._off_diagonal is None:
            return _descending(scipy.linalg.eigvalsh(self.dense()))
        return _tridiagonal_eigenvalues(self.diagonal, self._off_diagonal)

    def upper_bounds(self, border: float, k: int) -> _Array:
        """Return upper bounds of the k largest eigenvalues, given a bound on the complement's."""
        if self._off_diagonal is None:
            values = _descending(scipy.linalg.eigvalsh(self.bordered(border)))
        elif self.columns:
            off = np.append(self._off_diagonal, np.sqrt(self.gram[0, 0]))
            values = _tridiagonal_eigenvalues(np.append(self.diagonal, border), off)
        else:
            values = self.ritz_values
        return self._padded(values, border, k)

    def radau_bounds(self, first: int, limit: float, k: int) -> _Array:
        r"""Return upper bounds of the k largest, given a bound on the complement of the ``first`` basis vectors only.

        The vectors from ``first`` on are Lanczos vectors of the compression C to that complement, so they give
        moments of the residual's spectral measure. With :math:`\lambda_{\max}(C) \le u`, Gauss-Radau quadrature with a
        node at u bounds :math:`r^T (x - C)^{-1} r` from above for :math:`x > u`. The last entry of the bordered matrix
        is then not u. It makes u the largest eigenvalue of the part behind ``first`` (Golub and Meurant 2010, ch. 6).
        For a single chain.

        The corner depends on u with an unbounded derivative. So u must include the rounding level of ``H``.
        """
        off = self._off_diagonal
        assert off is not None, "only a single chain has a recurrence"
        if not self.columns:
            return self._padded(self.ritz_values, limit, k)
        squared = float(self.gram[0, 0])
        pivot = np.inf
        for index in range(first, self.size):
            link = off[index - 1] ** 2 / pivot if index > first else 0.0
            pivot = limit - self.diagonal[index] - link
            if not pivot > 0:  # The limit is no bound: the basis itself shows more.
                return np.full(k, np.inf)
        corner = limit - squared / pivot
        if not np.isfinite(corner):
            return np.full(k, np.inf)
        values = _tridiagonal_eigenvalues(np.append(self.diagonal, corner), np.append(off, np.sqrt(squared)))
        return self._padded(values, limit, k)

    @staticmethod
    def _padded(values: _Array, limit: float, k: int) -> _Array:
        upper = np.full(k, limit)
        upper[: len(values)] = np.maximum(values[:k], limit)
        return upper

    @property
    def is_single_chain(self) -> bool:
        """Whether ``H`` is tridiagonal and the residual leads on from its last vector."""
        return self._off_diagonal is not None and bool(self.columns)

    def eigenvectors(self, k: int) -> _Array:
        """Return eigenvectors of ``H`` for its k largest eigenvalues, ``(N, k)``."""
        first = self.size - k
        if self._off_diagonal is None or self.size == 1:
            _, vectors = scipy.linalg.eigh(self.dense(), subset_by_index=(first, self.size - 1))
        else:
            _, vectors = scipy.linalg.eigh_tridiagonal(
                self.diagonal, self._off_diagonal, select="i", select_range=(first, self.size - 1)
            )
        reversed_order: _Array = vectors[:, ::-1]
        return reversed_order

    @cached_property
    def all_eigenvectors(self) -> _Array:
        """Eigenvectors of ``H``, ``(N, N)``, in the order of `ritz_values`; orthogonal to rounding."""
        # Divide and conquer: the vectors of LAPACK's routines for a part of them are less orthogonal.
        return np.linalg.eigh(self.dense()).eigenvectors[:, ::-1]

    def tail(self, first: int) -> Projection:
        """Return the compression of ``A`` to the basis vectors from ``first`` on."""
        couplings = [(row - first, column - first, value) for row, column, value in self.couplings if column >= first]
        kept = [position for position, column in enumerate(self.columns) if column >= first]
        columns = [self.columns[position] - first for position in kept]
        return Projection(self.diagonal[first:], couplings, columns, self.gram[np.ix_(kept, kept)])

    def link(self, first: int) -> float:
        """Return the entry of ``H`` that couples vector ``first`` to the one before, or the residual's norm."""
        assert self._off_diagonal is not None, "only a single chain has a recurrence"
        return float(self._off_diagonal[first - 1] if first < self.size else np.sqrt(self.gram[0, 0]))

    def recurrence(self, floor: float) -> tuple[_Array, _Array]:
        """Return diagonal (m) and off-diagonal (m) of an unbroken chain; the last link leads out of it.

        A last link below ``floor`` is replaced by ``floor``.
        """
        assert self._off_diagonal is not None, "only a single chain has a recurrence"
        last = float(np.sqrt(self.gram[0, 0])) if self.columns else 0.0
        return self.diagonal, np.append(self._off_diagonal, max(last, floor))


def _tridiagonal_eigenvalues(diagonal: _Array, off_diagonal: _Array) -> _Array:
    if len(diagonal) == 1:
        return diagonal.copy()
    # The arguments' checks of scipy.linalg.eigvalsh_tridiagonal take longer than its result for a small matrix.
    values, info = scipy.linalg.lapack.dsterf(diagonal, off_diagonal)
    if info:
        raise np.linalg.LinAlgError(f"LAPACK's sterf found no eigenvalues of a tridiagonal matrix (info = {info})")
    return _descending(values)


def _descending(ascending: _Array) -> _Array:
    reversed_order: _Array = ascending[::-1]
    return reversed_order
