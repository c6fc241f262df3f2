"""Gap exponents where theory gives them exactly."""

from __future__ import annotations

import numpy as np
import pytest

from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.fit import fit_power_law


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_exact_law_has_gaps_with_exponent_s_plus_one(slope: float) -> None:
    values = np.arange(1.0, 2001) ** -slope
    fit = fit_eigengaps(values)
    assert fit.eigenvalues == fit_power_law(values)
    assert fit.predicted_exponent == fit.eigenvalues.slope + 1
    # delta_k = s k^-(s + 1) (1 - (s + 1) / 2k + ...): off by some (s + 1) / K in the fits.
    for exponent in (fit.exponent, fit.exponent_by_rank, fit.gaps.slope):
        assert exponent == pytest.approx(slope + 1, rel=0.02)
    assert fit.gaps.num_eigenvalues == 1999


def test_gaps_are_sorted_by_size_or_left_in_place() -> None:
    gaps = np.array([1.0, 8.0, 2.0, 4.0])
    values = np.concatenate([[0.0], np.cumsum(gaps[::-1])])[::-1] + 1.0
    fit = fit_eigengaps(values)
    log_rank = np.log(np.arange(1, 5))
    assert fit.exponent == pytest.approx(-np.polyfit(log_rank, np.log(np.sort(gaps)[::-1]), 1)[0], rel=1e-10)
    assert fit.exponent_by_rank == pytest.approx(-np.polyfit(log_rank, np.log(gaps), 1)[0], rel=1e-10)
    assert fit.gaps == fit_power_law(gaps)


def test_scattered_eigenvalues_leave_only_the_least_squares_exponents_usable() -> None:
    # Sample covariance of a power law: what a Hessian spectrum is like.
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((1500, 150)) * np.sqrt(1.0 / np.arange(1, 151))
    values = np.linalg.eigvalsh(factors.T @ factors / 1500)[::-1][:100]
    fit = fit_eigengaps(values)
    assert fit.exponent == pytest.approx(fit.predicted_exponent, abs=0.3)
    assert fit.gaps.slope > fit.predicted_exponent + 0.5


def test_options_choose_the_same_eigenvalues_for_both_fits() -> None:
    values = np.concatenate([[1e3], np.arange(1.0, 101) ** -1.0, [-1.0]])
    fit = fit_eigengaps(values, num_eigenvalues=50, drop_first=1)
    assert fit.eigenvalues == fit_power_law(values, num_eigenvalues=50, drop_first=1)
    assert fit.gaps.slope == fit_power_law(-np.diff(np.arange(1.0, 51) ** -1.0)).slope


def test_equal_eigenvalues_have_gaps_that_are_counted_out() -> None:
    fit = fit_eigengaps([16.0, 8.0, 8.0, 4.0, 2.0, 1.0])
    assert fit.num_zero_gaps == 1
    expected = np.polyfit(np.log([1, 3, 4, 5]), np.log([8.0, 4.0, 2.0, 1.0]), 1)[0]
    assert fit.exponent_by_rank == pytest.approx(-expected, rel=1e-10)


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]])
def test_errors_name_the_remedy(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"compute more eigenvalues, or in a higher precision"):
        fit_eigengaps(values)
