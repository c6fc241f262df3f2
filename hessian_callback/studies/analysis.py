r"""Comparison of the statistics of a spectrum with the step as predictors of the test loss, within and across runs.

`within_runs`, `across_runs` and `across_runs_at_train_loss` each answer one question by rows of coefficients, and
`plain_answer` converts the rows of a question to a sentence by a fixed rule. The logarithm of the step and the
training loss are predictors as well, since they cost nothing and drift within a run as the statistics do.

The measurement before the first step is left out everywhere. It is an outlier in every statistic, has no logarithm,
and a cluster of points with a single distant one always correlates.

**The rule within runs** uses Spearman's coefficient, which does not depend on how the curves bend.

- *better* (or *worse*): the coefficient is larger (smaller) in size than the baseline's, at the same checkpoints, in
  so many runs that a two-sided sign test has p < .05. That takes 6 runs.
- *adds to log(step)*: every run has a partial coefficient given log(step), and all have one sign; the interval of the
  pooled one excludes 0; and at most 5 % of as many independent pairs of random walks pool to one as large. A run in
  which loss or statistic follows the step in perfect order has no partial coefficient.

Of 100 simulated studies of three runs with twelve checkpoints, independent walks were found to add in 3, walks that
mostly fall in 1, and unrelated noisy decays in 7. The rule has no guard against two curves that both turn at points
that the runs share: these always add. For runs that overfit, use the segments as well.

**The rule across runs**, over settings if there are rows of these and otherwise over runs: *better* if the whole
interval of the Spearman coefficient is larger in size than the whole one of the baseline's, otherwise not
distinguished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import Literal

from scipy import stats

from hessian_callback.studies.association import (
    KINDS,
    PARTIAL_KINDS,
    Association,
    Kind,
    association,
    drift_null,
    interval_text,
    partial_association,
    pooled_within,
)

__all__ = [
    "BASELINES",
    "POOLED",
    "RUNS",
    "SEGMENTS",
    "SETTINGS",
    "Row",
    "Segment",
    "Series",
    "Target",
    "across_runs",
    "across_runs_at_train_loss",
    "plain_answer",
    "within_runs",
]

Target = Literal["test_loss", "gap"]
Segment = Literal["all", "before_minimum", "after_minimum"]

SEGMENTS: tuple[Segment, ...] = ("all", "before_minimum", "after_minimum")
#: Predictors that statistics are compared with, if a series has them.
BASELINES = ("log_step", "train_loss", "lambda_max", "trace")

#: Values of `Row.over` that are not a run's name.
POOLED, RUNS, SETTINGS = "pooled", "runs", "settings"

# A sign test over fewer runs cannot reach 5 %, two-sided, even if all agree.
_MIN_RUNS = 6
_SIGNIFICANCE = 0.05
# Two Spearman coefficients of a few observations are equal, or differ by more; torchmetrics rounds them at 1e-6.
_SAME = 1e-5

_WITHIN = "within runs"


@dataclass(frozen=True)
class Series:
    """Losses and statistics of one run at its checkpoints.

    Attributes:
        name: name of the run.
        labels: level of each factor, and the seed as ``"seed"``.
        steps: optimizer steps, ascending; 0 is the measurement before the first one.
        test_loss: at each step; ``None`` if unknown.
        train_loss: at each step; ``None`` if unknown.
        statistics: statistics of the spectrum at each step, by name; ``None`` if unknown.

    Raises:
        ValueError: if a list has another length than ``steps``, the steps do not ascend, a number is not finite, or a
            statistic has the name of a derived series.

    Example:
        >>> slope = {"slope": [0.1, 0.5, None]}
        >>> run = Series("seed 0", {"seed": "0"}, [0, 10, 20], [4.5, 2.5, 2.0], [4.5, 2.25, 1.5], slope)
        >>> run.values("slope"), run.values("gap")
        ([0.1, 0.5, None], [0.0, 0.25, 0.5])
    """

    name: str
    labels: Mapping[str, str]
    steps: Sequence[int]
    test_loss: Sequence[float | None]
    train_loss: Sequence[float | None]
    statistics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check lengths, order and names."""
        lists = {"test_loss": self.test_loss, "train_loss": self.train_loss, **self.statistics}
        if taken := {"log_step", "gap", "test_loss", "train_loss"} & set(self.statistics):
            raise ValueError(f"{self.name}: {', '.join(sorted(taken))} is not a statistic; rename it")
        for name, values in lists.items():
            if len(values) != len(self.steps):
                raise ValueError(f"{self.name}: {len(values)} values of {name} at {len(self.steps)} steps")
            if not all(value is None or math.isfinite(value) for value in values):
                raise ValueError(f"{self.name}: {name} must be finite, or None if unknown")
        if any(step < 0 for step in self.steps) or any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError(f"{self.name}: steps must ascend from 0 or later")

    @property
    def predictors(self) -> tuple[str, ...]:
        """Names of the baselines that every run has, then of the statistics."""
        return ("log_step", "train_loss", *self.statistics)

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """The labels without the seed."""
        return tuple(sorted((name, level) for name, level in self.labels.items() if name != "seed"))

    def values(self, name: str) -> list[float | None]:
        """Return a series by its name: ``"log_step"``, ``"gap"`` (test less train), a loss or a statistic."""
        if name == "log_step":
            return [math.log(step) if step > 0 else None for step in self.steps]
        if name == "gap":
            pairs = zip(self.test_loss, self.train_loss, strict=True)
            return [None if test is None or train is None else test - train for test, train in pairs]
        if name in ("test_loss", "train_loss"):
            return list(self.test_loss if name == "test_loss" else self.train_loss)
        return list(self.statistics[name]) if name in self.statistics else [None] * len(self.steps)


