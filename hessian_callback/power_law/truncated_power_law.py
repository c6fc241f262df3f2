r"""Maximum likelihood for the power law with an exponential cutoff, for many samples at once.

In :math:`y = \ln(\lambda / \lambda_K) \ge 0` the law is an exponential family with two parameters,

.. math:: f(y) = e^{-a y - r (e^y - 1)} / Z(a, r), \qquad r \ge 0,

with :math:`a = \beta - 1`. It is the power law if :math:`r = 0`. For eigenvalues that are close together, a and r
are large and cancel. The computation therefore uses the mean m of y as the unit and other parameters,

.. math:: f(u) = e^{-c u - \rho h(u)} / Z(c, \rho), \qquad u = y / m, \quad
    h(u) = (e^{m u} - 1 - m u) / m^2, \quad r = \rho / m^2, \quad a = c / m - r,

whose limit for small m is a normal law truncated at zero. The log-likelihood is concave, so the profile over c is
concave in :math:`\rho`, and a bisection of its derivative finds the maximum. Z is an upper incomplete gamma function
whose order may be negative, which scipy does not have. Gauss-Legendre quadrature computes it and all moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from hessian_callback.power_law.validation import FloatArray

__all__ = ["TruncatedPowerLawFits", "fit_truncated_power_laws", "scaled_excess"]

# exp(-42) is below the rounding of float64, so the density is negligible beyond.
_NEGLIGIBLE_LOG = 42.0
# 64 nodes agree with 120 to 1e-10 on a range that ends there.
_NUM_NODES = 64
# Below this mean, e^x - 1 - x is computed by its series if x is below _SERIES_RANGE; above, its rounding is harmless.
_SMALL_MEAN = 1e-3
_SERIES_RANGE = 0.1
_SERIES = 1.0 / special.factorial(np.arange(2, 12))


@dataclass(frozen=True)
class TruncatedPowerLawFits:
    r"""Truncated power laws fitted to B samples.

    Attributes:
        mean: ``(B,)``, m, the mean of y.
        tilt: ``(B,)``, c; 1 for the power law.
        scaled_rate: ``(B,)``, :math:`\rho`; 0 if the power law itself is the most likely member.
        log_normaliser: ``(B,)``, :math:`\ln Z(a, r)`, in y.
        log_likelihood_gain: ``(B,)``, mean log-likelihood less that of the fitted power law; at least 0.
    """

    mean: FloatArray
    tilt: FloatArray
    scaled_rate: FloatArray
    log_normaliser: FloatArray
    log_likelihood_gain: FloatArray

    @property
    def rate(self) -> FloatArray:
        r"""``(B,)``, r, the rate of the exponential cutoff in units of :math:`1 / \lambda_K`."""
        return self.scaled_rate / self.mean**2

    @property
    def exponent(self) -> FloatArray:
        r"""``(B,)``, :math:`a = \beta - 1`, the density exponent less one; may be negative."""
        return self.tilt / self.mean - self.rate

    def log_density(self, log_ratios: FloatArray) -> FloatArray:
        """Compute the log density of values of y.

        Args:
            log_ratios: ``(B, K)``, one row for each fit.

        Returns:
            ``(B, K)``.
        """
        mean = self.mean[:, None]
        u = log_ratios / mean
        return (
            -self.tilt[:, None] * u - self.scaled_rate[:, None] * scaled_excess(u, mean) - self.log_normaliser[:, None]
        )


def fit_truncated_power_laws(log_ratios: FloatArray) -> TruncatedPowerLawFits:
    r"""Fit a truncated power law to each row by maximum likelihood.

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
    excess = scaled_excess(log_ratios / mean[:, None], mean[:, None])
    mean_excess = excess.mean(axis=1)

    # Rates below `low` act on no eigenvalue, so a maximum there is the power law.
    low = np.log(1e-6 / excess.max(axis=1))
    high = np.log(10.0 / mean_excess)
    at_power_law = _profile(low, np.ones_like(mean), mean)
    tilt, boundary = at_power_law.tilt, at_power_law.mean_excess <= mean_excess
    above = ~boundary & (_profile(high, tilt, mean).mean_excess > mean_excess)
    while above.any():
        high = np.where(above, high + 1.5, high)
        above &= _profile(high, tilt, mean).mean_excess > mean_excess
    # The bracket spans about 30 in the logarithm: 36 halvings leave 1e-9.
    for _ in range(36):
        middle = 0.5 * (low + high)
        profile = _profile(middle, tilt, mean)
        tilt = profile.tilt
        rising = profile.mean_excess > mean_excess
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)

    scaled_rate = np.exp(0.5 * (low + high))
    profile = _profile(np.log(scaled_rate), tilt, mean)
    # In u, whose mean is 1; the log-likelihood of the power law is -1 there.
    gain = 1.0 - profile.tilt - scaled_rate * mean_excess - profile.log_normaliser
    boundary |= gain <= 0.0
    return TruncatedPowerLawFits(
        mean=mean,
        tilt=np.where(boundary, 1.0, profile.tilt),
        scaled_rate=np.where(boundary, 0.0, scaled_rate),
        log_normaliser=np.log(mean) + np.where(boundary, 0.0, profile.log_normaliser),
        log_likelihood_gain=np.where(boundary, 0.0, gain),
    )


