r"""Goodness of fit: p-value of the Kolmogorov-Smirnov distance by parametric bootstrap.

Exponent and cutoff are fitted to the tested eigenvalues, so Kolmogorov's distribution rejects too seldom. The
joint law of :math:`\ln(\lambda_i / \lambda_K) / \hat s` does not depend on s. One simulation for each K is
therefore an exact parametric bootstrap with the exponent refitted, for any slope and any unit.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hessian_callback.power_law.fit import PowerLawFit
from hessian_callback.power_law.validation import MIN_EIGENVALUES, FloatArray, checked_draws, checked_integer

__all__ = ["ks_p_value", "simulate_ks_distances"]

# Values simulated at once: some 30 MB of working memory.
_CHUNK = 1_000_000


def ks_p_value(fit: PowerLawFit, *, draws: int = 1000, seed: int = 0) -> float:
    r"""Compute the p-value of the fit error by parametric bootstrap, with the exponent refitted in every draw.

    .. math:: p = \frac{1 + \#\{d^*_b \ge d_{ks}\}}{1 + B}

    The draws for one K and seed are simulated once and cached. All fits with that K share the error of the
    simulation: with 1000 draws, the level of a test at 5 % is 5 +- 0.7 % for that K.

    Proven: the p-value is uniform, up to that error, for independent values of a power law. Assumed: that the
    eigenvalues are independent. Eigenvalues of a matrix repel each other and lie closer to their law than
    independent values do, so p is too large if the law holds.

    Args:
        fit: of the eigenvalues to test.
        draws: B, the number of simulated power laws; the standard error of p is at most
            :math:`1 / (2 \sqrt B)`.
        seed: of the simulation, at least 0.

    Returns:
        p, in (0, 1]: small if a power law seldom has so large a fit error.

    Raises:
        TypeError: if ``draws`` or ``seed`` is not an integer.
        ValueError: if ``draws`` is below 1 or ``seed`` is negative.

    Source:
        Clauset, Shalizi and Newman (2009), with the cutoff given by K instead of fitted.

    Example:
        >>> from hessian_callback.power_law.fit import fit_power_law
        >>> spectrum = np.arange(1.0, 101.0) ** -1.2
        >>> ks_p_value(fit_power_law(spectrum)) > 0.9
        True
        >>> ks_p_value(fit_power_law(np.linspace(2.0, 1.0, 100))) < 0.05
        True
    """
    draws, seed = checked_draws(draws, seed)
    null = _null_distances(fit.num_eigenvalues, draws, seed)
    at_least = null.size - int(np.searchsorted(null, fit.fit_error, side="left"))
    return (1 + at_least) / (1 + null.size)


def simulate_ks_distances(num_eigenvalues: int, draws: int, *, seed: int = 0) -> FloatArray:
    r"""Simulate the fit errors of power laws with K values each.

    Sorted exponential values are drawn by Renyi's representation: the spacings of n sorted values are
    independent and exponential with rates n, n - 1, ..., 1. No sorting is needed.

    Args:
        num_eigenvalues: K, the cutoff included; at least 3.
        draws: B, the number of power laws.
        seed: of the generator, at least 0. Equal K and seed give equal draws.

    Returns:
        ``(B,)``, :math:`d_{ks}` of each power law.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if ``num_eigenvalues`` is below 3, ``draws`` below 1 or ``seed`` negative.

    Source:
        Renyi (1953) for the spacings.

    Example:
        >>> distances = simulate_ks_distances(50, 20_000)
        >>> round(float(np.quantile(distances, 0.95)), 2)
        0.15
    """
    num_eigenvalues = checked_integer(
        num_eigenvalues,
        "num_eigenvalues",
        minimum=MIN_EIGENVALUES,
        remedy=f"a fit needs at least {MIN_EIGENVALUES}",
    )
    draws, seed = checked_draws(draws, seed)
    rng = np.random.default_rng([seed, num_eigenvalues])
    distances = np.empty(draws)
    rows = max(1, _CHUNK // num_eigenvalues)
    # The smallest value is the cutoff, at zero; the spacings are those of the K - 1 above it.
    spacing = 1.0 / np.arange(num_eigenvalues - 1, 0, -1)
    at_or_below = np.arange(2, num_eigenvalues + 1) / num_eigenvalues
    for start in range(0, draws, rows):
        stop = min(start + rows, draws)
        values = rng.standard_exponential((stop - start, num_eigenvalues - 1))
        # The sum of the sorted values is that of the spacings before they are scaled.
        slope = values.sum(axis=1, keepdims=True) / num_eigenvalues
        values *= spacing
        np.cumsum(values, axis=1, out=values)
        values /= -slope
        np.expm1(values, out=values)
        # The values are now minus the fitted law, so both signs are reversed.
        above = (values + at_or_below).max(axis=1)
        below = (-values - at_or_below).max(axis=1) + 1.0 / num_eigenvalues
        # At the cutoff the law is 0 and the empirical distribution is 1 / K.
        distances[start:stop] = np.maximum(np.maximum(above, below), 1.0 / num_eigenvalues)
    return distances


@lru_cache(maxsize=64)
def _null_distances(num_eigenvalues: int, draws: int, seed: int) -> FloatArray:
    null = np.sort(simulate_ks_distances(num_eigenvalues, draws, seed=seed))
    null.setflags(write=False)
    return null
