r"""The power law of a spectrum: maximum-likelihood slope, fit error and confidence interval.

The law is :math:`\lambda_k = \lambda_1 k^{-s}` in rank form and
:math:`p(\lambda) = \lambda^{-\beta} / Z_c` in density form, with :math:`s = 1 / (\beta - 1)`.
The functions take eigenvalues only, so they apply to any spectrum with positive eigenvalues.

Source: "Investigating the Overlooked Hessian Structure: From CNNs to LLMs" (Tang et al., ICML 2025).
The critical values for a fitted exponent and the exact interval of the slope are not in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from scipy import special

from hessian_callback.power_law.critical_values import critical_distance
from hessian_callback.power_law.validation import Eigenvalues, FloatArray, fitted_eigenvalues, log_ratios

__all__ = ["PowerLawFit", "fit_power_law"]


@dataclass(frozen=True)
class PowerLawFit:
    r"""A power law fitted to the K largest eigenvalues of a spectrum.

    .. math::
        \hat s = \frac{1}{K} \sum_{i=1}^{K} \ln\frac{\lambda_i}{\lambda_K}, \qquad
        \hat\beta = 1 + \frac{1}{\hat s}, \qquad
        d_{ks} = \sup_{\lambda \ge \lambda_K} |F^*(\lambda) - \hat F(\lambda)|, \quad
        F^*(\lambda) = 1 - (\lambda / \lambda_K)^{-1 / \hat s}

    All values are plain Python numbers. Only ``lambda_1`` and ``cutoff`` have the unit of the eigenvalues.

    Attributes:
        slope: :math:`\hat s`, the maximum-likelihood slope (Hill's estimator); larger is steeper.
            Its mean is s (K - 1) / K for independent values. Compare slopes at equal K only.
        fit_error: :math:`d_{ks}`, two-sided Kolmogorov-Smirnov distance to the fitted law, in (0, 1).
        num_eigenvalues: K, the number of fitted eigenvalues, the cutoff included.
        lambda_1: the largest fitted eigenvalue.
        cutoff: :math:`\lambda_K`, the smallest fitted eigenvalue.
        least_squares_slope: minus the slope of the regression line of :math:`\ln\lambda_k` on
            :math:`\ln k`. Common in the field, not in the paper. Its standard deviation is about 1.4 times
            that of ``slope``.
        r_squared: coefficient of determination of that line. It hardly separates a power law from a
            lognormal: both give about .99.
        num_dropped: number of eigenvalues left out because they were zero or negative.
        num_outliers_dropped: number of the largest eigenvalues left out on request (``drop_first``).

    Source:
        Tang et al., ICML 2025, for slope, exponent, distance and the 1.36 / sqrt(K) verdict.

    Example:
        >>> fit = fit_power_law([1.0, 0.5, 0.25, 0.125])
        >>> round(fit.slope, 4), fit.num_eigenvalues, fit.cutoff
        (1.0397, 4, 0.125)
        >>> low, high = fit.slope_interval(0.95)
        >>> round(low, 2), round(high, 2)
        (0.58, 6.72)
        >>> fit.within_critical_distance_fitted, fit.within_critical_distance_paper
        (True, True)
    """

    slope: float
    fit_error: float
    num_eigenvalues: int
    lambda_1: float
    cutoff: float
    least_squares_slope: float
    r_squared: float
    num_dropped: int
    num_outliers_dropped: int

    @property
    def slope_stderr(self) -> float:
        r"""Standard error of the slope, :math:`\hat s / \sqrt K`, for independent values."""
        return self.slope / math.sqrt(self.num_eigenvalues)

    @property
    def density_exponent(self) -> float:
        r""":math:`\hat\beta = 1 + 1 / \hat s`, the exponent of the density."""
        return 1.0 + 1.0 / self.slope

    @property
    def density_exponent_stderr(self) -> float:
        r"""Standard error of the density exponent, :math:`(\hat\beta - 1) / \sqrt K`, as in the paper."""
        return (self.density_exponent - 1.0) / math.sqrt(self.num_eigenvalues)

    def slope_interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Compute a confidence interval of the slope, exact for independent values of a power law.

        .. math:: \Big[\frac{K \hat s}{q_{(1 + level)/2}},\ \frac{K \hat s}{q_{(1 - level)/2}}\Big]

        with the quantiles q of :math:`\mathrm{Gamma}(K - 1, 1)`, the law of :math:`K \hat s / s`.

        Proven: the coverage for independent values of a power law. Assumed: that the eigenvalues are such
        values. Eigenvalues of a matrix repel each other, so the interval is too wide if the law holds. The
        error of the eigenvalues themselves is not included; see `slope_numerical_interval`.

        Args:
            level: coverage, in (0, 1).

        Returns:
            ``(low, high)``, with equal tails and without unit.

        Raises:
            ValueError: if ``level`` is outside (0, 1).

        Example:
            >>> fit = fit_power_law([1 / k for k in range(1, 51)])
            >>> low, high = fit.slope_interval()
            >>> round(fit.slope, 3), round(low, 3), round(high, 3)
            (0.942, 0.74, 1.3)
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level is {level}; give the coverage as a fraction, such as 0.95")
        tail = (1.0 - level) / 2.0
        scaled = self.num_eigenvalues * self.slope
        shape = self.num_eigenvalues - 1
        return (
            scaled / float(special.gammainccinv(shape, tail)),
            scaled / float(special.gammaincinv(shape, tail)),
        )

    @property
    def critical_distance_paper(self) -> float:
        r"""Critical distance of the paper at 5 %, :math:`1.36 / \sqrt K`. It rejects 0.5 % of true power laws."""
        return critical_distance(self.num_eigenvalues, exponent="known")

    @property
    def critical_distance_fitted(self) -> float:
        """Critical distance at 5 % for an exponent fitted to the same eigenvalues; see `critical_distance`."""
        return critical_distance(self.num_eigenvalues, exponent="fitted")

    @property
    def within_critical_distance_paper(self) -> bool:
        """Verdict of the paper: ``fit_error < critical_distance_paper``. Its level is 0.5 %, not 5 %."""
        return self.fit_error < self.critical_distance_paper

    @property
    def within_critical_distance_fitted(self) -> bool:
        """Verdict at a level of 5 %: ``fit_error < critical_distance_fitted``."""
        return self.fit_error < self.critical_distance_fitted

    def to_dict(self) -> dict[str, float | int | bool]:
        """Return fields and derived values as plain Python scalars, for JSON or a logger.

        Returns:
            One entry for each attribute and property, with ``slope_low`` and ``slope_high`` for the 95 %
            interval of the slope.

        Example:
            >>> fit_power_law([4.0, 2.0, 1.0, -1.0]).to_dict()["num_dropped"]
            1
        """
        low, high = self.slope_interval(0.95)
        values: dict[str, float | int | bool] = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {
            "slope_stderr": self.slope_stderr,
            "slope_low": low,
            "slope_high": high,
            "density_exponent": self.density_exponent,
            "density_exponent_stderr": self.density_exponent_stderr,
            "critical_distance_paper": self.critical_distance_paper,
            "critical_distance_fitted": self.critical_distance_fitted,
            "within_critical_distance_paper": self.within_critical_distance_paper,
            "within_critical_distance_fitted": self.within_critical_distance_fitted,
        }


def fit_power_law(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> PowerLawFit:
    r"""Fit a power law to the largest positive eigenvalues by maximum likelihood.

    .. math:: \hat s = \frac{1}{K} \sum_{i=1}^{K} \ln\frac{\lambda_i}{\lambda_K}

    Zero and negative eigenvalues lie outside the theory. They are left out and counted in ``num_dropped``.
    The smallest fitted eigenvalue is the cutoff :math:`\lambda_K`.

    Args:
        eigenvalues: ``(n,)``, in any order and any unit; dense tensor on any device and of any precision,
            array or sequence. They are fitted in float64.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers, for example one for each class.
            The others are fitted as a spectrum of their own: K and the ranks count without the outliers.

    Returns:
        The fit, see `PowerLawFit`.

    Raises:
        TypeError: if the eigenvalues are complex, boolean, sparse or not numbers, or an option is not an
            integer.
        ValueError: if the eigenvalues are not one-dimensional, contain NaN or infinity, fewer than 3 positive
            ones (or fewer than ``num_eigenvalues``) are left, or the fitted ones are all equal.

    Source:
        Tang et al., ICML 2025. Equal to ``powerlaw.Fit(eigenvalues, xmin=min(eigenvalues))``.

    Example:
        The exact law with slope 1. The estimate is below 1 at small K, see `PowerLawFit`:

        >>> import torch
        >>> spectrum = 3.0 / torch.arange(1, 1001)
        >>> fit = fit_power_law(spectrum)
        >>> round(fit.slope, 3), round(fit.least_squares_slope, 3), round(fit.fit_error, 3)
        (0.996, 1.0, 0.002)
        >>> round(fit_power_law(spectrum, num_eigenvalues=50).slope, 3)
        0.942
    """
    values, num_dropped = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    y = log_ratios(values, values[-1])
    slope = float(y.mean())
    least_squares_slope, r_squared = _least_squares(y)
    return PowerLawFit(
        slope=slope,
        fit_error=_ks_distance(y / slope),
        num_eigenvalues=int(values.size),
        lambda_1=float(values[0]),
        cutoff=float(values[-1]),
        least_squares_slope=least_squares_slope,
        r_squared=r_squared,
        num_dropped=num_dropped,
        num_outliers_dropped=int(drop_first),
    )


def _ks_distance(scaled: FloatArray) -> float:
    """Compute the distance between descending values and the unit exponential law, on both sides of every step.

    `scipy.stats.ks_1samp` returns the same value, but importing it takes half a second.
    """
    num = scaled.size
    law = -np.expm1(-scaled)
    # The values descend, so the i-th of them (from 0) has the fraction (num - i) / num at or below it.
    at_or_below = np.arange(num, 0, -1) / num
    below = at_or_below - 1.0 / num
    return float(max((at_or_below - law).max(), (law - below).max()))


def _least_squares(log_values: FloatArray) -> tuple[float, float]:
    """Return minus the slope of the regression line of log values on log rank, and its R squared."""
    log_rank = np.log(np.arange(1, log_values.size + 1))
    log_rank -= log_rank.mean()
    centred = log_values - log_values.mean()
    slope = float(log_rank @ centred / (log_rank @ log_rank))
    residual = centred - slope * log_rank
    return -slope, float(1.0 - residual @ residual / (centred @ centred))
