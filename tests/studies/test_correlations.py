"""The tables of correlations: planted rows whose coefficients are known, and rows of which nothing can be said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hessian_callback.power_law.fit import PowerLawFit
from hessian_callback.studies.analysis import (
    POOLED,
    across_runs,
    across_runs_at_train_loss,
    plain_answer,
    within_runs,
)
from hessian_callback.studies.analysis import Row as Found
from hessian_callback.studies.association import interval_text
from hessian_callback.studies.correlations import correlation_report, error_table, series_of
from hessian_callback.studies.results import RANDOM, TRAINED, UNKNOWN, Row

STEPS = [0, 10, 25, 40, 90, 160, 300, 700, 1500]
#: Too few to correlate within a run.
FEW = [0, 10, 90, 1500]
K50 = "all measured parameters, K = 50"


def row(run: str, step: int, fit_error: float | None, test_loss: float | None, **options: Any) -> Row:
    """A measurement with this fit error; slope and largest eigenvalue are functions of the step."""
    slope, lambda_1 = options.pop("slope", 0.5 + step / 1e4), 1.0 + step
    fit = None if fit_error is None else PowerLawFit(slope, fit_error, 50, lambda_1, 1.0, slope, 0.99, 0, 0)
    settings: dict[str, Any] = {
        "labels": {"width": "10", "when": options.pop("when", RANDOM if step == 0 else f"step {step}")},
        "seed": 0,
        "part": "",
        "num_eigenvalues": 50,
        "reason": None,
        "num_known": 50,
        "largest_bound": None,
        "gap_exponent": None,
        "test_error": None,
        "train_loss": None,
        "num_samples": 1000,
        "num_parameters": 100,
        "num_hvps": 40,
        "seconds": 1.0,
        "num_negative": 0,
        "missed_probability": None,
        "device": "CPU",
    }
    return Row(run=run, step=step, fit=fit, test_loss=test_loss, **{**settings, **options})


def planted(num_runs: int = 3, steps: Sequence[int] = STEPS, **options: Any) -> list[Row]:
    """Runs whose fit error goes with the test loss in perfect order, and whose loss goes up and down as it falls."""
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(num_runs):
        losses = 3 - 0.2 * np.log1p(steps) + 0.3 * rng.standard_normal(len(steps))
        train = 3 - 0.3 * np.log1p(steps)
        for step, test, trained in zip(steps, losses.tolist(), train.tolist(), strict=True):
            # Before the first step all is otherwise.
            fit_error = math.exp(test) / 100 if step else 1e-3
            settings = {"seed": seed, "train_loss": trained, **options}
            rows.append(row(f"seed-{seed}", step, fit_error, test, **settings))
    return rows


def ends(num_settings: int, seeds: int = 1) -> list[Row]:
    """The last measurement of each run: test loss and error go by the setting, the rest is noise."""
    rng = np.random.default_rng(8)
    rows = []
    for width in range(num_settings):
        for seed in range(seeds):
            noise = rng.standard_normal(3) / 50
            labels = {"width": str(width), "when": TRAINED}
            test = 2 - width / 10 + noise[0]
            fit_error, slope = 0.1 + noise[1] / 2, 1 + noise[2]
            settings: dict[str, Any] = {"labels": labels, "seed": seed, "test_error": test / 4, "slope": slope}
            rows.append(row(f"{width}-{seed}", 100, fit_error, test, **settings))
    return rows


def sections(text: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each section's table, by heading."""
    found = {}
    for part in text.split("## ")[1:]:
        heading, *lines = part.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        found[heading] = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    return found


# -- series ------------------------------------------------------------------------------------------