@dataclass(frozen=True)
class Row:
    """Coefficient of one predictor with the target.

    Attributes:
        question: ``"within runs"``, ``"across runs at step ..."`` or ``"across runs at train loss ..."``.
        over: the pairs: a run's name (its checkpoints), `POOLED` (all runs' coefficients, pooled), `RUNS` (a pair from
            each run) or `SETTINGS` (the mean over the seeds of each setting).
        segment: segment of the run; ``"all"`` across runs.
        predictor: ``"log_step"``, ``"train_loss"`` or a statistic.
        target: the loss that it is correlated with.
        kind: coefficient.
        found: the association; ``None`` if there is none.
        partial: the association given log(step); ``None`` for Kendall's and if there is none.
        leads: by baseline, the association's size less that of the baseline at the same observations; if pooled, their
            mean over the runs.
        drift_share: share of independent random walks with as strong an association; within runs only.
        falling_share: share of independent falling series with as strong a one; Pearson within runs only.
        partial_drift_share: share of independent random walks with as strong a partial one; within runs only.
        notes: reasons for missing values.
    """

    question: str
    over: str
    segment: Segment
    predictor: str
    target: Target
    kind: Kind
    found: Association | None = None
    partial: Association | None = None
    leads: Mapping[str, float] = field(default_factory=dict)
    drift_share: float | None = None
    falling_share: float | None = None
    partial_drift_share: float | None = None
    notes: tuple[str, ...] = ()


# Observations by name, all of one length; None if unknown.
_Table = Mapping[str, Sequence[float | None]]


