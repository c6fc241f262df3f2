r"""Uncertainty of the slope that follows from the error bounds of the eigenvalues.

A slope has three uncertainties, which are reported separately: that of the fit (`PowerLawFit.slope_interval`),
that of the samples of the Hessian, and the numerical one here. The numerical one is due to eigenvalues that were
not iterated until their error vanished.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from hessian_callback.power_law.validation import (
    MIN_EIGENVALUES,
    Eigenvalues,
    FloatArray,
    as_float64,
    checked_integer,
    log_ratios,
)

__all__ = ["slope_numerical_interval"]


def slope_numerical_interval(
    eigenvalues: Eigenvalues,
    error_bounds: Eigenvalues,
    *,
    sides: Literal["both", "above"] = "both",
    num_eigenvalues: int | None = None,
) -> tuple[float, float]:
    r"""Compute the smallest and the largest slope of all spectra within the error bounds.

    With :math:`t_i = \ln\lambda_i` anywhere in :math:`[l_i, u_i]` the slope is the convex function
    :math:`\bar t - \min_i t_i`, and any eigenvalue may be the cutoff:

    .. math::
        \max \hat s &= \frac{1}{K} \max_m \Big(\sum_{i \ne m} u_i - (K - 1)\, l_m\Big), \\
        \min \hat s &= \frac{1}{K} \sum_i \max(l_i, \tau) - \tau, \qquad \tau = \min_i u_i .

    The minimum has this form because, for a given cutoff, every eigenvalue is as small as its bound allows, and
    the slope then falls as the cutoff rises.

    - Proven: both extremes, up to a few roundings of float64, if every eigenvalue lies within its bound.
    - Assumed: that each does, that no eigenvalue was missed, and that the K largest eigenvalues are those
      given. For ``sides="above"`` it is also assumed that no given value exceeds the eigenvalue of its rank,
      which holds for Ritz values of exact products.
    - Measured, not proven: the part of an error bound that covers the rounding of the products
      (`Spectrum.rounding`). The interval holds only as far as that estimate does. The probability that an
      eigenvalue was missed is `Spectrum.missed_probability`.

    Args:
        eigenvalues: ``(n,)``, in any order.
        error_bounds: ``(n,)``, the largest distance of each to an eigenvalue of its own, in the same order and
            unit.
        sides: ``"both"`` if the true eigenvalue is in [theta - bound, theta + bound], ``"above"`` if it is in
            [theta, theta + bound].
        num_eigenvalues: K, how many of the largest to take; None for all positive ones.

    Returns:
        ``(low, high)``. The interval contains `PowerLawFit.slope` of the same K eigenvalues, up to rounding.

    Raises:
        TypeError: if an argument is not real numbers, or ``num_eigenvalues`` is not an integer.
        ValueError: if shapes differ, a bound is negative, an upper limit overflows, or a lower limit is not
            positive, so that the slope has no upper limit; if there are fewer than 3 positive eigenvalues, or
            fewer than ``num_eigenvalues``.

    Example:
        >>> low, high = slope_numerical_interval([4.0, 2.0, 1.0], [0.1, 0.1, 0.1])
        >>> round(low, 3), round(high, 3)
        (0.604, 0.788)
    """
    if sides not in ("both", "above"):
        raise ValueError(f"sides is {sides!r}; choose 'both' or 'above'")
    values, bounds = _largest_with_bounds(eigenvalues, error_bounds, num_eigenvalues)
    num = values.size
    lowest = values - bounds if sides == "both" else values
    with np.errstate(over="ignore"):
        highest = values + bounds
    if lowest.min() <= 0.0:
        raise ValueError(
            f"the error bound of {int((lowest <= 0.0).sum())} of {num} eigenvalues reaches down to zero, "
            "so the slope has no upper limit; allow more Hessian-vector products (max_hvps) or lower num_eigenvalues"
        )
    if not np.isfinite(highest).all():
        raise ValueError(
            "an eigenvalue plus its error bound overflows; scale eigenvalues and bounds by the same factor"
        )
    # Relative to the smallest, so that the slope of almost equal eigenvalues keeps its digits.
    low, high = log_ratios(lowest, lowest.min()), log_ratios(highest, lowest.min())
    largest = float(high.sum() - (high + (num - 1) * low).min()) / num
    cutoff = high.min()
    smallest = float(np.maximum(low - cutoff, 0.0).mean())
    return smallest, largest


def _largest_with_bounds(
    eigenvalues: Eigenvalues, error_bounds: Eigenvalues, num_eigenvalues: int | None
) -> tuple[FloatArray, FloatArray]:
    """Return the K largest positive eigenvalues in descending order, and their error bounds."""
    values, bounds = as_float64(eigenvalues), as_float64(error_bounds, "error_bounds")
    if values.shape != bounds.shape:
        raise ValueError(
            f"{values.size} eigenvalues have {bounds.size} error_bounds; pass one for each, in the same order"
        )
    if (bounds < 0.0).any():
        raise ValueError("an error bound is negative; pass distances, which are at least 0")
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > 0.0]
    if num_eigenvalues is not None:
        num_eigenvalues = checked_integer(
            num_eigenvalues, "num_eigenvalues", minimum=MIN_EIGENVALUES, remedy=f"take at least {MIN_EIGENVALUES}"
        )
    needed = num_eigenvalues or MIN_EIGENVALUES
    if order.size < needed:
        raise ValueError(
            f"{order.size} eigenvalues are positive, but at least {needed} are needed; compute more eigenvalues, or "
            "choose num_eigenvalues between 3 and their number"
        )
    order = order[:num_eigenvalues]
    return values[order], bounds[order]
