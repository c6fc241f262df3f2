"""A study's rows and its table, from run folders whose spectra and logged numbers are prescribed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.measurement.history import HistoryError, HistoryWriter
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.studies.definition import RESERVED, PlannedRun, Published, Study
from hessian_callback.studies.one_run import FINISHED
from hessian_callback.studies.results import (
    RANDOM,
    TRAINED,
    UNKNOWN,
    Row,
    csv_of,
    markdown_table,
    rows_of,
    setting_table,
)
from tests.helpers.lightning import CSVLogger

K = 50
#: Fits of K values to these hold by both critical values, by the paper's alone, and by neither.
HOLDS = 3.0 * torch.arange(1, K + 1).double() ** -1.2
LENIENT = torch.exp(-0.1 * torch.arange(K).double())
REJECTED = torch.cat([torch.linspace(110, 100, K // 2), torch.linspace(1.1, 1, K // 2)]).double()


def spectrum(values: Tensor, bounds: Tensor | float = 1e-3, **options: Any) -> Spectrum:
    """Prescribed eigenvalues; the bounds are relative."""
    errors = values.abs() * bounds
    settings: dict[str, Any] = {
        "rtol": 1e-2,
        "missed_probability": 1e-4,
        "num_matvecs": 40,
        "stopped": "converged",
        "rounding": 1e-12,
        "symmetry_defect": 0.0,
        "ritz_values": values,
    }
    settings |= options
    return Spectrum(
        eigenvalues=values, error_bounds=errors, converged=errors <= settings["rtol"] * values.abs(), **settings
    )


def measurement(step: int, values: Tensor | Spectrum | None = HOLDS, **options: Any) -> Measurement:
    """The measurement at the end of an epoch of 10 steps, or before the first of them."""
    found = spectrum(values) if isinstance(values, Tensor) else values
    settings: dict[str, Any] = {
        "epoch": max(step // 10 - 1, 0),
        "step": step,
        "when": "epoch" if step else "fit_start",
        "reason": None if found else "the loss is NaN",
        "seconds": 2.0,
        "num_parameters": 100,
        "num_samples": 1000,
    }
    # What the callback itself fitted plays no part.
    return Measurement(spectrum=found, fit=None, **{**settings, **options})


HISTORY = [
    measurement(0),
    measurement(10),
    measurement(15, epoch=1, when="step"),
    measurement(20),
    measurement(30),
]


def ended(folder: Path, histories: Mapping[str, Sequence[Measurement]], logged: Mapping[int, dict[str, float]]) -> None:
    """A folder as a finished run leaves it; ``logged`` has what an epoch ends with, by the steps until then."""
    folder.mkdir(parents=True)
    if logged:
        logger = CSVLogger(folder, name="", version="")
        for step, metrics in logged.items():
            # Lightning counts one back for what ends an epoch.
            logger.log_metrics({"epoch": step // 10 - 1, **metrics}, step - 1)
        logger.save()
    for prefix, history in histories.items():
        HistoryWriter(prefix).write([folder], history)
    ending = {"seconds": 3.0, "resumed": False, "device": "CPU, 1 thread(s)", "versions": {}}
    (folder / FINISHED).write_text(json.dumps(ending))


def planned(seed: int = 0, **labels: str) -> PlannedRun:
    return PlannedRun("_".join([*labels.values(), f"seed-{seed}"]), labels, seed, {})


def study(**options: Any) -> Study:
    return Study(**{"name": "s", "title": "S", "base": {}, "factors": {}, "seeds": [0], "fitted": [K], **options})


def rows_in(
    folder: Path,
    history: Sequence[Measurement] | Mapping[str, Sequence[Measurement]],
    logged: Mapping[int, dict[str, float]] | None = None,
    **options: Any,
) -> list[Row]:
    """The rows of a study of one run with this history, or with these by their callbacks' prefixes."""
    run = planned(width="10")
    histories = history if isinstance(history, Mapping) else {"hessian": history}
    ended(folder / run.name, histories, logged or {})
    return rows_of(study(**options), folder, [run])