def within_runs(
    series: Sequence[Series],
    target: Target = "test_loss",
    *,
    kinds: Sequence[Kind] = KINDS,
    segments: Sequence[Segment] = SEGMENTS,
    level: float = 0.95,
) -> list[Row]:
    """Correlate predictors and target over the checkpoints of each run, and pool the runs.

    If the test loss rises again, no monotone series follows it over the whole run. So the run is also split at the
    minimum of its test loss, which belongs to both parts. Each part needs at least 5 checkpoints; otherwise its rows
    have a note.

    Args:
        series: one a run; names must differ.
        target: ``"test_loss"``, or ``"gap"``, test less training loss, with which a training loss correlates by its
            own noise.
        kinds: coefficients.
        segments: parts of a run.
        level: nominal coverage of the intervals.

    Returns:
        For each segment, predictor and coefficient a row for every run and, with at least two runs, one for all.

    Raises:
        ValueError: if there are no series, or two share a name.

    Example:
        >>> loss, steps = [2.9, 2.4, 2.5, 2.1, 1.8, 1.9], [0, 10, 20, 40, 80, 160, 320]
        >>> run = Series("seed 0", {}, steps, [4.8, *loss], [None] * 7, {"fit_error": [0.5, *(x / 9 for x in loss)]})
        >>> rows = within_runs([run], kinds=["spearman"], segments=["all"])
        >>> [(row.predictor, round(row.found.value, 2)) for row in rows if row.found]
        [('log_step', -0.89), ('fit_error', 1.0)]
    """
    _check_names(series)
    rows: list[Row] = []
    for segment in segments:
        tables = {one.name: _segment(one, segment) for one in series}
        for predictor in _predictors(series):
            for kind in kinds:
                of_runs = [
                    _row(_WITHIN, name, segment, predictor, target, kind, table, level)
                    for name, table in tables.items()
                ]
                rows += [_with_drift(row, [row]) for row in of_runs]
                if len(of_runs) > 1:
                    rows.append(_with_drift(_pooled(of_runs, level), of_runs))
    return rows


def across_runs(
    series: Sequence[Series],
    target: Target = "test_loss",
    *,
    step: int | None = None,
    kinds: Sequence[Kind] = KINDS,
    level: float = 0.95,
) -> list[Row]:
    """Correlate predictors and target over runs, all at the same step.

    Seeds of one setting are not independent observations. So if there are more runs than settings, the same is done
    over the settings, each the mean of its seeds. The step is constant here, so it is neither a baseline nor removed.

    Args:
        series: one a run; names must differ.
        target: ``"test_loss"`` or ``"gap"``.
        step: one that all runs share; all of these, if not given.
        kinds: coefficients.
        level: nominal coverage of the intervals.

    Returns:
        For each step, predictor and coefficient a row over runs and one over settings; then the same at each run's
        last checkpoint (``"across runs at the last step"``), if these differ.

    Raises:
        ValueError: if there are no series, two share a name, or not all runs have the step.

    Example:
        >>> runs = [
        ...     Series(f"run {n}", {"width": f"{n}"}, [5], [2.0 - n / 9], [1.0], {"trace": [4.0 + n]}) for n in range(6)
        ... ]
        >>> rows = across_runs(runs, kinds=["spearman"])
        >>> [(row.question, row.predictor, round(row.found.value)) for row in rows if row.found]
        [('across runs at step 5', 'trace', -1)]
    """
    _check_names(series)
    shared = sorted(set.intersection(*(set(one.steps) for one in series)) - {0})
    if step is not None and step not in shared:
        without = [one.name for one in series if step not in one.steps]
        reason = f"is not one of {', '.join(without)}" if without else "is the measurement before the first step"
        raise ValueError(f"step {step} {reason}; the runs share {', '.join(map(str, shared)) or 'none'}")
    rows: list[Row] = []
    for at in shared if step is None else [step]:
        points = {one.name: _point(one, one.steps.index(at)) for one in series}
        rows += _across(f"across runs at step {at}", series, points, target, kinds, level)
    if step is None and len({one.steps[-1] for one in series if one.steps}) > 1:
        points = {one.name: _point(one, -1) for one in series if one.steps and one.steps[-1] > 0}
        rows += _across("across runs at the last step", series, points, target, kinds, level)
    return rows


