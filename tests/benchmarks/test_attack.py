"""The attack on the error bounds: its verdicts, and a record that is continued."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import attack
from hessian_callback import Spectrum, top_eigenvalues
from tests.helpers.spectra import operator_of, ranks

TRUTH = (ranks(40) ** -1.0).numpy()


@pytest.fixture(scope="module")
def spectrum() -> Spectrum:
    return top_eigenvalues(operator_of(torch.diag(ranks(40) ** -1.0)), 3)


def test_a_spectrum_within_its_bounds_passes(spectrum: Spectrum) -> None:
    assert attack.judge(spectrum, TRUTH) == (None, "")


def test_a_value_outside_its_bound_is_a_violation(spectrum: Spectrum) -> None:
    moved = spectrum.eigenvalues.clone()
    moved[1] += 2 * spectrum.error_bounds[1] + 1e-9
    assert attack.judge(dataclasses.replace(spectrum, eigenvalues=moved), TRUTH)[0] == "violated"


def test_a_value_that_converged_beyond_its_tolerance_is_found(spectrum: Spectrum) -> None:
    moved, wide = spectrum.eigenvalues.clone(), torch.full((3,), 0.1, dtype=torch.float64)
    moved[1] += 0.02
    changed = dataclasses.replace(spectrum, eigenvalues=moved, error_bounds=wide)
    assert attack.judge(changed, TRUTH)[0] == "false converged"
    undecided = dataclasses.replace(changed, converged=torch.tensor([True, False, True]))
    assert attack.judge(undecided, TRUTH)[0] == "false converged"  # It stopped as converged.
    assert attack.judge(dataclasses.replace(undecided, stopped="max_matvecs"), TRUTH)[0] is None


def test_errors_are_told_from_refusals() -> None:
    class Failing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __getattr__(self, name: str) -> object:
            raise self.error

    for error, kind in [
        (ArithmeticError(), "raised"),
        (ValueError(), "raised"),
        (np.linalg.LinAlgError(), "crash"),
        (TypeError(), "crash"),
    ]:
        assert attack.verdict(attack.Problem(Failing(error), TRUTH, {"k": 1}))[0] == kind


def test_a_record_is_continued_and_its_table_replaces_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, output = tmp_path / "record.jsonl", tmp_path / "page.md"
    output.write_text(f"before\n{attack.BEGIN}\nold\n{attack.END}\nafter\n", encoding="utf-8")
    options = ["--families", "degenerate", "--dtypes", "float32", "--record", str(record), "--output", str(output)]

    def call(matrices: int) -> list[dict[str, int]]:
        monkeypatch.setattr(sys, "argv", ["attack", "--matrices", str(matrices), "--seed", "5", *options])
        attack.main()
        return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]

    assert [line["cases"] for line in call(40)] == [4]
    assert [line["cases"] for line in call(80)] == [4, 3]
    page = output.read_text(encoding="utf-8")
    assert page.startswith("before\n")
    assert page.endswith(f"{attack.END}\nafter\n")
    assert "old" not in page
    assert "7 of 7 cases" in page
    assert "| degenerate | float32 | 7 | 0 | 0 | 0 | 0 |" in page
    assert "7 of 7 cases" in capsys.readouterr().out