# -- which measurements ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "places"),
    [
        ("last", [(30, TRAINED)]),
        ("first and last", [(0, RANDOM), (30, TRAINED)]),
        ("all", [(0, RANDOM), (10, "epoch 1"), (15, "step 15"), (20, "epoch 2"), (30, TRAINED)]),
    ],
)
def test_rows_are_those_that_the_study_chooses(chosen: str, places: list[tuple[int, str]], tmp_path: Path) -> None:
    rows = rows_in(tmp_path, HISTORY, rows=chosen)
    assert [(row.step, row.labels["when"]) for row in rows] == places
    assert {row.labels["width"] for row in rows} == {"10"}
    assert {(row.run, row.seed, row.part, row.device) for row in rows} == {("10_seed-0", 0, "", "CPU, 1 thread(s)")}


@pytest.mark.parametrize("chosen", ["last", "first and last", "all"])
def test_the_last_measurement_of_a_run_may_be_its_first(chosen: str, tmp_path: Path) -> None:
    (row,) = rows_in(tmp_path, HISTORY[:1], rows=chosen)
    assert row.labels["when"] == RANDOM


def test_there_is_no_first_row_where_nothing_was_measured_before_training(tmp_path: Path) -> None:
    rows = rows_in(tmp_path, HISTORY[1:], rows="first and last")
    assert [row.labels["when"] for row in rows] == [TRAINED]


def test_what_has_not_finished_is_left_out(tmp_path: Path) -> None:
    runs = [planned(seed) for seed in range(3)]
    for run in runs[:2]:
        ended(tmp_path / run.name, {"hessian": HISTORY}, {})
    (tmp_path / runs[0].name / FINISHED).unlink()
    assert [row.run for row in rows_of(study(), tmp_path, runs)] == ["seed-1"]
    assert rows_of(study(), tmp_path, runs[2:]) == []
    (tmp_path / runs[1].name / "hessian_history.jsonl").unlink()
    with pytest.raises(HistoryError, match="holds no measurement of the Hessian"):
        rows_of(study(), tmp_path, runs)


# -- the fits ------------------------------------------------------------------------------------------


def test_every_k_is_fitted_to_the_same_eigenvalues(tmp_path: Path) -> None:
    values = torch.cat([HOLDS[:40], torch.tensor([-1e-3, -2.0]).double()])
    rows = rows_in(tmp_path, [measurement(30, spectrum(values, stopped="max_matvecs"))], fitted=[3, 20, 40, 41])
    assert [row.num_eigenvalues for row in rows] == [3, 20, 40, 41]
    for row in rows[:3]:
        assert row.fit == fit_power_law(HOLDS[: row.num_eigenvalues])
        assert row.reason is None
        assert row.largest_bound == pytest.approx(1e-3, rel=1e-12)
    # Three eigenvalues have two gaps, which are too few.
    assert [row.gap_exponent for row in rows[:3]] == [
        None,
        *(fit_eigengaps(HOLDS[:number]).exponent for number in (20, 40)),
    ]
    last = rows[3]
    assert (last.fit, last.largest_bound, last.gap_exponent) == (None, None, None)
    assert last.reason == "only 40 eigenvalues are positive and known (max_matvecs)"
    assert {(row.num_known, row.num_negative, row.num_hvps, row.num_parameters) for row in rows} == {(40, 2, 40, 100)}


@pytest.mark.parametrize(("fit_rtol", "num"), [(None, 10), (0.05, 15), (0.5, 30), (1e-4, 0), (2e-3, 10)])
def test_fit_rtol_takes_the_place_of_the_measurements_tolerance(
    fit_rtol: float | None, num: int, tmp_path: Path
) -> None:
    """Behind the first eigenvalue that is not known well enough none counts, however well it is known itself."""
    bounds = torch.tensor([1e-3] * 10 + [0.03] * 5 + [0.2] * 5 + [1e-3] * 10).double()
    (row,) = rows_in(tmp_path, [measurement(30, spectrum(HOLDS[:30], bounds))], fitted=[max(num, 3)], fit_rtol=fit_rtol)
    assert row.num_known == num
    assert (row.fit is None) == (num == 0)
    if num:
        assert row.fit == fit_power_law(HOLDS[:num])
        assert row.largest_bound == pytest.approx(float(bounds[:num].max()), rel=1e-12)


def test_the_published_protocol_fits_what_is_positive_whatever_its_bounds(tmp_path: Path) -> None:
    values = torch.cat([HOLDS[:6], torch.tensor([-0.5]).double()])
    found = spectrum(values, 3.0, stopped="exhausted")
    assert len(found.positive_converged) == 0
    fitted, failed = rows_in(tmp_path, [measurement(30, found, mode="paper")], fitted=[6, 7], fit_rtol=1e-3)
    assert fitted.fit == fit_power_law(HOLDS[:6])
    assert (fitted.num_known, fitted.largest_bound) == (6, None)
    assert failed.reason == "only 6 eigenvalues are positive (exhausted)"