def across_runs_at_train_loss(
    series: Sequence[Series],
    target: Target = "test_loss",
    *,
    train_loss: float | None = None,
    kinds: Sequence[Kind] = KINDS,
    level: float = 0.95,
) -> list[Row]:
    r"""Correlate predictors and target over runs, each where its training loss first falls to the same value.

    Between the checkpoints i and i + 1 around that loss every series is interpolated linearly in the training loss,

    .. math:: v = (1 - w) v_i + w v_{i+1}, \qquad w = \frac{\ell_i - \ell}{\ell_i - \ell_{i+1}},

    log(step) among them, which is then removed for the partial coefficient. A value that is unknown at one of the two
    is unknown. Rows over settings are as in `across_runs`.

    Args:
        series: one a run; names must differ.
        target: ``"test_loss"`` or ``"gap"``.
        train_loss: :math:`\ell`; the middle of the range that all runs cross, if not given.
        kinds: coefficients.
        level: nominal coverage of the intervals.

    Returns:
        For each predictor and coefficient a row over runs and one over settings. Runs that never cross are left out
        and named in the notes of every row.

    Raises:
        ValueError: if there are no series, two share a name, or no ``train_loss`` is given and there is none that all
            runs cross; the message names the runs that prevent it.

    Example:
        >>> early = Series("a", {}, [10, 100], [2.0, 1.0], [2.0, 1.0], {"slope": [1.0, 2.0]})
        >>> late = Series("b", {}, [10, 100], [1.8, 0.9], [1.6, 0.8], {"slope": [1.0, 2.0]})
        >>> rows = across_runs_at_train_loss([early, late], kinds=["kendall"])
        >>> rows[0].question, rows[0].notes[-1]
        ('across runs at train loss 1.3', 'n = 2; at least 5 observations are needed')
    """
    _check_names(series)
    wanted = _shared_train_loss(series) if train_loss is None else train_loss
    points = {one.name: point for one in series if (point := _crossing(one, wanted)) is not None}
    never = [one.name for one in series if one.name not in points]
    note = (f"never cross this training loss: {', '.join(never)}",) if never else ()
    return _across(f"across runs at train loss {wanted:.4g}", series, points, target, kinds, level, note)


def plain_answer(
    rows: Sequence[Row], predictor: str = "fit_error", baseline: str = "log_step", *, segment: Segment = "all"
) -> str:
    """Describe in a sentence whether a statistic predicts the target better than a baseline, by the module's rule.

    Args:
        rows: the rows of one question, with Spearman's among them.
        predictor: a statistic.
        baseline: one of `BASELINES`.
        segment: segment of the runs.

    Returns:
        The sentence, with the numbers behind it.

    Raises:
        ValueError: if the rows are of several questions or targets, or have none of the predictor by Spearman.

    Example:
        >>> rows = [
        ...     Row("within runs", f"seed {seed}", "all", "slope", "test_loss", "spearman",
        ...         association([1, 3, 2, 4, 5, 6], [1, 2, 3, 4, 5, 6], "spearman"), leads={"log_step": -0.04})
        ...     for seed in range(3)
        ... ]
        >>> print(plain_answer(rows, "slope"))
        Within runs, too few to say whether slope goes with the test loss better than log_step (its Spearman coefficient
        is the larger one in size in 0 of 3 runs; 6 runs are the least); it is not shown to add to log(step) (no partial
        coefficient in seed 0, seed 1, seed 2).
    """
    if len(asked := {(row.question, row.target) for row in rows}) != 1:
        raise ValueError(f"rows of {len(asked)} questions and targets; a plain answer needs those of one")
    ((question, target),) = asked
    chosen = [row for row in rows if row.kind == "spearman" and row.segment == segment]
    mine = [row for row in chosen if row.predictor == predictor]
    if not mine:
        raise ValueError(f"no rows of {predictor} by Spearman in segment {segment!r}; ask for kind 'spearman'")
    of_what = f"the {target.replace('_', ' ')}"
    if question == _WITHIN:
        where = (
            ""
            if segment == "all"
            else f" {segment.replace('_', ' the ').replace('minimum', 'minimum of the test loss')}"
        )
        comparison = _sign_test(mine, baseline, f"{predictor} goes with {of_what}{where}")
        return f"{comparison}; {_adds_to_step(mine)}."
    over = SETTINGS if any(row.over == SETTINGS for row in mine) else RUNS
    own, other = (
        next((row for row in chosen if row.predictor == name and row.over == over), None)
        for name in (predictor, baseline)
    )
    assert own is not None  # `mine` has a row over it.
    return f"{question[0].upper()}{question[1:]}, over {over}: {_compared_across(own, other, baseline, of_what)}."


