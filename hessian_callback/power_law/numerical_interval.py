r"""What the error bounds of the eigenvalues leave open about the slope.

Three uncertainties of a slope must not be mixed: that of the fit (`PowerLawFit.slope_interval`), that of
the held-out sample, and the numerical one here, of eigenvalues that were not iterated to the end.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from hessian_callback.power_law.fit import MIN_EIGENVALUES, Eigenvalues, as_float64

__all__ = ["slope_numerical_interval"]


def slope_numerical_interval(
    eigenvalues: Eigenvalues,
    error_bounds: Eigenvalues,
    *,
    sides: Literal["both", "above"] = "both",
    num_eigenvalues: int | None = None,
) -> tuple[float, float]:
    r"""Smallest and largest slope of any spectrum within the error bounds; exact extremes.

    With :math:`t_i = \ln\lambda_i` anywhere in :math:`[l_i, u_i]` the slope is
    :math:`\bar t - \min_i t_i`, a convex function, where any eigenvalue may turn out the cutoff:

    .. math::
        \max \hat s &= \frac{1}{K} \max_m \Big(\sum_{i \ne m} u_i - (K - 1)\, l_m\Big), \\
        \min \hat s &= \frac{1}{K} \sum_i \max(l_i, \tau) - \tau, \qquad \tau = \min_i u_i .

    The minimum is so because at a given cutoff every eigenvalue should be as small as it may, and the
    slope then falls as the cutoff rises.

    Args:
        eigenvalues: ``(n,)``, in any order.
        error_bounds: ``(n,)``, distance of each to an eigenvalue of its own, in the same order and unit.
        sides: ``"both"``: the true value is in [theta - bound, theta + bound]; ``"above"``: in
            [theta, theta + bound], as for Ritz values, which exact products never put above the
            eigenvalues of their rank.
        num_eigenvalues: K, how many of the largest to take; None for all positive ones.

    Returns:
        ``(low, high)``. It encloses `PowerLawFit.slope` of the same K eigenvalues. That no eigenvalue was
        missed, and that the K largest stay the K largest, is supposed.

    Raises:
        ValueError: if shapes differ, a bound is negative, or a bound reaches down to zero, where the slope
            has no upper limit; if fewer than 3 positive eigenvalues (or ``num_eigenvalues``) are there.

    Example:
        >>> low, high = slope_numerical_interval([4.0, 2.0, 1.0], [0.1, 0.1, 0.1])
        >>> round(low, 3), round(high, 3)
        (0.604, 0.788)
    """
    values, bounds = as_float64(eigenvalues), as_float64(error_bounds, "error_bounds")
    if values.shape != bounds.shape:
        raise ValueError(
            f"{values.size} eigenvalues have {bounds.size} error_bounds; pass one for each, in the same order"
        )
    if (bounds < 0.0).any():
        raise ValueError("an error bound is negative; pass distances, which are at least 0")
    if sides not in ("both", "above"):
        raise ValueError(f"sides is {sides!r}; choose 'both' or 'above'")
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > 0.0]
    num = order.size if num_eigenvalues is None else num_eigenvalues
    if num < MIN_EIGENVALUES or num > order.size:
        raise ValueError(
            f"{order.size} eigenvalues are positive, where at least {max(num, MIN_EIGENVALUES)} are "
            "needed; compute more eigenvalues, or choose num_eigenvalues between 3 and their number"
        )
    values, bounds = values[order[:num]], bounds[order[:num]]
    lowest = values - bounds if sides == "both" else values
    if lowest.min() <= 0.0:
        raise ValueError(
            f"the error bound of {int((lowest <= 0.0).sum())} of {num} eigenvalues reaches down to zero, "
            "so the slope has no upper limit; allow more Hessian-vector products (max_hvps) or lower num_eigenvalues"
        )
    low, high = np.log(lowest), np.log(values + bounds)
    largest = float(high.sum() - (high + (num - 1) * low).min()) / num
    cutoff = high.min()
    smallest = float(np.maximum(low, cutoff).mean() - cutoff)
    return smallest, largest
