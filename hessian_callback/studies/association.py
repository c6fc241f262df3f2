r"""Correlation coefficients of two short series, with intervals and with the coefficients that drift alone gives.

A study has three to thirty checkpoints a run and a handful of runs, so every coefficient has an interval. Every
quantity of a training run drifts, and series that drift correlate. Two remedies are provided: the *partial*
association, in which the step is removed from both series, and the *drift null*, the distribution of coefficients of
independent series that drift.

**Which partial coefficient to use.** Pearson's removes a straight line in the given series. Two smooth curves that are
unrelated both bend, and their bends correlate: :math:`e^{-t}` and :math:`1/(1 + t)` at t = 0, 1, ..., 9 have a partial
coefficient of .999 given t. Spearman's does not depend on how a curve bends, and of a monotone series nothing is left
once the step is given. Given the step, use Spearman's. Pearson's is provided because the figures of the paper are
Pearson's. **Kendall's partial coefficient is not provided**, because it is not 0 for normal series that are independent
given z: with correlations of .9 to z each it is .19, which would find an association in every pair that drifts.
Spearman's is .01 then.

**Coverage.** In simulations of 6 to 14 independent observations, nominal 95 % intervals of the partial Spearman
coefficient had a coverage of 95 to 97 % if z explained half of x, and of 86 to 92 % if it explained nine tenths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import stats

from hessian_callback.power_law.validation import FloatArray
from hessian_callback.reports.running_correlations import MIN_OBSERVATIONS, rank_correlation

__all__ = [
    "KINDS",
    "PARTIAL_KINDS",
    "Association",
    "DriftNull",
    "Kind",
    "association",
    "drift_null",
    "interval_text",
    "partial_association",
    "pooled_within",
]

Kind = Literal["pearson", "spearman", "kendall"]

KINDS: tuple[Kind, ...] = ("pearson", "spearman", "kendall")
#: Kinds that have a partial association; the module's docstring says why Kendall's has none.
PARTIAL_KINDS: tuple[Kind, ...] = ("pearson", "spearman")


@dataclass(frozen=True)
class Association:
    """A coefficient with its interval.

    Attributes:
        kind: ``"pearson"``, ``"spearman"`` or ``"kendall"``.
        value: the coefficient, between -1 and 1.
        low: lower end of the interval.
        high: upper end of the interval.
        num: number of pairs; for a pooled one, of all runs together.
        num_given: number of series that were removed from both; 0 for a plain association.
    """

    kind: Kind
    value: float
    low: float
    high: float
    num: int
    num_given: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def interval_text(found: Association | None, *, digits: int = 2) -> str:
    """Write an association as ``value (low to high)``; empty if there is none.

    Example:
        >>> interval_text(Association("pearson", 0.853, 0.5179, 0.9611, 11))
        '0.85 (0.52 to 0.96)'
        >>> interval_text(None)
        ''
    """
    if found is None:
        return ""
    # Adding 0 makes a rounded -0.0 a 0.0.
    value, low, high = (f"{round(number, digits) + 0.0:.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def association(
    x: Sequence[float],
    y: Sequence[float],
    kind: Kind = "pearson",
    *,
    level: float = 0.95,
    names: tuple[str, str] = ("x", "y"),
) -> Association:
    r"""Correlate two series, with an interval on Fisher's scale.

    .. math:: \tanh\!\big(\operatorname{artanh} r \pm z \, \sigma\big), \qquad \sigma^2 = \frac{1}{n - 3}

    for Pearson's r; `rank_correlation` has those of rho and tau-b. All intervals suppose independent pairs. Within a
    run they are too narrow; compare with `drift_null` and the same coefficient of log(step).

    Args:
        x: ``(n,)``, finite, n at least 5.
        y: ``(n,)``, finite.
        kind: coefficient.
        level: nominal coverage, between 0 and 1.
        names: of x and y, for messages.

    Returns:
        Coefficient and interval.

    Raises:
        ValueError: if lengths differ, there are fewer than 5 pairs, a value is not finite, a series is constant, or
            an option is out of range.

    Example:
        >>> interval_text(association([1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 6, 5], "pearson"))
        '0.89 (0.26 to 0.99)'
    """
    _check_kind(kind, KINDS)
    _check_level(level)
    _check_series(dict(zip(names, (x, y), strict=True)), MIN_OBSERVATIONS)
    if kind != "pearson":
        ranks = rank_correlation(x, y, kind=kind, level=level)
        return Association(kind, ranks.value, ranks.low, ranks.high, ranks.num_observations)
    found = stats.pearsonr(x, y)
    value, interval = float(found.statistic), found.confidence_interval(level)
    # Exactly linear series: scipy's interval is the point itself, up to rounding.
    return Association(kind, value, min(float(interval.low), value), max(float(interval.high), value), len(x))


def partial_association(
    x: Sequence[float],
    y: Sequence[float],
    given: Sequence[Sequence[float]],
    kind: Kind = "spearman",
    *,
    level: float = 0.95,
    names: tuple[str, str] = ("x", "y"),
) -> Association:
    r"""Correlate the residuals of two series after others are removed from both.

    The Pearson correlation of the residuals of least squares on a constant and the given series; for Spearman, all
    series are replaced by their ranks first. For one given series z that is

    .. math:: r_{xy|z} = \frac{r_{xy} - r_{xz} r_{yz}}{\sqrt{(1 - r_{xz}^2)(1 - r_{yz}^2)}}

    The variance on Fisher's scale is :math:`1/(n - 3 - g)` for Pearson and :math:`(1 + \rho^2/2)/(n - 3 - g)` for
    Spearman. The module's docstring has the coverage of the intervals, and which kind to use.

    Args:
        x: ``(n,)``, finite, n at least 5 more than there are given series.
        y: ``(n,)``, finite.
        given: g series ``(n,)`` to remove, at least one.
        kind: ``"spearman"`` or ``"pearson"``.
        level: nominal coverage, between 0 and 1.
        names: of x and y, for messages.

    Returns:
        Coefficient and interval.

    Raises:
        ValueError: if nothing is given, lengths differ, there are too few values, one is not finite, a series is
            constant, the given ones depend on each other, or x or y is a function of them (linear, or in ranks).

    Source:
        Fisher (1924) for the lost observations; Bonett and Wright (2000) for rho's variance.

    Example:
        Both fall with the step z, but their ups and downs are opposite:

        >>> z = [0, 1, 2, 3, 4, 5, 6, 7]
        >>> x = [9, 6, 7, 4, 5, 2, 3, 0]
        >>> y = [7, 8, 5, 6, 3, 4, 1, 2]
        >>> round(association(x, y, "spearman").value, 2), round(partial_association(x, y, [z]).value, 2)
        (0.69, -0.95)
    """
    _check_kind(kind, PARTIAL_KINDS)
    _check_level(level)
    if not given:
        raise ValueError("given names no series; use association where nothing is to be taken out")
    num, num_given = len(x), len(given)
    named = dict(zip(names, (x, y), strict=True)) | {f"given[{index}]": series for index, series in enumerate(given)}
    _check_series(named, MIN_OBSERVATIONS + num_given)
    rows = np.array([stats.rankdata(row) if kind == "spearman" else row for row in named.values()], dtype=np.float64)
    out = _centred(rows[2:])
    if np.linalg.matrix_rank(out / np.linalg.norm(out, axis=1, keepdims=True)) < num_given:
        raise ValueError("the given series depend on each other; leave out the ones that repeat another")
    left = _left(rows[:2], out)
    for name, residual in zip(names, left, strict=True):
        if not np.isfinite(residual).all():
            how = "in order" if kind == "spearman" else "on a straight line"
            raise ValueError(f"{name} follows the given series {how}; nothing of it is left to correlate")
    value = float(_cosines(left[:1], left[1:])[0])
    inner = float(_inner(kind, np.array(value), num))
    reach = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(_variance(kind, inner, num, num_given))
    low, high = math.tanh(math.atanh(inner) - reach), math.tanh(math.atanh(inner) + reach)
    return Association(kind, value, min(low, value), max(high, value), num, num_given)


def pooled_within(found: Sequence[Association], *, level: float = 0.95) -> Association:
    r"""Pool the associations of several runs into one.

    .. math:: \bar z = \frac{\sum_i w_i \operatorname{artanh} r_i}{\sum_i w_i}, \qquad
        \operatorname{var} \bar z = \frac{\sum_i w_i^2 \sigma_i^2}{(\sum_i w_i)^2}, \qquad w_i = n_i - 3 - g_i

    with each run's :math:`\sigma_i^2`; tau's weight is :math:`n_i - 4`, the denominator of its variance. Differences
    between the runs' mean losses do not contribute. The interval is that of the mean of *these* runs under one common
    coefficient; with few seeds, compare with the coefficients of the runs.

    Args:
        found: one association a run, all of the same kind and with the same number of given series.
        level: nominal coverage, between 0 and 1.

    Returns:
        The pooled coefficient and its interval.

    Raises:
        ValueError: if there are none, or they are not of one kind.

    Example:
        >>> runs = [Association("pearson", r, -1, 1, 12) for r in (0.5, 0.7, 0.6)]
        >>> interval_text(pooled_within(runs))
        '0.61 (0.31 to 0.79)'
    """
    _check_level(level)
    if not found:
        raise ValueError("no association to pool; at least one run must have one")
    kinds = {(one.kind, one.num_given) for one in found}
    if len(kinds) > 1:
        raise ValueError(f"associations of {len(kinds)} kinds do not pool: {sorted(kinds)}")
    ((kind, num_given),) = kinds
    inner = [float(_inner(kind, np.array(one.value), one.num)) for one in found]
    weights = np.array([one.num - _lost(kind, num_given) for one in found], dtype=np.float64)
    variances = np.array([_variance(kind, r, one.num, num_given) for r, one in zip(inner, found, strict=True)])
    centre = float(weights @ np.arctanh(inner) / weights.sum())
    reach = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(float(weights**2 @ variances)) / float(weights.sum())
    low, value, high = (math.tanh(centre + shift) for shift in (-reach, 0.0, reach))
    return Association(kind, value, low, high, sum(one.num for one in found), num_given)


@dataclass(frozen=True)
class DriftNull:
    """Distribution of the coefficient of independent series that drift.

    Attributes:
        sizes: absolute coefficients of the simulated pairs, ascending.
    """

    sizes: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the absolute coefficients."""
        return float(np.median(self.sizes))

    def share(self, value: float) -> float:
        """Return the share of simulated pairs whose absolute coefficient is at least that of ``value``.

        The observed pair counts as one of them, so the share is positive and a valid Monte Carlo p-value.
        """
        # A rounding error must not put equal coefficients on two sides.
        reached = len(self.sizes) - np.searchsorted(self.sizes, abs(value) * (1 - 1e-12))
        return float((1 + reached) / (1 + len(self.sizes)))


