"""The simulation report runs, and the committed one meets what was asked of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report_sections import with_sections, write_sections
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


def cells_of(heading: str) -> list[list[str]]:
    """The cells of each line of a section's table, without its head."""
    section = REPORT.read_text().split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_committed_covariance_null_has_its_size_and_coverage() -> None:
    table = [cells for cells in cells_of("Size, coverage and power") if cells[0] == "independent"]
    numbers, covers, rejects = np.array([[float(cells[i]) for i in (6, -2, -1)] for cells in table]).T
    assert numbers.sum() > 5000
    # Rates at 5 % scatter by the spectra and by the draws of the null law, of which there are about as many.
    error = 100 * np.sqrt(0.05 * 0.95 * 2 / numbers)
    assert (np.abs(rejects - 5) < 3.5 * error).all()
    assert (np.abs(covers - 95) < 3.5 * error).all()
    assert 4 < numbers @ rejects / numbers.sum() < 6
    assert 93 < numbers @ covers / numbers.sum() < 97


def test_committed_population_slopes_are_within_three_percent() -> None:
    table = [
        cells for cells in cells_of("Correcting the slope") if cells[4] != "-" and cells[2] == f"{10 * int(cells[1])}"
    ]
    assert len(table) >= 7
    for cells in table:
        assert abs(float(cells[-2])) <= 3


def test_sections_are_replaced_by_their_headings() -> None:
    text = "# Title\n\n## One\n\nold\n\n## Two\n\nkept\n"
    assert with_sections(text, ["## One\n\nnew", "## Three\n\nadded"]) == (
        "# Title\n\n## One\n\nnew\n\n## Two\n\nkept\n\n## Three\n\nadded\n"
    )


def test_a_section_that_fails_loses_none_before_it(tmp_path: Path) -> None:
    def sections() -> Iterator[str]:
        yield "## One\n\nnew"
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_sections(tmp_path / "report.md", "# Title\n\n## One\n\nold\n\n## Two\n\nkept", sections())
    assert (tmp_path / "report.md").read_text() == "# Title\n\n## One\n\nnew\n\n## Two\n\nkept\n"
