"""The fit against closed forms, the `powerlaw` package, brute force and simulation."""

from __future__ import annotations

import json
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hessian_callback.power_law.fit import PowerLawFit, fit_power_law

EPS = np.finfo(np.float64).eps


def zipf(num: int, slope: float = 1.0, scale: float = 1.0) -> np.ndarray:
    """The exact law, lambda_k = scale k^-slope."""
    return scale * np.arange(1.0, num + 1) ** -slope


def pareto(num: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Independent values of the law with density exponent 1 + 1/slope, above 1."""
    return np.exp(slope * rng.standard_exponential(num))


def brute_force_ks(eigenvalues: np.ndarray, slope: float) -> float:
    """Supremum over both sides of every step, written without any shortcut."""
    cutoff = eigenvalues.min()
    worst = 0.0
    for value in eigenvalues:
        law = 1.0 - (value / cutoff) ** (-1.0 / slope)
        worst = max(worst, abs(law - np.mean(eigenvalues <= value)), abs(law - np.mean(eigenvalues < value)))
    return worst


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("num", [3, 20, 50, 1000])
def test_exact_law_has_the_closed_form(num: int, slope: float) -> None:
    fit = fit_power_law(zipf(num, slope, scale=7.0))
    # (1/K) sum ln(lambda_k / lambda_K) = s (ln K - ln(K!) / K)
    expected = slope * (math.log(num) - math.lgamma(num + 1) / num)
    assert fit.slope == pytest.approx(expected, rel=1e-10)
    assert fit.least_squares_slope == pytest.approx(slope, rel=1e-10)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-10)
    assert fit.density_exponent == pytest.approx(1.0 + 1.0 / expected, rel=1e-10)
    assert fit.slope_stderr == pytest.approx(expected / math.sqrt(num), rel=1e-10)
    assert (fit.num_eigenvalues, fit.num_dropped, fit.num_outliers_dropped) == (num, 0, 0)
    assert fit.lambda_1 == 7.0
    assert fit.cutoff == pytest.approx(7.0 * num**-slope, rel=1e-12)


def test_slope_of_the_exact_law_is_low_at_small_k() -> None:
    ratios = {num: fit_power_law(zipf(num)).slope for num in (20, 50, 1000)}
    assert ratios == pytest.approx({20: 0.88, 50: 0.94, 1000: 0.996}, abs=0.006)


@pytest.mark.parametrize("num", [50, 1000])
def test_powerlaw_package_gives_the_same_fit(num: int) -> None:
    powerlaw = pytest.importorskip("powerlaw")
    values = pareto(num, 0.8, np.random.default_rng(num))
    theirs = powerlaw.Fit(values, xmin=values.min(), verbose=0).power_law
    ours = fit_power_law(values)
    assert ours.density_exponent == pytest.approx(theirs.alpha, rel=1e-5)
    assert ours.density_exponent_stderr == pytest.approx(
        theirs.standard_err if hasattr(theirs, "standard_err") else theirs.sigma, rel=1e-5
    )
    # They look at one side of each step only.
    assert abs(ours.fit_error - theirs.D) <= 1.0 / num + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_fit_error_is_the_two_sided_supremum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.lognormal(size=40)
    fit = fit_power_law(values)
    law = stats.pareto(1.0 / fit.slope, scale=fit.cutoff)
    assert fit.fit_error == pytest.approx(brute_force_ks(values, fit.slope), rel=1e-10)
    assert fit.fit_error == pytest.approx(stats.kstest(values, law.cdf).statistic, rel=1e-10)


def test_fit_error_with_ties_is_the_supremum() -> None:
    values = np.array([4.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    fit = fit_power_law(values)
    assert fit.fit_error == pytest.approx(brute_force_ks(values, fit.slope), rel=1e-12)


@pytest.mark.parametrize("num", [5, 20, 50])
def test_interval_covers_as_often_as_it_says(num: int) -> None:
    rng = np.random.default_rng(num)
    draws, slope, level = 2000, 1.3, 0.9
    covered = 0
    for _ in range(draws):
        low, high = fit_power_law(pareto(num, slope, rng)).slope_interval(level)
        covered += low < slope < high
    # Three standard errors of a proportion; a band of two plain standard errors misses by more at these K.
    assert covered / draws == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / draws))


def test_interval_has_equal_tails_of_the_gamma_law() -> None:
    fit = fit_power_law(zipf(50))
    low, high = fit.slope_interval(0.8)
    gamma = stats.gamma(49)
    assert gamma.sf(50 * fit.slope / low) == pytest.approx(0.1, rel=1e-10)
    assert gamma.cdf(50 * fit.slope / high) == pytest.approx(0.1, rel=1e-10)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, float("nan")])
def test_interval_refuses_a_level_that_is_no_fraction(level: float) -> None:
    with pytest.raises(ValueError, match=r"as a fraction, such as 0\.95"):
        fit_power_law(zipf(10)).slope_interval(level)


def test_verdicts_differ_between_the_two_critical_values() -> None:
    # The interval between the two critical values is where the paper's is lenient.
    values = np.linspace(1.0, 0.1, 50)
    fit = fit_power_law(values)
    distance = 0.5 * (fit.critical_distance_fitted + fit.critical_distance_paper)
    between = PowerLawFit(**{**{k: getattr(fit, k) for k in fit.__dataclass_fields__}, "fit_error": distance})
    assert between.within_critical_distance_paper
    assert not between.within_critical_distance_fitted


@pytest.mark.parametrize(
    "spectrum",
    [
        np.exp(-np.arange(200) / 20.0),
        stats.lognorm(0.3).isf((np.arange(200) + 0.5) / 200),
        np.linspace(2.0, 1.0, 200),
    ],
    ids=["exponential decay", "lognormal", "linear"],
)
def test_other_spectra_fit_worse_than_the_law(spectrum: np.ndarray) -> None:
    other, law = fit_power_law(spectrum), fit_power_law(zipf(200))
    assert other.fit_error > 5 * law.fit_error
    assert other.r_squared < law.r_squared - 0.02
    assert law.within_critical_distance_fitted
    assert not other.within_critical_distance_fitted


positive = st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=40, unique=True)
# Every positive number of float64, neighbours and subnormal numbers included.
any_positive = st.lists(
    st.floats(5e-324, 1.7e308) | st.sampled_from([1.0, 1.0 + EPS, 1.0 + 2 * EPS, 5e-324, 1e-323, 1.7e308]),
    min_size=3,
    max_size=20,
).filter(lambda values: len(set(values)) > 1)


@settings(deadline=None, max_examples=100)
@given(positive, st.floats(1e-8, 1e8) | st.sampled_from([1e-300, 1e300]))
def test_scale_changes_nothing_but_the_unit(values: list[float], scale: float) -> None:
    spectrum = np.array(values)
    if np.ptp(np.log(spectrum)) < 1e-3:
        return  # The slope would be the rounding of the scaling.
    fit, scaled = fit_power_law(spectrum), fit_power_law(scale * spectrum)
    assert scaled.slope == pytest.approx(fit.slope, rel=1e-10)
    assert scaled.fit_error == pytest.approx(fit.fit_error, abs=1e-9)
    assert scaled.r_squared == pytest.approx(fit.r_squared, abs=1e-9)
    assert scaled.cutoff == pytest.approx(scale * fit.cutoff, rel=4 * EPS)


@settings(deadline=None, max_examples=60)
@given(positive, st.integers(-990, 990))
def test_a_power_of_two_as_scale_changes_no_digit(values: list[float], exponent: int) -> None:
    fit, scaled = fit_power_law(values), fit_power_law(np.ldexp(values, exponent))
    assert (scaled.slope, scaled.fit_error, scaled.r_squared) == (fit.slope, fit.fit_error, fit.r_squared)


@settings(deadline=None, max_examples=60)
@given(positive, st.randoms(use_true_random=False))
def test_order_changes_nothing(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fit_power_law(shuffled) == fit_power_law(values)


@settings(deadline=None, max_examples=60)
@given(positive, st.data())
def test_any_k_from_three_to_all_takes_the_largest(values: list[float], data: st.DataObject) -> None:
    num = data.draw(st.integers(3, len(values)))
    largest = sorted(values, reverse=True)[:num]
    fit = fit_power_law(values, num_eigenvalues=num)
    assert fit == fit_power_law(largest)
    assert (fit.num_eigenvalues, fit.lambda_1, fit.cutoff) == (num, largest[0], largest[-1])
    for bad in (2, len(values) + 1):
        with pytest.raises(ValueError, match="num_eigenvalues"):
            fit_power_law(values, num_eigenvalues=bad)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(any_positive)
def test_every_spectrum_with_two_values_has_a_fit(values: list[float]) -> None:
    fit = fit_power_law(values)
    with mpmath.workprec(200):
        exact = [mpmath.log(mpmath.mpf(v) / mpmath.mpf(min(values))) for v in values]
        slope = mpmath.fsum(exact) / len(values)
        cumulative = sorted(float(-mpmath.expm1(-y / slope)) for y in exact)
    assert fit.slope == pytest.approx(float(slope), rel=1e-13, abs=0.0)
    assert fit.fit_error == pytest.approx(stats.ks_1samp(cumulative, stats.uniform.cdf).statistic, abs=1e-12)
    assert all(math.isfinite(value) for value in fit.to_dict().values())


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0.01, 6.0), min_size=6, max_size=40, unique=True).filter(lambda y: np.ptp(y) > 0.1),
    st.floats(0.55, 3.0),  # Their optimiser searches density exponents between 1 and 3.
)
def test_powerlaw_package_gives_the_same_slope_for_any_spectrum(exponents: list[float], slope: float) -> None:
    powerlaw = pytest.importorskip("powerlaw")
    y = np.array(exponents) - min(exponents)
    values = np.exp(slope * y / y.mean())
    fit = fit_power_law(values)
    assert fit.slope == pytest.approx(slope, rel=1e-12)
    theirs = powerlaw.Fit(values, xmin=values.min(), verbose=0).power_law
    assert fit.density_exponent == pytest.approx(theirs.alpha, rel=1e-4)
    assert abs(fit.fit_error - theirs.D) <= 1.0 / len(values) + 1e-4


@settings(deadline=None, max_examples=60)
@given(positive)
def test_every_value_is_in_its_range(values: list[float]) -> None:
    fit = fit_power_law(values)
    low, high = fit.slope_interval()
    assert fit.slope > 0
    assert 0 < fit.fit_error < 1
    assert fit.fit_error >= 0.5 / fit.num_eigenvalues
    assert fit.r_squared <= 1 + 4 * EPS
    assert 0 < low < high < math.inf


def test_nonpositive_eigenvalues_are_dropped_and_counted() -> None:
    fit = fit_power_law([1.0, -3.0, 0.5, 0.0, 0.25, -0.0])
    assert fit.num_dropped == 3
    assert fit.slope == fit_power_law([1.0, 0.5, 0.25]).slope


def test_options_choose_which_are_fitted_and_say_so() -> None:
    values = np.concatenate([[500.0, 400.0], zipf(60)])
    fit = fit_power_law(values, drop_first=2, num_eigenvalues=50)
    assert fit.slope == fit_power_law(zipf(50)).slope
    assert fit.num_outliers_dropped == 2
    assert fit.num_eigenvalues == 50


def test_dictionary_is_plain_and_complete() -> None:
    fit = fit_power_law(zipf(30))
    values = fit.to_dict()
    assert {type(value) for value in values.values()} == {float, int, bool}
    assert json.loads(json.dumps(values)) == values
    properties = {name for name, member in vars(PowerLawFit).items() if isinstance(member, property)}
    assert set(values) == properties | set(PowerLawFit.__dataclass_fields__) | {"slope_low", "slope_high"}
    assert (values["slope_low"], values["slope_high"]) == fit.slope_interval(0.95)
