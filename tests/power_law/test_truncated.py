"""The truncated power law's normaliser and maximum against adaptive quadrature."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, special

from hessian_callback.power_law.truncated import _moments, _profile, fit_truncated_power_laws


@pytest.mark.parametrize("exponent", [-30.0, -1.0, -0.3, 0.0, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("rate", [1e-9, 1e-3, 1.0, 30.0])
def test_moments_are_those_of_adaptive_quadrature(exponent: float, rate: float) -> None:
    log_z, mean, variance, mean_excess = (v[0] for v in _moments(np.array([exponent]), np.array([rate])))
    peak = math.log(max(-exponent / rate, 1.0))
    top = -exponent * peak - rate * math.expm1(peak)

    def moment(function: object) -> float:
        def integrand(y: float) -> float:
            return function(y) * math.exp(-exponent * y - rate * math.expm1(y) - top)  # type: ignore[operator]

        edge = peak + 1.0
        while -exponent * edge - rate * math.expm1(edge) - top > -50:
            edge += 0.5
        points = sorted({0.0, max(peak - 1.0, 0.0), peak, peak + 1.0, edge})
        return sum(
            integrate.quad(integrand, a, b, epsabs=0, epsrel=1e-11, limit=400)[0] for a, b in itertools.pairwise(points)
        )

    total = moment(lambda y: 1.0)
    assert log_z == pytest.approx(math.log(total) + top, rel=1e-8, abs=1e-8)
    assert mean == pytest.approx(moment(lambda y: y) / total, rel=1e-7)
    assert variance == pytest.approx(moment(lambda y: (y - mean) ** 2) / total, rel=1e-6)
    assert mean_excess == pytest.approx(moment(math.expm1) / total, rel=1e-6)


@pytest.mark.parametrize("rate", [0.1, 2.0])
def test_normaliser_is_the_exponential_integral_at_whole_orders(rate: float) -> None:
    # exponent a: integral of x^-(a+1) exp(-rate (x - 1)) over x >= 1 is E_(a+1)(rate) e^rate.
    for exponent in (0, 1, 4):
        log_z = _moments(np.array([float(exponent)]), np.array([rate]))[0][0]
        assert log_z == pytest.approx(math.log(special.expn(exponent + 1, rate)) + rate, rel=1e-9, abs=1e-9)


def test_profile_solves_for_the_mean() -> None:
    mean = np.array([0.05, 0.5, 1.0, 3.0])
    profile = _profile(np.log(np.full(4, 0.2)), 1.0 / mean, mean)
    _, reached, _, _ = _moments(profile.exponent, np.full(4, 0.2))
    np.testing.assert_allclose(reached, mean, rtol=1e-8)


def test_rows_are_fitted_independently() -> None:
    y = np.random.default_rng(0).standard_exponential((5, 40)) * np.array([[0.2], [0.5], [1.0], [2.0], [4.0]])
    together = fit_truncated_power_laws(y)
    for row in range(5):
        alone = fit_truncated_power_laws(y[row : row + 1])
        assert together.log_likelihood_gain[row] == pytest.approx(alone.log_likelihood_gain[0], abs=1e-10)
        assert together.rate[row] == pytest.approx(alone.rate[0], rel=1e-5)


def test_at_the_maximum_both_moments_match() -> None:
    y = np.log1p(np.random.default_rng(1).standard_exponential((3, 200)))
    fits = fit_truncated_power_laws(y)
    assert (fits.rate > 0).all()
    _, mean, _, mean_excess = _moments(fits.exponent, fits.rate)
    np.testing.assert_allclose(mean, y.mean(axis=1), rtol=1e-8)
    np.testing.assert_allclose(mean_excess, np.expm1(y).mean(axis=1), rtol=1e-6)
