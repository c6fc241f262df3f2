r"""How many directions a spectrum has: effective ranks, participation ratio, outliers.

All are taken over the positive ones of the eigenvalues given, and free of their unit. From the top K
eigenvalues instead of all, the ranks are those of the operator restricted to their eigenspace.
"""

from __future__ import annotations

import numpy as np

from hessian_callback.power_law.fit import Eigenvalues, FloatArray, positive_eigenvalues

__all__ = ["effective_rank", "intrinsic_dimension", "outlier_ratio", "participation_ratio"]


def effective_rank(eigenvalues: Eigenvalues) -> float:
    r"""Exponential of the entropy of the eigenvalues' shares.

    .. math:: \exp\Big(-\sum_i p_i \ln p_i\Big), \qquad p_i = \lambda_i / \sum_j \lambda_j

    Args:
        eigenvalues: ``(n,)``, in any order and unit; those that are zero or negative are left out.

    Returns:
        Between 1 and the number of positive eigenvalues.

    Raises:
        ValueError: if none is positive, or as `positive_eigenvalues`.

    Source:
        Roy and Vetterli (2007).

    Example:
        >>> round(effective_rank([3.0, 3.0, 3.0, 3.0]), 6)
        4.0
    """
    shares = _relative(eigenvalues)
    shares /= shares.sum()
    # Shares that underflow to zero contribute nothing, the limit of p ln p.
    shares = shares[shares > 0.0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def intrinsic_dimension(eigenvalues: Eigenvalues) -> float:
    r"""Trace over the largest eigenvalue, the effective rank of concentration inequalities.

    .. math:: \sum_i \lambda_i / \lambda_1

    Args:
        eigenvalues: ``(n,)``, in any order and unit; those that are zero or negative are left out.

    Returns:
        Between 1 and the number of positive eigenvalues.

    Raises:
        ValueError: if none is positive, or as `positive_eigenvalues`.

    Source:
        Tropp (2015).

    Example:
        >>> intrinsic_dimension([4.0, 2.0, 2.0, -1.0])
        2.0
    """
    return float(_relative(eigenvalues).sum())


def participation_ratio(eigenvalues: Eigenvalues) -> float:
    r"""Squared trace over squared Frobenius norm.

    .. math:: \Big(\sum_i \lambda_i\Big)^2 / \sum_i \lambda_i^2

    Args:
        eigenvalues: ``(n,)``, in any order and unit; those that are zero or negative are left out.

    Returns:
        Between 1 and the number of positive eigenvalues.

    Raises:
        ValueError: if none is positive, or as `positive_eigenvalues`.

    Example:
        >>> round(participation_ratio([2.0, 1.0, 1.0]), 3)
        2.667
    """
    relative = _relative(eigenvalues)
    return float(relative.sum() ** 2 / (relative**2).sum())


def outlier_ratio(eigenvalues: Eigenvalues, num_classes: int) -> float:
    r"""How far the outliers that come from C classes stand above the bulk.

    .. math:: \lambda_1 / \lambda_{C + 1}

    Args:
        eigenvalues: ``(n,)``, in any order and unit.
        num_classes: C, at least 1.

    Returns:
        At least 1.

    Raises:
        ValueError: if ``num_classes`` is below 1 or fewer than C + 1 eigenvalues are positive.

    Example:
        >>> outlier_ratio([8.0, 6.0, 2.0, 1.0], num_classes=2)
        4.0
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; give the number of classes, at least 1")
    values, _ = positive_eigenvalues(eigenvalues)
    if values.size <= num_classes:
        raise ValueError(
            f"the ratio needs {num_classes + 1} positive eigenvalues, one more than num_classes, and has "
            f"{values.size}; compute more eigenvalues"
        )
    return float(values[0] / values[num_classes])


def _relative(eigenvalues: Eigenvalues) -> FloatArray:
    """The positive ones over the largest, so that no square overflows."""
    values, num_dropped = positive_eigenvalues(eigenvalues)
    if not values.size:
        raise ValueError(f"none of {num_dropped} eigenvalues is positive; pass the largest eigenvalues of the operator")
    relative: FloatArray = values / values[0]
    return relative