def test_series_are_the_measurements_in_order_by_part_and_k() -> None:
    rows = planted(2) + planted(1, part="head", num_eigenvalues=200)
    found = series_of(rows)
    assert list(found) == [K50, "head, K = 200"]
    assert [one.name for one in found[K50]] == ["seed-0", "seed-1"]
    (head,) = found["head, K = 200"]
    assert head.steps == STEPS
    assert head.labels == {"width": "10", "seed": "0"}
    assert list(head.statistics) == ["fit_error", "slope", "lambda_max"]
    assert head.test_loss == [each.test_loss for each in rows[-len(STEPS) :]]
    assert head.values("lambda_max") == [1.0 + step for step in STEPS]


def test_what_is_unknown_or_not_finite_is_unknown() -> None:
    rows = [
        row("a", 10, 0.1, 1.0, comparisons={"trace": 4.0}),
        row("a", 20, None, None),
        row("a", 30, 0.2, math.nan, train_loss=math.inf, comparisons={"trace": math.nan}),
    ]
    (one,) = series_of(rows)[K50]
    assert one.statistics == {
        "fit_error": [0.1, None, 0.2],
        "slope": [0.501, None, 0.503],
        "lambda_max": [11.0, None, 31.0],
        "trace": [4.0, None, None],
    }
    assert (one.test_loss, one.train_loss) == ([1.0, None, None], [None, None, None])


# -- within runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> list[Found]:
    """What the analysis finds in the planted runs."""
    (series,) = series_of(planted()).values()
    return within_runs(series)


@pytest.fixture(scope="module")
def report() -> tuple[str, list[dict[str, object]]]:
    """The report of the planted runs."""
    return correlation_report(planted())


def test_a_planted_statistic_stands_in_the_table(
    report: tuple[str, list[dict[str, object]]], found: list[Found]
) -> None:
    rows, (text, _) = planted(), report
    heading = f"Within runs: {K50}, width 10"
    assert list(sections(text)) == [heading]
    lines = {(line["segment"], line["predictor"]): line for line in sections(text)[heading]}
    assert {predictor for segment, predictor in lines if segment == "all"} == {
        "log_step",
        "train_loss",
        "fit_error",
        "slope",
        "lambda_max",
    }
    mine = lines["all", "fit_error"]
    assert mine["Spearman, run by run"] == "1.00, 1.00, 1.00"
    for kind in ("pearson", "spearman", "kendall"):
        (pooled,) = [
            each
            for each in found
            if (each.over, each.segment, each.predictor, each.kind) == (POOLED, "all", "fit_error", kind)
        ]
        assert mine[f"{kind.capitalize()} (95 %)"] == interval_text(pooled.found)
        if kind == "spearman":
            assert mine["Spearman given log(step)"] == interval_text(pooled.partial)
            assert pooled.drift_share is not None
            assert mine["random walks as strong"] == f"{100 * pooled.drift_share:.0f} %"
    # The clock's coefficients are those of the eight checkpoints after the first step.
    clock = [
        stats.spearmanr([each.step for each in run], [each.test_loss for each in run]).statistic
        for run in (rows[1:9], rows[10:18], rows[19:])
    ]
    assert lines["all", "log_step"]["Spearman, run by run"] == ", ".join(f"{value:.2f}" for value in clock)
    # Nothing of the clock is left once the clock is known.
    assert lines["all", "log_step"]["Spearman given log(step)"] == UNKNOWN
    assert f"\n- {plain_answer(found)}\n" in text
    assert "3 of 3 runs; 6 runs are the least" in text


def test_the_csv_has_the_rows_of_the_analysis(report: tuple[str, list[dict[str, object]]], found: list[Found]) -> None:
    _, table = report
    assert len(table) == len(found)
    for cells, one in zip(table, found, strict=True):
        assert cells["setting"] == f"{K50}, width 10"
        names = ("question", "over", "segment", "predictor", "target", "kind", "drift_share", "falling_share")
        assert [cells[name] for name in names] == [getattr(one, name) for name in names]
        for prefix, its in (("", one.found), ("partial_", one.partial)):
            figures = [cells.get(f"{prefix}{name}") for name in ("value", "low", "high", "n")]
            assert figures == ([None] * 4 if its is None else [its.value, its.low, its.high, its.num])
        assert cells["notes"] == "; ".join(one.notes)
    assert {cells["over"] for cells in table} == {"seed-0", "seed-1", "seed-2", POOLED}


