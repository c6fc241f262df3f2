"""Write docs/compatibility.md from the tests that pass here: ``python -m tests.helpers.compatibility``.

With ``--situations`` only the section of other people's code is run and written again.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.field_kinds import OUTCOMES, SITUATIONS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

# Heading, what a row promises, and the tests that its rows are.
SECTIONS = [
    (
        "Modules",
        "Each trains for an epoch with and without the callback, ending bit for bit alike, and is measured twice.",
        "tests/callbacks/test_models.py::test_training_with_the_callback",
    ),
    (
        "Second derivatives",
        "A Hessian-vector product in float64 against a difference of gradients.",
        "tests/callbacks/test_models.py::test_the_product_is_that_of_differences",
    ),
    (
        "Precision",
        "The eigenvalues are those of the loss in float32, or float64 under 64-true, at the same parameters. "
        "On the CPU Lightning runs 16-mixed as bf16-mixed.",
        "tests/callbacks/test_hostile_runs.py::test_precision",
    ),
    (
        "Cadences and trainer options",
        "Weights, optimizer, gradients, modes, generators, metrics and lists end bit for bit alike.",
        "tests/callbacks/test_trainer_paths.py::test_training_is_the_same_bit_for_bit",
    ),
    (
        "Faults",
        "The run continues, or ends, as it would have without the callback; what cannot work is reported before "
        "training. The last row is 30 drawn cases of module, precision, hook, fault and its place.",
        "tests/callbacks/test_faults.py",
    ),
]
HEADING = "## Other people's code"
# From here on the page is written by hand, and kept.
BY_HAND = "## On a GPU"
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers")


class Outcomes:
    """Collects what became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome


def words(node: str) -> str:
    """Return a test's identifier as words: its parameters, if they tell it from the others of its section."""
    function, _, parameters = node.partition("::")[2].partition("[")
    name = function.removeprefix("test_").replace("_", " ")
    # Without the options of a case that has none.
    return f"{name}: {parameters[:-1].removesuffix('-{}')}" if parameters else name


def page(outcomes: dict[str, str]) -> str:
    """Return the page for outcomes by test."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# What has been run",
        "",
        f"Written by `python -m tests.helpers.compatibility` from its own run: Python {platform.python_version()}, "
        f"{versions}, on the CPU; all but the last three sections, which are written by hand. Runs of "
        "several processes: [distributed.md](distributed.md).",
    ]
    for heading, promise, tests in SECTIONS:
        lines += ["", f"## {heading}", "", promise, "", "| Case | Outcome |", "|---|---|"]
        for node, outcome in outcomes.items():
            if node.startswith(tests):
                row = words(node) if tests.endswith(".py") else words(node).partition(": ")[2]
                lines.append(f"| {row} | {outcome} |")
    return "\n".join(lines) + "\n"


def situations() -> str:
    """Return the section of other people's code; it is written only if its tests pass."""
    lines = [HEADING, "", OUTCOMES, "", "| Situation | Outcome | Test |", "|---|---|---|"]
    lines += [f"| {situation} | {outcome} | `{test}` |" for situation, outcome, test in SITUATIONS]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the tests; write the page only if all pass, or are skipped for want of a package."""
    outcomes = Outcomes()
    tests = [test for *_, test in SITUATIONS]
    if "--situations" not in sys.argv:
        tests += [tests for *_, tests in SECTIONS]
    status = pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[outcomes])
    if status == 0:
        text = PAGE.read_text()
        start = HEADING if HEADING in text else BY_HAND
        generated = text.partition(start)[0] if "--situations" in sys.argv else f"{page(outcomes.of)}\n"
        PAGE.write_text(f"{generated}{situations()}\n{''.join(text.partition(BY_HAND)[1:])}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
