"""Trace and Frobenius norm against dense truth, the coverage of their intervals, and any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hessian_callback import HessianOperator, Spectrum, top_eigenvalues
from hessian_callback.algorithms.estimate import Estimate
from hessian_callback.algorithms.trace import frobenius_norm, moments, trace
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import CASES, dense_hessian
from tests.helpers.estimates import SPECTRA, Counted, coverage, index
from tests.helpers.ranks import run_ranks


def deflating(operator: MatvecOperator) -> Spectrum:
    return top_eigenvalues(operator, k=10, return_eigenvectors=True)


# -- trace and Frobenius norm ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_no_bias_and_standard_errors_that_cover(name: str, deflate: bool) -> None:
    eigenvalues = SPECTRA[name]()
    operator = Counted(eigenvalues)
    spectrum = deflating(operator) if deflate else None
    draws = [moments(operator, num_matvecs=12, spectrum=spectrum, seed=seed) for seed in range(150)]
    truths = (float(eigenvalues.sum()), float(eigenvalues.norm()))
    for truth, estimates in zip(truths, ([d.trace for d in draws], [d.frobenius_norm for d in draws]), strict=True):
        values = np.array([estimate.value for estimate in estimates])
        errors = np.array([estimate.stderr for estimate in estimates])
        # Four standard errors of 150 draws; the root of an unbiased square is low by a fraction of its error.
        assert abs(values.mean() - truth) < (4 / math.sqrt(150) + 0.1) * values.std()
        assert 0.8 < math.sqrt((errors**2).mean()) / values.std() < 1.25
        assert 0.8 < coverage([estimate.interval(0.9) for estimate in estimates], truth) < 0.97


@pytest.mark.slow
def test_deflation_lowers_the_error() -> None:
    eigenvalues = SPECTRA["spikes and a semicircle"]()
    operator = Counted(eigenvalues)
    plain = [trace(operator, num_matvecs=12, seed=seed).value for seed in range(30)]
    spectrum = deflating(operator)
    deflated = [trace(operator, num_matvecs=12, spectrum=spectrum, seed=seed).value for seed in range(30)]
    assert np.std(deflated) < 0.6 * np.std(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("deflate", [False, True])
def test_the_reported_cost_is_the_number_of_products(deflate: bool, dtype: torch.dtype) -> None:
    operator = Counted(SPECTRA["power law"](), dtype)
    spectrum = deflating(operator) if deflate else None
    operator.num_products = 0
    found = moments(operator, num_matvecs=25, spectrum=spectrum)
    assert (
        operator.num_products == found.num_matvecs == found.trace.num_matvecs == found.frobenius_norm.num_matvecs == 25
    )
    assert found.trace.num_vectors == (25 if deflate else 9)
    low, high = found.trace.interval(0.9999)
    assert low < float(SPECTRA["power law"]().sum()) < high


def test_the_part_in_the_basis_is_exact() -> None:
    """A matrix of rank 6 in the span of a sketch of 8 vectors, and a basis of the whole space."""
    low_rank = torch.cat(
        [torch.tensor([5.0, 4.0, 3.0, -3.0, -2.0, 1.0], dtype=torch.float64), torch.zeros(60).double()]
    )
    found = moments(Counted(low_rank), num_matvecs=24)
    assert found.num_matvecs == 24  # directions that only rounding spans cost no product
    assert found.trace.value == pytest.approx(8.0, abs=1e-10)
    assert found.frobenius_norm.value == pytest.approx(8.0, abs=1e-10)
    assert found.trace.stderr < 1e-10
    tiny = Counted(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    whole = moments(tiny, spectrum=top_eigenvalues(tiny, k=3, return_eigenvectors=True))
    assert (whole.num_matvecs, whole.trace.stderr, whole.trace.num_vectors) == (0, 0.0, 0)
    assert whole.trace.value == pytest.approx(6.0)
    assert whole.trace.interval() == (whole.trace.value, whole.trace.value)


@pytest.mark.slow
def test_unconverged_vectors_cause_no_bias() -> None:
    eigenvalues = SPECTRA["indefinite"]()
    operator = Counted(eigenvalues)
    spectrum = top_eigenvalues(operator, k=12, max_matvecs=16, return_eigenvectors=True)
    assert not spectrum.all_converged
    draws = [moments(operator, num_matvecs=10, spectrum=spectrum, seed=seed) for seed in range(100)]
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
        low, high = function(operator, num_matvecs=30).interval(0.999)
        assert low < float(truth) < high


def test_the_moments_of_the_zero_matrix_are_exact_zeros() -> None:
    found = moments(MatvecOperator(torch.zeros_like, 20), num_matvecs=6)
    assert (found.trace.value, found.frobenius_norm.value, found.frobenius_norm.stderr) == (0.0, 0.0, 0.0)


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
    return moments(operator, num_matvecs=12), moments(operator, num_matvecs=6, spectrum=spectrum)


@pytest.mark.parametrize("world_size", [2])
def test_the_number_of_ranks_does_not_matter(world_size: int) -> None:
    (alone,) = (outcome.value for outcome in run_ranks(_on_ranks, 1))
    shared = [outcome.value for outcome in run_ranks(_on_ranks, world_size)]
    for plain, deflated in shared:
        assert (plain, deflated) == shared[0]  # bit for bit, so that all ranks take the same branches
        for found, expected in ((plain, alone[0]), (deflated, alone[1])):
            assert found.trace.value == pytest.approx(expected.trace.value, rel=1e-9)
            assert found.frobenius_norm.value == pytest.approx(expected.frobenius_norm.value, rel=1e-9)
            assert found.frobenius_norm.stderr == pytest.approx(expected.frobenius_norm.stderr, rel=1e-6)
            assert found.num_matvecs == expected.num_matvecs


# -- errors ------------------------------------------------------------------------------------------


def test_errors() -> None:
    operator = Counted(index(20) ** -1.0)
    with pytest.raises(ValueError, match="at least 4"):
        moments(operator, num_matvecs=3)
    with pytest.raises(ValueError, match="return_eigenvectors"):
        moments(operator, spectrum=top_eigenvalues(operator, k=3))
    with pytest.raises(ValueError, match="spectrum of this operator"):
        moments(Counted(index(21)), spectrum=deflating(operator))
    with pytest.raises(ValueError, match="level"):
        Estimate(1.0, 0.1, 3, 3).interval(1.0)
    broken = MatvecOperator(lambda v: v / 0, 20)
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        moments(broken, num_matvecs=6)
    huge = MatvecOperator(lambda v: v * 1e200, 20)
    with pytest.raises(ArithmeticError, match="square of its norm overflows"):
        moments(huge, num_matvecs=6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_matvecs": 12.0}, TypeError, r"num_matvecs must be an integer, got 12\.0"),
        ({"num_matvecs": True}, TypeError, "num_matvecs must be an integer, got True"),
        ({"num_matvecs": math.nan}, TypeError, "num_matvecs must be an integer, got nan"),
        ({"num_matvecs": -1}, ValueError, "num_matvecs must be at least 4 for a standard error, got -1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 18446744073709551616"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moments(Counted(index(20) ** -1.0), **options)