@dataclass(frozen=True)
class _Profile:
    """The most likely tilt for a given rate, and moments there; each ``(B,)``."""

    tilt: FloatArray
    log_normaliser: FloatArray
    mean_excess: FloatArray


def _profile(log_rate: FloatArray, start: FloatArray, mean: FloatArray) -> _Profile:
    """Solve E[u] = 1 for the tilt by a safeguarded Newton iteration."""
    rate = np.exp(log_rate)
    # E[u] falls as the tilt rises. Any rate lowers it below 1 / c, so c is at most 1. At the lower end exp(m (u - 1))
    # has a gamma law of shape t + 1 and rate t, truncated below. There m E[u - 1] is at least digamma(t + 1) - ln t,
    # which is positive.
    low, high = -(rate * np.expm1(mean) / mean + mean), np.ones_like(mean)
    tilt = np.clip(start, low, high)
    for _ in range(60):
        log_normaliser, first, variance, mean_excess = _moments(tilt, rate, mean)
        too_low = first > 1.0
        low, high = np.where(too_low, tilt, low), np.where(too_low, high, tilt)
        step = tilt + (first - 1.0) / variance
        step = np.where((step <= low) | (step >= high), 0.5 * (low + high), step)
        converged = bool((np.abs(step - tilt) <= 1e-9 * (1.0 + np.abs(tilt))).all())
        if converged:
            break
        tilt = step
    return _Profile(tilt, log_normaliser, mean_excess)


def scaled_excess(u: FloatArray, mean: FloatArray | float) -> FloatArray:
    r"""Compute :math:`h(u) = (e^{m u} - 1 - m u) / m^2` without cancellation for small m.

    Args:
        u: any shape, at least 0.
        mean: m, positive, a number or an array that broadcasts to ``u``.

    Returns:
        h(u), in the shape of ``u``.

    Example:
        >>> scaled_excess(np.array([2.0]), 1e-12)
        array([2.])
    """
    x = mean * u
    excess: FloatArray = (np.expm1(x) - x) / mean**2
    if np.any(mean < _SMALL_MEAN):
        small = np.minimum(x, _SERIES_RANGE)
        excess = np.where(x < _SERIES_RANGE, u**2 * np.polynomial.polynomial.polyval(small, _SERIES), excess)
    return excess


@lru_cache(maxsize=1)
def _nodes() -> tuple[FloatArray, FloatArray]:
    nodes, weights = special.roots_legendre(_NUM_NODES)
    return 0.5 * (nodes + 1.0), 0.5 * weights


def _moments(
    tilt: FloatArray, rate: FloatArray, mean: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Compute ln Z, mean and variance of u, and mean of h(u); all arguments and results are ``(B,)``."""
    c, rho, m = tilt[:, None], rate[:, None], mean[:, None]
    peak = np.log1p(np.maximum(-c * m / rho, 0.0)) / m
    height = -c * peak - rho * scaled_excess(peak, m)

    def log_relative(u: FloatArray) -> FloatArray:
        relative: FloatArray = -c * u - rho * scaled_excess(u, m) - height
        return relative

    nodes, weights = _nodes()
    # The exponential cutoff has a width of about 1 in y.
    left, right = _negligible_outside(log_relative, peak, 1.0 / np.maximum(m, 1.0))
    width = right - left
    u = left + width * nodes
    density = width * weights * np.exp(log_relative(u))
    total = density.sum(axis=1)
    density /= total[:, None]
    first = (density * u).sum(axis=1)
    variance = (density * (u - first[:, None]) ** 2).sum(axis=1)
    return np.log(total) + height[:, 0], first, variance, (density * scaled_excess(u, m)).sum(axis=1)


def _negligible_outside(
    log_relative: Callable[[FloatArray], FloatArray], peak: FloatArray, reach: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return an interval around the peak outside which a log-concave density is negligible; all are ``(B, 1)``."""
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
    return left_outside, outside
