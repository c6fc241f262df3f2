"""The committed report on predictions says what the documentation takes from it."""

from __future__ import annotations

import pytest

from hessian_callback.callbacks.prediction import LEVEL
from tests.helpers.report_tables import COMPARISONS as BESIDE

REPORT = BESIDE.with_name("PREDICTION.md")

pytestmark = pytest.mark.skipif(not REPORT.exists(), reason="the benchmarks are not part of an installed package")


def lines(title: str) -> list[list[str]]:
    section = REPORT.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|") and not line.startswith(("| run", "| ---", "| series", "| pairs"))
    ]


def test_the_predictor_lost_to_log_step_in_three_runs_of_twenty_measurements() -> None:
    digits = [row for row in lines("The verdict") if row[0] == "digits"]
    assert [row[1] for row in digits] == ["0", "1", "2"]
    for row in digits:
        wins, num = map(int, row[2].split(" of "))
        assert num >= 20
        assert wins < num / 2
        assert float(row[5]) < 0.05
        assert row[-1] == "adds nothing over log(step)"


def test_intervals_of_real_runs_held_what_they_promise() -> None:
    coverages = [float(row[5].rstrip(" %")) for row in lines("The next validation loss")]
    assert len(coverages) == 6 * 7
    assert sum(coverages) / len(coverages) == pytest.approx(100 * LEVEL, abs=3)


def test_the_verdict_finds_a_slope_that_leads_and_few_others() -> None:
    rates = {(row[0], row[1]): float(row[2]) for row in lines('How often the verdict is "adds"')}
    assert rates["the slope leads", "20"] > 90
    assert rates["falling loss, the slope is noise", "20"] < 5
    assert rates["three random walks", "20"] < 15
