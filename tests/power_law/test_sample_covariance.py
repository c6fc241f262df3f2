"""The simulated null against sample covariances drawn sample by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.sample_covariance import (
    _power_sum,
    fit_population,
    simulate_sample_covariances,
)


def direct(slope: float, num: int, num_samples: int, num_parameters: int, rng: np.random.Generator) -> np.ndarray:
    """The largest eigenvalues of one sample covariance, by its definition."""
    scale = np.arange(1.0, num_parameters + 1) ** (-0.5 * slope)
    samples = rng.standard_normal((num_samples, num_parameters)) * scale
    return np.linalg.svd(samples, compute_uv=False)[:num] ** 2 / num_samples


@pytest.mark.parametrize(("num_samples", "num_parameters"), [(20, 60), (200, 60)], ids=["N < P", "N > P"])
def test_simulation_has_the_law_of_samples(num_samples: int, num_parameters: int) -> None:
    spectra = simulate_sample_covariances(
        0.8, 8, num_samples=num_samples, num_parameters=num_parameters, draws=600, seed=1
    )
    rng = np.random.default_rng(2)
    drawn = np.array([direct(0.8, 8, num_samples, num_parameters, rng) for _ in range(600)])
    for column in range(8):
        assert stats.ks_2samp(spectra[:, column], drawn[:, column]).pvalue > 1e-4
    fits, others = ([fit_power_law(row) for row in rows] for rows in (spectra, drawn))
    for name in ("slope", "fit_error"):
        values, expected = ([getattr(fit, name) for fit in many] for many in (fits, others))
        assert stats.ks_2samp(values, expected).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("num_samples", "slope"), [(50, 0.5), (50, 1.0), (150, 0.7)])
def test_tail_of_many_parameters_is_approximated(num_samples: int, slope: float) -> None:
    spectra = simulate_sample_covariances(slope, 10, num_samples=num_samples, num_parameters=800, draws=200)
    rng = np.random.default_rng(3)
    drawn = np.array([direct(slope, 10, num_samples, 800, rng) for _ in range(200)])
    slopes, expected = ([fit_power_law(row).slope for row in rows] for rows in (spectra, drawn))
    # Three standard errors of the difference, and 2 % for the approximation.
    error = 3 * math.sqrt((np.var(slopes) + np.var(expected)) / 200)
    assert np.mean(slopes) == pytest.approx(np.mean(expected), abs=error + 0.02 * np.mean(expected))
    # Without the tail, the slope is far off.
    alone = simulate_sample_covariances(slope, 10, num_samples=num_samples, num_parameters=100, draws=50)
    assert np.mean([fit_power_law(row).slope for row in alone]) > np.mean(expected) + 2 * error


@pytest.mark.slow
def test_interval_and_p_value_have_their_level_on_unseen_spectra() -> None:
    rng = np.random.default_rng(4)
    slope, size, draws = 0.9, {"num_samples": 40, "num_parameters": 30}, 60
    found = [fit_population(direct(slope, 8, 40, 30, rng), **size, draws=99, seed=i) for i in range(draws)]
    covered = [low < slope < high for low, high in (one.slope_interval(0.9) for one in found)]
    assert np.mean(covered) == pytest.approx(0.9, abs=3.5 * math.sqrt(0.9 * 0.1 / draws))
    rejected = [one.p_value <= 0.1 for one in found]
    assert np.mean(rejected) == pytest.approx(0.1, abs=3.5 * math.sqrt(0.9 * 0.1 / draws))
    # The critical value for independent values rejects none of them.
    assert not any(one.fit.fit_error > one.fit.critical_distance_fitted for one in found)
    assert np.mean([one.critical_distance for one in found]) < 0.8 * found[0].fit.critical_distance_fitted


def test_fit_is_reproducible_and_free_of_the_unit() -> None:
    values = direct(1.0, 6, 30, 20, np.random.default_rng(5))
    options = {"num_samples": 30, "num_parameters": 20, "draws": 20}
    one, other = fit_population(values, **options, seed=3), fit_population(2.0**20 * values, **options, seed=3)
    assert (one.slope, one.p_value, one.slope_stderr) == (other.slope, other.p_value, other.slope_stderr)
    assert one.fit == fit_power_law(values)
    assert fit_population(values, **options, seed=4).slope != one.slope


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
def test_sum_of_the_tail(slope: float) -> None:
    exact = (np.arange(101.0, 5001.0) ** -slope).sum()
    assert _power_sum(slope, 100, 5000) == pytest.approx(exact, rel=1e-4)
    assert _power_sum(slope, 100, 100) == 0.0


@pytest.mark.parametrize(
    ("values", "options", "error", "remedy"),
    [
        ([3.0, 2.0, 1.0], {"num_samples": 2, "num_parameters": 10}, ValueError, "num_samples is 2; give at least K"),
        ([3.0, 2.0, 1.0], {"num_samples": 9, "num_parameters": 2.5}, TypeError, "num_parameters is 2.5"),
        ([3.0, 2.0, 1.0], {"num_samples": 9, "num_parameters": 9, "draws": 0}, ValueError, "better 1000"),
        ([1.01, 1.0, 1.0], {"num_samples": 5, "num_parameters": 50}, ValueError, "check num_samples"),
        ([1e300, 1.0, 1e-300], {"num_samples": 50, "num_parameters": 50}, ValueError, "fit fewer eigenvalues"),
    ],
)
def test_errors_name_the_remedy(
    values: list[float], options: dict[str, int], error: type[Exception], remedy: str
) -> None:
    with pytest.raises(error, match=remedy):
        fit_population(values, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give a positive number"):
        simulate_sample_covariances(0.0, 3, num_samples=5, num_parameters=5, draws=1)