def _sign_test(rows: Sequence[Row], baseline: str, what: str) -> str:
    """Describe whether the predictor's coefficient is the larger one in size in more runs than by chance."""
    leads = [row.leads[baseline] for row in rows if row.over != POOLED and baseline in row.leads]
    wins, losses = (sum(sign * lead > _SAME for lead in leads) for sign in (1, -1))
    counts = f"its Spearman coefficient is the larger one in size in {wins} of {len(leads)} runs"
    if len(leads) < _MIN_RUNS:
        counts += f"; {_MIN_RUNS} runs are the least"
        return f"Within runs, too few to say whether {what} better than {baseline} ({counts})"
    p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    if p >= _SIGNIFICANCE:
        return f"Within runs, it is undecided whether {what} better or worse than {baseline} ({counts}, p = {p:.3g})"
    how = "better" if wins > losses else "worse"
    return f"Within runs, {what} {how} than {baseline} ({counts}, p = {p:.3g})"


def _adds_to_step(rows: Sequence[Row]) -> str:
    """Describe whether the predictor is associated with the target given the step."""
    runs = [row for row in rows if row.over != POOLED]
    pooled = next((row for row in rows if row.over == POOLED), runs[0])
    if without := [row.over for row in runs if row.partial is None]:
        return f"it is not shown to add to log(step) (no partial coefficient in {', '.join(without)})"
    found, share = pooled.partial, pooled.partial_drift_share
    assert found is not None
    assert share is not None
    signs = {math.copysign(1, row.partial.value) for row in runs if row.partial is not None}
    failed = [
        words
        for words, holds in (
            ("its interval includes 0", found.excludes_zero),
            ("its sign differs between runs", len(signs) == 1),
            ("drift alone gives as much too often", share <= _SIGNIFICANCE),
        )
        if not holds
    ]
    figures = (
        f"partial coefficient {interval_text(found)}, reached by {100 * share:.2g} % of independent drifting pairs"
    )
    if failed:
        return f"it is not shown to add to log(step) ({figures}: {', '.join(failed)})"
    return f"it adds to log(step) ({figures}, of one sign in all runs)"


def _compared_across(own: Row, other: Row | None, baseline: str, of_what: str) -> str:
    if own.found is None:
        return f"{own.predictor} has no Spearman coefficient with {of_what} ({'; '.join(own.notes)})"
    figures = f"{interval_text(own.found)}, n = {own.found.num}"
    if other is None or other.found is None:
        reason = "not measured" if other is None else "; ".join(other.notes)
        held = "excludes" if own.found.excludes_zero else "includes"
        return (
            f"{own.predictor}'s Spearman coefficient with {of_what} is {figures}, and its interval {held} 0; "
            f"{baseline} has none ({reason})"
        )
    (low, high), (base_low, base_high) = _sizes(own.found), _sizes(other.found)
    beside = f"{figures}, beside {interval_text(other.found)}"
    if low > base_high or high < base_low:
        how = "better" if low > base_high else "worse"
        return f"{own.predictor} goes with {of_what} {how} than {baseline} ({beside})"
    return f"{own.predictor} and {baseline} cannot be distinguished by their association with {of_what} ({beside})"


def _sizes(found: Association) -> tuple[float, float]:
    """Interval of the coefficient's size."""
    ends = sorted((abs(found.low), abs(found.high)))
    return (ends[0] if found.excludes_zero else 0.0), ends[1]


