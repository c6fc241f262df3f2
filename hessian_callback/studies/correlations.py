"""Tables of the correlations between a study's statistics and the test loss, and sentences about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from hessian_callback.studies.analysis import (
    POOLED,
    SEGMENTS,
    Row,
    Segment,
    Series,
    across_runs,
    across_runs_at_train_loss,
    plain_answer,
    within_runs,
)
from hessian_callback.studies.association import KINDS, Kind, association, interval_text
from hessian_callback.studies.results import TRAINED, UNKNOWN, markdown_table
from hessian_callback.studies.results import Row as Measured

__all__ = ["correlation_report", "error_table", "series_of"]

#: The statistics that sentences are about, and their baselines.
_ASKED = ("fit_error", "slope")
_COMPARED_WITH = ("log_step", "train_loss")
_FEWEST_RUNS = 5


def series_of(rows: Sequence[Measured]) -> dict[str, list[Series]]:
    """Group the measurements by part of the parameters, K and run.

    A number that is not finite, such as the loss of a run that diverged, counts as unknown.

    Args:
        rows: the study's rows, those of each run in order of time.

    Returns:
        Series by a title for the part and K.
    """
    found: dict[tuple[str, int], dict[str, list[Measured]]] = {}
    for row in rows:
        found.setdefault((row.part, row.num_eigenvalues), {}).setdefault(row.run, []).append(row)
    return {
        f"{part or 'all measured parameters'}, K = {number}": [_series(name, members) for name, members in runs.items()]
        for (part, number), runs in found.items()
    }


def _series(name: str, rows: Sequence[Measured]) -> Series:
    first = rows[0]
    statistics: dict[str, list[float | None]] = {
        "fit_error": [None if row.fit is None else row.fit.fit_error for row in rows],
        "slope": [None if row.fit is None else row.fit.slope for row in rows],
        "lambda_max": [None if row.fit is None else row.fit.lambda_1 for row in rows],
    }
    if any("trace" in row.comparisons for row in rows):
        statistics["trace"] = [_finite(row.comparisons.get("trace")) for row in rows]
    return Series(
        name=name,
        labels={key: level for key, level in first.labels.items() if key != "when"} | {"seed": str(first.seed)},
        steps=[row.step for row in rows],
        test_loss=[_finite(row.test_loss) for row in rows],
        train_loss=[_finite(row.train_loss) for row in rows],
        statistics=statistics,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def correlation_report(rows: Sequence[Measured]) -> tuple[str, list[dict[str, object]]]:
    """Correlate the statistics with the test loss.

    Within the runs of a setting, if one has five measurements after the first step. Across runs, if there are at least
    five, at their last step and at equal training losses.

    Args:
        rows: the study's rows.

    Returns:
        Markdown, and all coefficients with all digits for a CSV.
    """
    text: list[str] = []
    table: list[dict[str, object]] = []
    for title, series in series_of(rows).items():
        settings: dict[tuple[tuple[str, str], ...], list[Series]] = {}
        for one in series:
            settings.setdefault(one.setting, []).append(one)
        for setting, members in settings.items():
            where = ", ".join([title, *(f"{factor} {level}" for factor, level in setting)])
            if max(sum(step > 0 for step in one.steps) for one in members) >= _FEWEST_RUNS:
                found = within_runs(members)
                text += _section(f"Within runs: {where}", _within_text(found), _answers(found, SEGMENTS))
                table += [_plain(where, row) for row in found]
        if len(series) >= _FEWEST_RUNS:
            found, remarks = _at_one_place(series)
            for question in dict.fromkeys(row.question for row in found):
                mine = [row for row in found if row.question == question]
                heading = f"{question.capitalize()}: {title}"
                text += _section(heading, _across_text(mine), _answers(mine, SEGMENTS[:1]))
                table += [_plain(title, row) for row in mine]
            text += remarks
    if errors := error_table(rows):
        text += ["## Across runs, with the test error instead of the loss", errors]
    return "\n\n".join(text) + "\n", table


def _section(heading: str, table: str, answers: Sequence[str]) -> list[str]:
    """A section with a table; empty if no coefficient is known."""
    return [f"## {heading}", table, *answers] if table else []


def _at_one_place(series: Sequence[Series]) -> tuple[list[Row], list[str]]:
    """Rows over runs at their last step and at equal training losses, and remarks on missing ones."""
    rows = across_runs(series)
    found = [row for row in rows if row.question == rows[-1].question]
    if not all(sum(loss is not None for loss in one.train_loss) > 1 for one in series):
        return found, []
    try:
        return found + across_runs_at_train_loss(series), []
    except ValueError as error:
        # The rest of the message is for callers that choose a loss.
        return found, [f"Not compared at equal training losses: {str(error).partition(';')[0]}."]


def _answers(rows: Sequence[Row], segments: Sequence[Segment]) -> list[str]:
    sentences: list[str] = []
    for segment in segments:
        known = {r.predictor for r in rows if r.segment == segment and r.kind == "spearman" and r.found is not None}
        sentences += [
            f"- {plain_answer(rows, statistic, baseline, segment=segment)}"
            for statistic in _ASKED
            for baseline in _COMPARED_WITH
            if {statistic, baseline} <= known
        ]
    return ["\n".join(sentences)] if sentences else []


def _within_text(rows: Sequence[Row]) -> str:
    """A line for each segment and predictor: the runs' Spearman coefficients, and all three pooled."""
    lines = []
    for segment in SEGMENTS:
        for predictor in dict.fromkeys(row.predictor for row in rows):
            mine = [row for row in rows if row.segment == segment and row.predictor == predictor]
            ranked = [row for row in mine if row.kind == "spearman"]
            runs = [row for row in ranked if row.over != POOLED]
            if not any(row.found for row in mine):
                continue
            line = {"segment": segment.replace("_", " "), "predictor": predictor}
            line["Spearman, run by run"] = ", ".join(
                UNKNOWN if r.found is None else f"{r.found.value:.2f}" for r in runs
            )
            # A single run has no pooled row.
            for kind in KINDS:
                pooled = [row for row in mine if row.kind == kind and (row.over == POOLED or len(runs) == 1)]
                line[f"{kind.capitalize()} (95 %)"] = interval_text(pooled[-1].found) if pooled else ""
            pooled = [row for row in ranked if row.over == POOLED or len(runs) == 1]
            line["Spearman given log(step)"] = interval_text(pooled[-1].partial) if pooled else ""
            share = pooled[-1].drift_share if pooled else None
            line["random walks as strong"] = "" if share is None else f"{100 * share:.0f} %"
            lines.append(line)
    return markdown_table(lines)


