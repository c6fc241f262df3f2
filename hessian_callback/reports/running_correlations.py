"""Rank correlations of a few pairs, with confidence intervals that keep their level for small n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

__all__ = ["MIN_OBSERVATIONS", "RankCorrelation", "rank_correlation"]

# The standard error of Kendall's tau below divides by n - 4.
MIN_OBSERVATIONS = 5


@dataclass(frozen=True)
class RankCorrelation:
    """A rank correlation with its confidence interval.

    Attributes:
        value: coefficient, between -1 and 1.
        low: lower end of the interval.
        high: upper end of the interval.
        num_observations: number n of pairs.
    """

    value: float
    low: float
    high: float
    num_observations: int


def rank_correlation(
    x: Sequence[float],
    y: Sequence[float],
    *,
    kind: Literal["kendall", "spearman"] = "kendall",
    level: float = 0.95,
) -> RankCorrelation:
    r"""Compute a rank correlation and its confidence interval on Fisher's scale.

    .. math:: \tanh\!\big(\operatorname{artanh} r \pm z \, \sigma_r\big), \qquad
        \sigma_\tau^2 = \frac{0.437}{n - 4}, \qquad \sigma_\rho^2 = \frac{1 + \rho^2 / 2}{n - 3}

    The interval supposes independent pairs. Measurements of one training run are not independent: two series that
    merely drift correlate, and the interval then covers far less than its level (benchmarks/PREDICTION.md has figures).
    Compare the coefficient with that of log(step), which drifts as well. At :math:`|r| = 1`, where Fisher's scale is
    infinite, the interval is computed for a value nearer to 0 by half of the smallest possible step, and extended to r.

    The cost is :math:`O(n \log n)`.

    Args:
        x: ``(n,)``, finite, n at least 5.
        y: ``(n,)``, finite.
        kind: ``"kendall"`` (tau-b) or ``"spearman"`` (rho).
        level: nominal coverage, between 0 and 1.

    Returns:
        Coefficient and interval.

    Raises:
        ValueError: if the lengths differ, there are fewer than 5 pairs, a value is not finite, a series is constant
            (then no correlation is defined), or an option is out of range.

    Source:
        Fieller, Hartley and Pearson (1957) for tau; Bonett and Wright (2000) for rho.

    Example:
        >>> found = rank_correlation([1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 6, 5])
        >>> round(found.value, 3), round(found.low, 2), round(found.high, 2)
        (0.733, 0.02, 0.95)
    """
    _check(x, y, kind, level)
    num = len(x)
    if kind == "kendall":
        # The p-value is not used; its exact computation would be slow.
        value, step = float(stats.kendalltau(x, y, method="asymptotic").statistic), 4 / (num * (num - 1))
    else:
        value, step = float(stats.spearmanr(x, y).statistic), 12 / (num * (num**2 - 1))
    value = min(1.0, max(-1.0, value))
    inner = math.copysign(min(abs(value), 1 - step / 2), value)
    variance = 0.437 / (num - 4) if kind == "kendall" else (1 + inner**2 / 2) / (num - 3)
    reach = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    low, high = math.tanh(math.atanh(inner) - reach), math.tanh(math.atanh(inner) + reach)
    return RankCorrelation(value, min(low, value), max(high, value), num)


def _check(x: Sequence[float], y: Sequence[float], kind: str, level: float) -> None:
    if len(x) != len(y) or len(x) < MIN_OBSERVATIONS:
        raise ValueError(f"{len(x)} and {len(y)} values; a rank correlation needs at least {MIN_OBSERVATIONS} pairs")
    if kind not in ("kendall", "spearman"):
        raise ValueError(f"kind must be 'kendall' or 'spearman', got {kind!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if not all(math.isfinite(value) for value in (*x, *y)):
        raise ValueError("values must be finite; leave out the pairs that are not")
    if len(set(x)) == 1 or len(set(y)) == 1:
        raise ValueError("a constant series has no rank correlation; wait until its values differ")
