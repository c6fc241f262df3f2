r"""Effective ranks of a spectrum, and the ratio of its outliers to its bulk.

All are functions of the positive eigenvalues and have no unit. If only the K largest eigenvalues are given, the
ranks are those of the operator restricted to their eigenspace.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from hessian_callback.power_law.validation import Eigenvalues, FloatArray, checked_integer, positive_eigenvalues

__all__ = ["effective_rank", "intrinsic_dimension", "outlier_ratio", "participation_ratio"]


def effective_rank(eigenvalues: Eigenvalues) -> float:
    r"""Compute the exponential of the entropy of the eigenvalues' shares of the trace.

    .. math:: \exp\Big(-\sum_i p_i \ln p_i\Big), \qquad p_i = \lambda_i / \sum_j \lambda_j

    Args:
        eigenvalues: ``(n,)``, in any order and unit; zero and negative ones are left out.

    Returns:
        The rank, between 1 and the number of positive eigenvalues.

    Raises:
        TypeError: as `as_float64`.
        ValueError: if no eigenvalue is positive, or as `as_float64`.

    Source:
        Roy and Vetterli (2007).

    Example:
        >>> round(effective_rank([3.0, 3.0, 3.0, 3.0]), 6)
        4.0
    """
    shares = _relative(eigenvalues)
    return float(np.exp(special.entr(shares / shares.sum()).sum()))


def intrinsic_dimension(eigenvalues: Eigenvalues) -> float:
    r"""Compute the trace over the largest eigenvalue, the effective rank of concentration inequalities.

    .. math:: \sum_i \lambda_i / \lambda_1

    Args:
        eigenvalues: ``(n,)``, in any order and unit; zero and negative ones are left out.

    Returns:
        The rank, between 1 and the number of positive eigenvalues.

    Raises:
        TypeError: as `as_float64`.
        ValueError: if no eigenvalue is positive, or as `as_float64`.

    Source:
        Tropp (2015).

    Example:
        >>> intrinsic_dimension([4.0, 2.0, 2.0, -1.0])
        2.0
    """
    return float(_relative(eigenvalues).sum())


def participation_ratio(eigenvalues: Eigenvalues) -> float:
    r"""Compute the squared trace over the squared Frobenius norm.

    .. math:: \Big(\sum_i \lambda_i\Big)^2 / \sum_i \lambda_i^2

    Args:
        eigenvalues: ``(n,)``, in any order and unit; zero and negative ones are left out.

    Returns:
        The rank, between 1 and the number of positive eigenvalues.

    Raises:
        TypeError: as `as_float64`.
        ValueError: if no eigenvalue is positive, or as `as_float64`.

    Source:
        Bell and Dean (1970).

    Example:
        >>> round(participation_ratio([2.0, 1.0, 1.0]), 3)
        2.667
    """
    relative = _relative(eigenvalues)
    return float(relative.sum() ** 2 / (relative**2).sum())


def outlier_ratio(eigenvalues: Eigenvalues, num_classes: int) -> float:
    r"""Compute the ratio of the largest eigenvalue to the one after the C largest, for C classes.

    .. math:: \lambda_1 / \lambda_{C + 1}

    Args:
        eigenvalues: ``(n,)``, in any order and unit.
        num_classes: C, at least 1.

    Returns:
        The ratio, at least 1.

    Raises:
        TypeError: if ``num_classes`` is not an integer, or as `as_float64`.
        ValueError: if ``num_classes`` is below 1, fewer than C + 1 eigenvalues are positive, or the ratio
            overflows.

    Example:
        >>> outlier_ratio([8.0, 6.0, 2.0, 1.0], num_classes=2)
        4.0
    """
    num_classes = checked_integer(
        num_classes, "num_classes", minimum=1, remedy="give the number of classes, at least 1"
    )
    values, _ = positive_eigenvalues(eigenvalues)
    if values.size <= num_classes:
        raise ValueError(
            f"the ratio needs {num_classes + 1} positive eigenvalues, one more than num_classes, but there are "
            f"{values.size}; compute more eigenvalues"
        )
    with np.errstate(over="ignore"):
        ratio = float(values[0] / values[num_classes])
    if not math.isfinite(ratio):
        raise ValueError(
            f"the ratio of {values[0]:g} to {values[num_classes]:g} overflows; eigenvalue {num_classes + 1} is "
            "numerically zero, so lower num_classes or use more samples"
        )
    return ratio


def _relative(eigenvalues: Eigenvalues) -> FloatArray:
    """Return the positive eigenvalues over the largest, so that no square overflows."""
    values, num_dropped = positive_eigenvalues(eigenvalues)
    if not values.size:
        raise ValueError(f"none of {num_dropped} eigenvalues is positive; pass the largest eigenvalues of the operator")
    relative: FloatArray = values / values[0]
    return relative
