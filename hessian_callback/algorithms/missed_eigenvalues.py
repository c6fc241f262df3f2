"""Bound the eigenvalues of a complement that a Krylov basis has not seen, by Lanczos runs from random vectors.

The page "Error bounds" of the documentation has the proof.
"""

from __future__ import annotations

import numpy as np
import scipy.special
from numpy.typing import NDArray

from hessian_callback.algorithms.ritz import Projection

__all__ = ["Probe", "level_of_run"]

_Array = NDArray[np.float64]

# Shares of a run's level for the two ends of the spectrum. The lower end only enters the scale of rounding errors.
_UPPER_END, _LOWER_END = 0.9, 0.1


def level_of_run(number: int, level: float) -> float:
    r"""Return the part of a level that the ``number``-th random vector may spend: :math:`6 / (\pi^2 j^2)` of it.

    The parts sum to ``level`` over any number of vectors, so it need not be known beforehand.

    Example:
        >>> round(level_of_run(1, 1e-3), 6), round(sum(level_of_run(j, 1e-3) for j in range(1, 10_000)), 6)
        (0.000608, 0.001)
    """
    return float(6 / (np.pi * number) ** 2 * level)


class Probe:
    """Lanczos runs from random vectors in a complement, and the bounds on its eigenvalues that follow.

    A probe is one run, unless that ends in an invariant subspace; then a fresh vector begins another.

    Attributes:
        largest_seen: the largest Ritz value of all runs.
        level: largest acceptable probability of an error; set it for each run, see `level_of_run`.
    """

    def __init__(self, level: float = 1e-3) -> None:
        self._runs: list[tuple[_Array, _Array, int, int | None]] = []
        self.largest_seen = -np.inf
        self.smallest_seen = np.inf
        self.level = level

    def update(
        self, run: Projection, *, dimensions: int, smallest_link: float, new: bool, window: int | None = None
    ) -> None:
        """Add a run, or replace the last one by its continuation.

        Args:
            run: the projected matrix of the run.
            dimensions: dimensions of the space that its start vector was drawn in.
            smallest_link: smallest link of the recurrence that counts as seen.
            new: whether it is a new run.
            window: so many successive vectors of the run, and the residual that follows, are orthonormal; ``None``:
                all.
        """
        self.largest_seen = max(self.largest_seen, float(run.ritz_values[0]))
        self.smallest_seen = min(self.smallest_seen, float(run.ritz_values[-1]))
        recurrence = run.recurrence(floor=smallest_link)
        if not new:
            self._runs.pop()
        self._runs.append((*recurrence, dimensions, window))

    def missed_probability(self, bound: float) -> float:
        r"""Return a bound on the probability that all runs overlook an eigenvalue above ``bound``.

        For one run, :math:`p = I_\chi(1/2, (d-1)/2)`. For n runs with the product c of these,
        :math:`c \sum_{j<n} (-\ln c)^j / j!` (Fisher): c itself is not a probability.
        """
        if bound <= self.largest_seen:
            return 1.0
        return self._p_value(bound, 1)

    def rules_out(self, bound: float) -> bool:
        """Return whether the runs exclude an eigenvalue above ``bound`` at the probe's level."""
        return self.missed_probability(bound) <= _UPPER_END * self.level

    def expected_products(self, bound: float) -> float:
        r"""Estimate the products after which the latest run excludes an eigenvalue above ``bound`` by itself.

        The sum of :math:`p_j(x)^2` grows slowly at first and then geometrically. The rate is that of the latest quarter
        of the run. It falls when the run sees larger eigenvalues, so the estimate grows then.

        Returns:
            The products of the run in all, infinite while the run has seen an eigenvalue above ``bound``.
        """
        if bound <= self.largest_seen:
            return np.inf
        diagonal, off_diagonal, dimensions, _ = self._runs[-1]
        sums = np.cumsum(_squares(diagonal, off_diagonal, bound))
        mass = scipy.special.betaincinv(0.5, (dimensions - 1) / 2, _UPPER_END * self.level)
        latest = -(-len(sums) // 4)
        rate = np.log(sums[-1] / sums[-1 - latest]) / latest
        return float(len(sums) - 1 + np.log(1 / (mass * sums[-1])) / rate)

    def confident_bound(self) -> float:
        """Return the smallest upper bound of the eigenvalues that the runs prove, to three digits of its excess."""
        return self.largest_seen + self._excess(self.largest_seen, 1, _UPPER_END * self.level)

    def confident_lower_bound(self) -> float:
        """Return the largest lower bound of the eigenvalues that the runs prove, to three digits of its excess."""
        return self.smallest_seen - self._excess(self.smallest_seen, -1, _LOWER_END * self.level)

    def _excess(self, seen: float, sign: int, level: float) -> float:
        """Return how far beyond the extreme Ritz value the bound lies."""
        step = max(abs(seen), *(float(off[-1]) for _, off, _, _ in self._runs)) * 1e-6
        while self._p_value(seen + sign * step, sign) > level:
            step *= 2
        low, high = step / 2, step
        for _ in range(10):
            middle = (low + high) / 2
            if self._p_value(seen + sign * middle, sign) > level:
                low = middle
            else:
                high = middle
        return high

    def _p_value(self, point: float, sign: int) -> float:
        product = 1.0
        for diagonal, off_diagonal, dimensions, window in self._runs:
            mass = _point_mass_bound(sign * diagonal, off_diagonal, sign * point, window)
            if dimensions == 1:  # the vector is the eigenvector
                product *= float(mass >= 1)
            else:
                product *= float(scipy.special.betainc(0.5, (dimensions - 1) / 2, mass))
        return _product_tail(product, len(self._runs))


def _product_tail(product: float, count: int) -> float:
    """Return the probability that the product of ``count`` independent uniform variables is at most ``product``."""
    if count == 1 or product <= 0:
        return product
    # -2 ln of the product follows a chi-squared law with 2 count degrees of freedom.
    return float(scipy.special.gammaincc(count, -np.log(product)))


def _point_mass_bound(diagonal: _Array, off_diagonal: _Array, point: float, window: int | None) -> float:
    r"""Compute :math:`1 / \sum_j p_j(x)^2` for the orthonormal polynomials of a three-term recurrence.

    The sum runs over all j, or over the ``window + 1`` successive ones for which it is largest.
    """
    squares = _squares(diagonal, off_diagonal, point)
    if window is None or len(squares) <= window + 1:
        return float(1 / squares.sum())
    return float(1 / np.lib.stride_tricks.sliding_window_view(squares, window + 1).sum(axis=1).max())


def _squares(diagonal: _Array, off_diagonal: _Array, point: float) -> _Array:
    r"""Compute :math:`p_0(x)^2, p_1(x)^2, \dots`, up to the first that is beyond any probability of interest."""
    before, current = 0.0, 1.0
    squares = [1.0]
    link = 0.0
    for centre, following in zip(diagonal, off_diagonal, strict=True):
        before, current = current, ((point - centre) * current - link * before) / following
        link = following
        squares.append(min(abs(current), 1e100) ** 2)
        if squares[-1] >= 1e200:
            break
    return np.array(squares)
