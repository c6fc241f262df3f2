"""The fit against closed forms, the `powerlaw` package, brute force and simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hessian_callback.power_law.critical_values import critical_distance
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


@pytest.mark.parametrize(("num", "expected"), [(50, 0.1512), (1000, 0.0344)])
def test_critical_distance_of_a_fitted_exponent(num: int, expected: float) -> None:
    assert critical_distance(num) == pytest.approx(expected, abs=1e-4)
    fit = fit_power_law(zipf(num))
    assert fit.critical_distance_fitted == critical_distance(num)
    assert fit.critical_distance_paper == pytest.approx(1.36 / math.sqrt(num), rel=1e-12)


@pytest.mark.parametrize("num", [3, 4, 10, 20, 21, 37, 300])
@pytest.mark.parametrize("level", [0.2, 0.05, 0.01])
def test_critical_distance_rejects_as_often_as_it_says(num: int, level: float) -> None:
    # Independent of the table's own simulation: sorted draws, and the fit itself on a few of them.
    rng = np.random.default_rng([7, num])
    draws = 20_000
    log_ratios = np.sort(rng.standard_exponential((draws, num)), axis=1)
    log_ratios -= log_ratios[:, :1]
    law = -np.expm1(-log_ratios / log_ratios.mean(axis=1, keepdims=True))
    upper = np.arange(1, num + 1) / num
    distance = np.maximum(upper - law, law - upper + 1 / num).max(axis=1)
    for row in range(3):
        assert fit_power_law(np.exp(log_ratios[row])).fit_error == pytest.approx(distance[row], rel=1e-9)
    rate = np.mean(distance >= critical_distance(num, level=level))
    assert rate == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / draws))


def test_critical_distance_has_no_seam_and_the_known_limit() -> None:
    scaled = [critical_distance(num) * math.sqrt(num) for num in range(10, 200)]
    assert np.abs(np.diff(scaled)).max() < 0.006
    # Lilliefors' test for the exponential law: 1.094 / sqrt(n).
    assert critical_distance(10**8) * 10**4 == pytest.approx(1.094, abs=0.001)


def test_critical_distance_refuses_what_it_has_no_value_for() -> None:
    with pytest.raises(ValueError, match="use ks_p_value"):
        critical_distance(50, level=0.03)
    with pytest.raises(ValueError, match="at least 3"):
        critical_distance(2)
    with pytest.raises(ValueError, match="'fitted' or 'known'"):
        critical_distance(50, exponent="guessed")  # type: ignore[arg-type]


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


@settings(deadline=None, max_examples=60)
@given(positive, st.floats(1e-8, 1e8))
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
@given(positive, st.randoms(use_true_random=False))
def test_order_changes_nothing(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fit_power_law(shuffled) == fit_power_law(values)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_precision_are_fitted_in_float64(dtype: torch.dtype) -> None:
    tensor = torch.tensor(zipf(50)).to(dtype).requires_grad_()
    fit = fit_power_law(tensor)
    assert fit.slope == pytest.approx(fit_power_law(zipf(50)).slope, rel=4 * torch.finfo(dtype).eps)
    assert fit == fit_power_law(tensor.detach().double().numpy())
    assert fit == fit_power_law(tensor.detach().double().tolist())


def test_integers_are_numbers() -> None:
    assert fit_power_law([8, 4, 2, 1]) == fit_power_law([8.0, 4.0, 2.0, 1.0])
    assert fit_power_law(torch.tensor([8, 4, 2, 1])) == fit_power_law([8.0, 4.0, 2.0, 1.0])


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


@pytest.mark.parametrize(
    ("eigenvalues", "options", "error", "remedy"),
    [
        ([1.0, float("nan"), 2.0, 3.0], {}, ValueError, "check that the loss and its gradient are finite"),
        ([1.0, float("inf"), 2.0, 3.0], {}, ValueError, "measure in float32 or better"),
        ([2.0, 1.0, -1.0, 0.0], {}, ValueError, "compute more eigenvalues, or use more samples"),
        ([], {}, ValueError, "compute more eigenvalues"),
        ([2.0, 1.0, 0.5], {"drop_first": 1}, ValueError, "2 of 3 are left without the 1 largest"),
        ([2.0, 2.0, 2.0], {}, ValueError, "so that the spectrum decays"),
        ([[3.0, 2.0, 1.0]], {}, ValueError, r"one spectrum of shape \(n,\)"),
        (torch.tensor(1.0), {}, ValueError, r"one spectrum of shape \(n,\)"),
        ([3.0, 2.0, 1.0], {"num_eigenvalues": 4}, ValueError, "lower num_eigenvalues"),
        ([3.0, 2.0, 1.0], {"num_eigenvalues": 2}, ValueError, "fit at least 3"),
        ([3.0, 2.0, 1.0], {"drop_first": -1}, ValueError, "how many of the largest to leave out"),
        ([3.0 + 1j, 2.0, 1.0], {}, TypeError, r"values\.real"),
        (torch.ones(3, dtype=torch.complex64), {}, TypeError, r"values\.real"),
        ([True, True, False], {}, TypeError, "not a mask"),
        (torch.tensor([True, False, True]), {}, TypeError, "not a mask"),
        (["a", "b", "c"], {}, TypeError, "a list of floats"),
    ],
)
def test_unfittable_input_names_the_remedy(
    eigenvalues: object, options: dict[str, int], error: type[Exception], remedy: str
) -> None:
    with pytest.raises(error, match=remedy):
        fit_power_law(eigenvalues, **options)  # type: ignore[arg-type]