def _across_text(rows: Sequence[Row]) -> str:
    lines = []
    for over in dict.fromkeys(row.over for row in rows):
        for predictor in dict.fromkeys(row.predictor for row in rows):
            mine = {row.kind: row for row in rows if row.over == over and row.predictor == predictor}
            if not any(row.found for row in mine.values()):
                continue
            line = {"pairs": over, "predictor": predictor}
            for kind, row in mine.items():
                line[f"{kind.capitalize()} (95 %)"] = interval_text(row.found)
            line["n"] = str(max(row.found.num for row in mine.values() if row.found is not None))
            lines.append(line)
    return markdown_table(lines)


def _plain(where: str, row: Row) -> dict[str, object]:
    """A row for the CSV."""
    cells: dict[str, object] = {
        "setting": where,
        "question": row.question,
        "over": row.over,
        "segment": row.segment,
        "predictor": row.predictor,
        "target": row.target,
        "kind": row.kind,
    }
    for name, found in (("", row.found), ("partial_", row.partial)):
        if found is not None:
            cells |= {f"{name}value": found.value, f"{name}low": found.low, f"{name}high": found.high}
            cells[f"{name}n"] = found.num
    shares: Mapping[str, float | None] = {
        "drift_share": row.drift_share,
        "falling_share": row.falling_share,
        "partial_drift_share": row.partial_drift_share,
    }
    return {**cells, **shares, "notes": "; ".join(row.notes)}


def error_table(rows: Sequence[Measured]) -> str:
    """Correlate slope and fit error at the end of the runs with the share of held-out images classified wrongly.

    Over runs and, if these are more, over settings (means over the seeds), as in the source paper (r = .853 between
    slope and test error over eleven optimizers on MNIST).

    Args:
        rows: the study's rows.

    Returns:
        A table in Markdown, or an empty string if fewer than five settings have a test error.
    """
    lines = []
    places: dict[tuple[str, int], dict[str, list[tuple[float, float, float]]]] = {}
    for row in rows:
        if row.labels["when"] == TRAINED and row.fit is not None and row.test_error is not None:
            setting = str({name: level for name, level in row.labels.items() if name != "when"})
            point = (row.fit.slope, row.fit.fit_error, row.test_error)
            places.setdefault((row.part, row.num_eigenvalues), {}).setdefault(setting, []).append(point)
    for (part, number), settings in places.items():
        runs = [point for points in settings.values() for point in points]
        means = [tuple(map(fmean, zip(*points, strict=True))) for points in settings.values()]
        for over, points in (("runs", runs), ("settings", means)):
            if len(means) < _FEWEST_RUNS or (over == "settings" and len(means) == len(runs)):
                continue
            slopes, fit_errors, errors = zip(*points, strict=True)
            for name, values in (("slope", slopes), ("fit_error", fit_errors)):
                line = {"part": part or UNKNOWN, "K": str(number), "pairs": over, "predictor": name}
                for kind in KINDS:
                    line[f"{kind.capitalize()} (95 %)"] = _coefficient(values, errors, kind)
                lines.append({**line, "n": str(len(points))})
    return markdown_table(lines)


def _coefficient(values: Sequence[float], errors: Sequence[float], kind: Kind) -> str:
    try:
        return interval_text(association(values, errors, kind))
    except ValueError:  # Equal errors have no correlation.
        return UNKNOWN
