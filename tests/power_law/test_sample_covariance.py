"""The simulated null against sample covariances drawn sample by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.sample_covariance import (
    _tail,
    effective_num_samples,
    fit_population,
    jackknife,
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
    # The null law has one table, whose error counts as well.
    slope, size, draws = 0.9, {"num_samples": 40, "num_parameters": 30}, 200
    error = math.sqrt(0.1 * 0.9 * 2 / draws)
    found = [fit_population(direct(slope, 8, 40, 30, rng), **size, draws=draws) for _ in range(draws)]
    covered = [low < slope < high for low, high in (one.slope_interval(0.9) for one in found)]
    assert np.mean(covered) == pytest.approx(0.9, abs=3.5 * error)
    rejected = [one.p_value <= 0.1 for one in found]
    assert np.mean(rejected) == pytest.approx(0.1, abs=3.5 * error)
    # The critical value for independent values rejects none of them.
    assert not any(one.fit.fit_error > one.fit.critical_distance_fitted for one in found)
    assert np.mean([one.critical_distance for one in found]) < 0.8 * found[0].fit.critical_distance_fitted


def test_fit_is_reproducible_and_free_of_the_unit() -> None:
    values = direct(1.0, 6, 30, 20, np.random.default_rng(5))
    options = {"num_samples": 30, "num_parameters": 20, "draws": 20}
    one, other = fit_population(values, **options, seed=3), fit_population(2.0**20 * values, **options, seed=3)
    assert (one.slope, one.p_value, one.slope_stderr) == (other.slope, other.p_value, other.slope_stderr)
    assert one.within_critical_distance == (one.fit.fit_error < one.critical_distance)
    assert one.fit == fit_power_law(values)
    assert fit_population(values, **options, seed=4).slope != one.slope


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
def test_sums_of_the_tail(slope: float) -> None:
    values, count = _tail(slope, 100, 5000)
    ranks = np.arange(101.0, 5001.0)
    for power in (1.0, 2.0):
        assert count @ values**power == pytest.approx((ranks ** (-power * slope)).sum(), rel=1e-4)
    assert _tail(slope, 100, 100)[0].size == 0


def test_interpolated_law_is_that_of_a_simulation_between_the_tabulated_slopes() -> None:
    slope, size = math.exp(0.3), {"num_samples": 60, "num_parameters": 40}
    fits = [fit_power_law(row) for row in simulate_sample_covariances(slope, 8, **size, draws=300)]
    # A spectrum with the mean slope of the simulation has the simulated population as its fit.
    mean = float(np.mean([fit.slope for fit in fits]))
    spectrum = np.exp(mean * 8 / 28 * np.arange(7.0, -1.0, -1.0))
    assert fit_power_law(spectrum).slope == pytest.approx(mean)
    found = fit_population(spectrum, **size, draws=300)
    assert found.slope == pytest.approx(slope, rel=1e-3)
    assert found.critical_distance == pytest.approx(np.quantile([fit.fit_error for fit in fits], 0.95), rel=0.01)
    low, high = found.slope_interval(0.8)
    assert found.slope_interval(0.9)[0] < low < found.slope < high < found.slope_interval(0.9)[1]
    # At its ends the slope is a 10 % and a 90 % quantile.
    for end, quantile in ((low, 0.9), (high, 0.1)):
        slopes = [fit_power_law(row).slope for row in simulate_sample_covariances(end, 8, **size, draws=300)]
        assert np.quantile(slopes, quantile) == pytest.approx(mean, rel=2e-3)


def test_terms_of_different_sizes_scatter_as_their_effective_number() -> None:
    sizes = np.array([4.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert effective_num_samples(sizes) == pytest.approx(64 / 20)
    assert effective_num_samples(1e200 * sizes) == pytest.approx(64 / 20)
    # The variance of a weighted mean of unit normals is that of so many equal ones.
    assert (sizes**2).sum() / sizes.sum() ** 2 == pytest.approx(1 / effective_num_samples(sizes))
    for wrong in ([0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="trace of each term"):
            effective_num_samples(wrong)


@pytest.mark.parametrize("parts", [2, 5])
def test_jackknife_removes_a_bias_in_proportion_to_the_number_of_samples(parts: int) -> None:
    fraction = 0.5 if parts == 2 else 1 - 1 / parts
    truth, bias = np.array([3.0, 2.0, 1.0]), np.array([0.5, -0.2, 0.1])
    noise = np.random.default_rng(6).standard_normal((parts, 3))
    noise -= noise.mean(axis=0)
    found = jackknife(truth + bias, truth + bias / fraction + noise, fraction=fraction)
    assert found == pytest.approx(truth)
    assert jackknife(1.3, [1.5, 1.7]) == pytest.approx(1.0)


def test_jackknife_removes_the_ridge_of_many_small_population_eigenvalues() -> None:
    size = {"num_parameters": 4000, "draws": 40}
    whole = simulate_sample_covariances(1.0, 10, num_samples=400, **size).mean(axis=0)
    half = simulate_sample_covariances(1.0, 10, num_samples=200, **size).mean(axis=0)
    truth = fit_power_law(np.arange(1.0, 11.0) ** -1.0).slope
    before, after = (abs(fit_power_law(values).slope / truth - 1) for values in (whole, jackknife(whole, [half])))
    assert before > 0.05
    assert after < 0.25 * before


@pytest.mark.parametrize(
    ("whole", "parts", "fraction", "remedy"),
    [
        (1.0, [1.0, 1.0], 1.0, "such as 0.5 for halves"),
        ([2.0, 1.0], [2.0, 1.0], 0.5, "one entry, of the shape of whole"),
        (1.0, [], 0.5, "one entry, of the shape of whole"),
        (1.0, [1.0, math.nan], 0.5, "leave out parts without a result"),
    ],
)
def test_wrong_parts_are_refused(whole: object, parts: object, fraction: float, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        jackknife(whole, parts, fraction=fraction)  # type: ignore[arg-type]


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
