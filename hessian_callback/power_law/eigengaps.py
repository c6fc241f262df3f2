r"""Power law of the eigengaps that a power-law spectrum implies.

If :math:`\lambda_k = \lambda_1 k^{-s}` then :math:`\delta_k = \lambda_k - \lambda_{k+1} \approx
s \lambda_1 k^{-(s + 1)}`, so the gaps follow a power law with exponent s + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.validation import Eigenvalues, fitted_eigenvalues

__all__ = ["EigengapFit", "fit_eigengaps"]


@dataclass(frozen=True)
class EigengapFit:
    r"""Power law of the eigengaps, and the exponent that the slope of the eigenvalues predicts.

    Attributes:
        exponent: minus the least-squares slope of log gap on log rank, with the gaps sorted by size as in the
            paper.
        exponent_by_rank: the same with the gaps in the order of their eigenvalues, as in the theory.
        gaps: maximum-likelihood fit to the gaps. Its cutoff is the smallest gap. The smallest of K gaps is
            random and close to zero unless the spectrum is exact, so ``gaps.slope`` is far above s + 1.
        eigenvalues: maximum-likelihood fit to the eigenvalues.

    Example:
        >>> fit = fit_eigengaps([1 / k for k in range(1, 1001)])
        >>> round(fit.exponent, 2), round(fit.predicted_exponent, 2), fit.num_zero_gaps
        (1.98, 2.0, 0)
    """

    exponent: float
    exponent_by_rank: float
    gaps: PowerLawFit
    eigenvalues: PowerLawFit

    @property
    def predicted_exponent(self) -> float:
        r""":math:`\hat s + 1`, with the slope of the same eigenvalues."""
        return self.eigenvalues.slope + 1.0

    @property
    def num_zero_gaps(self) -> int:
        """Number of gaps that were left out because two eigenvalues are equal."""
        return self.gaps.num_dropped


def fit_eigengaps(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> EigengapFit:
    r"""Fit the exponent of the gaps between successive eigenvalues.

    .. math:: \delta_k = \lambda_k - \lambda_{k + 1}, \qquad \delta_{(k)} \propto k^{-(s + 1)}

    The errors of the eigenvalues must be small compared with the gaps, which are about K times smaller than the
    eigenvalues. Error bounds that are sufficient for a slope are not sufficient here.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_eigenvalues: K, how many of the largest positive eigenvalues to take; None for all of them.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        The fits, see `EigengapFit`; K eigenvalues have K - 1 gaps.

    Raises:
        TypeError: as `fit_power_law`.
        ValueError: as `fit_power_law`, or if fewer than 3 gaps are positive, or all positive gaps are equal.

    Source:
        Tang et al., ICML 2025. They report 1.817 on MNIST, for a prediction of 2.009, with gaps sorted by size.

    Example:
        >>> round(fit_eigengaps([4.0, 2.0, 1.0, 0.5]).exponent, 2)
        1.23
    """
    values, _ = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    gaps = values[:-1] - values[1:]
    rank = np.arange(1, gaps.size + 1)
    positive = gaps > 0.0
    num_positive = int(positive.sum())
    if num_positive < 3 or np.ptp(gaps[positive]) == 0.0:
        raise ValueError(
            f"{num_positive} of {gaps.size} eigengaps are positive, but 3 different ones are needed; compute more "
            "eigenvalues, or in a higher precision if rounding made them equal"
        )
    fit = fit_power_law(gaps)
    by_rank = np.polynomial.Polynomial.fit(np.log(rank[positive]), np.log(gaps[positive]), 1).convert().coef[1]
    return EigengapFit(
        exponent=fit.least_squares_slope,
        exponent_by_rank=-float(by_rank),
        gaps=fit,
        eigenvalues=fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first),
    )
