"""Tables of the benchmarks' reports."""

from __future__ import annotations

from pathlib import Path

COMPARISONS = Path(__file__).parents[2] / "benchmarks" / "COMPARISONS.md"


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Cells of the first table under a heading, by their first cell."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in cells}
