"""The scaled and shifted Hessian against dense matrices, alone and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessian_callback.algorithms.lanczos import top_eigenvalues
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.operators.engine_selection import TracingStatistics
from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.preconditioned import PreconditionedOperator
from tests.helpers.problems import problem
from tests.helpers.ranks import run_ranks


def hessian(ranks: Ranks | None = None) -> HessianOperator:
    return problem(ranks).operator(hvp="double_backward", memory_budget=None, tracing_statistics=TracingStatistics())


def diagonals(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    scale = 10 ** (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    scale[::7] = 0.0
    return scale, torch.rand(size, generator=generator, dtype=torch.float64)


def dense(operator: Any, size: int) -> Tensor:
    return torch.stack([operator.matvec_slice(column) for column in torch.eye(size, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("negative", [False, True])
def test_products_are_those_of_the_dense_matrix(negative: bool) -> None:
    operator = hessian()
    size = operator.num_parameters
    scale, shift = diagonals(size)
    sign = -1.0 if negative else 1.0
    expected = sign * scale[:, None] * dense(operator, size) * scale + torch.diag(shift)
    ours = PreconditionedOperator(operator, scale, shift, negative=negative)
    torch.testing.assert_close(dense(ours, size), expected, rtol=1e-12, atol=1e-14)
    largest = float(torch.linalg.eigvalsh(expected)[-1])
    spectrum = top_eigenvalues(ours, 1, rtol=1e-6, max_matvecs=size)
    assert abs(float(spectrum.eigenvalues[0]) - largest) <= float(spectrum.error_bounds[0]) + 1e-12


def on_two_ranks(rank: int) -> float:
    operator = hessian(Ranks(dist.group.WORLD))
    scale, shift = diagonals(operator.num_parameters)
    return float(top_eigenvalues(PreconditionedOperator(operator, scale, shift), 1, rtol=1e-8).eigenvalues[0])


def test_ranks_share_the_products() -> None:
    operator = hessian()
    scale, shift = diagonals(operator.num_parameters)
    alone = float(top_eigenvalues(PreconditionedOperator(operator, scale, shift), 1, rtol=1e-8).eigenvalues[0])
    assert [outcome.value for outcome in run_ranks(on_two_ranks, 2)] == [pytest.approx(alone, rel=1e-9)] * 2


def test_precise_products_are_those_of_the_float64_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    inputs = torch.randn(50, 6)
    operator = HessianOperator(model, lambda m, x: m(x).square().mean(), [inputs])
    scale = 10 ** torch.linspace(-3, 3, 6, dtype=torch.float64)
    shift = torch.linspace(0, 1, 6, dtype=torch.float64)
    ours = PreconditionedOperator(operator, scale, shift, negative=True)
    rounded = scale.float().double()
    exact = -rounded[:, None] * (2 / 50 * inputs.double().T @ inputs.double()) * rounded
    exact += torch.diag(shift.float().double())
    vectors = torch.randn(6, 2)
    found = ours.precise_products(vectors)
    assert found is not None
    torch.testing.assert_close(found, exact @ vectors.double(), rtol=1e-10, atol=1e-10)


def test_a_known_error_is_not_measured_again() -> None:
    operator = PreconditionedOperator(hessian(), torch.ones(hessian().num_parameters), relative_error=1e-3)
    assert operator.relative_error == 1e-3
    assert operator.precise_products(torch.ones(operator.partition.slice_length, 1)) is None


def test_an_operator_without_precise_products_can_be_scaled() -> None:
    matrix = MatvecOperator(torch.eye(3, dtype=torch.float64).mv, 3)
    operator = PreconditionedOperator(matrix, torch.ones(3))
    assert operator.precise_products(torch.ones(3, 1)) is None
    assert operator.relative_error == matrix.relative_error


def test_a_diagonal_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        PreconditionedOperator(MatvecOperator(torch.eye(3).mv, 3), torch.ones(2))
