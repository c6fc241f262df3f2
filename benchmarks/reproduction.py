"""The tables of docs/reproduction.md, from the saved results of the studies of the paper.

    python -m benchmarks.reproduction

replaces the tables between the page's markers. benchmarks/reproduction/NAME.csv is the results.csv of
example_configs/studies/NAME.yaml, as `hessian-callback study` wrote it, and NAME.correlations.md its correlations.md.
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

#: The same for the statistics along a training.
TRAINING = re.compile(r"<!-- training (\w+) K=(\d+) -->\n.*?<!-- end -->", re.DOTALL)

#: The same for their correlations with the test loss.
CORRELATIONS = re.compile(r"<!-- correlations (\w+) K=(\d+) -->\n.*?<!-- end -->", re.DOTALL)

# Columns of the table along a training: the name, the column of the results, the digits.
_STATISTICS = [
    ("test loss", "test_loss", 3),
    ("train loss", "train_loss", 3),
    ("d_ks", "d_ks", 3),
    ("s_hat", "s_hat", 2),
    ("λ₁", "lambda_1", 1),
    ("trace", "trace", 0),
]


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


def training_table(name: str, number: str) -> str:
    """A line for each setting and step; numbers over seeds as mean and range."""
    factors, rows = rows_of(name)
    labels = [factor for factor in factors if factor != "when"]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["K"] == number:
            place = (*(row[label] for label in labels), row["part"] or UNKNOWN, row["step"])
            groups.setdefault(place, []).append(row)
    lines = []
    for place, members in sorted(groups.items(), key=lambda group: (group[0][:-1], int(group[0][-1]))):
        line = {**dict(zip([*labels, "part", "step"], place, strict=True)), "seeds": str(len(members))}
        line |= {title: spread([row[column] for row in members], digits) for title, column, digits in _STATISTICS}
        lines.append(line)
    return markdown_table(lines)


def correlation_table(name: str, number: str) -> str:
    """A line for each setting and part of the run: Spearman's coefficients of the predictors with the test loss."""
    text = (SAVED / f"{name}.correlations.md").read_text(encoding="utf-8")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        kind, _, setting = title.partition(f", K = {number}, ")
        question, _, part = kind.partition(": ")
        if question != "Within runs" or not setting:
            continue
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
        place = {title: index for index, title in enumerate(table[0])}
        for cells in table[2:]:
            segment, predictor = cells[place["segment"]], cells[place["predictor"]]
            shown = {"setting": setting, "Hessian": part, "of the run": segment}
            line = lines.setdefault(tuple(shown.values()), shown)
            line[predictor] = cells[place["Spearman (95 %)"]]
    return markdown_table(list(lines.values()))


def spread(texts: Sequence[str], digits: int) -> str:
    """Mean and range of the numbers in a CSV's cells."""
    return results.spread([float(text) for text in texts if text], f".{digits}f", between="–")


def written(page: str) -> str:
    """Return the page with new tables."""

    def block(match: re.Match[str]) -> str:
        name, numbers = match.groups()
        return f"<!-- table {name} K={numbers} -->\n\n{table(name, numbers.split(','))}\n\n<!-- end -->"

    def training(match: re.Match[str]) -> str:
        name, number = match.groups()
        return f"<!-- training {name} K={number} -->\n\n{training_table(name, number)}\n\n<!-- end -->"

    def correlations(match: re.Match[str]) -> str:
        name, number = match.groups()
        return f"<!-- correlations {name} K={number} -->\n\n{correlation_table(name, number)}\n\n<!-- end -->"

    return CORRELATIONS.sub(correlations, TRAINING.sub(training, BLOCK.sub(block, page)))


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