def test_without_fitted_the_k_is_the_one_that_was_measured(tmp_path: Path) -> None:
    history = [measurement(10, HOLDS[:12]), measurement(20, None), measurement(30, HOLDS[:12])]
    rows = rows_in(tmp_path, history, rows="all", fitted=[])
    assert [(row.num_eigenvalues, row.fit is None, row.reason) for row in rows] == [
        (12, False, None),
        (12, True, "the loss is NaN"),
        (12, False, None),
    ]


def test_a_measurement_that_failed_is_a_row_without_numbers(tmp_path: Path) -> None:
    failed = measurement(30, None, num_parameters=None, num_samples=None)
    (row,) = rows_in(tmp_path, [measurement(0), failed])
    assert (row.fit, row.reason, row.num_known, row.seconds) == (None, "the loss is NaN", 0, 2.0)
    absent = (row.num_hvps, row.num_negative, row.missed_probability, row.num_parameters, row.num_samples)
    assert absent == (None,) * 5
    cells = row.as_dict()
    assert (cells["d_ks"], cells["holds_paper"], cells["reason"]) == (None, None, "the loss is NaN")


@pytest.mark.parametrize(
    ("values", "message"),
    [(HOLDS[:2], "needs at least 3 positive"), (torch.full((5,), 2.0).double(), "all 5 eigenvalues equal")],
)
def test_what_has_no_slope_says_why(values: Tensor, message: str, tmp_path: Path) -> None:
    (row,) = rows_in(tmp_path, [measurement(30, values)], fitted=[])
    assert row.fit is None
    assert message in str(row.reason)


def test_eigenvalues_in_equal_pairs_have_a_slope_and_perhaps_no_gaps(tmp_path: Path) -> None:
    (row,) = rows_in(tmp_path, [measurement(30, torch.tensor([3.0, 3.0, 2.0, 2.0]).double())], fitted=[4])
    assert row.fit is not None
    assert row.gap_exponent is None


# -- parts ---------------------------------------------------------------------------------------------


def test_groups_of_parameters_are_parts_beside_the_whole(tmp_path: Path) -> None:
    head = measurement(30, HOLDS[:10] / 7, num_parameters=20, seconds=0.5, comparisons={"trace": 1.5})
    whole = measurement(30, HOLDS[:10], groups={"head": head, "rest": measurement(30, None)})
    rows = {row.part: row for row in rows_in(tmp_path, [whole], fitted=[8])}
    assert list(rows) == ["", "head", "rest"]
    assert rows["head"].fit == fit_power_law(HOLDS[:8] / 7)
    assert (rows["head"].num_parameters, rows["head"].seconds) == (20, 0.5)
    assert (rows["head"].comparisons, rows[""].comparisons) == ({"trace": 1.5}, {})
    assert rows["rest"].reason == "the loss is NaN"


def test_several_callbacks_are_parts_and_their_groups_stay_apart(tmp_path: Path) -> None:
    def history(scale: float) -> list[Measurement]:
        return [measurement(30, HOLDS * scale, groups={"head": measurement(30, HOLDS * scale / 7)})]

    rows = rows_in(tmp_path, {"train": history(1), "test": history(2)})
    assert {row.part: row.fit.lambda_1 for row in rows if row.fit} == pytest.approx(
        {"train": 3.0, "train/head": 3 / 7, "test": 6.0, "test/head": 6 / 7}
    )
    assert len(setting_table(study(), rows)) == 4


# -- what was logged -----------------------------------------------------------------------------------

LOGGED = {
    10: {"val_loss": 0.9, "val_acc": 0.5, "train_loss": 0.8},
    20: {"val_loss": 0.7, "val_acc": 0.75, "train_loss": 0.5},
    30: {"val_loss": 0.6, "val_acc": 0.875, "train_loss": 0.3},
}


def test_losses_and_errors_are_those_of_the_same_weights(tmp_path: Path) -> None:
    rows = rows_in(tmp_path, [HISTORY[index] for index in (0, 1, 3, 4)], LOGGED, rows="all")
    assert [row.test_loss for row in rows] == [None, 0.9, 0.7, 0.6]
    assert [row.test_error for row in rows] == [None, 0.5, 0.25, 0.125]
    assert [row.train_loss for row in rows] == [None, 0.8, 0.5, 0.3]


