"""The null of the Kolmogorov-Smirnov distance against sorted draws through the fit itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hessian_callback.power_law.critical_values import critical_distance
from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.goodness_of_fit import _null_distances, ks_p_value, simulate_ks_distances


@pytest.mark.parametrize("num", [3, 10, 60])
def test_simulated_distances_have_the_law_of_fitted_ones(num: int) -> None:
    rng = np.random.default_rng(5)
    fitted = [fit_power_law(np.exp(2.5 * rng.standard_exponential(num))).fit_error for _ in range(1500)]
    simulated = simulate_ks_distances(num, 20_000)
    # Floors and rounding would make ties of the smallest distance at K = 3, so they are compared rounded.
    assert stats.ks_2samp(np.round(fitted, 9), np.round(simulated, 9)).pvalue > 0.001


@pytest.mark.parametrize(("num", "critical"), [(50, 0.151), (1000, 0.0344)])
def test_critical_values_are_reproduced(num: int, critical: float) -> None:
    distances = simulate_ks_distances(num, 20_000, seed=3)
    quantile = np.quantile(distances, 0.95)
    # Three standard errors of a 95 % quantile of 20,000 draws are 1 % of it.
    assert quantile == pytest.approx(critical, rel=0.012)
    assert quantile == pytest.approx(critical_distance(num), rel=0.012)
    # What the paper's value rejects at a nominal 5 %.
    assert np.mean(distances >= 1.36 / math.sqrt(num)) == pytest.approx(0.005, abs=0.002)


def test_p_value_is_the_share_of_draws_as_large() -> None:
    fit = fit_power_law(np.exp(np.random.default_rng(1).standard_exponential(40)))
    distances = simulate_ks_distances(40, 500, seed=9)
    expected = (1 + np.sum(distances >= fit.fit_error)) / 501
    assert ks_p_value(fit, draws=500, seed=9) == expected
    assert ks_p_value(fit, draws=500, seed=9) == expected
    assert 0 < ks_p_value(fit, draws=500, seed=10) != expected


def test_p_values_are_uniform_under_the_law() -> None:
    rng = np.random.default_rng(2)
    p_values = [ks_p_value(fit_power_law(np.exp(rng.standard_exponential(50)))) for _ in range(800)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulate_ks_distances(30, 100)
    monkeypatch.setattr("hessian_callback.power_law.goodness_of_fit._CHUNK", 7 * 30)
    np.testing.assert_array_equal(simulate_ks_distances(30, 100), whole)


def test_null_is_simulated_once_and_cannot_be_changed() -> None:
    fit = fit_power_law(np.arange(1.0, 78) ** -1.0)
    before = _null_distances.cache_info().misses
    for scale in (1.0, 2.0, 3.0):
        ks_p_value(fit_power_law(scale * np.arange(1.0, 78) ** -scale), seed=123)
    assert _null_distances.cache_info().misses == before + 1
    null = _null_distances(fit.num_eigenvalues, 1000, 123)
    with pytest.raises(ValueError, match="read-only"):
        null[0] = 0.0


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="better 1000"):
        ks_p_value(fit_power_law([3.0, 2.0, 1.0]), draws=0)
    with pytest.raises(ValueError, match="at least 3"):
        simulate_ks_distances(2, 10)
