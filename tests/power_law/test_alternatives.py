"""Each law against an independent density, its optimum, `powerlaw`, and draws from itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from hessian_callback.power_law.alternatives import (
    ALTERNATIVES,
    Alternative,
    boundary_p,
    compare_alternatives,
    likelihood_ratio_test,
)
from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.truncated_power_law import fit_truncated_power_laws


def log_density(name: Alternative, x: np.ndarray, *parameters: float) -> np.ndarray:
    """Log densities on x >= 1, from scipy's distributions or by quadrature."""
    if name == "exponential":
        return stats.expon(loc=1.0, scale=1.0 / parameters[0]).logpdf(x)
    if name == "lognormal":
        mu, sigma = parameters
        return stats.truncnorm(-mu / sigma, np.inf, loc=mu, scale=sigma).logpdf(np.log(x)) - np.log(x)
    if name == "stretched_exponential":
        b, rate = parameters
        return stats.gompertz(rate, scale=1.0 / b).logpdf(np.log(x)) - np.log(x)
    beta, rate = parameters
    normaliser, _ = integrate.quad(
        lambda y: math.exp((1 - beta) * y - rate * math.expm1(y)),
        0.0,
        math.log1p(745 / rate),
        epsabs=0,
        limit=200,
    )
    return -beta * np.log(x) - rate * (x - 1) - math.log(normaliser)