def test_a_run_without_validation_has_no_test_loss(tmp_path: Path) -> None:
    """Its Hessian's own loss is that of training images."""
    (row,) = rows_in(tmp_path, [measurement(30, loss=0.4)], {30: {"train_loss": 0.3}})
    assert (row.test_loss, row.test_error, row.train_loss) == (None, None, 0.3)


# -- one line a setting --------------------------------------------------------------------------------


def made(values: Tensor | None, seed: int, number: int = K, when: str = TRAINED, **options: Any) -> Row:
    fit = None if values is None else fit_power_law(values, num_eigenvalues=number)
    settings: dict[str, Any] = {
        "run": f"seed-{seed}",
        "labels": {"width": "10", "when": when},
        "seed": seed,
        "part": "",
        "step": 30,
        "num_eigenvalues": number,
        "fit": fit,
        "reason": None if fit else "failed",
        "num_known": K if fit else 0,
        "largest_bound": 1e-3 if fit else None,
        "gap_exponent": None,
        "test_loss": None,
        "test_error": None,
        "train_loss": None,
        "num_samples": 1000,
        "num_parameters": 100,
        "num_hvps": 40,
        "seconds": 2.0,
        "num_negative": 0,
        "missed_probability": 1e-4,
        "device": "CPU",
    }
    return Row(**{**settings, **options})


def line_of(rows: Sequence[Row], *published: Published) -> dict[str, str]:
    (line,) = setting_table(study(published=published), rows)
    return line


def test_seeds_are_put_into_one_line() -> None:
    slopes = [fit_power_law(values).slope for values in (HOLDS, HOLDS**2, HOLDS**3)]
    mean, low, high = sum(slopes) / 3, *sorted(slopes)[::2]
    line = line_of(
        [
            made(HOLDS, 0, test_loss=0.5, test_error=0.25, gap_exponent=2.0, largest_bound=2e-3),
            made(HOLDS**2, 1, test_loss=0.25, test_error=0.25, gap_exponent=1.0),
            made(HOLDS**3, 2, test_loss=0.75, test_error=0.25, num_hvps=60, num_samples=5000),
        ]
    )
    assert (line["width"], line["when"], line["K"], line["seeds"]) == ("10", TRAINED, "50", "3")
    assert line["s_hat"] == f"{mean:.3f} ({low:.3f} to {high:.3f})"
    assert line["test loss"] == "0.500 (0.250 to 0.750)"
    assert line["test error"] == "0.2500"
    assert line["gap exponent"] == "1.500 (1.000 to 2.000)"
    assert line["largest bound"] == "0.2 %"
    assert (line["products"], line["samples"]) == ("47 (40 to 60)", "1000/5000")
    assert (line["published d_ks"], line["published verdict"]) == (UNKNOWN, UNKNOWN)
    assert not {"part", "verdict"} & set(line)


def test_settings_parts_places_and_k_have_lines_of_their_own() -> None:
    rows = [
        made(HOLDS, seed, number, when, part=part)
        for seed in (0, 1)
        for when in (RANDOM, TRAINED)
        for part in ("", "head")
        for number in (20, K)
    ]
    lines = setting_table(study(), rows)
    assert [(line["when"], line.get("part"), line["K"], line["seeds"]) for line in lines] == [
        (when, part, number, "2") for when in (RANDOM, TRAINED) for part in (None, "head") for number in ("20", "50")
    ]


def verdicts(fit: PowerLawFit) -> tuple[bool, bool]:
    return fit.within_critical_distance_paper, fit.within_critical_distance_fitted


def test_verdicts_are_counted_by_both_critical_values() -> None:
    kinds = (HOLDS, LENIENT, REJECTED)
    assert [verdicts(fit_power_law(values)) for values in kinds] == [(True, True), (True, False), (False, False)]
    line = line_of([made(values, seed) for seed, values in enumerate(kinds)])
    assert (line["holds (paper's value)"], line["holds (fitted)"]) == ("2 of 3", "1 of 3")