def test_a_single_run_is_not_pooled_and_settings_are_kept_apart() -> None:
    other = [replace(each, run=f"wide-{each.run}", labels={**each.labels, "width": "20"}) for each in planted(1)]
    text, table = correlation_report(planted() + other)
    first, second = sections(text).values()
    assert list(sections(text)) == [f"Within runs: {K50}, width {width}" for width in (10, 20)]
    assert {line["Spearman, run by run"] for line in first if line["predictor"] == "fit_error"} >= {"1.00, 1.00, 1.00"}
    mine = next(line for line in second if line["predictor"] == "fit_error" and line["segment"] == "all")
    assert mine["Spearman, run by run"] == "1.00"
    assert mine["Spearman (95 %)"].startswith("1.00 (")
    assert {cells["over"] for cells in table if str(cells["setting"]).endswith("20")} == {"wide-seed-0"}


# -- across runs ---------------------------------------------------------------------------------------


def test_runs_are_compared_at_their_last_step_and_over_settings() -> None:
    rows = ends(6, seeds=2)
    text, table = correlation_report(rows)
    heading = f"Across runs at step 100: {K50}"
    lines = {(line["pairs"], line["predictor"]): line for line in sections(text)[heading]}
    # The step and the largest eigenvalue are one for all, and the training loss is unknown.
    assert {predictor for _, predictor in lines} == {"fit_error", "slope"}
    slopes, losses = ([getter(each) for each in rows] for getter in (slope_of, lambda each: each.test_loss))
    assert lines["runs", "slope"]["Spearman (95 %)"].startswith(f"{stats.spearmanr(slopes, losses).statistic:.2f} (")
    means = [np.reshape(values, (6, 2)).mean(axis=1) for values in (slopes, losses)]
    assert lines["settings", "slope"]["Pearson (95 %)"].startswith(f"{stats.pearsonr(*means).statistic:.2f} (")
    assert (lines["runs", "slope"]["n"], lines["settings", "slope"]["n"]) == ("12", "6")
    (series,) = series_of(rows).values()
    assert [(cells["over"], cells["predictor"], cells.get("value")) for cells in table] == [
        (one.over, one.predictor, one.found and one.found.value) for one in across_runs(series)
    ]
    assert {cells["setting"] for cells in table} == {K50}


def slope_of(each: Row) -> float:
    assert each.fit is not None
    return each.fit.slope


def test_runs_are_compared_where_their_training_losses_are_equal() -> None:
    rows = [
        replace(each, labels={**each.labels, "width": each.run}, train_loss=each.train_loss + each.seed / 50)
        for each in planted(6, FEW)
        if each.train_loss is not None
    ]
    text, table = correlation_report(rows)
    (series,) = series_of(rows).values()
    at_loss = across_runs_at_train_loss(series)
    headings = list(sections(text))
    assert headings == [
        f"Across runs at step 1500: {K50}",
        f"A{at_loss[0].question[1:]}: {K50}",
    ]
    # Where the losses are equal the steps are not, and are what to compare with.
    assert f"- {plain_answer(at_loss)}\n- {plain_answer(at_loss, 'slope')}" in text
    mine = [cells for cells in table if cells["question"] == at_loss[0].question]
    assert [cells.get("value") for cells in mine] == [one.found and one.found.value for one in at_loss]


def test_runs_that_share_no_training_loss_are_compared_at_their_last_step_alone() -> None:
    rows = [
        replace(each, train_loss=each.train_loss + 10 * each.seed)
        for each in planted(5, FEW)
        if each.train_loss is not None
    ]
    text, _ = correlation_report(rows)
    assert list(sections(text)) == [f"Across runs at step 1500: {K50}"]
    assert "Not compared at equal training losses: no training loss is crossed by all runs: seed-4 falls" in text
    assert "give train_loss" not in text


