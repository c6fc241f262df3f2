r"""How unusual a fit error is: the null distribution of the Kolmogorov-Smirnov distance.

Exponent and cutoff are fitted to the eigenvalues tested, so Kolmogorov's distribution is too lenient. But
:math:`\ln(\lambda_i / \lambda_K) / \hat s` has the same joint law whatever s is: one simulation for each K
is an exact parametric bootstrap with the exponent refitted, for any slope and any unit.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hessian_callback.power_law.fit import MIN_EIGENVALUES, FloatArray, PowerLawFit

__all__ = ["ks_p_value", "simulate_ks_distances"]

# Values simulated at once: some 30 MB of working memory.
_CHUNK = 1_000_000


def ks_p_value(fit: PowerLawFit, *, draws: int = 1000, seed: int = 0) -> float:
    r"""Parametric-bootstrap p-value of the fit error, with the exponent refitted in every draw.

    .. math:: p = \frac{1 + \#\{d^*_b \ge d_{ks}\}}{1 + B}

    Draws of one K and seed are simulated once and kept, so later fits with that K cost a search only. They
    share the simulation's error, too: with 1000 draws a test at 5 % has a level of 5 +- 0.7 % for that K.

    Args:
        fit: of the eigenvalues in question.
        draws: B, the number of power laws simulated; the standard error of p is at most
            :math:`1 / (2 \sqrt B)`.
        seed: of the simulation.

    Returns:
        p, in (0, 1]: small where a power law would seldom fit so badly. Eigenvalues of a matrix repel each
        other and lie closer to their law than independent values do, so it errs on the side of the law.

    Raises:
        ValueError: if ``draws`` is below 1.

    Source:
        Clauset, Shalizi and Newman (2009), with the cutoff given by K instead of chosen.

    Example:
        >>> from hessian_callback.power_law.fit import fit_power_law
        >>> spectrum = np.arange(1.0, 101.0) ** -1.2
        >>> ks_p_value(fit_power_law(spectrum)) > 0.9
        True
        >>> ks_p_value(fit_power_law(np.linspace(2.0, 1.0, 100))) < 0.05
        True
    """
    null = _null_distances(fit.num_eigenvalues, draws, seed)
    at_least = null.size - int(np.searchsorted(null, fit.fit_error, side="left"))
    return (1 + at_least) / (1 + null.size)


def simulate_ks_distances(num_eigenvalues: int, draws: int, *, seed: int = 0) -> FloatArray:
    r"""Fit errors of simulated power laws with K values each.

    Sorted exponential values are drawn by Renyi's representation: the spacings of n sorted values are
    independent and exponential with rates n, n - 1, ..., 1, so nothing has to be sorted.

    Args:
        num_eigenvalues: K, the cutoff among them; at least 3.
        draws: B, the number of power laws.
        seed: of the generator; the same for the same K gives the same draws.

    Returns:
        ``(B,)``, :math:`d_{ks}` of each, in the order drawn.

    Raises:
        ValueError: if ``num_eigenvalues`` is below 3 or ``draws`` below 1.

    Example:
        >>> distances = simulate_ks_distances(50, 20_000)
        >>> round(float(np.quantile(distances, 0.95)), 2)
        0.15
    """
    if num_eigenvalues < MIN_EIGENVALUES:
        raise ValueError(f"num_eigenvalues is {num_eigenvalues}; a fit needs at least {MIN_EIGENVALUES}")
    if draws < 1:
        raise ValueError(f"draws is {draws}; simulate at least one power law, better 1000")
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
        # Now minus the fitted law, so both signs are turned.
        above = (values + at_or_below).max(axis=1)
        below = (-values - at_or_below).max(axis=1) + 1.0 / num_eigenvalues
        # At the cutoff itself the law is 0 and the empirical distribution 1 / K.
        distances[start:stop] = np.maximum(np.maximum(above, below), 1.0 / num_eigenvalues)
    return distances


@lru_cache(maxsize=64)
def _null_distances(num_eigenvalues: int, draws: int, seed: int) -> FloatArray:
    null = np.sort(simulate_ks_distances(num_eigenvalues, draws, seed=seed))
    null.setflags(write=False)
    return null
