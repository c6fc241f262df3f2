"""The solvers: the eigenvalues that each of them trusts, its costs and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessian_callback import Lanczos, PublishedProtocol, fit_power_law, top_eigenvalues
from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.algorithms.pooled_ritz import pooled_ritz_values
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.measurement.solvers import Solver

EIGENVALUES = torch.arange(1, 501, dtype=torch.float64) ** -1.0


def operator_of(eigenvalues: Tensor) -> MatvecOperator:
    return MatvecOperator(lambda v: eigenvalues * v, len(eigenvalues))


def test_each_solver_is_its_algorithm() -> None:
    operator = operator_of(EIGENVALUES)
    expected = top_eigenvalues(operator, k=20, max_matvecs=300, seed=3, positive_only=True)
    assert torch.equal(Lanczos().solve(operator, 20, seed=3).eigenvalues, expected.eigenvalues)
    pool = pooled_ritz_values(operator, num_runs=3, num_steps=20, seed=3)
    published = PublishedProtocol()
    spectrum = published.solve(operator, 20, seed=3)
    assert torch.equal(spectrum.eigenvalues, pool.ritz_values[:20])
    assert published.fit(spectrum, 20) == (fit_power_law(pool.ritz_values[:20]), None)
    vectors = Lanczos().solve(operator, 20, return_eigenvectors=True).eigenvectors
    assert vectors is not None
    assert vectors.shape == (500, 20)


# The contract of every solver.
SOLVERS: list[tuple[Solver, int, int]] = [
    (Lanczos(), 300, 80),
    (Lanczos(max_hvps=50), 50, 50),
    (PublishedProtocol(), 60, 60),
    (PublishedProtocol(runs=2, steps=15), 30, 30),
    (PublishedProtocol(steps=1000), 3000, 1500),
]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "limit", "expected"), SOLVERS)
def test_products_stay_within_the_limit(solver: Solver, limit: int, expected: int) -> None:
    assert (solver.hvp_limit(20), solver.expected_hvps(20, 500)) == (limit, expected)
    seen: list[LanczosProgress] = []
    spectrum = solver.solve(operator_of(EIGENVALUES), 20, progress=seen.append)
    assert spectrum.num_matvecs == seen[-1].num_matvecs <= limit
    if not solver.proves_bounds:
        assert spectrum.num_matvecs == expected
        assert spectrum.missed_probability == 1.0
    again = solver.solve(operator_of(EIGENVALUES), 20)
    assert torch.equal(again.eigenvalues, spectrum.eigenvalues)


def test_the_default_limit_has_a_floor() -> None:
    """The ten largest eigenvalues of transformers needed up to 320 products."""
    assert [Lanczos().hvp_limit(k) for k in (3, 10, 30, 50)] == [300, 300, 300, 500]


def test_only_the_published_protocol_fits_values_that_have_not_converged() -> None:
    operator = operator_of(EIGENVALUES)
    solver = Lanczos(max_hvps=30)
    fit, reason = solver.fit(solver.solve(operator, 20), 20)
    assert fit is not None
    assert fit.num_eigenvalues < 20
    assert reason is not None
    assert reason.startswith(f"only {fit.num_eigenvalues} of 20 eigenvalues are positive and converged: max_hvps=30")
    published = PublishedProtocol(runs=1)
    spectrum = published.solve(operator, 20)
    assert not spectrum.all_converged
    fit, reason = published.fit(spectrum, 20)
    assert fit is not None
    assert (fit.num_eigenvalues, reason) == (20, None)


@pytest.mark.parametrize("slope_rtol", [0.1, 0.02])
def test_a_run_that_stops_on_the_slope_knows_it_to_the_tolerance(slope_rtol: float) -> None:
    """On a spectrum whose tail is dense, with a known truth and a known cost of iterating to the end."""
    eigenvalues = torch.cat([EIGENVALUES[:25], torch.linspace(0.039, 0.02, 475, dtype=torch.float64)])
    operator = operator_of(eigenvalues)
    solver = Lanczos(max_hvps=500, stop_on="slope", slope_rtol=slope_rtol)
    spectrum = solver.solve(operator, 40)
    fit, reason = solver.fit(spectrum, 40)
    truth = fit_power_law(eigenvalues[:40]).slope
    assert fit is not None
    assert (fit.num_eigenvalues, reason) == (40, None)
    assert spectrum.stopped == "criterion"
    assert not spectrum.all_converged
    assert ((spectrum.eigenvalues - eigenvalues[:40]).abs() <= spectrum.error_bounds).all()
    assert abs(fit.slope - truth) <= 2 * slope_rtol * truth
    assert spectrum.num_matvecs < Lanczos(max_hvps=500).solve(operator, 40).num_matvecs


def test_a_slope_that_is_not_fixed_yet_is_not_fitted() -> None:
    solver = Lanczos(max_hvps=60, stop_on="slope")
    spectrum = solver.solve(operator_of(EIGENVALUES), 40)
    assert spectrum.stopped == "max_matvecs"
    fit, reason = solver.fit(spectrum, 40)
    assert fit is None or fit.num_eigenvalues < 40
    assert reason is not None


@pytest.mark.parametrize(("asymmetry", "dtype"), [(0.1, torch.float64), (0.0, torch.float32)])
def test_the_reason_tells_asymmetry_from_rounding(asymmetry: float, dtype: torch.dtype) -> None:
    """With the asymmetric part no eigenvalue below it is known; without it, none below the rounding level."""
    torch.manual_seed(0)
    noise = torch.randn(60, 60, dtype=dtype)
    matrix = torch.diag(torch.arange(1, 61, dtype=dtype) ** -6) + asymmetry * (noise - noise.T) / 60**0.5
    solver = Lanczos()
    spectrum = solver.solve(MatvecOperator(lambda v: matrix @ v, 60, dtype=dtype), 20)
    _, reason = solver.fit(spectrum, 20)
    words = ("differ by", "hvp='double_backward'") if asymmetry else ("rounding level of", "precision='64-true'")
    assert all(word in str(reason) for word in words)
    assert (spectrum.symmetry_defect > 0.25 * spectrum.rounding) == bool(asymmetry)


@pytest.mark.parametrize("kind", [Lanczos, PublishedProtocol])
def test_negative_eigenvalues_are_never_fitted(kind: type[Solver]) -> None:
    operator = operator_of(torch.cat([EIGENVALUES[:4], -EIGENVALUES[:16]]))
    options: dict[str, Any] = {"runs": 1} if kind is PublishedProtocol else {}
    solver = kind(**options)
    fit, reason = solver.fit(solver.solve(operator, 10), 10)
    assert fit is not None
    assert fit.num_eigenvalues == 4
    assert "only 4 of 10 eigenvalues are positive" in str(reason)
    assert f"pass solver={kind.__name__}(allow_fewer=True)" in str(reason)
    lenient = kind(allow_fewer=True, **options)
    assert lenient.fit(lenient.solve(operator, 10), 10) == (fit, None)
    fit, reason = solver.fit(solver.solve(operator_of(-EIGENVALUES), 10), 10)
    assert fit is None
    assert "only 0 of 10" in str(reason)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Lanczos(rtol=1.0), "rtol must be a finite number above 0 and below 1"),
        (lambda: Lanczos(rtol=float("nan")), "rtol must be"),
        (lambda: Lanczos(max_hvps=20).check(20), "allow about 80"),
        (lambda: Lanczos(max_hvps=2.5), "max_hvps must be None or an integer"),  # type: ignore[arg-type]
        (lambda: Lanczos(stop_on="fit_error"), "'eigenvalues' or 'slope'"),
        (lambda: Lanczos(slope_rtol=0.0), "slope_rtol"),
        (lambda: Lanczos(hvp="lineraize"), "hvp must be 'auto'"),
        (lambda: Lanczos(memory_budget="4GB"), "memory_budget must be None or an integer"),  # type: ignore[arg-type]
        (lambda: Lanczos(allow_fewer="no"), "allow_fewer must be True or False"),  # type: ignore[arg-type]
        (lambda: Lanczos(checkpoint=""), "checkpoint must be None or a path"),
        (lambda: PublishedProtocol(runs=0), "runs must be an integer of at least 1"),
        (lambda: PublishedProtocol(steps=6).check(20), "fewer than num_eigenvalues=20"),
    ],
)
def test_bad_options_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_the_published_protocol_has_no_checkpoint(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint; use solver=Lanczos\(checkpoint=\.\.\.\)"):
        PublishedProtocol().solve(operator_of(EIGENVALUES), 3, checkpoint=tmp_path)
