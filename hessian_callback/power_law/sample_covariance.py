r"""Null law of sample covariances with a power-law population: slope without bias, interval, critical fit error.

The critical values and intervals of `fit_power_law` are exact for independent eigenvalues. Eigenvalues of a matrix
repel each other, so slopes and fit errors scatter less. A finite sample changes the slope and bends the spectrum. Both
effects are simulated here for

.. math:: S = \frac{1}{N} \sum_{n=1}^{N} x_n x_n^T, \qquad
    x_n \sim \mathcal{N}(0, \Sigma), \qquad \lambda_k(\Sigma) = k^{-s}, \quad k \le P,

with the number of samples N, the number of parameters P and the number of fitted eigenvalues K.

A Hessian is such a matrix only approximately. N is the number of independent terms of equal size. A Gauss-Newton
matrix has C - 1 terms a sample for C classes, of different sizes: `effective_num_samples` counts them. Without these
sizes N is unknown, and a wrong N biases the slope for N below 10 K.
``python -m benchmarks.statistics_report --only population`` measures size and coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize

from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.validation import (
    MIN_EIGENVALUES,
    Eigenvalues,
    FloatArray,
    checked_draws,
    checked_integer,
    positive_eigenvalues,
)

__all__ = [
    "PopulationFit",
    "effective_num_samples",
    "fit_population",
    "jackknife",
    "simulate_sample_covariances",
]

# Number of simulated population eigenvalues for each fitted one, if N is large, for steep and for flat populations; and
# if N is small, where the matrix has size N. The others are replaced by their effect.
_HEAD_STEEP, _HEAD_FLAT, _HEAD_FEW_SAMPLES = 5, 16, 40
# Slope below which a population is flat.
_FLAT = 0.7
# Nodes of the integral over the other population eigenvalues.
_TAIL_NODES = 48
# Spacing of the tabulated slopes on a logarithmic scale.
_STEP = 0.2
# The search ends at this slope, and at one where the Kth population eigenvalue comes near the rounding of the first.
_SMALLEST_SLOPE = 0.02
_LARGEST_LOG_RANGE = 18.0


@dataclass(frozen=True)
class PopulationFit:
    r"""A power-law population fitted to the spectrum of a sample covariance.

    Attributes:
        fit: the power law fitted to the eigenvalues, see `fit_power_law`.
        slope: s of the population whose samples have a mean slope of ``fit.slope``.
        p_value: share of simulated samples of that population with at least the fit error of ``fit``.
        critical_distance: simulated 95 % quantile of their fit error.
        num_samples: N.
        num_parameters: P.
        draws: number of simulated sample covariances for each tabulated slope.
        seed: of the simulation.

    Example:
        >>> spectrum = simulate_sample_covariances(1.0, 10, num_samples=100, num_parameters=30, draws=1)[0]
        >>> found = fit_population(spectrum, num_samples=100, num_parameters=30, draws=50)
        >>> low, high = found.slope_interval(0.9)
        >>> low < found.slope < high
        True
    """

    fit: PowerLawFit
    slope: float
    p_value: float
    critical_distance: float
    num_samples: int
    num_parameters: int
    draws: int
    seed: int

    @property
    def within_critical_distance(self) -> bool:
        """Verdict at a level of 5 % for a sample covariance: ``fit.fit_error < critical_distance``."""
        return self.fit.fit_error < self.critical_distance

    @property
    def slope_stderr(self) -> float:
        """Standard error of ``slope``, half of the interval at 68.27 %."""
        low, high = self.slope_interval(0.6827)
        return 0.5 * (high - low)

    def slope_interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Compute a confidence interval of the population's slope.

        It has the slopes s at which :math:`\hat s` lies between the quantiles :math:`(1 - level)/2` and
        :math:`(1 + level)/2` of the simulated slopes.

        Args:
            level: coverage, in (0, 1).

        Returns:
            ``(low, high)``, with equal tails and without unit.

        Raises:
            ValueError: if ``level`` is outside (0, 1), or an end lies outside the range of the simulated slopes.

        Source:
            Neyman (1937).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level is {level}; give the coverage as a fraction, such as 0.95")
        null = _Null(self.fit.num_eigenvalues, self.num_samples, self.num_parameters, self.draws, self.seed)
        tail = 0.5 * (1.0 - level)
        low = null.solve(lambda slopes: float(np.quantile(slopes, 1.0 - tail)), self.fit.slope)
        high = null.solve(lambda slopes: float(np.quantile(slopes, tail)), self.fit.slope)
        return low, high


def fit_population(
    eigenvalues: Eigenvalues,
    *,
    num_samples: int,
    num_parameters: int,
    num_eigenvalues: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> PopulationFit:
    r"""Fit a power-law population to the spectrum of a sample covariance.

    .. math:: \mathrm{E}[\hat s(S) \mid s, N, P, K] = \hat s

    is solved for s. The laws of the slope and of the fit error are simulated for tabulated slopes, a factor of
    :math:`e^{0.2}` apart, and interpolated between four of them. The table for one K, N, P, ``draws`` and ``seed`` is
    made when needed and cached, so later fits, such as those of the other measurements of a run, take milliseconds.

    Measured, not proven: size and coverage. Assumed: independent Gaussian samples, and a power law of all P population
    eigenvalues.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_samples: N, at least K.
        num_parameters: P, at least K.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        draws: number of sample covariances for each of about five tabulated slopes. Each costs an eigenvalue
            decomposition of size min(N, P, 5 K), for slopes below .7 of size min(N, P, 16 K). With 1000 draws the level
            of the test at 5 % is 5 +- 0.7 %, with 500 draws 5 +- 1 %.
        seed: of the simulation, at least 0.

    Returns:
        The fit, see `PopulationFit`.

    Raises:
        TypeError: as `fit_power_law`, or if an option is not an integer.
        ValueError: as `fit_power_law`; if N or P is below K; if no slope between 0.02 and 18 / ln K explains the
            spectrum.

    Source:
        Clauset, Shalizi and Newman (2009) for the bootstrap with refitted exponent; the null law is ours.

    Example:
        >>> spectra = simulate_sample_covariances(1.0, 20, num_samples=60, num_parameters=80, draws=1, seed=8)
        >>> found = fit_population(spectra[0], num_samples=60, num_parameters=80, draws=50)
        >>> abs(found.slope - 1.0) < 0.2, found.p_value > 0.01
        (True, True)
    """
    draws, seed = checked_draws(draws, seed)
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues)
    null = _Null(fit.num_eigenvalues, *_checked_size(fit.num_eigenvalues, num_samples, num_parameters), draws, seed)
    slope = null.solve(lambda slopes: float(slopes.mean()), fit.slope)
    distances = null.distances(slope)
    return PopulationFit(
        fit=fit,
        slope=slope,
        p_value=(1 + int(np.count_nonzero(distances >= fit.fit_error))) / (1 + draws),
        critical_distance=float(np.quantile(distances, 0.95)),
        num_samples=num_samples,
        num_parameters=num_parameters,
        draws=draws,
        seed=seed,
    )


def simulate_sample_covariances(
    slope: float, num_eigenvalues: int, *, num_samples: int, num_parameters: int, draws: int, seed: int = 0
) -> FloatArray:
    r"""Simulate the largest eigenvalues of sample covariances with population eigenvalues :math:`k^{-s}`.

    The first h population eigenvalues are simulated exactly, with Bartlett's triangular factor if N is at least h.
    h is 5 K, or 16 K for slopes below .7, or 40 K if N is below that. The effect of the others,
    :math:`\lambda_j` with :math:`h < j \le P`, is the ridge

    .. math:: \ell \to \ell + \frac{1}{N} \sum_{j > h} \lambda_j
        \Big(1 + \Big(1 - \frac{\min(h, N)}{N}\Big) \frac{\lambda_j}{\ell - \lambda_j}\Big)

    after a Gaussian orthogonal matrix with variance :math:`\sum_{j > h} \lambda_j^2 / N^2` was added. Measured: the
    mean slope differs from that of direct simulations by at most 1 % for slopes from 0.5.

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
        Bartlett (1933) for the triangular factor of a Wishart matrix; Marchenko and Pastur (1967) for the ridge.

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
    num_samples, num_parameters = _checked_size(num_eigenvalues, num_samples, num_parameters)
    head = (_HEAD_FLAT if slope < _FLAT else _HEAD_STEEP) * num_eigenvalues
    if num_samples < head:
        head = _HEAD_FEW_SAMPLES * num_eigenvalues
    head = min(num_parameters, head)
    rank = min(head, num_samples)
    scale = np.arange(1.0, head + 1) ** (-0.5 * slope)
    tail, count = _tail(slope, head, num_parameters)
    noise = math.sqrt(0.5 * float(count @ tail**2)) / num_samples
    spectra = np.empty((draws, num_eigenvalues))
    for row in range(draws):
        rng = np.random.default_rng([seed, row])
        factor = scale[:, None] * _wishart_factor(head, num_samples, rng)
        gram = (factor.T @ factor if num_samples < head else factor @ factor.T) / num_samples
        if noise:
            added = noise * rng.standard_normal(gram.shape)
            gram += added + added.T
        spectra[row] = np.linalg.eigvalsh(gram)[::-1][:num_eigenvalues]
    for start in range(0, draws, 100):
        some = spectra[start : start + 100, :, None]
        # A value below those of the tail is none of a sample covariance; it gets the ridge alone.
        ratio = np.where(some > tail, tail / np.maximum(some - tail, 1e-300), 0.0)
        spectra[start : start + 100] += (1.0 + (1.0 - rank / num_samples) * ratio) @ (count * tail) / num_samples
    return spectra


