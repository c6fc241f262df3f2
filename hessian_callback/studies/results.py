"""Results of the finished runs of a study: one row a fit, and a table with the published figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from hessian_callback.measurement.measurement import Measurement
from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.reports.logged_scalars import losses_at
from hessian_callback.reports.run_files import Run, find_runs
from hessian_callback.reports.run_tables import RunTable, csv_of, tabulate
from hessian_callback.studies.definition import PlannedRun, Published, Study
from hessian_callback.studies.one_run import finished

__all__ = [
    "ACCURACY",
    "ENDS",
    "RANDOM",
    "TRAINED",
    "UNKNOWN",
    "Row",
    "agreement",
    "csv_of",
    "markdown_table",
    "rows_of",
    "setting_table",
    "spread",
]

#: Names of a run's two ends in the column ``when``.
ENDS = RANDOM, TRAINED = ("random init", "trained")
#: The metric that the test error is taken from.
ACCURACY = "val_acc"
#: Cell of an unknown value.
UNKNOWN = "–"


@dataclass(frozen=True)
class Row:
    r"""The fit to the K largest eigenvalues of one measurement of one run.

    Attributes:
        run: the run's name.
        labels: levels by factor; and ``when``, which is ``"random init"``, ``"trained"``, or the number of epochs or
            steps.
        seed: the run's seed.
        part: prefix of the callback, if there are several, and group of parameters, with a slash between.
        step: optimizer steps before the measurement.
        num_eigenvalues: requested K.
        fit: the fit; ``None`` if fewer eigenvalues are positive and known to their tolerance.
        reason: why there is no fit.
        num_known: number of leading eigenvalues that are positive and known to their tolerance; for the published
            protocol, which has no bounds, of those that are positive.
        largest_bound: the largest relative error bound of the fitted ones; ``None`` without a fit, and for the
            published protocol, which has no bounds.
        gap_exponent: exponent of the eigengaps sorted by size; ``None`` if they have none.
        test_loss: the run's validation loss with these weights.
        test_error: share of the held-out images that are classified wrongly.
        train_loss: the run's training loss.
        num_samples: samples behind the Hessian.
        num_parameters: its size.
        num_hvps: products spent.
        seconds: wall time of the measurement.
        num_negative: eigenvalues that are negative for certain.
        missed_probability: the chance that an eigenvalue was overlooked.
        device: device of the run.
        comparisons: results of the optional comparisons.
    """

    run: str
    labels: Mapping[str, str]
    seed: int
    part: str
    step: int
    num_eigenvalues: int
    fit: PowerLawFit | None
    reason: str | None
    num_known: int
    largest_bound: float | None
    gap_exponent: float | None
    test_loss: float | None
    test_error: float | None
    train_loss: float | None
    num_samples: int | None
    num_parameters: int | None
    num_hvps: int | None
    seconds: float
    num_negative: int | None
    missed_probability: float | None
    device: str
    comparisons: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Return the row for a table: numbers with all their digits, ``None`` for unknown ones."""
        fit = self.fit
        return {
            "run": self.run,
            **self.labels,
            "seed": self.seed,
            "part": self.part,
            "step": self.step,
            "K": self.num_eigenvalues,
            "d_ks": fit and fit.fit_error,
            "s_hat": fit and fit.slope,
            "s_hat_stderr": fit and fit.slope_stderr,
            "beta": fit and fit.density_exponent,
            "beta_stderr": fit and fit.density_exponent_stderr,
            "critical_paper": fit and fit.critical_distance_paper,
            "critical_fitted": fit and fit.critical_distance_fitted,
            "holds_paper": fit and fit.within_critical_distance_paper,
            "holds_fitted": fit and fit.within_critical_distance_fitted,
            "lambda_1": fit and fit.lambda_1,
            "lambda_K": fit and fit.cutoff,
            "least_squares_slope": fit and fit.least_squares_slope,
            "r_squared": fit and fit.r_squared,
            "gap_exponent": self.gap_exponent,
            "test_loss": self.test_loss,
            "test_error": self.test_error,
            "train_loss": self.train_loss,
            "samples": self.num_samples,
            "parameters": self.num_parameters,
            "known": self.num_known,
            "largest_bound": self.largest_bound,
            "negative": self.num_negative,
            "missed_probability": self.missed_probability,
            "products": self.num_hvps,
            "seconds": self.seconds,
            "device": self.device,
            "reason": self.reason,
            **self.comparisons,
        }


