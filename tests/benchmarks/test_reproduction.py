"""That the page of reproductions says what the studies left."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reproduction import (
    BLOCK,
    PAGE,
    SAVED,
    STUDIES,
    correlation_table,
    rows_of,
    spread,
    training_table,
    written,
)


def test_the_tables_are_those_of_the_saved_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(page)) > 8
    assert written(page) == page, "run python -m benchmarks.reproduction"


@pytest.mark.parametrize("path", sorted(SAVED.glob("*.csv")), ids=lambda path: path.stem)
def test_saved_results_belong_to_a_study(path: Path) -> None:
    assert (STUDIES / path.name).with_suffix(".yaml").exists()
    factors, rows = rows_of(path.stem)
    assert "when" in factors
    assert rows
    for row in rows:
        # A fit and a reason against it exclude each other.
        assert bool(row["d_ks"]) != bool(row["reason"])
        if row["d_ks"]:
            assert (float(row["d_ks"]) < float(row["critical_paper"])) == (row["holds_paper"] == "True")
            assert float(row["beta"]) == pytest.approx(1 + 1 / float(row["s_hat"]))


def test_seeds_are_shown_as_mean_and_range() -> None:
    assert spread(["1.0", "", "2.0"], 2) == "1.50 (1.00–2.00)"
    assert spread(["0.5004", "0.5"], 2) == "0.50"
    assert spread(["", ""], 2) == "–"


def test_a_training_has_a_line_for_each_part_and_step() -> None:
    lines = training_table("gpt_small_training", "50").splitlines()
    assert lines[0].startswith("| text | part | step | seeds | test loss | train loss | d_ks | s_hat | λ₁ | trace |")
    _, rows = rows_of("gpt_small_training")
    places = {(row["text"], row["part"], row["step"]) for row in rows if row["K"] == "50"}
    assert len(lines) - 2 == len(places)
    (first,) = (line for line in lines if line.startswith("| all of it | last block | 0 |"))
    at_start = [row for row in rows if row["step"] == "0" and row["part"] == "last block" and row["K"] == "50"]
    largest = sorted(float(row["lambda_1"]) for row in at_start if row["text"] == "all of it")
    assert f"({largest[0]:.1f}–{largest[-1]:.1f})" in first


def test_correlations_are_those_of_the_saved_page() -> None:
    lines = correlation_table("gpt_small_training", "50").splitlines()
    assert (
        lines[0]
        == "| setting | Hessian | of the run | log_step | train_loss | fit_error | slope | lambda_max | trace |"
    )
    (line,) = (line for line in lines if line.startswith("| text all of it | all measured parameters | all |"))
    assert "| -1.00 (-1.00 to -0.99) | 1.00 (0.99 to 1.00) | -0.01 (-0.37 to 0.36) |" in line
    (line,) = (line for line in lines if line.startswith("| text 10,000 characters | last block | after minimum |"))
    assert "| 0.40 (-0.01 to 0.70) | -0.93 (-0.97 to -0.82) |" in line
