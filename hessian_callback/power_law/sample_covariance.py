r"""Power-law population of a sample covariance: slope without bias, its standard error, and a goodness-of-fit test.

The critical values and intervals of `fit_power_law` are exact for independent eigenvalues. Eigenvalues of a matrix
repel each other, so slopes and fit errors scatter less. A finite sample changes the slope and bends the spectrum. Both
effects are simulated here for

.. math:: S = \frac{1}{N} \sum_{n=1}^{N} x_n x_n^T, \qquad
    x_n \sim \mathcal{N}(0, \Sigma), \qquad \lambda_k(\Sigma) = k^{-s}, \quad k \le P,

with the number of samples N, the number of parameters P and the number of fitted eigenvalues K.

A Hessian is such a matrix only approximately. If the terms of different samples are dependent, or their size varies
from sample to sample, the number of independent samples is below N, and the slope is biased for N below 10 K.
``python -m benchmarks.statistics_report --only population`` measures size and coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.validation import (
    MIN_EIGENVALUES,
    Eigenvalues,
    FloatArray,
    checked_draws,
    checked_integer,
)

__all__ = ["PopulationFit", "fit_population", "simulate_sample_covariances"]

# Number of simulated population eigenvalues for each fitted one. The others are a random matrix with their moments.
_HEAD = 10
# Spectra for the mean slope at each trial slope. Their number adds 1.5 % to the standard error.
_CALIBRATION_DRAWS = 32
# Range of the search.
_SMALLEST_SLOPE, _LARGEST_SLOPE = 0.02, 20.0


@dataclass(frozen=True)
class PopulationFit:
    r"""A power-law population fitted to the spectrum of a sample covariance.

    Attributes:
        fit: the power law fitted to the eigenvalues, see `fit_power_law`.
        slope: s of the population whose samples have a mean slope of ``fit.slope``.
        slope_stderr: standard error of ``slope``.
        p_value: share of simulated samples of that population with at least the fit error of ``fit``.
        critical_distance: simulated 95 % quantile of their fit error.
        num_samples: N.
        num_parameters: P.

    Example:
        >>> spectrum = simulate_sample_covariances(1.0, 10, num_samples=100, num_parameters=30, draws=1)[0]
        >>> found = fit_population(spectrum, num_samples=100, num_parameters=30, draws=50)
        >>> low, high = found.slope_interval(0.99)
        >>> low < found.slope < high
        True
    """

    fit: PowerLawFit
    slope: float
    slope_stderr: float
    p_value: float
    critical_distance: float
    num_samples: int
    num_parameters: int

    def slope_interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Compute a confidence interval of the population's slope, :math:`s \pm z \, \sigma_s`.

        Args:
            level: coverage, in (0, 1).

        Returns:
            ``(low, high)``, symmetric about ``slope``, with quantiles of the normal law.

        Raises:
            ValueError: if ``level`` is outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level is {level}; give the coverage as a fraction, such as 0.95")
        half = float(special.ndtri(0.5 * (1.0 + level))) * self.slope_stderr
        return self.slope - half, self.slope + half


def fit_population(
    eigenvalues: Eigenvalues,
    *,
    num_samples: int,
    num_parameters: int,
    num_eigenvalues: int | None = None,
    draws: int = 200,
    seed: int = 0,
) -> PopulationFit:
    r"""Fit a power-law population to the spectrum of a sample covariance, by simulation.

    .. math:: \mathrm{E}[\hat s(S) \mid s, N, P, K] = \hat s

    is solved for s. Samples of that population then give the standard error of s and the null law of the fit error.

    Measured, not proven: size and coverage. Assumed: independent Gaussian samples, and a power law of all P population
    eigenvalues.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_samples: N, at least K.
        num_parameters: P, at least K.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        draws: number of sample covariances to simulate, beside about 300 for ``slope``. Each costs an eigenvalue
            decomposition of size min(N, P, 10 K), or of size min(N, 20 K) if P is above 10 K.
        seed: of the simulation, at least 0.

    Returns:
        The fit, see `PopulationFit`.

    Raises:
        TypeError: as `fit_power_law`, or if an option is not an integer.
        ValueError: as `fit_power_law`; if N or P is below K; if no slope between 0.02 and 20 explains the spectrum.

    Source:
        Clauset, Shalizi and Newman (2009) for the bootstrap with refitted exponent; the null law is ours.

    Example:
        >>> spectra = simulate_sample_covariances(1.0, 20, num_samples=60, num_parameters=80, draws=1, seed=8)
        >>> found = fit_population(spectra[0], num_samples=60, num_parameters=80)
        >>> low, high = found.slope_interval()
        >>> low < 1.0 < high, high - low < 0.25, found.p_value > 0.05
        (True, True, True)
    """
    draws, seed = checked_draws(draws, seed)
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues)
    size = {"num_samples": num_samples, "num_parameters": num_parameters}

    def mean_slope(slope: float) -> float:
        # The same random numbers for every slope, so that the mean is smooth in it.
        spectra = simulate_sample_covariances(
            slope, fit.num_eigenvalues, **size, draws=_CALIBRATION_DRAWS, seed=seed + 1
        )
        return float((np.log(spectra) - np.log(spectra[:, -1:])).mean())

    slope = _solve(mean_slope, fit.slope)
    step = 0.05 * slope
    derivative = (mean_slope(slope + step) - mean_slope(slope - step)) / (2.0 * step)
    simulated = [
        fit_power_law(spectrum)
        for spectrum in simulate_sample_covariances(slope, fit.num_eigenvalues, **size, draws=draws, seed=seed)
    ]
    deviation = float(np.std([other.slope for other in simulated], ddof=1)) * math.sqrt(1.0 + 1.0 / _CALIBRATION_DRAWS)
    distances = np.array([other.fit_error for other in simulated])
    return PopulationFit(
        fit=fit,
        slope=slope,
        slope_stderr=deviation / derivative,
        p_value=(1 + int(np.count_nonzero(distances >= fit.fit_error))) / (1 + draws),
        critical_distance=float(np.quantile(distances, 0.95)),
        num_samples=num_samples,
        num_parameters=num_parameters,
    )


def simulate_sample_covariances(
    slope: float, num_eigenvalues: int, *, num_samples: int, num_parameters: int, draws: int, seed: int = 0
) -> FloatArray:
    r"""Simulate the largest eigenvalues of sample covariances with population eigenvalues :math:`k^{-s}`.

    Bartlett's triangular factor replaces the samples if N is at least the dimension. The simulation is exact for P up
    to 10 K. For larger P, the Gram matrix of the population eigenvalues beyond the first 10 K is replaced by a multiple
    of the identity plus a Gaussian orthogonal matrix with the same first two moments, of size at most 20 K.

    Args:
        slope: s, positive.
        num_eigenvalues: K, at least 3.
        num_samples: N, at least K.
        num_parameters: P, at least K.
        draws: B, the number of sample covariances.
        seed: of the generator, at least 0.

    Returns:
        ``(B, K)``, descending, in units of the largest population eigenvalue.

    Raises:
        TypeError: if an option that counts is not an integer.
        ValueError: if ``slope`` is not positive and finite, K is below 3, or N or P is below K.

    Source:
        Bartlett (1933) for the triangular factor of a Wishart matrix.

    Example:
        >>> simulate_sample_covariances(1.0, 5, num_samples=10_000, num_parameters=50, draws=2).round(1)[0, :2]
        array([1. , 0.5])
    """
    draws, seed = checked_draws(draws, seed)
    if not 0.0 < slope < math.inf:
        raise ValueError(f"slope is {slope}; give a positive number")
    num_eigenvalues = checked_integer(
        num_eigenvalues, "num_eigenvalues", minimum=MIN_EIGENVALUES, remedy=f"take at least {MIN_EIGENVALUES}"
    )
    for value, name in ((num_samples, "num_samples"), (num_parameters, "num_parameters")):
        checked_integer(value, name, minimum=num_eigenvalues, remedy=f"give at least K = {num_eigenvalues}")
    head = min(num_parameters, _HEAD * num_eigenvalues)
    scale = np.arange(1.0, head + 1) ** (-0.5 * slope)
    shift = _power_sum(slope, head, num_parameters) / num_samples
    noise = math.sqrt(_power_sum(2.0 * slope, head, num_parameters))
    spectra = np.empty((draws, num_eigenvalues))
    for row in range(draws):
        rng = np.random.default_rng([seed, row])
        factor = scale[:, None] * _wishart_factor(head, num_samples, rng)
        gram = factor.T @ factor if noise or num_samples < head else factor @ factor.T
        if noise:
            gram = _with_noise(gram, min(num_samples, 2 * head), noise, rng)
        spectra[row] = np.linalg.eigvalsh(gram)[::-1][:num_eigenvalues] / num_samples + shift
    return spectra


def _with_noise(gram: FloatArray, size: int, deviation: float, rng: np.random.Generator) -> FloatArray:
    """Enlarge a matrix with zeros and add a Gaussian orthogonal matrix; ``(size, size)``."""
    noise = rng.standard_normal((size, size))
    noise = (deviation / math.sqrt(2.0)) * (noise + noise.T)
    noise[: len(gram), : len(gram)] += gram
    return noise


def _wishart_factor(size: int, num_samples: int, rng: np.random.Generator) -> FloatArray:
    """Draw A such that A A^T is a Wishart matrix with N degrees of freedom; ``(size, size)`` or ``(size, N)``."""
    if num_samples < size:
        return rng.standard_normal((size, num_samples))
    factor = np.tril(rng.standard_normal((size, size)), -1)
    factor[np.diag_indices(size)] = np.sqrt(rng.chisquare(num_samples - np.arange(size)))
    return factor


def _power_sum(slope: float, after: int, last: int) -> float:
    """Compute the sum of k^-s over after < k <= last, by the midpoint rule; its relative error is below 1 / after^2."""
    if last == after:
        return 0.0
    start, stop = math.log(after + 0.5), math.log(last + 0.5)
    # The integral of exp((1 - s) t) over t = ln k.
    mean = 0.5 * (1.0 - slope) * (start + stop)
    half = 0.5 * (1.0 - slope) * (stop - start)
    return (stop - start) * math.exp(mean) * (math.sinh(half) / half if half else 1.0)


def _solve(mean_slope: Callable[[float], float], target: float) -> float:
    """Find the population slope whose samples have the target as their mean slope."""
    low, high = target / 1.5, target * 1.5
    while low >= _SMALLEST_SLOPE and mean_slope(low) > target:
        low /= 2.0
    while high <= _LARGEST_SLOPE and mean_slope(high) < target:
        high *= 2.0
    if low < _SMALLEST_SLOPE or high > _LARGEST_SLOPE:
        raise ValueError(
            f"no population with a slope between {_SMALLEST_SLOPE} and {_LARGEST_SLOPE} has samples with a mean slope "
            f"of {target:.3g}; check num_samples and num_parameters, or fit fewer eigenvalues"
        )
    # Much smaller than the standard error, which is above 1 %.
    return float(optimize.brentq(lambda slope: mean_slope(slope) - target, low, high, xtol=1e-3 * target))
