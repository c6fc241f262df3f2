r"""Maximum likelihood for the power law with an exponential cutoff, for many samples at once.

In :math:`y = \ln(\lambda / \lambda_K) \ge 0` the law is an exponential family with two parameters,

.. math:: f(y) = e^{-a y - r (e^y - 1)} / Z(a, r), \qquad r \ge 0,

with :math:`a = \beta - 1`; :math:`r = 0` is the power law. Its log-likelihood is concave, so the profile
over a is concave in r, and a bisection of its derivative finds the maximum. Z is an upper incomplete gamma
function of an order that may be negative, which scipy does not offer; Gauss-Legendre quadrature gives it
and all moments at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from hessian_callback.power_law.fit import FloatArray

__all__ = ["TruncatedPowerLawFits", "fit_truncated_power_laws"]

# exp(-42) is below the rounding of float64, so what lies outside contributes nothing.
_NEGLIGIBLE_LOG = 42.0
# 64 nodes agree with 120 to 1e-10 on a range that ends there.
_NUM_NODES = 64


@dataclass(frozen=True)
class TruncatedPowerLawFits:
    r"""Truncated power laws fitted to B samples.

    Attributes:
        exponent: ``(B,)``, :math:`a = \beta - 1`, the density exponent less one; may be negative.
        rate: ``(B,)``, r, of the exponential cutoff in units of :math:`1 / \lambda_K`; 0 where the power
            law itself is the most likely member.
        log_normaliser: ``(B,)``, :math:`\ln Z(a, r)`.
        log_likelihood_gain: ``(B,)``, mean log-likelihood above the fitted power law's; not negative.
    """

    exponent: FloatArray
    rate: FloatArray
    log_normaliser: FloatArray
    log_likelihood_gain: FloatArray


def fit_truncated_power_laws(log_ratios: FloatArray) -> TruncatedPowerLawFits:
    r"""Fit each row by maximum likelihood.

    Args:
        log_ratios: ``(B, K)``, :math:`y = \ln(\lambda / \lambda_K)`, in any order; not negative, and not
            all zero in a row.

    Returns:
        The fits, see `TruncatedPowerLawFits`.

    Example:
        An exponential law in :math:`\lambda` has a = -1 and, here, rate 2:

        >>> quantiles = (np.arange(2000) + 0.5) / 2000
        >>> fits = fit_truncated_power_laws(np.log1p(-np.log1p(-quantiles) / 2)[None])
        >>> fits.exponent.round(1), fits.rate.round(1)
        (array([-1.]), array([2.]))
    """
    mean = log_ratios.mean(axis=1)
    excess = np.expm1(log_ratios)
    mean_excess = excess.mean(axis=1)

    # Rates below `low` act on no eigenvalue, so a maximum there is the power law.
    low = np.log(1e-6 / excess.max(axis=1))
    high = np.log(10.0 / mean_excess)
    at_power_law = _profile(low, 1.0 / mean, mean)
    exponent, boundary = at_power_law.exponent, at_power_law.mean_excess <= mean_excess
    above = _profile(high, exponent, mean).mean_excess > mean_excess
    while above.any():
        high = np.where(above, high + 1.5, high)
        above = _profile(high, exponent, mean).mean_excess > mean_excess
    # The bracket spans some 30 in the logarithm: 36 halvings leave 1e-9.
    for _ in range(36):
        middle = 0.5 * (low + high)
        profile = _profile(middle, exponent, mean)
        exponent = profile.exponent
        rising = profile.mean_excess > mean_excess
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)

    rate = np.exp(0.5 * (low + high))
    profile = _profile(np.log(rate), exponent, mean)
    log_likelihood = -profile.exponent * mean - rate * mean_excess - profile.log_normaliser
    gain = log_likelihood - (-np.log(mean) - 1.0)
    boundary |= gain <= 0.0
    return TruncatedPowerLawFits(
        exponent=np.where(boundary, 1.0 / mean, profile.exponent),
        rate=np.where(boundary, 0.0, rate),
        log_normaliser=np.where(boundary, np.log(mean), profile.log_normaliser),
        log_likelihood_gain=np.where(boundary, 0.0, gain),
    )


@dataclass(frozen=True)
class _Profile:
    """The most likely exponent for a given rate, and moments there; each ``(B,)``."""

    exponent: FloatArray
    log_normaliser: FloatArray
    mean_excess: FloatArray


def _profile(log_rate: FloatArray, start: FloatArray, mean: FloatArray) -> _Profile:
    """Solve E[y] = mean for the exponent by a safeguarded Newton iteration."""
    rate = np.exp(log_rate)
    # The mean falls with the exponent. Any rate lowers it below 1 / a; and where a is as low as the other
    # end, the mode alone lies beyond the mean.
    low, high = -(rate * np.exp(mean) + 1.0), 1.0 / mean
    exponent = np.clip(start, low, high)
    for _ in range(60):
        log_normaliser, first, variance, mean_excess = _moments(exponent, rate)
        too_low = first > mean
        low, high = np.where(too_low, exponent, low), np.where(too_low, high, exponent)
        step = exponent + (first - mean) / variance
        step = np.where((step <= low) | (step >= high), 0.5 * (low + high), step)
        converged = bool((np.abs(step - exponent) <= 1e-9 * (1.0 + np.abs(exponent))).all())
        if converged:
            break
        exponent = step
    return _Profile(exponent, log_normaliser, mean_excess)


@lru_cache(maxsize=1)
def _nodes() -> tuple[FloatArray, FloatArray]:
    nodes, weights = special.roots_legendre(_NUM_NODES)
    return 0.5 * (nodes + 1.0), 0.5 * weights


def _moments(exponent: FloatArray, rate: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Each ``(B,)``: ln Z, mean and variance of y, mean of exp(y) - 1."""
    a, r = exponent[:, None], rate[:, None]
    peak = np.log(np.maximum(-a / r, 1.0))
    height = -a * peak - r * np.expm1(peak)

    def log_relative(y: FloatArray) -> FloatArray:
        relative: FloatArray = -a * y - r * np.expm1(y) - height
        return relative

    # The logarithm of the integrand is concave, so it counts on one interval around its peak.
    reach = np.ones_like(peak)
    counts = log_relative(peak + reach) > -_NEGLIGIBLE_LOG
    while counts.any():
        reach = np.where(counts, 2.0 * reach, reach)
        counts = log_relative(peak + reach) > -_NEGLIGIBLE_LOG
    inside, outside = peak, peak + reach
    left_inside, left_outside = peak, np.zeros_like(peak)
    for _ in range(8):
        middle = 0.5 * (inside + outside)
        counts = log_relative(middle) > -_NEGLIGIBLE_LOG
        inside, outside = np.where(counts, middle, inside), np.where(counts, outside, middle)
        middle = 0.5 * (left_inside + left_outside)
        counts = log_relative(middle) > -_NEGLIGIBLE_LOG
        left_inside = np.where(counts, middle, left_inside)
        left_outside = np.where(counts, left_outside, middle)

    nodes, weights = _nodes()
    width = outside - left_outside
    y = left_outside + width * nodes
    density = width * weights * np.exp(log_relative(y))
    total = density.sum(axis=1)
    density /= total[:, None]
    mean = (density * y).sum(axis=1)
    variance = (density * (y - mean[:, None]) ** 2).sum(axis=1)
    return np.log(total) + height[:, 0], mean, variance, (density * np.expm1(y)).sum(axis=1)
