"""Both modes fit by the same code: what each of them trusts, costs and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessian_callback import fit_power_law, top_eigenvalues
from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.algorithms.pooled_ritz import pooled_ritz_values
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.measurement.solvers import Protocol

EIGENVALUES = torch.arange(1, 501, dtype=torch.float64) ** -1.0


def operator_of(eigenvalues: Tensor) -> MatvecOperator:
    return MatvecOperator(lambda v: eigenvalues * v, len(eigenvalues))


def test_strict_is_the_solver_and_paper_is_the_pool() -> None:
    operator = operator_of(EIGENVALUES)
    strict, paper = Protocol(20, seed=3), Protocol(20, "paper", seed=3)
    expected = top_eigenvalues(operator, k=20, max_matvecs=200, seed=3, positive_only=True)
    assert torch.equal(strict.solve(operator).eigenvalues, expected.eigenvalues)
    pool = pooled_ritz_values(operator, num_runs=3, num_steps=20, seed=3)
    spectrum = paper.solve(operator)
    assert torch.equal(spectrum.eigenvalues, pool.ritz_values[:20])
    assert paper.fit(spectrum) == (fit_power_law(pool.ritz_values[:20]), None)
    assert strict.solve(operator, return_eigenvectors=True).eigenvectors.shape == (500, 20)


@pytest.mark.parametrize(
    ("protocol", "limit", "expected"),
    [
        (Protocol(20), 200, 80),
        (Protocol(20, max_hvps=50), 50, 50),
        (Protocol(20, "paper"), 60, 60),
        (Protocol(20, "paper", paper_runs=2, paper_steps=15), 30, 30),
        (Protocol(20, "paper", paper_steps=1000), 3000, 1500),
    ],
)
def test_cost(protocol: Protocol, limit: int, expected: int) -> None:
    assert (protocol.hvp_limit, protocol.expected_hvps(500)) == (limit, expected)
    seen: list[LanczosProgress] = []
    spectrum = protocol.solve(operator_of(EIGENVALUES), progress=seen.append)
    assert spectrum.num_matvecs == seen[-1].num_matvecs <= limit
    if protocol.mode == "paper":
        assert spectrum.num_matvecs == expected


def test_only_paper_mode_fits_what_has_not_converged() -> None:
    operator = operator_of(EIGENVALUES)
    fit, reason = Protocol(20, max_hvps=30).fit(Protocol(20, max_hvps=30).solve(operator))
    assert fit is not None
    assert fit.num_eigenvalues < 20
    assert reason.startswith(f"only {fit.num_eigenvalues} of 20 eigenvalues are positive and converged: max_hvps=30")
    paper = Protocol(20, "paper", paper_runs=1)
    spectrum = paper.solve(operator)
    assert not spectrum.all_converged
    fit, reason = paper.fit(spectrum)
    assert (fit.num_eigenvalues, reason) == (20, None)


@pytest.mark.parametrize("slope_rtol", [0.1, 0.02])
def test_a_run_that_stops_on_the_slope_knows_it_as_well_as_it_says(slope_rtol: float) -> None:
    """On a spectrum whose tail is dense; the truth is known, and so is what iterating to the end costs."""
    eigenvalues = torch.cat([EIGENVALUES[:25], torch.linspace(0.039, 0.02, 475, dtype=torch.float64)])
    operator = operator_of(eigenvalues)
    protocol = Protocol(40, max_hvps=500, stop_on="slope", slope_rtol=slope_rtol)
    spectrum = protocol.solve(operator)
    fit, reason = protocol.fit(spectrum)
    truth = fit_power_law(eigenvalues[:40]).slope
    assert fit is not None
    assert (fit.num_eigenvalues, reason) == (40, None)
    assert spectrum.stopped == "criterion"
    assert not spectrum.all_converged
    assert ((spectrum.eigenvalues - eigenvalues[:40]).abs() <= spectrum.error_bounds).all()
    assert abs(fit.slope - truth) <= 2 * slope_rtol * truth
    assert spectrum.num_matvecs < Protocol(40, max_hvps=500).solve(operator).num_matvecs


def test_a_slope_that_is_not_fixed_yet_is_not_fitted() -> None:
    protocol = Protocol(40, max_hvps=60, stop_on="slope")
    spectrum = protocol.solve(operator_of(EIGENVALUES))
    assert spectrum.stopped == "max_matvecs"
    fit, reason = protocol.fit(spectrum)
    assert fit is None or fit.num_eigenvalues < 40
    assert reason is not None


@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_negative_eigenvalues_are_never_fitted(mode: str) -> None:
    operator = operator_of(torch.cat([EIGENVALUES[:4], -EIGENVALUES[:16]]))
    protocol = Protocol(10, mode, paper_runs=1)
    fit, reason = protocol.fit(protocol.solve(operator))
    assert fit.num_eigenvalues == 4
    assert "only 4 of 10 eigenvalues are positive" in reason
    lenient = Protocol(10, mode, paper_runs=1, allow_fewer=True)
    assert lenient.fit(lenient.solve(operator)) == (fit, None)
    nothing = operator_of(-EIGENVALUES)
    fit, reason = protocol.fit(protocol.solve(nothing))
    assert fit is None
    assert "only 0 of 10" in reason


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_eigenvalues": 2}, "at least 3"),
        ({"mode": "lenient"}, "'strict' or 'paper'"),
        ({"rtol": 1.0}, "rtol"),
        ({"max_hvps": 20}, "allow about 80"),
        ({"paper_runs": 0}, "paper_runs"),
        ({"paper_steps": 6}, "fewer than num_eigenvalues=20"),
        ({"stop_on": "fit_error"}, "'eigenvalues' or 'slope'"),
        ({"slope_rtol": 0.0}, "slope_rtol"),
        ({"stop_on": "slope", "mode": "paper"}, "needs proven bounds"),
    ],
)
def test_errors(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Protocol(**{"num_eigenvalues": 20, **options})