def drift_null(
    num: int,
    kind: Kind,
    *,
    series: Literal["walk", "falling"] = "walk",
    given_time: bool = False,
    runs: int = 1,
    draws: int = 2000,
    seed: int = 0,
) -> DriftNull:
    """Simulate the coefficients of independent series that drift.

    A coefficient within a run is evidence only if few such pairs reach it. Two *falling* series, sums of exponential
    steps, have a median Pearson correlation of .92 at six points, and always equal ranks. Two random *walks* drift up
    or down at random, and are the milder null. Neither null covers curves that bend for a common reason, as those of
    several runs of one setting do.

    Args:
        num: points of each series, at least 5, and 6 given the time.
        kind: coefficient.
        series: ``"walk"`` (normal steps) or ``"falling"`` (exponential steps of one sign).
        given_time: remove the index of the point from both, as `partial_association` does. Walks only: in ranks
            nothing is left of a falling series.
        runs: independent pairs whose coefficients are pooled as `pooled_within` does.
        draws: simulated pairs, each of ``runs``.
        seed: of the simulation.

    Returns:
        The absolute coefficients.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> null = drift_null(6, "pearson", series="falling")
        >>> round(null.median, 2), null.share(0.98) > 0.05
        (0.92, True)
    """
    _check_kind(kind, PARTIAL_KINDS if given_time else KINDS)
    if series not in ("walk", "falling") or (given_time and series == "falling"):
        raise ValueError(f"series must be 'walk', or 'falling' where no time is given; got {series!r}")
    if num < MIN_OBSERVATIONS + given_time or runs < 1 or draws < 1:
        raise ValueError(
            f"{num} points, {runs} runs, {draws} draws; at least {MIN_OBSERVATIONS + given_time}, 1 and 1 are needed"
        )
    return _simulated(num, kind, series, given_time, runs, draws, seed)


