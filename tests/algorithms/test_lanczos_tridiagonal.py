"""A fixed number of Lanczos steps: Gauss quadrature, residual bounds, early ends, any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hessian_callback import HessianOperator
from hessian_callback.algorithms.lanczos_tridiagonal import lanczos_tridiagonal
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import CASES, rotated

EIGENVALUES = torch.cat([torch.arange(1, 61, dtype=torch.float64) ** -1.0, -0.2 * torch.rand(40, dtype=torch.float64)])


def start(size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_quadrature_is_exact_for_polynomials_below_twice_the_steps() -> None:
    matrix = rotated(EIGENVALUES)
    vector = start(100)
    run = lanczos_tridiagonal(MatvecOperator(matrix.mv, 100), vector, 6)
    unit = vector / vector.norm()
    power = unit
    for degree in range(12):
        quadrature = float((run.weights * run.ritz_values**degree).sum())
        assert quadrature == pytest.approx(float(unit @ power), rel=1e-11, abs=1e-13)
        power = matrix @ power
    assert float((run.weights * run.ritz_values**12).sum()) != pytest.approx(float(unit @ power), rel=1e-6)


def test_every_ritz_value_is_as_near_to_an_eigenvalue_as_its_residual_says() -> None:
    matrix = rotated(EIGENVALUES)
    run = lanczos_tridiagonal(MatvecOperator(matrix.mv, 100), start(100), 40)
    distances = (run.ritz_values[:, None] - EIGENVALUES).abs().min(1).values
    assert (distances <= run.residuals + run.rounding).all()
    assert run.residuals[0] < 1e-8 < run.residuals.max()
    assert run.num_matvecs == 40


def test_all_steps_give_all_eigenvalues() -> None:
    matrix = rotated(EIGENVALUES)
    run = lanczos_tridiagonal(MatvecOperator(matrix.mv, 100), start(100), 1000)
    assert run.num_matvecs == 100
    torch.testing.assert_close(run.ritz_values, EIGENVALUES.sort(descending=True).values, atol=1e-12, rtol=0)
    assert not run.residuals.any()


def test_a_run_ends_where_its_krylov_space_does() -> None:
    """Copies of an eigenvalue are one for a single vector."""
    matrix = rotated(torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    calls = []
    run = lanczos_tridiagonal(MatvecOperator(matrix.mv, 7), start(7), 6, progress=calls.append)
    torch.testing.assert_close(run.ritz_values, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    assert calls == [1, 2, 3]


def test_hessian_and_float32() -> None:
    case = CASES["mlp"](torch.float32)
    operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights)
    run = lanczos_tridiagonal(operator, torch.ones(operator.num_parameters), 20)
    assert run.ritz_values.dtype == torch.float64
    assert float(run.weights.sum()) == pytest.approx(1.0)
    assert np.all(np.diff(run.ritz_values.numpy()) <= 0)


def test_errors() -> None:
    operator = MatvecOperator(lambda v: v, 3)
    with pytest.raises(ValueError, match="num_steps"):
        lanczos_tridiagonal(operator, torch.ones(3, dtype=torch.float64), 0)
    with pytest.raises(TypeError, match=r"num_steps must be an integer, got 2\.5"):
        lanczos_tridiagonal(operator, torch.ones(3, dtype=torch.float64), 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinity"):
        lanczos_tridiagonal(operator, torch.full((3,), torch.inf, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="zero"):
        lanczos_tridiagonal(operator, torch.zeros(3, dtype=torch.float64), 2)
    with pytest.raises(ArithmeticError, match="NaN"):
        lanczos_tridiagonal(MatvecOperator(lambda v: v * float("nan"), 3), torch.ones(3, dtype=torch.float64), 2)