def effective_num_samples(sizes: Eigenvalues) -> float:
    r"""Compute the number of terms of equal size that scatter as much as terms of the given sizes.

    .. math:: N_\mathrm{eff} = \frac{(\sum_n a_n)^2}{\sum_n a_n^2}

    Args:
        sizes: ``(n,)``, :math:`a_n`, the trace of each independent term of the matrix; zeros are left out.

    Returns:
        :math:`N_\mathrm{eff}`, between 1 and n.

    Raises:
        TypeError: if the sizes are not real numbers.
        ValueError: if they are not one-dimensional, not finite, negative or all zero.

    Source:
        Kish (1965), for weighted samples.

    Example:
        >>> effective_num_samples([2.0, 2.0, 2.0]), effective_num_samples([1.0, 0.0, 0.0])
        (3.0, 1.0)
    """
    values, num_dropped = positive_eigenvalues(sizes)
    if not values.size or (num_dropped and min(map(float, sizes)) < 0.0):
        raise ValueError("sizes must not be negative or all zero; pass the trace of each term")
    relative = values / values[0]
    return float(relative.sum() ** 2 / (relative @ relative))


def jackknife(
    whole: Eigenvalues | float, parts: Eigenvalues | Sequence[Eigenvalues], *, fraction: float = 0.5
) -> FloatArray:
    r"""Extrapolate slopes or eigenvalues to infinitely many samples, from parts of the samples.

    .. math:: \hat x_\infty = \frac{\hat x - f \, \bar x_f}{1 - f}

    removes a bias in proportion to 1/N. With the halves of the extra ``split_half``, f is 1/2. If the parts leave out
    one of B batches, f is (B - 1) / B. A slope is less linear in 1/N than eigenvalues are, so extrapolate the
    eigenvalues if they are available, and fit the result. Its slope is that of the K largest population eigenvalues,
    not the exponent of their law.

    Measured, not proven: ``python -m benchmarks.statistics_report --only correction`` has bias and variance.

    Args:
        whole: :math:`\hat x` on all N samples; a slope, or ``(K,)`` descending eigenvalues.
        parts: ``(B,)`` or ``(B, K)``, the same on parts of f N samples each, which together contain every sample
            equally often.
        fraction: f, in (0, 1).

    Returns:
        :math:`\hat x_\infty`, of the shape of ``whole``. Extrapolated eigenvalues may be out of order or negative.

    Raises:
        ValueError: if ``fraction`` is outside (0, 1), shapes do not match, there are no parts, or a value is not
            finite.

    Source:
        Quenouille (1956).

    Example:
        >>> float(jackknife(1.1, [1.15, 1.25]).round(3))
        1.0
        >>> jackknife([4.0, 2.0, 1.5], [[4.5, 2.5, 2.0], [4.5, 2.5, 2.0]])
        array([3.5, 1.5, 1. ])
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction is {fraction}; give the share of the samples in a part, such as 0.5 for halves")
    all_samples, some = np.asarray(whole, dtype=np.float64), np.asarray(parts, dtype=np.float64)
    if some.ndim != all_samples.ndim + 1 or some.shape[1:] != all_samples.shape or not len(some):
        raise ValueError(
            f"whole has shape {all_samples.shape} and parts have {some.shape}; pass parts with one entry, of the shape "
            "of whole, for each part of the samples"
        )
    if not (np.isfinite(all_samples).all() and np.isfinite(some).all()):
        raise ValueError("a value is NaN or infinite; leave out parts without a result")
    result: FloatArray = (all_samples - fraction * some.mean(axis=0)) / (1.0 - fraction)
    return result


class _Null:
    """The laws of slope and fit error for one K, N and P, interpolated between tabulated slopes."""

    def __init__(self, num_eigenvalues: int, num_samples: int, num_parameters: int, draws: int, seed: int) -> None:
        self._size = (num_eigenvalues, num_samples, num_parameters, draws, seed)

    def slopes(self, slope: float) -> FloatArray:
        """Return the simulated slopes at a population slope, ascending; ``(draws,)``."""
        return np.exp(self._interpolated(slope, 0))

    def distances(self, slope: float) -> FloatArray:
        """Return the simulated fit errors at a population slope, ascending; ``(draws,)``."""
        return np.exp(self._interpolated(slope, 1))

    def solve(self, statistic: Callable[[FloatArray], float], target: float) -> float:
        """Find the population slope at which an increasing statistic of the simulated slopes equals the target."""
        largest = _LARGEST_LOG_RANGE / math.log(self._size[0])
        low = high = target
        while _SMALLEST_SLOPE <= low <= largest and statistic(self.slopes(low)) > target:
            low /= 1.2
        while _SMALLEST_SLOPE <= high <= largest and statistic(self.slopes(high)) < target:
            high *= 1.2
        if low < _SMALLEST_SLOPE or high > largest:
            raise ValueError(
                f"no population with a slope between {_SMALLEST_SLOPE} and {largest:.3g} has samples with a slope of "
                f"{target:.3g}; check num_samples and num_parameters, or fit fewer eigenvalues"
            )
        if low == high:
            return target
        return float(
            optimize.brentq(lambda slope: statistic(self.slopes(slope)) - target, low, high, xtol=1e-6 * target)
        )

    def _interpolated(self, slope: float, which: int) -> FloatArray:
        position = math.log(slope) / _STEP
        nodes = [math.floor(position) + offset for offset in (-1, 0, 1, 2)]
        values = np.zeros(self._size[3])
        for node in nodes:
            # Lagrange's polynomial of the node.
            weight = math.prod((position - other) / (node - other) for other in nodes if other != node)
            values += weight * _tabulated(node, *self._size)[which]
        return values


# 128 tabulated slopes with 1000 draws take 2 MB.
@lru_cache(maxsize=128)
def _tabulated(
    node: int, num_eigenvalues: int, num_samples: int, num_parameters: int, draws: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Return logarithms of slopes and fit errors, each ascending; every node has the same random numbers."""
    spectra = simulate_sample_covariances(
        math.exp(_STEP * node),
        num_eigenvalues,
        num_samples=num_samples,
        num_parameters=num_parameters,
        draws=draws,
        seed=seed,
    )
    fits = [fit_power_law(spectrum) for spectrum in spectra]
    found = np.sort(np.log([[fit.slope for fit in fits], [fit.fit_error for fit in fits]]), axis=1)
    found.setflags(write=False)
    return found[0], found[1]


