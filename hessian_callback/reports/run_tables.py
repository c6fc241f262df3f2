"""The tables of a report: measurements beside losses, rank correlations, and runs side by side."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

from hessian_callback.measurement.history import HistoryError
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.reports.logged_scalars import losses_at
from hessian_callback.reports.run_files import Run
from hessian_callback.reports.running_correlations import MIN_OBSERVATIONS, rank_correlation

__all__ = ["Correlation", "RunTable", "across_runs", "correlations", "csv_of", "csv_text", "tabulate"]

_VALIDATION = ("val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss", "loss/val")
# Names of curves that an error message lists.
_MOST_NAMES = 30
_TRAINING = ("train_loss", "train/loss", "training_loss", "loss/train", "loss")


@dataclass(frozen=True)
class RunTable:
    """A run's measurements and the losses that belong to them.

    Attributes:
        run: the run.
        num_fitted: ``K`` of the run's slopes; measurements with another one are not compared with them.
        mode: the protocol, ``"strict"`` or ``"paper"``.
        validation: the validation loss at each measurement, ``None`` if none was logged.
        training: the training loss likewise.
        validation_name: the name that the validation loss was logged under; ``None`` if none was found, and
            ``validation`` is the mean loss over the held-out samples.
        training_name: the name of the training loss; ``None``: none was found.
    """

    run: Run
    num_fitted: int | None
    mode: str
    validation: Sequence[float | None]
    training: Sequence[float | None]
    validation_name: str | None
    training_name: str | None

    @property
    def comparable(self) -> list[bool]:
        """Whether each measurement has a slope at the run's ``K`` and protocol, made while training."""
        return [
            m.logged and m.num_fitted == self.num_fitted and m.mode == self.mode and m.when != "validate"
            for m in self.run.history
        ]

    @property
    def last(self) -> int | None:
        """Index of the last comparable measurement; ``None`` if there is none."""
        return max((index for index, fits in enumerate(self.comparable) if fits), default=None)

    @property
    def validation_label(self) -> str:
        """Name of the validation loss for figures and tables."""
        return self.validation_name or "held-out loss"

    @property
    def training_label(self) -> str:
        """Name of the training loss for figures and tables."""
        return self.training_name or "training loss"


def tabulate(run: Run, *, val_loss: str | None = None, train_loss: str | None = None) -> RunTable:
    """Put the losses beside a run's measurements.

    Args:
        run: the run.
        val_loss: the name of the validation loss in the logger; default: the usual ones.
        train_loss: the name of the training loss likewise.

    Raises:
        HistoryError: if a name that was asked for was not logged.
    """
    validation_name = _chosen("--val_loss", val_loss, _VALIDATION, run)
    training_name = _chosen("--train_loss", train_loss, _TRAINING, run)
    held_out = [m.loss for m in run.history]
    last = next((m for m in reversed(run.history) if m.logged and m.fit is not None), None)
    return RunTable(
        run=run,
        num_fitted=None if last is None else last.num_fitted,
        mode="strict" if last is None else last.mode,
        validation=held_out if validation_name is None else losses_at(run.history, run.scalars[validation_name]),
        training=[None] * len(held_out)
        if training_name is None
        else losses_at(run.history, run.scalars[training_name]),
        validation_name=validation_name,
        training_name=training_name,
    )


def _chosen(option: str, asked: str | None, usual: Sequence[str], run: Run) -> str | None:
    if asked is not None:
        if asked not in run.scalars:
            names = sorted(name[:60] for name in run.scalars)
            written = ", ".join(names[:_MOST_NAMES]) or "nothing"
            written += f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            raise HistoryError(f"{option} {asked}: {run.name} has no such curve. Its loggers wrote {written}")
        return asked
    names = [form for name in usual for form in (f"{name}_epoch", name, f"{name}_step")]
    return next((name for name in names if name in run.scalars), None)


# -- one row for each measurement --------------------------------------------------------------------

_COLUMNS = {
    "K": "num_fitted",
    "slope": "slope",
    "slope_stderr": "slope_stderr",
    "fit_error": "fit_error",
    "critical_distance": "critical_distance",
    "density_exponent": "density_exponent",
    "lambda_max": "lambda_max",
    "num_hvps": "num_hvps",
    "seconds": "seconds",
    "num_parameters": "num_parameters",
    "num_samples": "num_samples",
    "held_out_loss": "loss",
}


def csv_text(tables: Iterable[RunTable]) -> str:
    """Write all measurements as CSV, one a row, numbers with all their digits.

    Unknown values are empty cells. The columns ``logged`` and ``reason`` say whether a slope can be compared and why
    not. Results of ``extras`` and ``groups`` follow in columns of their own.
    """
    rows: list[dict[str, object]] = []
    for table in tables:
        for index, m in enumerate(table.run.history):
            row: dict[str, object] = {
                "run": table.run.name,
                "prefix": table.run.prefix,
                "when": m.when,
                "epoch": m.epoch,
                "step": m.step,
                "mode": m.mode,
                **{column: getattr(m, name) for column, name in _COLUMNS.items()},
                "validation_loss": table.validation[index] if table.validation_name else None,
                "training_loss": table.training[index],
                "logged": m.logged,
                "reason": m.reason,
                **m.comparisons,
            }
            for group, part in m.groups.items():
                row |= {f"{name}/{group}": getattr(part, name) for name in ("slope", "slope_stderr", "fit_error")}
            rows.append(row)
    return csv_of(rows)


