"""The simulation report runs, and the committed one meets what was asked of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.report_tables import rows

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "STATISTICS.md"

pytestmark = pytest.mark.skipif(not REPORT.exists(), reason="the benchmarks are not part of an installed package")


def test_report_is_reproducible(tmp_path: Path) -> None:
    texts = []
    for name in ("one.md", "two.md"):
        command = [sys.executable, "-m", "benchmarks.statistics_report", "--scale", "0.01", "--output"]
        subprocess.run(
            [*command, str(tmp_path / name), "--only", "slope", "critical", "outliers"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert list(rows(texts[0], "The slope")) == ["20", "50", "200", "1000"]


def test_committed_coverage_is_nominal() -> None:
    table = rows(REPORT.read_text(), "The slope and its 95 % interval")
    assert list(table) == ["20", "50", "200", "1000"]
    for cells in table.values():
        assert 94.0 <= float(cells[3]) <= 96.0
        assert float(cells[0]) == pytest.approx(float(cells[1]), abs=0.01)


def test_committed_critical_values_are_reproduced() -> None:
    table = rows(REPORT.read_text(), "Critical values")
    for num, expected in {"1000": 0.0344, "50": 0.151}.items():
        simulated = float(re.match(r"[\d.]+", table[num][1]).group())  # type: ignore[union-attr]
        assert simulated == pytest.approx(expected, rel=0.005)
        assert float(table[num][2]) == pytest.approx(simulated, rel=0.005)


def test_committed_size_is_nominal() -> None:
    text = REPORT.read_text()
    for num in ("50", "200", "1000"):
        lines = text.split(f"| K = {num} |")[1].splitlines()
        line = next(line for line in lines if line.startswith("| Pareto"))
        draws, _, fitted, bootstrap = (float(cell) for cell in line.strip("|").split("|")[1:5])
        error = 100 * (0.05 * 0.95 / draws) ** 0.5
        assert fitted == pytest.approx(5.0, abs=3.5 * error)
        assert bootstrap == pytest.approx(5.0, abs=3.5 * error)