def draw(name: str, num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    laws: dict[str, Callable[[], np.ndarray]] = {
        "power_law": lambda: np.exp(rng.standard_exponential(num)),
        "exponential": lambda: 1.0 + 0.7 * rng.standard_exponential(num),
        "lognormal": lambda: np.exp(np.abs(rng.standard_normal(num))),
        "stretched_exponential": lambda: (1.0 + 2.0 * rng.standard_exponential(num)) ** 1.5,
        "truncated_power_law": lambda: _truncated(rng, num),
    }
    return laws[name]()


def _truncated(rng: np.random.Generator, num: int) -> np.ndarray:
    # Rejection: Pareto with density exponent 1.8, cut off at rate 0.2.
    x = np.exp(rng.standard_exponential(20 * num) / 0.8)
    return x[rng.random(x.size) < np.exp(-0.2 * (x - 1))][:num]


@pytest.mark.parametrize("source", ["exponential", "lognormal", "stretched_exponential", "truncated_power_law"])
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_ratio_is_that_of_the_most_likely_member(name: Alternative, source: str) -> None:
    x = draw(source, 300, seed=1)
    x = 5.0 * x / x.min()
    test = likelihood_ratio_test(x, name)
    assert test.limit_case is None
    x = x / x.min()
    slope = np.log(x).mean()
    power_law = stats.pareto(1 / slope).logpdf(x)
    parameters = np.array(list(test.parameters.values()))
    best = log_density(name, x, *parameters)
    assert test.log_likelihood_ratio == pytest.approx((power_law - best).sum(), rel=1e-7, abs=1e-7)

    def worse(scaled: np.ndarray) -> float:
        values = parameters * scaled
        return -log_density(name, x, *values).sum()

    # A local optimiser that starts there gains nothing, and every step away loses.
    found = optimize.minimize(worse, np.ones_like(parameters), method="Nelder-Mead", options={"maxiter": 60})
    assert found.fun >= -best.sum() - 1e-6 * abs(best.sum())
    for index in range(len(parameters)):
        for factor in (0.97, 1.03):
            scaled = np.ones_like(parameters)
            scaled[index] = factor
            assert worse(scaled) > -best.sum()


@pytest.mark.parametrize("name", ["lognormal", "exponential", "stretched_exponential"])
def test_vuong_is_that_of_the_powerlaw_package(name: Alternative) -> None:
    powerlaw = pytest.importorskip("powerlaw")
    x = draw("exponential", 200, seed=3)
    ratio, p = powerlaw.Fit(x, xmin=x.min(), verbose=0).distribution_compare("power_law", name, normalized_ratio=True)
    test = likelihood_ratio_test(x, name)
    assert test.test == "vuong"
    # Their optimiser stops at about three digits for the two-parameter laws.
    assert test.statistic == pytest.approx(ratio, rel=5e-3)
    assert test.p_value == pytest.approx(p, rel=0.1)
    assert test.p_value == pytest.approx(2 * stats.norm.sf(abs(test.statistic)), rel=1e-9)


@pytest.mark.parametrize("name", ["exponential", "truncated_power_law"])
def test_power_against_the_law_itself(name: Alternative) -> None:
    assert likelihood_ratio_test(draw(name, 300, seed=5), name).verdict(0.01) == name


@pytest.mark.parametrize("name", ["lognormal", "stretched_exponential"])
def test_boundary_test_is_sharper_than_vuong_where_the_power_law_is_a_limit(name: Alternative) -> None:
    test = likelihood_ratio_test(draw(name, 300, seed=5), name)
    assert test.boundary_p_value is not None
    assert test.boundary_p_value < test.p_value < 0.05
    assert test.boundary_p_value == pytest.approx(0.5 * stats.chi2(1).sf(-2 * test.log_likelihood_ratio), rel=1e-9)


def test_power_law_beats_what_does_not_contain_it() -> None:
    tests = compare_alternatives(draw("power_law", 300, seed=2))
    assert tests["exponential"].verdict() == "power_law"
    assert {tests[name].verdict() for name in tests if name != "exponential"} == {"undecided"}


@pytest.mark.parametrize("name", ["lognormal", "stretched_exponential"])
@pytest.mark.parametrize("seed", range(6))
def test_limit_case_is_reported_exactly_where_the_moments_say_so(name: Alternative, seed: int) -> None:
    x = draw("power_law", 60, seed)
    y = np.log(x / x.min())
    test = likelihood_ratio_test(x, name)
    if (y**2).mean() >= 2 * y.mean() ** 2:
        assert test.limit_case == "power law"
        assert (test.log_likelihood_ratio, test.statistic, test.p_value) == (0.0, None, 1.0)
        assert test.boundary_p_value == 1.0
        assert test.parameters == {}
        assert test.verdict() == "undecided"
    else:
        assert test.limit_case is None
        assert test.log_likelihood_ratio < 0


def test_limit_cases_happen_in_the_seeds_above() -> None:
    limits = {likelihood_ratio_test(draw("power_law", 60, seed), "lognormal").limit_case for seed in range(6)}
    assert limits == {None, "power law"}


def test_truncated_power_law_without_a_cutoff_is_reported_as_the_power_law() -> None:
    x = np.arange(1.0, 101) ** -0.3
    x[0] *= 10.0  # An outlier above makes a cutoff less likely than none.
    test = likelihood_ratio_test(x, "truncated_power_law")
    assert (test.limit_case, test.statistic, test.p_value) == ("power law", 0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("slope", [0.3, 3.0])
def test_boundary_null_of_the_truncated_power_law_has_its_size_below_half(slope: float) -> None:
    draws, num = 600, 100
    y = np.random.default_rng(11).standard_exponential((draws, num)) * slope
    gain = fit_truncated_power_laws(y - y.min(axis=1, keepdims=True)).log_likelihood_gain
    rate = np.mean([boundary_p(2 * num * value) < 0.05 for value in gain])
    if slope < 0.5:
        assert rate == pytest.approx(0.05, abs=0.01 + 3 * math.sqrt(0.05 * 0.95 / draws))
    else:
        # The documented 12 %: what the bootstrap is for.
        assert rate == pytest.approx(0.12, abs=3 * math.sqrt(0.12 * 0.88 / draws))


@pytest.mark.parametrize("name", ["lognormal", "stretched_exponential"])
def test_boundary_null_has_its_size(name: Alternative) -> None:
    rng = np.random.default_rng(12)
    draws = 400
    p_values = [
        likelihood_ratio_test(np.exp(rng.standard_exponential(200)), name).boundary_p_value for _ in range(draws)
    ]
    for level in (0.05, 0.2):
        rate = np.mean(np.array(p_values) < level)
        assert rate == pytest.approx(level, abs=0.015 + 3 * math.sqrt(level * (1 - level) / draws))


@pytest.mark.slow
def test_bootstrap_simulates_the_null_of_a_steep_law() -> None:
    num, draws = 30, 400
    x = np.exp(6.0 * np.random.default_rng(4).standard_exponential(num))
    test = likelihood_ratio_test(x, "truncated_power_law", bootstrap_draws=draws)
    assert test == likelihood_ratio_test(x, "truncated_power_law", bootstrap_draws=draws)
    assert test.statistic is not None
    y = 6.0 * np.random.default_rng(0).standard_exponential((2000, num))
    null = 2 * num * fit_truncated_power_laws(y - y.min(axis=1, keepdims=True)).log_likelihood_gain
    expected = np.mean(null >= test.statistic)
    # Four standard errors of both simulations; at slope 1 it would be some .19 lower, asymptotically .27.
    assert test.bootstrap_p_value == pytest.approx(expected, abs=0.11)
    assert test.boundary_p_value is not None
    assert test.boundary_p_value < expected - 0.2


def test_bootstrap_null_of_the_lognormal_agrees_with_its_chi_square() -> None:
    x = draw("power_law", 100, seed=0)
    tests = compare_alternatives(x, ("lognormal", "exponential"), bootstrap_draws=400)
    lognormal = tests["lognormal"]
    assert lognormal.boundary_p_value is not None
    assert lognormal.boundary_p_value < 0.9, "choose a seed that is not a limit case"
    assert lognormal.bootstrap_p_value == pytest.approx(lognormal.boundary_p_value, abs=0.1)
    assert tests["exponential"].bootstrap_p_value is None


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_units_do_not_matter(name: Alternative) -> None:
    x = draw("lognormal", 80, seed=4)
    one, other = likelihood_ratio_test(x, name), likelihood_ratio_test(1e-7 * x, name)
    assert other.log_likelihood_ratio == pytest.approx(one.log_likelihood_ratio, rel=1e-6)
    assert other.p_value == pytest.approx(one.p_value, rel=1e-5)


def test_same_eigenvalues_above_the_same_cutoff_as_the_fit() -> None:
    x = np.concatenate([[1e4, 1e3], draw("lognormal", 100, seed=6), [-1.0, 0.0]])
    options = {"drop_first": 2, "num_eigenvalues": 60}
    test = likelihood_ratio_test(x, "exponential", **options)
    chosen = np.sort(x)[::-1][2:62]
    assert test == likelihood_ratio_test(chosen, "exponential")
    assert test.num_eigenvalues == fit_power_law(x, **options).num_eigenvalues == 60


NEIGHBOUR = math.nextafter(1.0, 2.0)


@pytest.mark.parametrize("name", ALTERNATIVES)
@pytest.mark.parametrize(
    "values",
    [[1.0, 1.0, NEIGHBOUR], [1.0] + [NEIGHBOUR] * 19, [5e-324, 1e-323, 1.5e-323, 1e-322], [1.0 + 1e-9, 1.0, 1.0, 1.0]],
    ids=["one above", "one below", "subnormal", "one outlier"],
)
def test_degenerate_spectra_give_finite_numbers_without_a_warning(name: Alternative, values: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = likelihood_ratio_test(values, name)
    assert math.isfinite(test.log_likelihood_ratio)
    assert 0.0 <= test.p_value <= 1.0
    assert all(math.isfinite(value) for value in test.parameters.values())


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0.0, 50.0), min_size=4, max_size=15).filter(lambda y: max(y) - min(y) > 0.1),
    st.floats(-14.0, 0.8),
    st.sampled_from(ALTERNATIVES),
)
def test_any_spectrum_has_a_ratio_and_a_p_value(y: list[float], log_width: float, name: Alternative) -> None:
    test = likelihood_ratio_test(np.exp(10.0**log_width * np.array(y)), name)
    assert math.isfinite(test.log_likelihood_ratio)
    assert 0.0 <= test.p_value <= 1.0
    assert name == "exponential" or test.log_likelihood_ratio <= 0.0


