"""The truncated power law's normaliser and maximum against adaptive quadrature."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from hessian_callback.power_law.truncated_power_law import _moments, _profile, fit_truncated_power_laws, scaled_excess


@pytest.mark.parametrize("exponent", [-30.0, -1.0, -0.3, 0.0, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("rate", [1e-9, 1e-3, 1.0, 30.0])
def test_moments_are_those_of_adaptive_quadrature(exponent: float, rate: float) -> None:
    # With m = 1, u is y, and the tilt is the exponent plus the rate.
    one = np.ones(1)
    log_z, mean, variance, above = (v[0] for v in _moments(np.array([exponent + rate]), np.array([rate]), one))
    mean_excess = above + mean
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
        log_z = _moments(np.array([float(exponent) + rate]), np.array([rate]), np.ones(1))[0][0]
        assert log_z == pytest.approx(math.log(special.expn(exponent + 1, rate)) + rate, rel=1e-9, abs=1e-9)


def test_profile_solves_for_the_mean() -> None:
    mean = np.array([1e-12, 1e-4, 0.05, 0.5, 1.0, 3.0])
    rate = np.full(6, 0.2)
    profile = _profile(np.log(rate), np.ones(6), mean)
    _, reached, _, _ = _moments(profile.tilt, rate, mean)
    np.testing.assert_allclose(reached, 1.0, rtol=1e-8)


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
    _, mean, _, mean_excess = _moments(fits.tilt, fits.scaled_rate, fits.mean)
    np.testing.assert_allclose(mean, 1.0, rtol=1e-8)
    m = y.mean(axis=1)
    np.testing.assert_allclose(mean_excess, (np.expm1(y).mean(axis=1) - m) / m**2, rtol=1e-6)


@pytest.mark.parametrize("mean", [1e-15, 1e-9, 0.9e-3, 1.1e-3, 0.5])
def test_excess_keeps_its_digits(mean: float) -> None:
    u = np.array([0.0, 1e-3, 1.0, 99.0, 200.0])
    # exp(x) - 1 - x = x^2 / 2 1F1(1; 3; x), without cancellation.
    expected = 0.5 * u**2 * special.hyp1f1(1.0, 3.0, mean * u)
    # The rounding of the direct formula is eps / m in units of u.
    np.testing.assert_allclose(scaled_excess(u, np.array([mean])), expected, rtol=1e-13, atol=1e-12 * u.max())


@pytest.mark.parametrize("num_equal", [2, 30, 999])
@pytest.mark.parametrize("mean", [1e-15, 1e-10, 1e-6])
def test_narrow_spectra_have_the_limit_of_a_truncated_normal_law(mean: float, num_equal: int) -> None:
    y = np.concatenate([np.ones(num_equal), [0.0]])
    y *= mean / y.mean()
    fits = fit_truncated_power_laws(y[None])
    assert 0 < fits.scaled_rate[0] < math.inf
    u = y / mean
    scale = fits.scaled_rate[0] ** -0.5
    location = -fits.tilt[0] * scale**2
    normal = stats.truncnorm(-location / scale, np.inf, loc=location, scale=scale).logpdf(u) - math.log(mean)
    np.testing.assert_allclose(fits.log_density(y[None])[0], normal, rtol=1e-5, atol=1e-5 * num_equal)

    def loss(parameters: np.ndarray) -> float:
        mu, sigma = parameters[0], math.exp(parameters[1])
        return -stats.truncnorm(-mu / sigma, np.inf, loc=mu, scale=sigma).logpdf(u).mean()

    found = optimize.minimize(loss, [location, math.log(scale)], method="Nelder-Mead")
    # The power law has a mean log-likelihood of -1 in u.
    assert fits.log_likelihood_gain[0] == pytest.approx(1.0 - found.fun, rel=1e-4)
