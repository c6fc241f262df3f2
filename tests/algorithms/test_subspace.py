"""Angles between eigenspaces against scipy, and the bound against dense eigenvectors and drawn matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from torch import Tensor

from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.algorithms.subspace import principal_angles, subspace_rotation
from hessian_callback.linalg.distributed import Partition, Ranks
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import CASES, rotated
from tests.helpers.ranks import run_ranks


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def angles_between(one: Tensor, other: Tensor) -> Tensor:
    return principal_angles(one, other, Partition(len(one), 1, 0), Ranks())


# -- angles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize(("k", "other_k"), [(1, 1), (4, 4), (3, 5), (5, 3)])
def test_angles_are_scipy_s(k: int, other_k: int, distance: float) -> None:
    one = random_matrix(50, k)
    other = torch.cat([one, random_matrix(50, 5, 1)], 1)[:, :other_k] + distance * random_matrix(50, other_k, 2)
    expected = np.sort(scipy.linalg.subspace_angles(one.numpy(), other.numpy()))
    np.testing.assert_allclose(angles_between(one, other).numpy(), expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("angle", [0.0, 1e-10, 1e-5, 0.3, math.pi / 4, 1.5, math.pi / 2 - 1e-9, math.pi / 2])
def test_a_known_angle(angle: float) -> None:
    basis, _ = torch.linalg.qr(random_matrix(30, 3))
    turned = torch.stack([basis[:, 0], math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 2]], 1)
    found = angles_between(basis[:, :2], turned)
    np.testing.assert_allclose(found.numpy(), [0.0, angle], atol=1e-14, rtol=1e-12)


def test_angles_in_float32_are_as_accurate_as_the_dtype() -> None:
    one, other = random_matrix(20000, 4), random_matrix(20000, 4, 1)
    other = one + 1e-3 * other
    expected = angles_between(one, other)
    torch.testing.assert_close(angles_between(one.float(), other.float()), expected, rtol=1e-3, atol=1e-6)


def test_dependent_columns_give_fewer_angles() -> None:
    one = random_matrix(20, 2)
    assert len(angles_between(torch.cat([one, one[:, :1] + one[:, 1:]], 1), random_matrix(20, 5, 1))) == 2
    with pytest.raises(ValueError, match="zeros"):
        angles_between(one, torch.zeros(20, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="20 rows"):
        angles_between(one, random_matrix(21, 2))


# -- rotation and bound ------------------------------------------------------------------------------


def dense_operator(matrix: Tensor) -> MatvecOperator:
    return MatvecOperator(matrix.mv, len(matrix))


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.03, 0.3])
@pytest.mark.parametrize("dimension", [1, 3, 6])
def test_the_bound_holds_and_follows_from_the_residual(dimension: int, size: float) -> None:
    eigenvalues = torch.arange(1, 81, dtype=torch.float64) ** -1.0
    matrix = rotated(eigenvalues)
    change = random_matrix(80, 80, 5)
    change = size * (change + change.T) / torch.linalg.matrix_norm(change + change.T, 2)
    before, now = (
        top_eigenvalues(dense_operator(m), k=10, rtol=1e-9, max_matvecs=200, return_eigenvectors=True)
        for m in (matrix, matrix + change)
    )
    rotation = subspace_rotation(dense_operator(matrix + change), before, now, dimension=dimension)

    old, new = (torch.linalg.eigh(m).eigenvectors.flip(1)[:, :dimension] for m in (matrix, matrix + change))
    expected = np.sort(scipy.linalg.subspace_angles(old.numpy(), new.numpy()))
    np.testing.assert_allclose(rotation.angles.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert rotation.overlap == pytest.approx(float((old.T @ new).square().sum()) / dimension)
    assert rotation.largest_angle == pytest.approx(float(expected[-1]), rel=1e-4)
    assert rotation.num_matvecs == dimension

    images = (matrix + change) @ old
    compressed = old.T @ images
    norm = float(torch.linalg.matrix_norm(images - old @ compressed, 2))
    outside = float(torch.linalg.eigvalsh(matrix + change)[-1 - dimension])
    gap = float(torch.linalg.eigvalsh(compressed)[0]) - outside
    assert rotation.residual_norm == pytest.approx(norm, rel=1e-4)
    assert rotation.gap == pytest.approx(gap, rel=1e-4, abs=1e-7)
    perturbation = float(torch.linalg.matrix_norm(change @ old, 2))
    assert rotation.perturbation_norm == pytest.approx(perturbation, rel=1e-3)
    assert rotation.residual_norm <= rotation.perturbation_norm <= size * (1 + 1e-6)
    if gap > 0:
        assert math.sin(float(expected[-1])) <= rotation.sine_bound * (1 + 1e-6) + 1e-7
        assert rotation.sine_bound < 10 * size / gap
    else:
        assert rotation.sine_bound == math.inf


def test_spaces_that_change_places_have_no_finite_bound() -> None:
    """The first and the fourth eigenvector swap: the angle is pi / 2 and the bound infinite."""
    before, now = (
        dense_operator(torch.diag(torch.tensor(d, dtype=torch.float64)))
        for d in ([4.0, 3.0, 2.0, 1.0, 0.5], [1.0, 3.0, 2.0, 4.0, 0.5])
    )
    spectra = [top_eigenvalues(operator, k=4, return_eigenvectors=True) for operator in (before, now)]
    rotation = subspace_rotation(now, *spectra, dimension=2)
    assert rotation.largest_angle == pytest.approx(math.pi / 2)
    assert rotation.overlap == pytest.approx(0.5)
    assert rotation.sine_bound == math.inf


def drawn_spectrum(rng: np.random.Generator, size: int, dimension: int) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 0:
        return np.arange(1.0, size + 1) ** -rng.uniform(0.3, 2)
    if kind == 1:  # clusters of three
        return np.repeat(np.arange(1.0, size + 1) ** -1.0, 3)[:size] + 1e-6 * rng.normal(size=size)
    if kind == 2:  # outliers on a bulk
        return np.concatenate([rng.uniform(1, 10, dimension), rng.uniform(-0.5, 0.5, size - dimension)])
    return rng.normal(size=size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_bound_holds_for_the_computed_vectors(dtype: torch.dtype) -> None:
    """Loosely converged Ritz vectors differ from the eigenvectors; the angle is measured between them."""
    rng = np.random.default_rng(7)
    informative = beyond_davis_kahan = 0
    for seed in range(50):
        size, dimension = int(rng.integers(80, 160)), int(rng.integers(1, 5))
        k = dimension + int(rng.integers(1, 3))
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        first = (basis * drawn_spectrum(rng, size, dimension)) @ basis.T
        change = rng.normal(size=(size, size))
        change *= 10 ** rng.uniform(-8, 0) / np.linalg.norm(change + change.T, 2)
        operators = [
            MatvecOperator((torch.from_numpy(matrix + matrix.T).to(dtype) / 2).mv, size, dtype=dtype)
            for matrix in (first, first + change)
        ]
        rtols = [float(10 ** rng.uniform(-6, -0.5)) for _ in operators]
        spectra = [
            top_eigenvalues(operator, k, rtol=rtol, max_matvecs=size, seed=seed + number, return_eigenvectors=True)
            for number, (operator, rtol) in enumerate(zip(operators, rtols, strict=True))
        ]
        rotation = subspace_rotation(operators[1], *spectra, dimension=dimension)
        vectors = [spectrum.eigenvectors[:, :dimension].double().numpy() for spectrum in spectra]
        sine = math.sin(scipy.linalg.subspace_angles(*vectors).max())
        assert sine <= rotation.sine_bound
        if rotation.sine_bound < 1:
            informative += 1
            beyond_davis_kahan += sine > rotation.residual_norm / rotation.gap
    assert informative > 10
    assert beyond_davis_kahan > 0  # the bound on exact eigenvectors alone does not hold


# -- ranks -------------------------------------------------------------------------------------------


def _on_ranks(rank: int) -> Any:
    case = CASES["mlp"]()
    size = dist.get_world_size()
    spectra = []
    for scale in (1.0, 1.02):
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.mul_(scale)
        operator = HessianOperator(
            case.model,
            case.loss_fn,
            case.batches[rank::size],
            weights=case.weights[rank::size],
            process_group=dist.group.WORLD,
        )
        spectra.append(top_eigenvalues(operator, k=6, rtol=1e-8, return_eigenvectors=True, max_matvecs=100))
    return subspace_rotation(operator, *spectra, dimension=3)


def test_the_number_of_ranks_does_not_matter() -> None:
    (alone,) = (outcome.value for outcome in run_ranks(_on_ranks, 1))
    for outcome in run_ranks(_on_ranks, 2):
        torch.testing.assert_close(outcome.value.angles, alone.angles, atol=1e-6, rtol=1e-5)
        assert outcome.value.sine_bound == pytest.approx(alone.sine_bound, rel=1e-4)
        assert outcome.value.perturbation_norm == pytest.approx(alone.perturbation_norm, rel=1e-4)


# -- errors ------------------------------------------------------------------------------------------


def test_errors() -> None:
    operator = dense_operator(rotated(torch.arange(10, 0, -1, dtype=torch.float64)))
    spectrum = top_eigenvalues(operator, k=3, return_eigenvectors=True)
    with pytest.raises(ValueError, match="dimension must be at least 1, got 0"):
        subspace_rotation(operator, spectrum, spectrum, dimension=0)
    with pytest.raises(TypeError, match=r"dimension must be an integer, got 1\.5"):
        subspace_rotation(operator, spectrum, spectrum, dimension=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 present eigenvalues"):
        subspace_rotation(operator, spectrum, spectrum, dimension=3)
    with pytest.raises(ValueError, match="return_eigenvectors"):
        subspace_rotation(operator, replace(spectrum, eigenvectors=None), spectrum, dimension=2)
    narrow = replace(spectrum, eigenvectors=spectrum.eigenvectors[:, :1])
    with pytest.raises(ValueError, match="holds 1"):
        subspace_rotation(operator, narrow, spectrum, dimension=2)
    with pytest.raises(ArithmeticError, match="NaN"):
        subspace_rotation(MatvecOperator(lambda v: v * math.nan, 10), spectrum, spectrum, dimension=2)