@pytest.mark.parametrize("seed", range(3))
def test_narrow_spectra_cannot_tell_truncated_from_lognormal_nor_exponential_from_the_law(seed: int) -> None:
    # As the width vanishes, both laws are a normal law truncated at the cutoff, in units of the mean.
    y = np.abs(np.random.default_rng(seed).standard_normal(60))
    tests = {width: compare_alternatives(np.exp(width * y)) for width in (1e-4, 1e-6, 1e-8)}
    for width, found in tests.items():
        truncated, lognormal = found["truncated_power_law"], found["lognormal"]
        assert truncated.log_likelihood_ratio == pytest.approx(lognormal.log_likelihood_ratio, rel=10 * width, abs=1e-5)
        # The exponential law in x differs from the power law by terms of the order of the width.
        scaled = found["exponential"].log_likelihood_ratio / width
        assert scaled == pytest.approx(tests[1e-4]["exponential"].log_likelihood_ratio / 1e-4, rel=1e-2)
        assert found["exponential"].p_value == pytest.approx(tests[1e-4]["exponential"].p_value, rel=1e-2)


def test_truncated_law_of_widely_spread_eigenvalues_is_a_gamma_law() -> None:
    # The cutoff truncates nothing that counts here, so x has a gamma law, whose shape solves a known equation.
    y = np.log([1e140] * 9 + [1.0])
    log_mean_x = float(special.logsumexp(y)) - math.log(10)
    shape = optimize.brentq(lambda k: math.log(k) - special.digamma(k) - (log_mean_x - y.mean()), 1e-6, 10.0)
    gamma = 10 * (shape * y.mean() - shape - special.gammaln(shape) + shape * (math.log(shape) - log_mean_x))
    power_law = -10 * (math.log(y.mean()) + 1)
    test = likelihood_ratio_test(np.exp(y), "truncated_power_law")
    assert test.log_likelihood_ratio == pytest.approx(power_law - gamma, rel=1e-3)


