"""The tables of docs/reproduction.md, from the saved results of the studies of the paper.

    python -m benchmarks.reproduction

replaces the tables between the page's markers. benchmarks/reproduction/NAME.csv is the results.csv of
example_configs/studies/NAME.yaml, as `hessian-callback study` wrote it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from hessian_callback.studies import results
from hessian_callback.studies.definition import Published, load_study
from hessian_callback.studies.results import UNKNOWN, agreement, markdown_table

ROOT = Path(__file__).parents[1]
SAVED = Path(__file__).with_name("reproduction")
PAGE = ROOT / "docs" / "reproduction.md"
STUDIES = ROOT / "example_configs" / "studies"

#: A block of the page: a study's name, the K that are shown, and the table.
BLOCK = re.compile(r"<!-- table (\w+) K=([\d,]+) -->\n.*?<!-- end -->", re.DOTALL)


def rows_of(name: str) -> tuple[list[str], list[dict[str, str]]]:
    """The names of a study's factors (``when`` among them), and its rows."""
    with (SAVED / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        names = list(reader.fieldnames or [])
    return names[names.index("run") + 1 : names.index("seed")], rows


def table(name: str, numbers: Sequence[str]) -> str:
    """A line for each setting and K beside the published figures; numbers over seeds as mean and range."""
    factors, rows = rows_of(name)
    study = load_study(STUDIES / f"{name}.yaml")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["K"] in numbers:
            groups.setdefault((*(row[factor] for factor in factors), row["part"], row["K"]), []).append(row)
    lines = []
    for place, members in groups.items():
        labels = dict(zip(factors, place, strict=False))
        published = study.published_for(labels) or Published({})
        fitted = [row for row in members if row["d_ks"]]
        num = len(fitted)
        holds = sum(row["holds_paper"] == "True" for row in fitted)
        strict = sum(row["holds_fitted"] == "True" for row in fitted)
        line = {factor: level for factor, level in labels.items() if factor != "when"}
        if len({row["when"] for row in rows}) > 1:
            line["when"] = labels["when"]
        line |= {"part": place[-2] or UNKNOWN, "K": place[-1]}
        line["seeds"] = str(num) if num == len(members) else f"{num} of {len(members)}"
        line["d_ks"] = spread([row["d_ks"] for row in fitted], 3)
        line["s_hat"] = spread([row["s_hat"] for row in fitted], 2)
        line["accepted by 1.36/√K"] = f"{holds} of {num}" if num else UNKNOWN
        line["by the fitted value"] = f"{strict} of {num}" if num else UNKNOWN
        line["test error"] = spread([row["test_error"] for row in members], 3)
        line["published d_ks"] = UNKNOWN if published.fit_error is None else str(published.fit_error)
        line["published s_hat"] = UNKNOWN if published.slope is None else str(published.slope)
        line["verdict"] = agreement(published, holds, num)
        lines.append(line)
    return markdown_table(lines)


def spread(texts: Sequence[str], digits: int) -> str:
    """Mean and range of the numbers in a CSV's cells."""
    return results.spread([float(text) for text in texts if text], f".{digits}f", between="–")


def written(page: str) -> str:
    """Return the page with new tables."""

    def block(match: re.Match[str]) -> str:
        name, numbers = match.groups()
        return f"<!-- table {name} K={numbers} -->\n\n{table(name, numbers.split(','))}\n\n<!-- end -->"

    return BLOCK.sub(block, page)


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