def _across(
    question: str,
    series: Sequence[Series],
    points: Mapping[str, Mapping[str, float | None]],
    target: Target,
    kinds: Sequence[Kind],
    level: float,
    notes: tuple[str, ...] = (),
) -> list[Row]:
    """Rows over runs, each a point by name, and over settings."""
    names = (*_predictors(series), "test_loss", "gap")
    settings: dict[tuple[tuple[str, str], ...], list[Mapping[str, float | None]]] = {}
    for one in series:
        if one.name in points:
            settings.setdefault(one.setting, []).append(points[one.name])
    tables = {RUNS: {name: [point.get(name) for point in points.values()] for name in names}}
    if len(settings) < len(points):
        means = {name: [_mean([point.get(name) for point in seeds]) for seeds in settings.values()] for name in names}
        tables[SETTINGS] = means
    return [
        replace(row, notes=notes + row.notes)
        for predictor in _predictors(series)
        for kind in kinds
        for over, table in tables.items()
        for row in [_row(question, over, "all", predictor, target, kind, table, level)]
    ]


def _row(
    question: str,
    over: str,
    segment: Segment,
    predictor: str,
    target: Target,
    kind: Kind,
    table: _Table,
    level: float,
) -> Row:
    row = Row(question, over, segment, predictor, target, kind)
    x, y = _known(table, predictor, target)
    try:
        row = replace(row, found=association(x, y, kind, level=level, names=(predictor, target)))
    except ValueError as error:
        return replace(row, notes=(str(error),))
    row = replace(row, leads=_leads(table, predictor, target, kind))
    if predictor == "log_step" or kind not in PARTIAL_KINDS:
        return row
    x, y, given = _known(table, predictor, target, "log_step")
    if len(set(given)) == 1:
        return replace(row, notes=("given log(step): all are at the same step",))
    try:
        partial = partial_association(x, y, [given], kind, level=level, names=(predictor, target))
    except ValueError as error:
        return replace(row, notes=(f"given log(step): {error}",))
    return replace(row, partial=partial)


def _leads(table: _Table, predictor: str, target: Target, kind: Kind) -> dict[str, float]:
    """Difference in size between the predictor's coefficient and that of each baseline that has one."""
    leads = {}
    for baseline in BASELINES:
        if baseline == predictor or baseline not in table:
            continue
        x, other, y = _known(table, predictor, baseline, target)
        # With too few common observations, or constant ones, there is nothing to compare.
        with suppress(ValueError):
            leads[baseline] = abs(association(x, y, kind).value) - abs(association(other, y, kind).value)
    return leads


def _pooled(rows: Sequence[Row], level: float) -> Row:
    """One row for several runs."""
    row = replace(rows[0], over=POOLED, found=None, partial=None, leads={}, notes=())
    if not (found := [one.found for one in rows if one.found is not None]):
        return replace(row, notes=("no run has a coefficient",))
    notes = [f"not in {one.over}" for one in rows if one.found is None]
    by_baseline = {baseline: [one.leads[baseline] for one in rows if baseline in one.leads] for baseline in BASELINES}
    leads = {baseline: fmean(values) for baseline, values in by_baseline.items() if values}
    row = replace(row, found=pooled_within(found, level=level), leads=leads)
    if partials := [one.partial for one in rows if one.partial is not None]:
        notes += [f"given log(step): not in {one.over}" for one in rows if one.found and not one.partial]
        row = replace(row, partial=pooled_within(partials, level=level))
    return replace(row, notes=tuple(notes))


def _with_drift(row: Row, runs: Sequence[Row]) -> Row:
    """Add the shares of drifting pairs with coefficients as large."""
    found, partials = [one.found for one in runs], [one.partial for one in runs]
    return replace(
        row,
        drift_share=_drift_share(row.found, found, "walk"),
        falling_share=_drift_share(row.found, found, "falling") if row.kind == "pearson" else None,
        partial_drift_share=_drift_share(row.partial, partials, "walk"),
    )


