"""Scans and outlier checks on spectra whose breaks are known."""

from __future__ import annotations

import numpy as np
import pytest

from hessian_callback.power_law.cutoff import check_outliers, scan_cutoff
from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.goodness_of_fit import ks_p_value

RANK = np.arange(1.0, 201.0)
BROKEN = np.where(RANK <= 50, 1.0 / RANK, np.exp((50.0 - RANK) / 10.0) / 50.0)


def test_every_row_is_the_fit_of_the_largest() -> None:
    scan = scan_cutoff(-np.sort(-BROKEN)[::-1], num_eigenvalues=[200, 20, 50, 20])
    assert scan.num_eigenvalues == (20, 50, 200)
    for fit, p_value, slope, error in zip(scan.fits, scan.p_values, scan.slopes, scan.fit_errors, strict=True):
        assert fit == fit_power_law(BROKEN[: fit.num_eigenvalues])
        assert p_value == ks_p_value(fit)
        assert (slope, error) == (fit.slope, fit.fit_error)


def test_scan_shows_where_the_law_ends() -> None:
    scan = scan_cutoff(BROKEN, num_eigenvalues=range(10, 201))
    largest = scan.largest_accepted()
    assert largest is not None
    # The distance needs a few eigenvalues beyond the break to notice it.
    assert 50 <= largest < 75
    assert (scan.p_values[:40] > 0.5).all()
    coarse = scan_cutoff(BROKEN)
    assert (coarse.num_eigenvalues[0], coarse.num_eigenvalues[-1]) == (10, 200)
    assert len(coarse.fits) <= 20


def test_scan_of_something_else_accepts_nothing() -> None:
    assert scan_cutoff(np.linspace(2.0, 1.0, 400), num_eigenvalues=[200, 400]).largest_accepted() is None


def test_scan_leaves_outliers_out_of_every_fit() -> None:
    spectrum = np.concatenate([[1e6], BROKEN])
    scan = scan_cutoff(spectrum, num_eigenvalues=[50, 100], drop_first=1)
    assert [fit.num_outliers_dropped for fit in scan.fits] == [1, 1]
    assert scan.fits[0].slope == fit_power_law(BROKEN[:50]).slope


def test_short_spectrum_is_scanned_whole() -> None:
    assert scan_cutoff([4.0, 3.0, 1.0, -1.0]).num_eigenvalues == (3,)


@pytest.mark.parametrize("seed", range(3))
def test_censored_slope_is_the_likelihoods_maximum(seed: int) -> None:
    values = np.sort(np.exp(1.4 * np.random.default_rng(seed).standard_exponential(60)))[::-1]
    check = check_outliers(values, 7)
    y = np.log(values / values[-1])
    # 53 exponential values and 7 of which it is only known that they exceed y[7].
    grid = check.censored_slope * np.array([0.99, 1.0, 1.01])
    log_likelihood = -(53 * np.log(grid)) - y[7:].sum() / grid - 7 * y[7] / grid
    assert log_likelihood.argmax() == 1
    assert check.full == fit_power_law(values)
    assert check.without == fit_power_law(values, drop_first=7)
    assert check.without.num_outliers_dropped == 7
    assert check.censored_slope_stderr == pytest.approx(check.censored_slope / np.sqrt(53))


def test_censored_slope_ignores_how_large_outliers_are() -> None:
    clean = 1.0 / RANK[:60]
    spiked = clean.copy()
    spiked[:5] *= 1e4
    honest, fooled = check_outliers(clean, 5), check_outliers(spiked, 5)
    assert fooled.censored_slope == pytest.approx(honest.censored_slope, rel=1e-12)
    assert fooled.full.slope > honest.full.slope + 0.5
    assert fooled.slope_change < -0.5


def test_censored_slope_has_no_bias_under_the_law_but_dropping_has() -> None:
    rng = np.random.default_rng(3)
    checks = [check_outliers(np.exp(rng.standard_exponential(80)), 10) for _ in range(400)]
    censored = np.mean([check.censored_slope for check in checks]) * 70 / 69
    dropped = np.mean([check.without.slope for check in checks]) * 70 / 69
    assert censored == pytest.approx(1.0, abs=4 / np.sqrt(400 * 70))
    assert dropped < 0.8


def test_outliers_count_within_k() -> None:
    check = check_outliers(BROKEN, 5, num_eigenvalues=50)
    assert check.full == fit_power_law(BROKEN[:50])
    assert check.without.num_eigenvalues == 45
    assert check.without.cutoff == check.full.cutoff


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="the number of classes"):
        check_outliers(BROKEN, 0)
    with pytest.raises(ValueError, match="lower num_outliers or compute more"):
        check_outliers(BROKEN[:5], 3)
    with pytest.raises(ValueError, match="leave it None"):
        scan_cutoff(BROKEN, num_eigenvalues=[])
    with pytest.raises(ValueError, match="lower num_eigenvalues"):
        scan_cutoff(BROKEN, num_eigenvalues=[300])
    with pytest.raises(ValueError, match=r"such as 0\.1"):
        scan_cutoff(BROKEN).largest_accepted(10)