def csv_of(rows: Iterable[Mapping[str, object]]) -> str:
    """Write rows as CSV, with a column for each name that occurs and empty cells for unknown values.

    Example:
        >>> csv_of([{"K": 50, "s_hat": None}, {"K": 200, "trace": 1.5}]).splitlines()
        ['K,s_hat,trace', '50,,', '200,,1.5']
    """
    rows = list(rows)
    text = StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# -- correlations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """Rank correlations of a statistic with the validation loss.

    Attributes:
        statistic: name of the statistic.
        baseline: whether it is a baseline for the statistics of the spectrum.
        num: number of pairs.
        spearman: Spearman's coefficient; ``None`` if there is none.
        spearman_interval: its 95 % interval, see `running_correlations`.
        kendall: Kendall's tau-b likewise.
        kendall_interval: its 95 % interval.
        missing: why there is no coefficient; ``None`` if there is one.
    """

    statistic: str
    baseline: bool
    num: int
    spearman: float | None = None
    spearman_interval: tuple[float, float] | None = None
    kendall: float | None = None
    kendall_interval: tuple[float, float] | None = None
    missing: str | None = None


def correlations(table: RunTable) -> list[Correlation]:
    """Correlate the statistics of a run with its validation loss over the measurements.

    The measurement before the first step is left out, because it is an outlier of every statistic and causes
    correlations that training itself does not have. Nearly every statistic has a trend along a run, so ``log(step)``
    is correlated as a baseline.
    """
    chosen = [
        index for index, fits in enumerate(table.comparable) if fits and table.run.history[index].when != "fit_start"
    ]
    history = [table.run.history[index] for index in chosen]
    columns = _statistics(history, [table.training[index] for index in chosen], table.training_name)
    columns[("log(step)", True)] = [math.log(m.step) if m.step > 0 else None for m in history]
    losses = [table.validation[index] for index in chosen]
    return [_correlation(name, baseline, values, losses) for (name, baseline), values in columns.items()]


def across_runs(tables: Sequence[RunTable]) -> tuple[int, list[int], list[Correlation]]:
    """Correlate over runs, at the last step that all of them have reached.

    Args:
        tables: runs of one prefix, ``K`` and mode, each with a comparable measurement.

    Returns:
        The step; for each run the index of its last comparable measurement up to it (its first one, if it begins
        later); and the correlations.
    """
    step = min(table.run.history[table.last].step for table in tables if table.last is not None)
    indices = []
    for table in tables:
        fitting = [index for index, fits in enumerate(table.comparable) if fits]
        reached = [index for index in fitting if table.run.history[index].step <= step]
        indices.append(reached[-1] if reached else fitting[0])
    history = [table.run.history[index] for table, index in zip(tables, indices, strict=True)]
    training = [table.training[index] for table, index in zip(tables, indices, strict=True)]
    losses = [table.validation[index] for table, index in zip(tables, indices, strict=True)]
    columns = _statistics(history, training, tables[0].training_name)
    return step, indices, [_correlation(name, base, values, losses) for (name, base), values in columns.items()]


def _statistics(
    history: Sequence[Measurement], training: Sequence[float | None], training_name: str | None
) -> dict[tuple[str, bool], list[float | None]]:
    columns: dict[tuple[str, bool], list[float | None]] = {
        ("slope", False): [m.slope for m in history],
        ("fit error", False): [m.fit_error for m in history],
        ("largest eigenvalue", False): [m.lambda_max for m in history],
    }
    for name, shown in (("trace", "trace"), ("frobenius_norm", "Frobenius norm")):
        if any(name in m.comparisons for m in history):
            columns[(shown, False)] = [m.comparisons.get(name) for m in history]
    if training_name is not None:
        columns[(training_name, True)] = list(training)
    return columns


def _correlation(
    name: str, baseline: bool, values: Sequence[float | None], losses: Sequence[float | None]
) -> Correlation:
    pairs = [
        (x, y)
        for x, y in zip(values, losses, strict=True)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    if len(pairs) < MIN_OBSERVATIONS:
        return Correlation(name, baseline, len(pairs), missing=f"needs at least {MIN_OBSERVATIONS} pairs")
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return Correlation(name, baseline, len(pairs), missing="is constant" if len(set(xs)) == 1 else "loss constant")
    rho, tau = rank_correlation(xs, ys, kind="spearman"), rank_correlation(xs, ys, kind="kendall")
    return Correlation(name, baseline, len(pairs), rho.value, (rho.low, rho.high), tau.value, (tau.low, tau.high))