# The tables use the same few lengths repeatedly.
@lru_cache(maxsize=256)
def _simulated(num: int, kind: Kind, series: str, given_time: bool, runs: int, draws: int, seed: int) -> DriftNull:
    rng = np.random.default_rng(seed)
    shape = (draws * runs, num)
    steps = (rng.standard_normal(shape) if series == "walk" else rng.exponential(size=shape) for _ in range(2))
    first, second = (np.cumsum(one, axis=1) for one in steps)
    if kind == "kendall":
        values = _kendall_rows(first, second)
    else:
        if kind == "spearman":
            first, second = (np.asarray(stats.rankdata(rows, axis=1), dtype=np.float64) for rows in (first, second))
        out = np.arange(num, dtype=np.float64)[None] if given_time else np.empty((0, num))
        values = _cosines(_left(first, out), _left(second, out))
    values = values.reshape(draws, runs)
    if runs > 1:
        # Equal lengths, so equal weights; a run without a residual drops out.
        known = np.isfinite(values)
        scores = np.arctanh(_inner(kind, np.where(known, values, 0.0), num))
        with np.errstate(invalid="ignore"):
            values = np.tanh(scores.sum(axis=1) / known.sum(axis=1))
    return DriftNull(tuple(np.sort(np.abs(values[np.isfinite(values)])).tolist()))