def _drift_share(
    found: Association | None, of_runs: Sequence[Association | None], series: Literal["walk", "falling"]
) -> float | None:
    """Share of drifting pairs as strong as one run's, or as several pooled, all then as short as the shortest."""
    if found is None:
        return None
    nums = [one.num for one in of_runs if one is not None]
    null = drift_null(min(nums), found.kind, series=series, given_time=found.num_given > 0, runs=len(nums))
    return null.share(found.value)


def _segment(one: Series, segment: Segment) -> _Table:
    """A run's checkpoints without that before the first step, or those of a part of it."""
    table = {name: one.values(name) for name in (*one.predictors, "test_loss", "gap")}
    keep = [index for index, step in enumerate(one.steps) if step > 0]
    if segment != "all":
        known = [(loss, index) for index in keep if (loss := one.test_loss[index]) is not None]
        lowest = min(known)[1] if known else -1
        before = segment == "before_minimum"
        keep = [index for index in keep if (index <= lowest if before else index >= lowest >= 0)]
    return {name: [values[index] for index in keep] for name, values in table.items()}


def _point(one: Series, index: int) -> dict[str, float | None]:
    return {name: one.values(name)[index] for name in (*one.predictors, "test_loss", "gap")}


def _train_losses(one: Series) -> list[tuple[int, float]]:
    """Index and training loss of the checkpoints after the first step that know it."""
    return [
        (index, loss)
        for index, (step, loss) in enumerate(zip(one.steps, one.train_loss, strict=True))
        if step > 0 and loss is not None
    ]


def _crossing(one: Series, wanted: float) -> dict[str, float | None] | None:
    """A run's values at the place where its training loss first falls to the wanted one; ``None`` if it never does."""
    for (i, above), (j, below) in pairwise(_train_losses(one)):
        if above >= wanted >= below and above > below:
            weight = (above - wanted) / (above - below)
            ends = zip(_point(one, i).items(), _point(one, j).values(), strict=True)
            return {
                name: None if first is None or second is None else (1 - weight) * first + weight * second
                for (name, first), second in ends
            } | {"train_loss": wanted}
    return None


def _shared_train_loss(series: Sequence[Series]) -> float:
    """The middle of the range that every run's training loss falls through."""
    ranges = {}
    for one in series:
        losses = [loss for _, loss in _train_losses(one)]
        if not losses:
            raise ValueError(f"{one.name} has no training loss; leave it out, or give train_loss")
        peak = losses.index(max(losses))
        ranges[one.name] = (min(losses[peak:]), losses[peak])
    lowest, highest = max(ranges, key=lambda name: ranges[name][0]), min(ranges, key=lambda name: ranges[name][1])
    low, high = ranges[lowest][0], ranges[highest][1]
    if low >= high:
        raise ValueError(
            f"no training loss is crossed by all runs: {lowest} falls to {low:.4g}, {highest} from {high:.4g}; "
            "give train_loss, and the runs that never cross it are left out and named"
        )
    return (low + high) / 2


def _known(table: _Table, *names: str) -> list[list[float]]:
    """The observations at which all of some series are known."""
    columns = [table.get(name, ()) for name in names]
    complete = [[value for value in observation if value is not None] for observation in zip(*columns, strict=False)]
    kept = [observation for observation in complete if len(observation) == len(names)]
    return [[observation[place] for observation in kept] for place in range(len(names))]


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean over the seeds of a setting; unknown if one is."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _predictors(series: Sequence[Series]) -> tuple[str, ...]:
    """Predictors of all runs, in order of their first occurrence."""
    return tuple(dict.fromkeys(name for one in series for name in one.predictors))


def _check_names(series: Sequence[Series]) -> None:
    if not series:
        raise ValueError("no runs to analyse; give at least one")
    names = [one.name for one in series]
    if len(set(names)) < len(names):
        raise ValueError("two runs share a name; name each of them differently")
