"""How sure it is that the complement of a basis holds no eigenvalue above a bound; `lanczos` has the proof."""

from __future__ import annotations

import numpy as np
import scipy.special
from numpy.typing import NDArray

from hessian_callback.algorithms.ritz import Projection

__all__ = ["Probe"]

_Array = NDArray[np.float64]


class Probe:
    """What Lanczos runs of random vectors in a complement say about its largest eigenvalue.

    There is one run, unless it ends in an invariant subspace; then a fresh vector begins another.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[_Array, _Array, int]] = []
        self.largest_seen = -np.inf

    def update(self, run: Projection, *, dimensions: int, rounding: float, new: bool) -> None:
        """Take note of a run as it stands: its small matrix, and the dimensions its vector was drawn in.

        Of an error of norm ``rounding`` in some direction, ``rounding / sqrt(dimensions)`` points along a given
        eigenvector: less than that was not seen.
        """
        self.largest_seen = max(self.largest_seen, float(run.ritz_values[0]))
        recurrence = run.recurrence(floor=rounding / np.sqrt(dimensions))
        if not new:
            self._runs.pop()
        self._runs.append((*recurrence, dimensions))

    def missed_probability(self, bound: float) -> float:
        r"""The chance that all runs overlook an eigenvalue above ``bound``: :math:`\prod I_\chi(1/2, (d-1)/2)`."""
        if bound <= self.largest_seen:
            return 1.0
        probability = 1.0
        for diagonal, off_diagonal, dimensions in self._runs:
            mass = _point_mass_bound(diagonal, off_diagonal, bound)
            if dimensions == 1:  # the vector is the eigenvector
                probability *= float(mass >= 1)
            else:
                probability *= float(scipy.special.betainc(0.5, (dimensions - 1) / 2, mass))
        return probability

    def confident_bound(self, level: float) -> float:
        """The smallest bound whose missed probability is at most ``level``, to three digits of its excess."""
        step = max(abs(self.largest_seen), *(float(off[-1]) for _, off, _ in self._runs)) * 1e-6
        while self.missed_probability(self.largest_seen + step) > level:
            step *= 2
        low, high = step / 2, step
        for _ in range(10):
            middle = (low + high) / 2
            if self.missed_probability(self.largest_seen + middle) > level:
                low = middle
            else:
                high = middle
        return self.largest_seen + high


def _point_mass_bound(diagonal: _Array, off_diagonal: _Array, point: float) -> float:
    r""":math:`1 / \sum_{j=0}^m p_j(x)^2` for the orthonormal polynomials of a three-term recurrence."""
    before, current, total = 0.0, 1.0, 1.0
    link = 0.0
    for centre, following in zip(diagonal, off_diagonal, strict=True):
        before, current = current, ((point - centre) * current - link * before) / following
        link = following
        if abs(current) > 1e100:  # far beyond any probability of interest
            return 0.0
        total += current**2
    return 1 / total