def test_runs_that_diverged_leave_the_others_their_tables() -> None:
    whole = ends(6)
    lost = [replace(whole[0], run="lost", labels={"width": "9", "when": TRAINED}, test_loss=math.nan)]
    (heading, lines), *_ = sections(correlation_report(whole + lost)[0]).items()
    assert heading == f"Across runs at step 100: {K50}"
    assert {line["n"] for line in lines} == {"6"}


# -- the test error ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_test_error_is_correlated_over_runs_and_over_settings(seeds: int) -> None:
    rows = ends(6, seeds)
    table = sections(f"## Errors\n{error_table(rows)}")["Errors"]
    assert [(line["pairs"], line["predictor"], line["n"]) for line in table] == [
        (over, predictor, str(num))
        for over, num in (("runs", 6 * seeds), ("settings", 6))[: 1 + (seeds > 1)]
        for predictor in ("slope", "fit_error")
    ]
    errors = [each.test_error for each in rows]
    for line in table:
        values = [slope_of(each) if line["predictor"] == "slope" else each.fit and each.fit.fit_error for each in rows]
        pairs = [np.array(column, dtype=float) for column in (values, errors)]
        if line["pairs"] == "settings":
            pairs = [column.reshape(6, seeds).mean(axis=1) for column in pairs]
        pearson = stats.pearsonr(*pairs)
        low, high = pearson.confidence_interval()
        assert line["Pearson (95 %)"] == f"{pearson.statistic:.2f} ({low:.2f} to {high:.2f})"
        assert line["Spearman (95 %)"].startswith(f"{stats.spearmanr(*pairs).statistic:.2f} (")
        assert line["Kendall (95 %)"].startswith(f"{stats.kendalltau(*pairs).statistic:.2f} (")


def test_only_ends_of_runs_with_a_fit_and_an_error_count() -> None:
    rows = ends(6)
    extra = [
        replace(rows[0], run="a", test_error=None),
        replace(rows[0], run="b", fit=None),
        replace(rows[0], run="c", labels={"width": "0", "when": RANDOM}),
    ]
    assert error_table(rows + extra) == error_table(rows)
    apart = error_table(rows + [replace(each, num_eigenvalues=200, part="head") for each in rows])
    assert [line.split("|")[1:3] for line in apart.splitlines()[2:]] == [
        *[[" – ", " 50 "]] * 2,
        *[[" head ", " 200 "]] * 2,
    ]


def test_equal_errors_have_no_correlation() -> None:
    table = sections("## Errors\n" + error_table([replace(each, test_error=0.9) for each in ends(5)]))["Errors"]
    assert [line["n"] for line in table] == ["5", "5"]
    assert all("Pearson (95 %)" not in line for line in table)


# -- nothing to say --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [],
        planted(4, STEPS[:5]),
        ends(4),
        [replace(each, step=0, labels={"width": each.run, "when": RANDOM}) for each in ends(6)],
    ],
    ids=["no rows", "four checkpoints of four runs", "four runs", "before the first step"],
)
def test_too_little_gives_nothing(rows: list[Row]) -> None:
    text, table = correlation_report(rows)
    assert (text.strip(), table) == ("", [])


def test_without_a_test_loss_there_is_no_table_but_the_reason_is_in_the_csv() -> None:
    rows = [replace(each, test_loss=None) for each in planted(5)]
    text, table = correlation_report(rows)
    assert text.strip() == ""
    assert all("value" not in cells for cells in table)
    assert {cells["notes"] for cells in table if cells["over"] == "seed-0"} == {
        "n = 0; at least 5 observations are needed"
    }
    assert error_table(rows) == ""
