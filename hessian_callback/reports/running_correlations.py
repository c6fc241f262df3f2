"""Rank correlations of a few measurements, with intervals that stay honest at small n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats
from torchmetrics.functional.regression import kendall_rank_corrcoef, spearman_corrcoef

__all__ = ["MIN_OBSERVATIONS", "RankCorrelation", "rank_correlation"]

# Kendall's standard error below divides by n - 4.
MIN_OBSERVATIONS = 5


@dataclass(frozen=True)
class RankCorrelation:
    """A rank correlation with its interval.

    Attributes:
        value: the coefficient, between -1 and 1.
        low: lower end of the interval.
        high: upper end of the interval.
        num_observations: n.
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
    r"""Correlate ranks, with an interval on Fisher's scale.

    .. math:: \tanh\!\big(\operatorname{artanh} r \pm z \, \sigma_r\big), \qquad
        \sigma_\tau^2 = \frac{0.437}{n - 4}, \qquad \sigma_\rho^2 = \frac{1 + \rho^2 / 2}{n - 3}

    The interval is for independent pairs. A training run's are not independent: two series that merely drift
    correlate, and then the interval covers far less than its level (benchmarks/PREDICTION.md has the figures). So it
    must be read beside that of log(step), which drifts as well. At :math:`|r| = 1`, where Fisher's scale is infinite,
    the interval is that of a value half of the smallest possible step nearer to 0, extended to r.

    Args:
        x: ``(n,)``, finite, n at least 5.
        y: ``(n,)``, finite.
        kind: ``"kendall"`` (tau-b) or ``"spearman"`` (rho), both of torchmetrics.
        level: nominal coverage, between 0 and 1.

    Returns:
        Coefficient and interval.

    Raises:
        ValueError: if lengths differ, there are fewer than 5 pairs, a value is not finite, a series is constant
            (no correlation is defined then), or an option is out of range.

    Source:
        Fieller, Hartley and Pearson (1957) for tau; Bonett and Wright (2000) for rho.

    Example:
        >>> found = rank_correlation([1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 6, 5])
        >>> round(found.value, 3), round(found.low, 2), round(found.high, 2)
        (0.733, 0.02, 0.95)
    """
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
    # Ranks first: they are exact in any precision, values that differ in their last digits are not.
    first, second = (torch.from_numpy(stats.rankdata(values)) for values in (x, y))
    num = len(x)
    if kind == "kendall":
        tau = kendall_rank_corrcoef(first, second)
        assert isinstance(tau, torch.Tensor)  # A tuple only with a test, which was not asked for.
        value, step = float(tau), 4 / (num * (num - 1))
    else:
        value, step = float(spearman_corrcoef(first, second)), 12 / (num * (num**2 - 1))
    value = min(1.0, max(-1.0, value))
    inner = math.copysign(min(abs(value), 1 - step / 2), value)
    variance = 0.437 / (num - 4) if kind == "kendall" else (1 + inner**2 / 2) / (num - 3)
    reach = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    low, high = math.tanh(math.atanh(inner) - reach), math.tanh(math.atanh(inner) + reach)
    return RankCorrelation(value, min(low, value), max(high, value), num)