def rows_of(study: Study, folder: Path, runs: Sequence[PlannedRun]) -> list[Row]:
    """Read the finished runs among some.

    Args:
        study: the study; its ``rows`` choose the measurements, its ``fitted`` the K.
        folder: where its runs are.
        runs: the runs to read.

    Raises:
        HistoryError: if a finished run's files can't be read.
    """
    rows: list[Row] = []
    for planned in runs:
        ending = finished(folder / planned.name)
        if ending is None:
            continue
        found = find_runs([folder / planned.name])
        for run in found:
            prefix = run.prefix if len(found) > 1 else ""
            rows += _rows_of_run(study, planned, run, prefix, str(ending["device"]))
    return rows


def _rows_of_run(study: Study, planned: PlannedRun, run: Run, prefix: str, device: str) -> Iterator[Row]:
    """The rows of one callback's measurements, in order of time."""
    table = tabulate(run)
    errors = _test_errors(table)
    for index, measurement in enumerate(run.history):
        last = index == len(run.history) - 1
        when = _when(measurement, last=last)
        if not last and (study.rows == "last" or (study.rows == "first and last" and when not in ENDS)):
            continue
        for group, member in {"": measurement, **measurement.groups}.items():
            spectrum = member.spectrum
            values = _fitted(member, study.fit_rtol)
            for wanted in study.fitted or [_asked(run.history, group)]:
                fit, reason = _fit(member, values, wanted)
                yield Row(
                    run=planned.name,
                    labels={**planned.labels, "when": when},
                    seed=planned.seed,
                    part="/".join(filter(None, (prefix, group))),
                    step=measurement.step,
                    num_eigenvalues=wanted,
                    fit=fit,
                    reason=reason,
                    num_known=len(values),
                    largest_bound=_largest_bound(member, fit),
                    gap_exponent=_gap_exponent(values, fit),
                    test_loss=table.validation[index] if table.validation_name else None,
                    test_error=errors[index],
                    train_loss=table.training[index],
                    num_samples=measurement.num_samples,
                    num_parameters=member.num_parameters,
                    num_hvps=None if spectrum is None else spectrum.num_matvecs,
                    seconds=member.seconds,
                    num_negative=None if spectrum is None else spectrum.num_negative,
                    missed_probability=None if spectrum is None else spectrum.missed_probability,
                    device=device,
                    comparisons=member.comparisons,
                )


def _when(measurement: Measurement, *, last: bool) -> str:
    if measurement.step == 0:
        return RANDOM
    if last:
        return TRAINED
    return f"epoch {measurement.epoch + 1}" if measurement.when == "epoch" else f"step {measurement.step}"


def _asked(history: Sequence[Measurement], group: str) -> int:
    """Number of eigenvalues that a callback measured; 0 if all of its measurements failed."""
    members = [measurement.groups.get(group) if group else measurement for measurement in history]
    spectra = [member.spectrum for member in members if member is not None]
    # A measurement that failed in the middle of a run counts with the K of the others.
    return max((len(spectrum.eigenvalues) for spectrum in spectra if spectrum is not None), default=0)


def _fitted(measurement: Measurement, fit_rtol: float | None) -> Tensor:
    """The eigenvalues that a law can be fitted to; under the published protocol all positive ones."""
    spectrum = measurement.spectrum
    if spectrum is None:
        return torch.zeros(0, dtype=torch.float64)
    if measurement.mode == "paper":
        return spectrum.eigenvalues[spectrum.eigenvalues > 0]
    return replace(spectrum, rtol=fit_rtol or spectrum.rtol).positive_converged


def _fit(measurement: Measurement, values: Tensor, wanted: int) -> tuple[PowerLawFit | None, str | None]:
    if measurement.spectrum is None:
        return None, measurement.reason
    if len(values) < wanted:
        what = "positive" if measurement.mode == "paper" else "positive and known"
        return None, f"only {len(values)} eigenvalues are {what} ({measurement.spectrum.stopped})"
    try:
        return fit_power_law(values, num_eigenvalues=wanted), None
    except ValueError as error:  # Too few were measured, or all are equal.
        return None, str(error)


def _largest_bound(measurement: Measurement, fit: PowerLawFit | None) -> float | None:
    spectrum = measurement.spectrum
    if fit is None or spectrum is None or measurement.mode == "paper":
        return None
    bounds = spectrum.error_bounds / spectrum.eigenvalues
    return float(bounds[: fit.num_eigenvalues].max())


def _gap_exponent(values: Tensor, fit: PowerLawFit | None) -> float | None:
    if fit is None:
        return None
    try:
        return fit_eigengaps(values, num_eigenvalues=fit.num_eigenvalues).exponent
    except ValueError:  # Equal eigenvalues have no gaps.
        return None


def _test_errors(table: RunTable) -> list[float | None]:
    scalars = table.run.scalars
    if ACCURACY not in scalars:
        return [None] * len(table.run.history)
    return [None if share is None else 1 - share for share in losses_at(table.run.history, scalars[ACCURACY])]


