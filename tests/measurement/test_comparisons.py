"""The choice of comparisons: names, costs that are as announced, and numbers that are those of the functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hessian_callback import fit_power_law, top_eigenvalues
from hessian_callback.algorithms.trace import moments
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.measurement.comparisons import EXTRAS, Comparisons, Finding, numerical_interval_of

EIGENVALUES = torch.cat([torch.arange(1, 301, dtype=torch.float64) ** -1.0, torch.full((50,), -0.05).double()])
OPERATOR = MatvecOperator(lambda v: EIGENVALUES * v, 350)


def findings(chosen: Comparisons, previous: bool = True) -> dict[str, Finding]:
    spectrum = top_eigenvalues(OPERATOR, k=20, return_eigenvectors=chosen.needs_eigenvectors)
    tasks = chosen.of_spectrum(spectrum, 20)
    tasks += chosen.of_operator(OPERATOR, spectrum, spectrum if previous else None, seed=3)
    return {name: task() for name, task in tasks}


def test_every_comparison() -> None:
    chosen = Comparisons(tuple(name for name in EXTRAS if name not in ("norms", "halves")), num_classes=9)
    found = findings(chosen)
    values = {name: value for finding in found.values() for name, value in finding.values.items()}
    assert set(values) == {
        *("trace", "trace_stderr", "frobenius_norm", "frobenius_norm_stderr"),
        *("negative_mass", "negative_mass_stderr"),
        *("subspace_angle", "subspace_overlap", "subspace_change", "subspace_sine_bound"),
        *("slope_numerical_low", "slope_numerical_high", "outlier_ratio"),
    }
    assert abs(values["trace"] - float(EIGENVALUES.sum())) < 5 * values["trace_stderr"]
    assert abs(values["frobenius_norm"] - float(EIGENVALUES.norm())) < 5 * values["frobenius_norm_stderr"]
    mass = 2.5 / float(EIGENVALUES.abs().sum())
    assert abs(values["negative_mass"] - mass) < 5 * values["negative_mass_stderr"]
    # Compared with itself: what is left is that Ritz vectors are not quite eigenvectors.
    assert values["subspace_angle"] < 1e-6
    assert values["subspace_overlap"] == pytest.approx(1.0)
    assert values["outlier_ratio"] == pytest.approx(10.0, rel=0.02)
    truth = fit_power_law(EIGENVALUES[:20]).slope
    assert values["slope_numerical_low"] <= truth <= values["slope_numerical_high"]
    assert found["spectral density"].density is not None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"extras": ("trace",), "trace_hvps": 12}, 12),
        ({"extras": ("frobenius", "trace")}, 30),
        ({"extras": ("density",), "density_hvps": 42}, 40),
        ({"extras": ("subspace",), "subspace_dimension": 3}, 3),
        ({"extras": ("numerical_interval",), "num_classes": 5}, 0),
    ],
)
def test_costs_are_as_announced(options: dict[str, Any], expected: int) -> None:
    chosen = Comparisons(**options)
    spent = sum(finding.num_hvps for finding in findings(chosen).values())
    assert spent == expected
    assert expected <= chosen.expected_hvps(200) <= expected + 3
    assert Comparisons(("halves",)).expected_hvps(200) == 200


def test_trace_and_norm_come_from_the_same_products() -> None:
    spectrum = top_eigenvalues(OPERATOR, k=20, return_eigenvectors=True)
    expected = moments(OPERATOR, num_matvecs=30, spectrum=spectrum, seed=3)
    both = findings(Comparisons(("trace", "frobenius")))["trace and Frobenius norm"]
    assert both.values["trace"] == expected.trace.value
    assert both.values["frobenius_norm"] == expected.frobenius_norm.value
    assert set(findings(Comparisons(("frobenius",)))["trace and Frobenius norm"].values) == {
        "frobenius_norm",
        "frobenius_norm_stderr",
    }


def test_no_comparison_with_nothing() -> None:
    assert findings(Comparisons(("subspace",)), previous=False) == {}
    assert Comparisons(("numerical_interval",)).of_spectrum(top_eigenvalues(OPERATOR, k=5), None) == []


def test_no_bound_from_eigenvalues_that_are_not_known() -> None:
    spectrum = top_eigenvalues(OPERATOR, k=20, return_eigenvectors=True)
    unsure = replace(spectrum, converged=torch.arange(20) < 10)
    (_, task) = Comparisons(("subspace",)).of_operator(OPERATOR, unsure, spectrum, seed=0)[0]
    with pytest.raises(ValueError, match="not all converged"):
        task()
    Comparisons(("subspace",), subspace_dimension=9).of_operator(OPERATOR, unsure, spectrum, seed=0)[0][1]()


def test_rounding_widens_the_interval_downwards() -> None:
    """An eigenvalue may lie below its Ritz value by as much as products are wrong."""
    spectrum = top_eigenvalues(OPERATOR, k=20, rtol=1e-6, max_matvecs=300)
    narrow = numerical_interval_of(spectrum, 20)
    wide = numerical_interval_of(replace(spectrum, rounding=1e-3), 20)
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]
    with pytest.raises(ValueError, match="positive"):
        numerical_interval_of(replace(spectrum, rounding=1.0), 20)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"extras": ("hessian",)}, "unknown"),
        ({"extras": ("trace", "trace")}, "twice"),
        ({"trace_hvps": 3}, "trace_hvps"),
        ({"density_hvps": 3}, "density_hvps"),
        ({"subspace_dimension": 0}, "subspace_dimension"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_errors(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Comparisons(**options)
