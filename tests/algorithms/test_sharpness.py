"""Trace, Frobenius norm and density against dense truth; what their standard errors are worth; any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hessian_callback import HessianOperator, Spectrum, top_eigenvalues
from hessian_callback.algorithms.sharpness import (
    Estimate,
    SpectralDensity,
    frobenius_norm,
    moments,
    spectral_density,
    trace,
)
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import CASES, dense_hessian
from tests.helpers.ranks import run_ranks


def index(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "power law": lambda: index(300) ** -1.0,
    "indefinite": lambda: torch.cat([index(200) ** -1.0, -0.3 * index(100) ** -0.7]),
    "spikes and a semicircle": lambda: torch.cat(
        [torch.linspace(3, 8, 10).double(), torch.from_numpy(np.random.default_rng(0).beta(1.5, 1.5, 290) * 2 - 1)]
    ),
}


class Counted(MatvecOperator):
    def __init__(self, eigenvalues: Tensor, dtype: torch.dtype = torch.float64) -> None:
        eigenvalues = eigenvalues.to(dtype)
        super().__init__(lambda v: eigenvalues * v, len(eigenvalues), dtype=dtype)
        self.num_products = 0

    def matvec_slice(self, vector: Tensor) -> Tensor:
        self.num_products += 1
        return super().matvec_slice(vector)


def deflating(operator: MatvecOperator) -> Spectrum:
    return top_eigenvalues(operator, k=10, return_eigenvectors=True)


def covered(estimates: list[Estimate], truth: float, level: float = 0.9) -> float:
    inside = [low <= truth <= high for low, high in (estimate.interval(level) for estimate in estimates)]
    return sum(inside) / len(inside)


# -- trace and Frobenius norm ------------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_no_bias_and_standard_errors_that_cover(name: str, deflate: bool) -> None:
    eigenvalues = SPECTRA[name]()
    operator = Counted(eigenvalues)
    spectrum = deflating(operator) if deflate else None
    draws = [moments(operator, num_products=12, spectrum=spectrum, seed=seed) for seed in range(150)]
    truths = (float(eigenvalues.sum()), float(eigenvalues.norm()))
    for truth, estimates in zip(truths, ([d.trace for d in draws], [d.frobenius_norm for d in draws]), strict=True):
        values = np.array([estimate.value for estimate in estimates])
        errors = np.array([estimate.stderr for estimate in estimates])
        # Four standard errors of 150 draws; the root of an unbiased square is low by a fraction of its error.
        assert abs(values.mean() - truth) < (4 / math.sqrt(150) + 0.1) * values.std()
        assert 0.8 < math.sqrt((errors**2).mean()) / values.std() < 1.25
        assert 0.8 < covered(estimates, truth) < 0.97


def test_deflation_is_worth_its_name() -> None:
    eigenvalues = SPECTRA["spikes and a semicircle"]()
    operator = Counted(eigenvalues)
    plain = [trace(operator, num_products=12, seed=seed).value for seed in range(30)]
    spectrum = deflating(operator)
    deflated = [trace(operator, num_products=12, spectrum=spectrum, seed=seed).value for seed in range(30)]
    assert np.std(deflated) < 0.6 * np.std(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("deflate", [False, True])
def test_cost_is_what_is_said(deflate: bool, dtype: torch.dtype) -> None:
    operator = Counted(SPECTRA["power law"](), dtype)
    spectrum = deflating(operator) if deflate else None
    operator.num_products = 0
    found = moments(operator, num_products=25, spectrum=spectrum)
    assert (
        operator.num_products == found.num_matvecs == found.trace.num_matvecs == found.frobenius_norm.num_matvecs == 25
    )
    assert found.trace.num_vectors == (25 if deflate else 9)
    low, high = found.trace.interval(0.9999)
    assert low < float(SPECTRA["power law"]().sum()) < high


def test_what_the_basis_holds_is_exact() -> None:
    """Rank 6, which a sketch of 8 vectors spans; and a basis of the whole space."""
    low_rank = torch.cat(
        [torch.tensor([5.0, 4.0, 3.0, -3.0, -2.0, 1.0], dtype=torch.float64), torch.zeros(60).double()]
    )
    found = moments(Counted(low_rank), num_products=24)
    assert found.num_matvecs == 24  # the directions that only rounding spans are not multiplied, and make room
    assert found.trace.value == pytest.approx(8.0, abs=1e-10)
    assert found.frobenius_norm.value == pytest.approx(8.0, abs=1e-10)
    assert found.trace.stderr < 1e-10
    tiny = Counted(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    whole = moments(tiny, spectrum=top_eigenvalues(tiny, k=3, return_eigenvectors=True))
    assert (whole.num_matvecs, whole.trace.stderr, whole.trace.num_vectors) == (0, 0.0, 0)
    assert whole.trace.value == pytest.approx(6.0)
    assert whole.trace.interval() == (whole.trace.value, whole.trace.value)


def test_half_converged_vectors_do_no_harm() -> None:
    eigenvalues = SPECTRA["indefinite"]()
    operator = Counted(eigenvalues)
    spectrum = top_eigenvalues(operator, k=12, max_matvecs=16, return_eigenvectors=True)
    assert not spectrum.all_converged
    draws = [moments(operator, num_products=10, spectrum=spectrum, seed=seed) for seed in range(100)]
    for truth, values in (
        (float(eigenvalues.sum()), [d.trace.value for d in draws]),
        (float(eigenvalues.square().sum()), [d.frobenius_norm.value**2 for d in draws]),
    ):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(100)


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_networks(name: str) -> None:
    case = CASES[name]()
    dense = dense_hessian(case)
    operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights)
    for function, truth in ((trace, dense.trace()), (frobenius_norm, dense.norm())):
        low, high = function(operator, num_products=30).interval(0.999)
        assert low < float(truth) < high


def test_the_zero_matrix_has_no_sharpness() -> None:
    found = moments(MatvecOperator(torch.zeros_like, 20), num_products=6)
    assert (found.trace.value, found.frobenius_norm.value, found.frobenius_norm.stderr) == (0.0, 0.0, 0.0)


# -- density ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRA)
def test_moments_of_the_density(name: str) -> None:
    eigenvalues = SPECTRA[name]()
    operator = Counted(eigenvalues)
    draws = [spectral_density(operator, num_vectors=6, num_steps=12, seed=seed) for seed in range(40)]
    for function in (torch.ones_like, lambda t: t, torch.square, lambda t: torch.exp(-t)):
        truth = float(function(eigenvalues).mean())
        estimates = [density.mean(function) for density in draws]
        values = [estimate.value for estimate in estimates]
        assert abs(np.mean(values) - truth) <= 4 * np.std(values) / math.sqrt(40) + 1e-12
        if np.std(values) > 1e-12:
            assert covered(estimates, truth) > 0.75


def test_negative_mass_and_share() -> None:
    eigenvalues = torch.cat([torch.linspace(0.5, 1.5, 150), torch.linspace(-1.2, -0.4, 50)]).double()
    truth_mass = float(eigenvalues.clamp(max=0).abs().sum() / eigenvalues.abs().sum())
    operator = Counted(eigenvalues)
    draws = [spectral_density(operator, num_vectors=6, num_steps=20, seed=seed) for seed in range(40)]
    masses, shares = [d.negative_mass for d in draws], [d.negative_share for d in draws]
    assert covered(masses, truth_mass) > 0.75
    assert covered(shares, 0.25) > 0.75
    for estimates in (masses, shares):
        spread = np.std([estimate.value for estimate in estimates])
        assert 0.7 < math.sqrt(np.mean([estimate.stderr**2 for estimate in estimates])) / spread < 1.4


def test_smoothed_density_is_the_smoothed_spectrum() -> None:
    eigenvalues = SPECTRA["spikes and a semicircle"]()
    density = spectral_density(Counted(eigenvalues), num_vectors=60, num_steps=40)
    points, width = torch.linspace(-4, 11, 301, dtype=torch.float64), 0.5
    smooth = density.smoothed(points, width)
    scaled = (points[:, None] - eigenvalues) / width
    truth = (torch.exp(-0.5 * scaled**2) / (width * math.sqrt(2 * math.pi))).mean(1)
    assert float(torch.trapezoid(smooth, points)) == pytest.approx(1.0, abs=1e-6)
    assert float(torch.trapezoid((smooth - truth).abs(), points)) < 0.05


def test_runs_that_end_early_are_filled_up_with_nothing() -> None:
    # The eigenspace of 1 has two dimensions, so three steps exhaust it, whatever was asked for.
    density = spectral_density(Counted(torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64)), num_steps=40)
    assert density.nodes.shape == (4, 3)
    assert density.num_matvecs == 12
    torch.testing.assert_close(density.weights.sum(1), torch.ones(4, dtype=torch.float64))


# -- ranks -------------------------------------------------------------------------------------------


def _on_ranks(rank: int) -> tuple[Any, ...]:
    case = CASES["mlp"]()
    size = dist.get_world_size()
    operator = HessianOperator(
        case.model,
        case.loss_fn,
        case.batches[rank::size],
        weights=case.weights[rank::size],
        process_group=dist.group.WORLD,
    )
    spectrum = top_eigenvalues(operator, k=5, return_eigenvectors=True)
    density = spectral_density(operator, num_vectors=2, num_steps=10)
    return moments(operator, num_products=12), moments(operator, num_products=6, spectrum=spectrum), density


@pytest.mark.parametrize("world_size", [2])
def test_the_number_of_ranks_does_not_matter(world_size: int) -> None:
    (alone,) = (outcome.value for outcome in run_ranks(_on_ranks, 1))
    shared = [outcome.value for outcome in run_ranks(_on_ranks, world_size)]
    for plain, deflated, density in shared:
        assert (plain, deflated) == shared[0][:2]  # bit for bit, or ranks would take different ways
        for found, expected in ((plain, alone[0]), (deflated, alone[1])):
            assert found.trace.value == pytest.approx(expected.trace.value, rel=1e-9)
            assert found.frobenius_norm.value == pytest.approx(expected.frobenius_norm.value, rel=1e-9)
            assert found.frobenius_norm.stderr == pytest.approx(expected.frobenius_norm.stderr, rel=1e-6)
            assert found.num_matvecs == expected.num_matvecs
        torch.testing.assert_close(density.nodes, alone[2].nodes, atol=1e-9, rtol=0)
        torch.testing.assert_close(density.weights, alone[2].weights, atol=1e-8, rtol=0)


# -- errors ------------------------------------------------------------------------------------------


def test_errors() -> None:
    operator = Counted(index(20) ** -1.0)
    with pytest.raises(ValueError, match="at least 4"):
        moments(operator, num_products=3)
    with pytest.raises(ValueError, match="return_eigenvectors"):
        moments(operator, spectrum=top_eigenvalues(operator, k=3))
    with pytest.raises(ValueError, match="spectrum of this operator"):
        moments(Counted(index(21)), spectrum=deflating(operator))
    with pytest.raises(ValueError, match="num_vectors"):
        spectral_density(operator, num_vectors=1)
    with pytest.raises(ValueError, match="level"):
        Estimate(1.0, 0.1, 3, 3).interval(1.0)
    broken = MatvecOperator(lambda v: v / 0, 20)
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        moments(broken, num_products=6)
    density = SpectralDensity(torch.zeros(2, 1).double(), torch.ones(2, 1).double(), 5, 0.0, 2)
    with pytest.raises(ValueError, match="width"):
        density.smoothed(torch.zeros(1), 0.0)
    with pytest.raises(ZeroDivisionError):
        _ = density.negative_mass
