"""Spectral density against closed forms and dense truth, the coverage of its intervals, and any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessian_callback import HessianOperator
from hessian_callback.algorithms.density import SpectralDensity, spectral_density
from hessian_callback.algorithms.lanczos_tridiagonal import lanczos_tridiagonal
from tests.helpers.cases import CASES
from tests.helpers.estimates import SPECTRA, Counted, coverage, index
from tests.helpers.ranks import run_ranks


@pytest.mark.slow
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
            assert coverage([estimate.interval(0.9) for estimate in estimates], truth) > 0.75


@pytest.mark.slow
def test_negative_mass() -> None:
    eigenvalues = torch.cat([torch.linspace(0.5, 1.5, 150), torch.linspace(-1.2, -0.4, 50)]).double()
    truth = float(eigenvalues.clamp(max=0).abs().sum() / eigenvalues.abs().sum())
    operator = Counted(eigenvalues)
    masses = [spectral_density(operator, num_vectors=6, num_steps=20, seed=seed).negative_mass for seed in range(40)]
    assert coverage([mass.interval(0.9) for mass in masses], truth) > 0.75
    spread = np.std([mass.value for mass in masses])
    assert 0.7 < math.sqrt(np.mean([mass.stderr**2 for mass in masses])) / spread < 1.4


def test_smoothed_density_is_the_smoothed_spectrum() -> None:
    eigenvalues = SPECTRA["spikes and a semicircle"]()
    density = spectral_density(Counted(eigenvalues), num_vectors=60, num_steps=40)
    points, width = torch.linspace(-4, 11, 301, dtype=torch.float64), 0.5
    smooth = density.smoothed(points, width)
    scaled = (points[:, None] - eigenvalues) / width
    truth = (torch.exp(-0.5 * scaled**2) / (width * math.sqrt(2 * math.pi))).mean(1)
    assert float(torch.trapezoid(smooth, points)) == pytest.approx(1.0, abs=1e-6)
    assert float(torch.trapezoid((smooth - truth).abs(), points)) < 0.05


def test_runs_that_end_early_are_padded_with_weight_zero() -> None:
    # The eigenspace of 1 has two dimensions, so the run ends after three steps.
    density = spectral_density(Counted(torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64)), num_steps=40)
    assert density.nodes.shape == (4, 3)
    assert density.num_matvecs == 12
    torch.testing.assert_close(density.weights.sum(1), torch.ones(4, dtype=torch.float64))


# -- share below a threshold -----------------------------------------------------------------------

RNG = np.random.default_rng(0)
# Spectra of networks: most eigenvalues lie next to zero, where a single node decides on which side they are counted.
CROWDED: dict[str, Tensor] = {
    "bulk around zero": torch.cat(
        [index(20) ** -1.0, torch.from_numpy(RNG.normal(0, 1e-4, 360)), -0.05 * index(20) ** -1.0]
    ),
    "many zeros": torch.cat([index(80) ** -1.0, torch.zeros(240).double(), -0.3 * index(80) ** -0.7]),
    "semicircle": torch.from_numpy(RNG.beta(1.5, 1.5, 400) * 2 - 1),
    "few negative": torch.cat([index(390) ** -1.0, -1e-3 * index(10) ** -1.0]),
    "positive": index(400) ** -1.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CROWDED)
def test_intervals_of_a_share_cover_it(name: str, dtype: torch.dtype) -> None:
    eigenvalues = CROWDED[name]
    draws = [spectral_density(Counted(eigenvalues, dtype), num_steps=16, seed=seed) for seed in range(30)]
    for threshold in (-2e-3, 0.0, 0.02):
        truth = float((eigenvalues < threshold).double().mean())
        intervals = [density.share_below(threshold, 0.9) for density in draws]
        # 22 of 30 or fewer has probability 0.01 at a coverage of 0.9.
        assert coverage(intervals, truth) > 22 / 30
        assert all(0 <= low <= high <= 1 for low, high in intervals)


def test_the_interval_of_a_share_narrows_at_a_gap() -> None:
    eigenvalues = torch.cat([torch.full((150,), 1.0), torch.linspace(-1.2, -0.4, 50)]).double()
    wide, narrow = (
        spectral_density(Counted(eigenvalues), num_vectors=40, num_steps=steps).share_below(0.3) for steps in (4, 16)
    )
    assert wide[1] - wide[0] > 0.3
    assert narrow[0] > 0.1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(-1.1, 1.1))
def test_the_share_of_one_vector_s_measure_is_bounded_without_sampling(seed: int, steps: int, threshold: float) -> None:
    """The Chebyshev-Markov-Stieltjes inequality holds for each vector, not on average only."""
    rng = np.random.default_rng(seed)
    eigenvalues = torch.from_numpy(np.round(rng.uniform(-1, 1, 24), 2))
    start = torch.from_numpy(rng.standard_normal(24))
    run = lanczos_tridiagonal(Counted(eigenvalues), start, steps)
    rule = [torch.stack([row, row]) for row in (run.ritz_values, run.weights)]
    low, high = SpectralDensity(*rule, 24, run.rounding, run.num_matvecs).share_below(threshold)
    masses = start.square() / start.square().sum()
    distance = 4 * run.rounding  # eigenvalues at the threshold count on either side
    assert low <= float(masses[eigenvalues < threshold + distance].sum()) + 1e-9
    assert high >= float(masses[eigenvalues < threshold - distance].sum()) - 1e-9


# -- ranks -----------------------------------------------------------------------------------------


def density_on(rank: int) -> SpectralDensity:
    case, size = CASES["mlp"](), dist.get_world_size()
    operator = HessianOperator(
        case.model,
        case.loss_fn,
        case.batches[rank::size],
        weights=case.weights[rank::size],
        process_group=dist.group.WORLD,
    )
    return spectral_density(operator, num_vectors=2, num_steps=10)


def test_the_number_of_ranks_does_not_matter() -> None:
    (alone,) = (outcome.value for outcome in run_ranks(density_on, 1))
    for outcome in run_ranks(density_on, 2):
        torch.testing.assert_close(outcome.value.nodes, alone.nodes, atol=1e-9, rtol=0)
        torch.testing.assert_close(outcome.value.weights, alone.weights, atol=1e-8, rtol=0)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_vectors": 1}, ValueError, "num_vectors must be at least 2 for a standard error, got 1"),
        ({"num_vectors": 2.5}, TypeError, r"num_vectors must be an integer, got 2\.5"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": "9"}, TypeError, "num_steps must be an integer, got '9'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spectral_density(Counted(index(20) ** -1.0), **options)


def test_undefined_quantities_are_refused() -> None:
    density = SpectralDensity(torch.zeros(2, 1).double(), torch.ones(2, 1).double(), 5, 0.0, 2)
    for width in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="width must be positive and finite"):
            density.smoothed(torch.zeros(1), width)
    with pytest.raises(ValueError, match="threshold must be a number"):
        density.share_below(math.nan)
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        density.share_below(0.0, 1.0)
    with pytest.raises(ZeroDivisionError):
        _ = density.negative_mass
