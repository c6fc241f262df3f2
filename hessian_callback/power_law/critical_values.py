r"""Critical values of the Kolmogorov-Smirnov distance between eigenvalues and their fitted power law.

They are tabulated, so that a verdict needs no simulation. `goodness_of_fit.ks_p_value` simulates a p-value for
any level.
"""

from __future__ import annotations

import math
from typing import Literal

from hessian_callback.power_law.validation import MIN_EIGENVALUES, checked_integer

__all__ = ["critical_distance"]

# Asymptotic quantiles of sqrt(K) d_ks for a known exponent (Kolmogorov), rounded as in the paper.
_KNOWN_EXPONENT = {0.20: 1.07, 0.15: 1.14, 0.10: 1.22, 0.05: 1.36, 0.01: 1.63}

# The same quantiles if exponent and cutoff come from the tested eigenvalues, simulated by
# `benchmarks.critical_values` (2e5 to 2e6 draws for each K). Up to K = 20 there is one value for each K. Above,
# the quantile is a + b / sqrt(K) + c / K, with the limit a. Two standard errors of Monte Carlo are .001 in the
# 5 % row and .002 in the 1 % row. The limit at 5 % agrees with the 1.094 of the literature.
# fmt: off
_FITTED_EXPONENT_SMALL_K: dict[float, tuple[float, ...]] = {
    0.20: (
        0.754, 0.829, 0.824, 0.811, 0.824, 0.832, 0.836, 0.837, 0.838,
        0.839, 0.841, 0.843, 0.844, 0.846, 0.847, 0.847, 0.848, 0.850,
    ),
    0.15: (
        0.806, 0.872, 0.858, 0.857, 0.872, 0.878, 0.880, 0.881, 0.882,
        0.885, 0.887, 0.889, 0.890, 0.891, 0.893, 0.894, 0.895, 0.896,
    ),
    0.10: (
        0.914, 0.919, 0.894, 0.923, 0.934, 0.936, 0.938, 0.940, 0.944,
        0.947, 0.948, 0.950, 0.951, 0.952, 0.954, 0.955, 0.956, 0.958,
    ),
    0.05: (
        1.030, 0.976, 1.006, 1.022, 1.024, 1.025, 1.033, 1.038, 1.039,
        1.041, 1.043, 1.045, 1.048, 1.049, 1.050, 1.052, 1.053, 1.054,
    ),
    0.01: (
        1.129, 1.199, 1.207, 1.198, 1.219, 1.224, 1.227, 1.232, 1.235,
        1.238, 1.240, 1.242, 1.245, 1.245, 1.248, 1.250, 1.253, 1.253,
    ),
}
_FITTED_EXPONENT_LARGE_K: dict[float, tuple[float, float, float]] = {
    0.20: (0.8848, -0.1684, 0.0493),
    0.15: (0.9322, -0.1672, 0.0252),
    0.10: (0.9951, -0.1721, 0.0203),
    0.05: (1.0937, -0.1675, -0.0467),
    0.01: (1.2945, -0.1774, -0.0598),
}
# fmt: on


def critical_distance(
    num_eigenvalues: int, *, level: float = 0.05, exponent: Literal["fitted", "known"] = "fitted"
) -> float:
    r"""Compute the Kolmogorov-Smirnov distance at which a power law is rejected.

    .. math:: d_c = c_K(\alpha) / \sqrt{K}

    With ``exponent="known"`` :math:`c` is the constant of the paper, Kolmogorov's asymptotic quantile (1.36 at
    5 %). It assumes that the exponent was known beforehand. With ``exponent="fitted"`` :math:`c_K` is the
    simulated quantile for exponent and cutoff taken from the same K eigenvalues (about 1.07 at K = 50 and 1.09
    at K = 1000, at 5 %). It does not depend on the slope: under a power law the logarithms of the values over
    their smallest are exponential, and dividing them by their mean removes the scale.

    Both assume independent eigenvalues. Eigenvalues of a matrix repel each other, so the level is below the
    nominal one for a matrix whose spectrum follows the law.

    Args:
        num_eigenvalues: K, the number of fitted eigenvalues, the cutoff included; at least 3.
        level: probability of rejecting a true power law; one of 0.20, 0.15, 0.10, 0.05, 0.01.
        exponent: ``"fitted"`` if the exponent was fitted to the same eigenvalues, as `fit_power_law` does.

    Returns:
        The distance, without unit, in (0, 1).

    Raises:
        TypeError: if ``num_eigenvalues`` is not an integer.
        ValueError: if ``num_eigenvalues`` is below 3, or ``level`` or ``exponent`` is not listed above.

    Source:
        ``"known"``: Tang et al., ICML 2025. ``"fitted"``: simulation, after Lilliefors (1969).

    Example:
        >>> round(critical_distance(1000), 4), round(critical_distance(50), 3)
        (0.0344, 0.151)
        >>> round(critical_distance(1000, exponent="known"), 4)
        0.043
    """
    num_eigenvalues = checked_integer(
        num_eigenvalues,
        "num_eigenvalues",
        minimum=MIN_EIGENVALUES,
        remedy=f"a fit needs at least {MIN_EIGENVALUES}",
    )
    if level not in _KNOWN_EXPONENT:
        raise ValueError(
            f"level is {level}; choose one of {sorted(_KNOWN_EXPONENT)}, or use ks_p_value, which takes any level"
        )
    root = math.sqrt(num_eigenvalues)
    if exponent == "known":
        return _KNOWN_EXPONENT[level] / root
    if exponent == "fitted":
        small = _FITTED_EXPONENT_SMALL_K[level]
        if num_eigenvalues - MIN_EIGENVALUES < len(small):
            return small[num_eigenvalues - MIN_EIGENVALUES] / root
        a, b, c = _FITTED_EXPONENT_LARGE_K[level]
        return (a + b / root + c / num_eigenvalues) / root
    raise ValueError(f"exponent is {exponent!r}; choose 'fitted' or 'known'")