def _checked_size(num_eigenvalues: int, num_samples: int, num_parameters: int) -> tuple[int, int]:
    remedy = f"give at least K = {num_eigenvalues}"
    return (
        checked_integer(num_samples, "num_samples", minimum=num_eigenvalues, remedy=remedy),
        checked_integer(num_parameters, "num_parameters", minimum=num_eigenvalues, remedy=remedy),
    )


def _wishart_factor(size: int, num_samples: int, rng: np.random.Generator) -> FloatArray:
    """Draw A such that A A^T is a Wishart matrix with N degrees of freedom; ``(size, size)`` or ``(size, N)``."""
    if num_samples < size:
        return rng.standard_normal((size, num_samples))
    factor = np.tril(rng.standard_normal((size, size)), -1)
    factor[np.diag_indices(size)] = np.sqrt(rng.chisquare(num_samples - np.arange(size)))
    return factor


def _tail(slope: float, after: int, last: int) -> tuple[FloatArray, FloatArray]:
    """Represent the population eigenvalues k^-s with after < k <= last by values and numbers of each."""
    if last == after:
        return np.zeros(0), np.zeros(0)
    start, stop = math.log(after + 0.5), math.log(last + 0.5)
    points, weights = np.polynomial.legendre.leggauss(_TAIL_NODES)
    log_rank = start + 0.5 * (stop - start) * (1.0 + points)
    return np.exp(-slope * log_rank), 0.5 * (stop - start) * weights * np.exp(log_rank)