def _kendall_rows(first: FloatArray, second: FloatArray) -> FloatArray:
    """Tau of each pair of rows without ties, ``(d, n), (d, n) -> (d,)``."""
    num = first.shape[1]
    agreeing: FloatArray = np.zeros(len(first))
    for lag in range(1, num):
        signs = (np.sign(rows[:, lag:] - rows[:, :-lag]) for rows in (first, second))
        agreeing += np.prod(list(signs), axis=0).sum(axis=1)
    agreeing *= 2 / (num * (num - 1))
    return agreeing


def _centred(rows: FloatArray) -> FloatArray:
    centred: FloatArray = rows - rows.mean(axis=1, keepdims=True)
    return centred


def _left(rows: FloatArray, out: FloatArray) -> FloatArray:
    """Residuals of ``(d, n)`` rows on a constant and ``(g, n)`` others; NaN where rounding alone is left."""
    basis, _ = np.linalg.qr(_centred(out).T)
    left = _centred(rows)
    left -= left @ basis @ basis.T
    floor = 8 * rows.shape[1] * np.finfo(np.float64).eps * np.linalg.norm(rows, axis=1)
    left[np.linalg.norm(left, axis=1) <= floor] = np.nan
    return left


def _cosines(first: FloatArray, second: FloatArray) -> FloatArray:
    """Cosine of each pair of rows, ``(d, n), (d, n) -> (d,)``."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: FloatArray = np.clip(np.sum(first * second, axis=1) / lengths, -1.0, 1.0)
    return cosines


def _inner(kind: Kind, values: FloatArray, num: int) -> FloatArray:
    """Clip values to be finite on Fisher's scale: no nearer to 1 than half of the smallest step, as for ranks."""
    step = {
        "pearson": np.finfo(np.float64).eps,
        "spearman": 12 / (num * (num**2 - 1)),
        "kendall": 4 / (num * (num - 1)),
    }
    inner: FloatArray = np.clip(values, step[kind] / 2 - 1, 1 - step[kind] / 2)
    return inner


def _lost(kind: Kind, num_given: int) -> int:
    """Return the number that the variance on Fisher's scale subtracts from the number of pairs."""
    return 4 if kind == "kendall" else 3 + num_given


def _variance(kind: Kind, value: float, num: int, num_given: int) -> float:
    numerator = {"pearson": 1.0, "spearman": 1 + value**2 / 2, "kendall": 0.437}[kind]
    return numerator / (num - _lost(kind, num_given))


def _check_kind(kind: str, known: Sequence[str]) -> None:
    if kind not in known:
        raise ValueError(f"kind must be one of {', '.join(known)}; got {kind!r}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def _check_series(series: Mapping[str, Sequence[float]], at_least: int) -> None:
    lengths = [len(values) for values in series.values()]
    if len(set(lengths)) > 1:
        raise ValueError(f"{' and '.join(map(str, lengths))} values of {', '.join(series)}; pairs are needed")
    if lengths[0] < at_least:
        raise ValueError(f"n = {lengths[0]}; at least {at_least} observations are needed")
    for name, values in series.items():
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be finite; leave out the observations that are not")
        if len(set(values)) == 1:
            raise ValueError(f"{name} is constant and has no correlation; wait until its values differ")
