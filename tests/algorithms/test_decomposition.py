"""The Krylov decomposition against dense arithmetic: orthogonality, residuals, discrepancies and the rounding level."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hessian_callback.algorithms.decomposition import Decomposition
from hessian_callback.algorithms.lanczos import top_eigenvalues
from hessian_callback.linalg.krylov_basis import KrylovBasis
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import rotated
from tests.helpers.spectra import DTYPES, operator_of, ranks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_the_decomposition_holds(num_chains: int, dtype: torch.dtype) -> None:
    matrix = rotated(torch.cat([ranks(100) ** -1.0, -(ranks(50) ** -1.0)])).to(dtype)
    decomposition = Decomposition(operator_of(matrix, dtype), seed=0)
    for chain in range(num_chains):
        decomposition.begin()
        for _ in range(11):
            decomposition.expand(decomposition.chains[chain])
    decomposition.expand(decomposition.chains[0])
    basis = torch.stack([decomposition.basis.vector(index) for index in range(decomposition.size)])
    size = decomposition.size
    eps = torch.finfo(dtype).eps
    gram = basis.double() @ basis.double().T
    assert torch.linalg.matrix_norm(gram - torch.eye(size), 2) <= 10 * math.sqrt(size) * eps
    remainder = basis.double() @ matrix.double() - torch.from_numpy(decomposition.projection().dense()) @ basis.double()
    for chain in decomposition.chains:
        remainder[chain.column] -= chain.residual.double()
    assert torch.linalg.matrix_norm(remainder, 2) <= 100 * eps


def grown(operator: MatvecOperator, size: int, seed: int = 0) -> Decomposition:
    decomposition = Decomposition(operator, seed)
    decomposition.begin()
    while decomposition.size < size:
        decomposition.expand(decomposition.chains[0])
    return decomposition


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_vectors_on_few_coordinates_stay_orthogonal_in_float32(exponent: float) -> None:
    """Each vector of this basis has most of its norm in the first coordinates."""
    diagonal = (ranks(20_000) ** -exponent).float()
    for seed in range(4):
        decomposition = grown(MatvecOperator(lambda v: diagonal * v, 20_000, dtype=torch.float32), 60, seed)
        decomposition.check_orthogonality()
        basis = torch.stack([decomposition.basis.vector(index) for index in range(60)]).double()
        deviation = torch.linalg.matrix_norm(basis @ basis.T - torch.eye(60), 2)
        assert deviation <= 10 * math.sqrt(60) * torch.finfo(torch.float32).eps


def test_a_loss_of_orthogonality_is_found_along_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    subtract = KrylovBasis.subtract

    def forgetful(self: KrylovBasis, vector: Tensor, coefficients: Tensor) -> None:
        if self.size < 20:
            subtract(self, vector, coefficients)

    monkeypatch.setattr(KrylovBasis, "subtract", forgetful)
    products: list[int] = []
    with pytest.raises(ArithmeticError, match="lost its orthogonality"):
        top_eigenvalues(
            operator_of(rotated(ranks(300) ** -1.0)),
            100,
            max_matvecs=250,
            progress=lambda now: products.append(now.num_matvecs),
        )
    assert len(products) < 64


def test_the_discrepancy_bounds_the_asymmetry_within_the_span() -> None:
    matrix = rotated(ranks(120) ** -1.0)
    skew = torch.randn(120, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix + 1e-4 * (skew - skew.T) / torch.linalg.matrix_norm(skew - skew.T, 2)
    decomposition = grown(operator_of(matrix), 40)
    basis = torch.stack([decomposition.basis.vector(index) for index in range(40)])
    difference = basis @ matrix @ basis.T - torch.from_numpy(decomposition.projection().dense())
    assert torch.linalg.matrix_norm(difference, 2) <= decomposition.asymmetry
    # The error of the products is not confined to the span.
    assert decomposition.asymmetry >= 1e-4
    assert decomposition.asymmetry <= 1e-3


def test_residuals_that_were_dropped_are_part_of_the_rounding_level() -> None:
    diagonal = torch.tensor([1.0, 1 + 3e-15, 0.5], dtype=torch.float64)
    decomposition = Decomposition(operator_of(torch.diag(diagonal)), seed=0)
    decomposition.begin(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert not decomposition.chains
    without = 32 * decomposition.eps * decomposition.norm
    assert decomposition.rounding >= without + 1e-15


def test_a_probe_goes_on_below_the_rounding_level_and_other_chains_end_there() -> None:
    diagonal = torch.zeros(500)
    diagonal[:2] = torch.tensor([1.0, 1e-7])

    def started(probing: bool) -> Decomposition:
        decomposition = Decomposition(MatvecOperator(lambda v: diagonal * v, 500, dtype=torch.float32), seed=0)
        decomposition.begin(torch.eye(500)[0].clone())
        decomposition.begin(probing=probing)
        return decomposition

    assert not started(False).chains
    probe = started(True)
    assert probe.chains
    probe.end_probe()
    assert not probe.chains


def test_a_basis_that_fills_the_space_has_no_residual() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=generator)  # not symmetric
    decomposition = grown(operator_of(matrix), 4)
    assert not decomposition.chains
    assert not decomposition.begin()
    spectrum = top_eigenvalues(operator_of(matrix), 4)
    assert torch.isfinite(spectrum.error_bounds).all()
    assert not spectrum.all_converged


def test_products_whose_squares_overflow_are_told_from_infinite_ones() -> None:
    diagonal = 1e25 * torch.arange(1, 31)
    operator = MatvecOperator(lambda v: diagonal * v, 30, dtype=torch.float32)
    with pytest.raises(ArithmeticError, match=r"finite, but its squared norm overflows torch\.float32; scale the loss"):
        top_eigenvalues(operator, 2)