@pytest.mark.parametrize("name", ALTERNATIVES)
@pytest.mark.parametrize("spectrum", [[3.0, 2.0, 1.0], [1e100, 1e50, 1.0, 1.0], np.linspace(2.0, 1.0, 400)])
def test_extreme_spectra_give_finite_numbers(name: Alternative, spectrum: list[float]) -> None:
    test = likelihood_ratio_test(spectrum, name)
    assert math.isfinite(test.log_likelihood_ratio)
    assert 0.0 <= test.p_value <= 1.0
    assert test.statistic is None or math.isfinite(test.statistic)


def test_boundary_p_is_half_a_tail() -> None:
    assert boundary_p(0.0) == 1.0
    assert boundary_p(3.0) == pytest.approx(0.5 * stats.chi2(1).sf(3.0), rel=1e-12)


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="choose one of lognormal, exponential"):
        likelihood_ratio_test([3.0, 2.0, 1.0], "weibull")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lower num_eigenvalues"):
        likelihood_ratio_test([1e200, 1.0, 0.5], "lognormal")
    with pytest.raises(ValueError, match="leave it 0 for the exponential"):
        likelihood_ratio_test([3.0, 2.0, 1.0], "exponential", bootstrap_draws=10)
    with pytest.raises(ValueError, match="compute more eigenvalues"):
        compare_alternatives([1.0, 0.5])
    with pytest.raises(TypeError, match=r"bootstrap_draws is 2\.5, which is not an integer"):
        likelihood_ratio_test([3.0, 2.0, 1.0], "lognormal", bootstrap_draws=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is -1"):
        likelihood_ratio_test([3.0, 2.0, 1.0], "lognormal", bootstrap_draws=2, seed=-1)
    with pytest.raises(ValueError, match=r"such as 0\.05"):
        likelihood_ratio_test([3.0, 2.0, 1.0], "lognormal").verdict(5)