# -- one line for each setting -----------------------------------------------------------------------


def setting_table(study: Study, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Make a line for each setting from its seeds, with the published figures.

    A number is the mean over the seeds, with the smallest and the largest in brackets. ``seeds`` is the number of seeds
    with a fit, and of all if some have none. A verdict counts the seeds for which the law is not rejected at 5 %, by
    the paper's critical value and by the one for a fitted exponent. The last column compares with the published
    verdict by the paper's critical value: ``same``, ``different``, or ``mixed`` if the seeds differ.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*row.labels.items(), row.part, row.num_eigenvalues), []).append(row)
    return [_line(study, members) for members in groups.values()]


def _line(study: Study, members: Sequence[Row]) -> dict[str, str]:
    first = members[0]
    fits = [row.fit for row in members if row.fit is not None]
    published = study.published_for(first.labels) or Published({})
    num = len(fits)
    holds = sum(fit.within_critical_distance_paper for fit in fits)
    line = dict(first.labels)
    if first.part:
        line["part"] = first.part
    line |= {
        "K": str(first.num_eigenvalues),
        "seeds": str(num) if num == len(members) else f"{num} of {len(members)}",
        "d_ks": spread([fit.fit_error for fit in fits], ".4f"),
        "s_hat": spread([fit.slope for fit in fits], ".3f"),
        "beta": spread([fit.density_exponent for fit in fits], ".3f"),
        "largest bound": _percent([row.largest_bound for row in members]),
        "holds (paper's value)": f"{holds} of {num}" if num else UNKNOWN,
        "holds (fitted)": f"{sum(fit.within_critical_distance_fitted for fit in fits)} of {num}" if num else UNKNOWN,
        "gap exponent": spread([row.gap_exponent for row in members], ".3f"),
        "test error": spread([row.test_error for row in members], ".4f"),
        "test loss": spread([row.test_loss for row in members], ".3f"),
        "samples": "/".join(map(str, sorted({row.num_samples for row in members if row.num_samples is not None}))),
        "products": spread([row.num_hvps for row in members], ".0f"),
        "seconds": spread([row.seconds for row in members], ".1f"),
        "published d_ks": UNKNOWN if published.fit_error is None else f"{published.fit_error:.4f}",
        "published s_hat": UNKNOWN if published.slope is None else f"{published.slope:.3f}",
        "published gap exponent": UNKNOWN if published.gap_exponent is None else f"{published.gap_exponent:.3f}",
        "published verdict": UNKNOWN if published.holds is None else ("holds" if published.holds else "rejected"),
    }
    if published.holds is not None:
        line["verdict"] = agreement(published, holds, num)
    return line


def agreement(published: Published, holds: int, num: int) -> str:
    """Compare the number of seeds for which the law holds with the published verdict.

    Example:
        >>> agreement(Published({}, holds=False), 0, 3), agreement(Published({}, holds=False), 1, 3)
        ('same', 'mixed')
    """
    if published.holds is None or not num:
        return UNKNOWN
    agreeing = holds if published.holds else num - holds
    return {num: "same", 0: "different"}.get(agreeing, "mixed")


def spread(values: Sequence[float | None], digits: str, between: str = " to ") -> str:
    """Format the mean of the known values, with the smallest and the largest in brackets if these differ as formatted.

    Example:
        >>> spread([1.0, None, 2.0], ".1f"), spread([0.5], ".2f"), spread([None], ".1f")
        ('1.5 (1.0 to 2.0)', '0.50', '–')
    """
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    mean = format(fmean(known), digits)
    if not all(map(math.isfinite, known)):  # A run diverged.
        return mean
    low, high = format(min(known), digits), format(max(known), digits)
    return mean if low == high else f"{mean} ({low}{between}{high})"


def _percent(bounds: Sequence[float | None]) -> str:
    largest = max((bound for bound in bounds if bound is not None), default=None)
    return UNKNOWN if largest is None else f"{100 * largest:.2g} %"


def markdown_table(lines: Sequence[Mapping[str, str]]) -> str:
    """Write lines as a table in Markdown without columns of unknown values; empty if no column is left.

    Example:
        >>> print(markdown_table([{"K": "50", "test loss": UNKNOWN}, {"K": "200", "s_hat": "1.065"}]))
        | K | s_hat |
        |---|---|
        | 50 | – |
        | 200 | 1.065 |
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    names = [name for name in names if any(line.get(name, "") not in ("", UNKNOWN) for line in lines)]
    if not names:
        return ""
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(head + ["| " + " | ".join(line.get(name) or UNKNOWN for name in names) + " |" for line in lines])
