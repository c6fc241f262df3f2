"""That the page of reproductions says what the studies left."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reproduction import BLOCK, PAGE, SAVED, STUDIES, rows_of, spread, written


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
