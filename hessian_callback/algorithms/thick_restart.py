r"""Compress a Krylov decomposition to the span of some of its Ritz vectors.

Let :math:`A V = V H + W L^T`, with one residual in W for each chain. The columns of S are the eigenvectors of H for m
of the Ritz values, :math:`\Theta`. For any orthogonal Q, the vectors :math:`V' = V S Q` satisfy a decomposition of the
same form, with no error in exact arithmetic:

.. math:: A V' = V' (Q^T \Theta Q) + W (Q^T S^T L)^T .

Q is chosen such that the residuals are attached to the last vectors only. For a single chain :math:`Q^T \Theta Q` is
tridiagonal, so that the result is again a Lanczos decomposition: that of a filtered start vector. For c chains it is
diagonal except for its last c rows and columns.

References: Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal.
Appl. 22 (2000); Stewart, "A Krylov-Schur algorithm for large eigenproblems", SIAM J. Matrix Anal. Appl. 23 (2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from hessian_callback.algorithms.ritz import Projection

__all__ = ["ThickRestart", "kept_at_ends", "thick_restart"]

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class ThickRestart:
    """The small matrices of a compressed decomposition.

    Attributes:
        weights: S Q: the new vectors as combinations of the old ones, ``(N, m)``.
        diagonal: diagonal of the new H, ``(m,)``.
        rows, columns: positions of its entries below the diagonal that are not zero.
        values: these entries.
        mixing: the new residuals as combinations of the old ones, ``(c, c)``: W M. The j-th one belongs to vector
            ``m - c + j``.
    """

    weights: _Array
    diagonal: _Array
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: _Array
    mixing: _Array


def kept_at_ends(ritz_values: _Array, wanted: int, count: int) -> tuple[int, int]:
    r"""Return how many of the largest and of the smallest Ritz values to keep, ``count`` in all.

    Lanczos converges at both ends of the spectrum. Eigenvectors of the lower end that are dropped come back at the cost
    of products. The numbers p and q maximise the gap ratio of the smallest wanted eigenvalue,
    :math:`(\theta_k - \theta_{p+1}) / (\theta_{p+1} - \theta_{N-q})`, on which the rate of convergence depends.

    Args:
        ritz_values: descending, ``(N,)``.
        wanted: k.
        count: at least k and less than N.

    Source:
        Compare Wu and Simon (2000), who discuss rules that keep both ends.

    Example:
        >>> kept_at_ends(np.array([9.0, 8.0, 5.0, 4.0, 1.0, 0.0, -1.0, -9.0]), 2, 4)
        (3, 1)
    """
    best, chosen = -np.inf, (count, 0)
    for lowest in range(count - wanted + 1):
        largest = count - lowest
        following, smallest = ritz_values[largest], ritz_values[len(ritz_values) - lowest - 1]
        gap, rest = ritz_values[wanted - 1] - following, following - smallest
        ratio = gap / rest if rest > 1e-300 * gap else np.inf
        if ratio > best:
            best, chosen = ratio, (largest, lowest)
    return chosen


def thick_restart(projection: Projection, largest: int, smallest: int = 0) -> ThickRestart:
    """Return the compression to Ritz vectors of both ends of the spectrum.

    Args:
        projection: the small matrices of the decomposition.
        largest: number of the largest Ritz values to keep.
        smallest: number of the smallest ones; together at least the number of chains, and at most that of vectors.

    Raises:
        ValueError: if the numbers are out of range.

    Example:
        >>> projection = Projection(np.array([3.0, 1.0, 2.0]), [(1, 0, 1.0), (2, 1, 1.0)], [2], np.array([[0.25]]))
        >>> restart = thick_restart(projection, 2)
        >>> kept = np.diag(restart.diagonal)
        >>> kept[1, 0] = kept[0, 1] = restart.values[0]
        >>> bool(np.allclose(np.linalg.eigvalsh(kept), projection.ritz_values[1::-1]))
        True
    """
    number, count = len(projection.columns), largest + smallest
    if not max(1, number) <= count <= projection.size or min(largest, smallest) < 0:
        raise ValueError(f"{count} vectors can't be kept of {projection.size} with {number} chains")
    ends = np.r_[:largest, projection.size - smallest : projection.size]
    ritz, vectors = projection.ritz_values[ends], projection.all_eigenvectors[:, ends]
    coupling = vectors[projection.columns].T  # (m, c)
    if number == 0:
        none = np.zeros(0, dtype=np.int64)
        return ThickRestart(vectors, ritz.copy(), none, none, np.zeros(0), np.zeros((0, 0)))
    if number == 1:
        return _single(vectors, ritz, coupling[:, 0])
    return _several(vectors, ritz, coupling)


def _single(vectors: _Array, ritz: _Array, coupling: _Array) -> ThickRestart:
    count = len(ritz)
    length = float(np.linalg.norm(coupling))
    # The first column of an orthogonal matrix is along the coupling, and the reduction to tridiagonal form keeps it.
    basis = np.linalg.qr(np.column_stack([coupling, np.eye(count)]))[0] if length > 0 else np.eye(count)
    reduced, rotation = scipy.linalg.hessenberg(basis.T * ritz @ basis, calc_q=True)
    basis = (basis @ rotation)[:, ::-1]
    links = np.diag(reduced, -1)[::-1]
    # Signs, from the last vector to the first: positive coupling, positive links.
    signs = np.ones(count)
    signs[-1] = np.copysign(1.0, basis[:, -1] @ coupling)
    for index in reversed(range(count - 1)):
        signs[index] = signs[index + 1] * np.copysign(1.0, links[index])
    places = np.arange(count - 1)
    return ThickRestart(
        vectors @ (basis * signs),
        np.diag(reduced)[::-1].copy(),
        places + 1,
        places,
        np.abs(links),
        np.array([[length]]),
    )


def _several(vectors: _Array, ritz: _Array, coupling: _Array) -> ThickRestart:
    count, number = coupling.shape
    whole, triangular = np.linalg.qr(coupling, mode="complete")
    coupled, free = whole[:, :number], whole[:, number:]
    values, inner = np.linalg.eigh(free.T * ritz @ free)
    basis = np.hstack([(free @ inner)[:, ::-1], coupled])
    last = basis.T * ritz @ coupled  # the last columns of the new matrix
    rows, columns = np.array(
        [(row, column) for row in range(count - number, count) for column in range(row)], dtype=np.int64
    ).T.reshape(2, -1)
    diagonal = np.append(values[::-1], np.diag(last[count - number :]))
    entries = last[columns, rows - (count - number)]
    return ThickRestart(vectors @ basis, diagonal, rows, columns, entries, triangular[:number].T.copy())
