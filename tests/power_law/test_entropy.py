"""Entropy terms against quadrature, the deficit against known divergences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from hessian_callback.power_law.entropy import entropy_deficit, maximum_entropy_terms
from hessian_callback.power_law.fit import fit_power_law

VALUES = 0.3 * np.exp(0.4 * np.random.default_rng(0).standard_exponential(60))


def test_terms_are_the_integrals_over_the_fitted_density() -> None:
    fit = fit_power_law(VALUES)
    terms = maximum_entropy_terms(VALUES)
    law = stats.pareto(1 / fit.slope, scale=fit.cutoff)
    assert terms.entropy == pytest.approx(law.entropy(), rel=1e-10)
    assert terms.mean_log_eigenvalue == pytest.approx(law.expect(np.log, lb=fit.cutoff), rel=1e-6)
    # The multiplier is the sample's mean, which is what makes the fit a maximum-entropy solution.
    assert terms.mean_log_eigenvalue == pytest.approx(np.log(VALUES).mean(), rel=1e-12)
    normaliser, _ = integrate.quad(lambda x: x**-fit.density_exponent, fit.cutoff, np.inf)
    assert terms.normalisation_multiplier == pytest.approx(math.log(normaliser), rel=1e-8)
    assert terms.volume_multiplier == fit.density_exponent


def test_multipliers_add_up_to_the_entropy() -> None:
    terms = maximum_entropy_terms(VALUES, num_eigenvalues=30, drop_first=2)
    total = terms.volume_multiplier * terms.mean_log_eigenvalue + terms.normalisation_multiplier
    assert terms.entropy == pytest.approx(total, rel=1e-12)


def test_no_density_of_the_same_volume_has_more_entropy() -> None:
    fit = fit_power_law(VALUES)
    terms = maximum_entropy_terms(VALUES)
    # Gamma laws of ln(lambda / cutoff) with the same mean, the exponential being shape 1.
    for shape in (0.5, 0.9, 1.1, 3.0):
        other = stats.gamma(shape, scale=fit.slope / shape)
        assert other.entropy() + terms.mean_log_eigenvalue < terms.entropy


def test_deficit_estimates_the_divergence() -> None:
    shape, num = 3.0, 4000
    other = stats.gamma(shape, scale=1 / shape)
    y = other.ppf((np.arange(num) + 0.5) / num)
    # From the exponential law with the mean above the smallest value, which is the cutoff.
    divergence = math.log((y - y[0]).mean()) + 1.0 - other.entropy()
    result = entropy_deficit(np.exp(y), draws=50)
    assert result.deficit == pytest.approx(divergence, abs=0.02)
    assert result.p_value == 1 / 51


def test_deficit_has_neither_unit_nor_slope() -> None:
    one = entropy_deficit(VALUES)
    other = entropy_deficit(1e5 * VALUES**3)
    assert other.deficit == pytest.approx(one.deficit, abs=1e-10)
    assert other.p_value == one.p_value
    assert other.expected_deficit == one.expected_deficit


def test_p_values_are_uniform_under_the_law() -> None:
    rng = np.random.default_rng(1)
    p_values = [entropy_deficit(np.exp(rng.standard_exponential(50))).p_value for _ in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_expected_deficit_is_the_bias_under_the_law() -> None:
    rng = np.random.default_rng(2)
    deficits = [entropy_deficit(np.exp(rng.standard_exponential(40))).deficit for _ in range(300)]
    expected = entropy_deficit(np.exp(rng.standard_exponential(40))).expected_deficit
    assert np.mean(deficits) == pytest.approx(expected, abs=4 * np.std(deficits) / math.sqrt(300))


@pytest.mark.parametrize("num", [5, 6, 7, 12, 13])
def test_smallest_spectra_have_a_deficit(num: int) -> None:
    assert math.isfinite(entropy_deficit(2.0 ** -np.arange(num), draws=20).deficit)


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="needs 5; compute more eigenvalues"):
        entropy_deficit([4.0, 3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="in a higher precision"):
        entropy_deficit([8.0] + [2.0] * 20 + [1.0])
    with pytest.raises(ValueError, match="better 1000"):
        entropy_deficit(VALUES, draws=0)
