"""What a result may not depend on: the unit of the Hessian, the length of a start, autograd, and the default device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.algorithms.density import spectral_density
from hessian_callback.algorithms.lanczos_tridiagonal import lanczos_tridiagonal
from hessian_callback.algorithms.pooled_ritz import pooled_ritz_values
from hessian_callback.algorithms.subspace import subspace_rotation
from hessian_callback.algorithms.trace import moments
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.operators.product_check import check_products

SIZE = 60
DIAGONAL = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -1


def operator(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> MatvecOperator:
    diagonal = DIAGONAL.to(dtype) * scale
    return MatvecOperator(lambda vector: diagonal * vector, SIZE, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "length"),
    [(torch.float32, 1e-25), (torch.float32, 1e-22), (torch.float32, 1e20), (torch.float64, 1e-170)],
)
def test_a_start_may_have_any_length(dtype: torch.dtype, length: float) -> None:
    start = torch.linspace(1, 2, SIZE, dtype=dtype)
    expected, found = (top_eigenvalues(operator(dtype), 2, start=vector) for vector in (start, start * length))
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-5, atol=0)
    run = lanczos_tridiagonal(operator(dtype), start * length, 9)
    torch.testing.assert_close(run.ritz_values, lanczos_tridiagonal(operator(dtype), start, 9).ritz_values)


@pytest.mark.parametrize("scale", [1e-25, 1e-23, 1e-19, 1.0, 1e18])
def test_moments_in_float32_have_the_unit_of_the_matrix(scale: float) -> None:
    expected = moments(operator(torch.float32), num_matvecs=9)
    found = moments(operator(torch.float32, scale), num_matvecs=9)
    for one, other in ((found.trace, expected.trace), (found.frobenius_norm, expected.frobenius_norm)):
        assert one.value / scale == pytest.approx(other.value, rel=1e-4)
        assert one.stderr / scale == pytest.approx(other.stderr, rel=1e-3)


@pytest.mark.parametrize("length", [1e-25, 1e25])
def test_differences_are_homogeneous(length: float) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(8, 3)
    differences = HessianOperator(model, lambda m, x: m(x).square().mean(), [inputs], hvp="finite_difference")
    vector = torch.randn(differences.num_parameters)
    expected = differences.matvec(vector)
    torch.testing.assert_close(differences.matvec(vector * length) / length, expected, rtol=1e-2, atol=1e-3)


def test_a_matrix_with_a_gradient_is_a_matrix() -> None:
    factor = nn.Parameter(torch.eye(SIZE, dtype=torch.float64) * DIAGONAL.sqrt())
    gram = MatvecOperator(lambda vector: factor.T @ (factor @ vector), SIZE)
    start = torch.ones(SIZE, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(top_eigenvalues(gram, 2, start=start, rtol=1e-8).eigenvalues, DIAGONAL[:2])
    assert not gram.matvec_slice(start).requires_grad
    assert moments(gram, num_matvecs=9).trace.value == pytest.approx(moments(operator(), num_matvecs=9).trace.value)
    assert spectral_density(gram, num_vectors=2, num_steps=9).nodes.isfinite().all()


@pytest.fixture
def other_default_device() -> Iterator[None]:
    """Stands for a GPU as the default device, and tensors on the CPU."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("other_default_device")
def test_the_default_device_is_not_looked_at() -> None:
    one, other = (top_eigenvalues(operator(), 3, return_eigenvectors=True) for _ in range(2))
    assert one.eigenvalues.device.type == "cpu"
    assert moments(operator(), num_matvecs=9).trace.value > 0
    assert spectral_density(operator(), num_vectors=2, num_steps=9).nodes.device.type == "cpu"
    assert pooled_ritz_values(operator(), num_runs=2, num_steps=9).ritz_values.device.type == "cpu"
    assert float(subspace_rotation(operator(), one, other, dimension=2).overlap) == pytest.approx(1)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("hvp", ["auto", "linearize", "finite_difference"])
def test_products_do_not_look_at_the_default_device(hvp: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    batches = [(torch.randn(64, 4), torch.randint(2, (64,)))]
    size = HessianOperator(model, classify, batches).bytes_per_graph
    vector = torch.ones(23)
    torch.set_default_device("meta")
    try:
        # Batches are cut, and the engines are timed.
        found = HessianOperator(model, classify, batches, hvp=hvp, memory_budget=size // 2)
        found.expect_products(100_000)
        for _ in range(6):
            assert found.matvec(vector).device.type == "cpu"
        check_products(found, seed=0)
    finally:
        torch.set_default_device(None)
