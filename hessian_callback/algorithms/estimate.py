"""Estimates from independent random vectors, with their standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import scipy.special
import torch

__all__ = ["Estimate", "check_finite", "mean_and_stderr", "student_quantile"]


@dataclass(frozen=True)
class Estimate:
    """Mean of a few independent draws, with its standard error.

    Attributes:
        value: the estimate.
        stderr: its standard error, in the same unit; 0 if the value is exact.
        num_vectors: number of independent draws; 0 if the value is exact.
        num_matvecs: products spent.

    Example:
        >>> low, high = Estimate(value=10.0, stderr=1.0, num_vectors=5, num_matvecs=5).interval(0.95)
        >>> round(low, 2), round(high, 2)
        (7.22, 12.78)
    """

    value: float
    stderr: float
    num_vectors: int
    num_matvecs: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Return the interval :math:`\hat x \pm t_{n-1}\, \sigma` of Student's distribution for n draws.

        Args:
            level: nominal coverage, between 0 and 1.

        Raises:
            ValueError: if ``level`` is out of range.
        """
        width = student_quantile(level, self.num_vectors) * self.stderr
        return self.value - width, self.value + width


def student_quantile(level: float, num_vectors: int) -> float:
    r"""Return :math:`t_{n-1}` of a two-sided interval: half its width in standard errors.

    Args:
        level: nominal coverage, between 0 and 1.
        num_vectors: n; 0 for an exact value, whose interval has no width.

    Raises:
        ValueError: if ``level`` is out of range.

    Example:
        >>> round(student_quantile(0.95, 5), 3)
        2.776
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if num_vectors == 0:
        return 0.0
    return float(scipy.special.stdtrit(num_vectors - 1, (1 + level) / 2))


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    r"""Return the mean of independent draws and its standard error, :math:`s / \sqrt n`.

    Args:
        values: the draws; at least two for a finite standard error. The mean of none is an exact zero.

    Example:
        >>> mean_and_stderr([1.0, 3.0])
        (2.0, 1.0)
    """
    if not values:
        return 0.0, 0.0
    draws = torch.tensor(values, dtype=torch.float64, device="cpu")
    return float(draws.mean()), float(draws.std() / len(values) ** 0.5)


def check_finite(squared_norm: float) -> None:
    """Raise an error if the squared norm of a product is NaN or infinite.

    Raises:
        ArithmeticError: if it is.

    Example:
        >>> check_finite(1e300)
    """
    if not abs(squared_norm) < float("inf"):
        raise ArithmeticError(
            "a product of the operator with a random vector holds NaN or infinity, or the square of its norm "
            "overflows; check the loss for overflow or a division by zero on these batches, or use float64"
        )