@pytest.mark.parametrize(
    ("spectra", "holds", "verdict"),
    [
        ([HOLDS, LENIENT], True, "same"),
        ([HOLDS, LENIENT], False, "different"),
        ([REJECTED, REJECTED], False, "same"),
        ([REJECTED, REJECTED], True, "different"),
        ([HOLDS, REJECTED], True, "mixed"),
        ([HOLDS, REJECTED], False, "mixed"),
        ([HOLDS, None], True, "same"),
        ([None, None], True, UNKNOWN),
    ],
)
def test_the_published_verdict_is_compared_by_the_papers_value(
    spectra: list[Tensor | None], holds: bool, verdict: str
) -> None:
    rows = [made(values, seed) for seed, values in enumerate(spectra)]
    line = line_of(rows, Published({"when": TRAINED}, holds=holds))
    assert (line["published verdict"], line["verdict"]) == ("holds" if holds else "rejected", verdict)


def test_published_figures_stand_beside_their_setting_alone() -> None:
    published = Published({"width": "10", "when": TRAINED}, fit_error=0.0132, slope=1.065, gap_exponent=1.9)
    trained, random = setting_table(study(published=[published]), [made(HOLDS, 0), made(HOLDS, 0, when=RANDOM)])
    names = ("published d_ks", "published s_hat", "published gap exponent", "published verdict")
    assert [trained[name] for name in names] == ["0.0132", "1.065", "1.900", UNKNOWN]
    assert {random[name] for name in names} == {UNKNOWN}
    assert "verdict" not in trained


def test_a_seed_without_a_fit_is_counted_and_enters_no_mean() -> None:
    line = line_of([made(HOLDS, 0), made(None, 1, num_samples=None, num_hvps=None)])
    assert (line["seeds"], line["holds (fitted)"]) == ("1 of 2", "1 of 1")
    assert line["s_hat"] == f"{fit_power_law(HOLDS).slope:.3f}"
    assert (line["samples"], line["products"]) == ("1000", "40")
    nothing = line_of([made(None, 0, num_samples=None)])
    empty = ("d_ks", "s_hat", "beta", "largest bound", "holds (fitted)", "holds (paper's value)")
    assert {nothing[name] for name in empty} == {UNKNOWN}
    assert (nothing["seeds"], nothing["samples"]) == ("0 of 1", "")


def test_a_seed_that_diverged_shows() -> None:
    rows = [made(HOLDS, seed, test_loss=loss) for seed, loss in enumerate([0.5, math.nan])]
    assert line_of(rows)["test loss"] == line_of(rows[::-1])["test loss"] == "nan"


def test_a_table_in_markdown_has_the_columns_that_say_something() -> None:
    lines = [{"a": "1", "b": UNKNOWN, "c": ""}, {"a": "2", "d": "x"}]
    assert markdown_table(lines).splitlines() == ["| a | d |", "|---|---|", "| 1 | – |", "| 2 | x |"]
    assert markdown_table([]) == markdown_table([{"b": UNKNOWN}]) == ""


# -- CSV -------------------------------------------------------------------------------------------------


def test_csv_has_all_digits_and_gaps_where_nothing_is_known() -> None:
    rows = [made(LENIENT, 0, test_error=0.1 + 0.2), replace(made(None, 1), comparisons={"trace": 1 / 3})]
    fitted, failed = csv.DictReader(StringIO(csv_of(row.as_dict() for row in rows)))
    fit = rows[0].fit
    assert fit is not None
    assert {name: float(fitted[name]) for name in ("d_ks", "s_hat", "beta", "lambda_1", "lambda_K", "test_error")} == {
        "d_ks": fit.fit_error,
        "s_hat": fit.slope,
        "beta": fit.density_exponent,
        "lambda_1": 1.0,
        "lambda_K": float(LENIENT[-1]),
        "test_error": 0.1 + 0.2,
    }
    assert (fitted["width"], fitted["when"], fitted["K"], fitted["trace"]) == ("10", TRAINED, "50", "")
    assert (fitted["holds_paper"], fitted["holds_fitted"], fitted["reason"]) == ("True", "False", "")
    assert (failed["s_hat"], failed["holds_paper"], failed["reason"]) == ("", "", "failed")
    assert float(failed["trace"]) == 1 / 3


def test_no_factor_can_be_called_like_a_column() -> None:
    names = {field.name for field in fields(Row)} - {"run", "labels"}
    row = Row(run="r", labels={}, **dict.fromkeys(names - {"comparisons", "seconds"}), seconds=0.0)  # type: ignore[arg-type]
    assert row.as_dict().keys() | {"when"} == RESERVED
