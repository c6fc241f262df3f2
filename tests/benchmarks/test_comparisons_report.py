"""The committed report on the comparisons says what the documentation takes from it."""

from __future__ import annotations

import pytest

from tests.helpers.report_tables import COMPARISONS as REPORT
from tests.helpers.report_tables import rows

pytestmark = pytest.mark.skipif(not REPORT.exists(), reason="the benchmarks are not part of an installed package")


def lines(title: str) -> list[list[str]]:
    section = REPORT.read_text().split(f"## {title}")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_standard_errors_of_the_trace_are_right_and_deflation_pays() -> None:
    for _, _, plain, plain_ratio, _, _, deflated, deflated_ratio in lines("The trace"):
        assert float(deflated) < 0.7 * float(plain)
        # 100 draws leave the ratio uncertain by some 7 %.
        assert 0.85 < float(plain_ratio) < 1.15
        assert 0.85 < float(deflated_ratio) < 1.15


def test_strict_is_right_and_pools_hold_a_third() -> None:
    for _, k, exact, strict, pooled, third, single in lines("The published protocol"):
        assert float(strict.split()[0]) == pytest.approx(float(exact), rel=0.02)
        assert int(pooled.split("(")[1].split(";")[0]) <= int(k) / 3
        for unconverged in (third, single):
            assert float(unconverged.split()[0]) > 2.5 * float(exact)
    assert "ten outliers, positive bulk" in rows(REPORT.read_text(), "The published protocol")
