r"""Where the law holds: the fit at every cutoff, and without the largest eigenvalues.

Slopes at different K do not compare as estimates of one number (at small K they are low), so a scan
shows where a power law holds; it does not choose K, and neither function here changes what a fit reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessian_callback.power_law.fit import (
    MIN_EIGENVALUES,
    Eigenvalues,
    FloatArray,
    PowerLawFit,
    fit_power_law,
    fitted_eigenvalues,
)
from hessian_callback.power_law.goodness_of_fit import ks_p_value

__all__ = ["CutoffScan", "OutlierCheck", "check_outliers", "scan_cutoff"]


@dataclass(frozen=True)
class CutoffScan:
    r"""Fits to the K largest eigenvalues, for several K.

    Attributes:
        fits: one fit for each K, in ascending K.
        p_values: ``(len(fits),)``, the bootstrap p-value of each fit error.

    Example:
        >>> scan = scan_cutoff([1 / k for k in range(1, 101)], num_eigenvalues=[10, 50, 100])
        >>> scan.num_eigenvalues, scan.largest_accepted(0.1)
        ((10, 50, 100), 100)
    """

    fits: tuple[PowerLawFit, ...]
    p_values: FloatArray

    @property
    def num_eigenvalues(self) -> tuple[int, ...]:
        """K of each fit."""
        return tuple(fit.num_eigenvalues for fit in self.fits)

    @property
    def slopes(self) -> FloatArray:
        """``(len(fits),)``, the slope at each K, with the factor K / (K - 1) not applied."""
        return np.array([fit.slope for fit in self.fits])

    @property
    def fit_errors(self) -> FloatArray:
        """``(len(fits),)``, the Kolmogorov-Smirnov distance at each K."""
        return np.array([fit.fit_error for fit in self.fits])

    def largest_accepted(self, level: float = 0.1) -> int | None:
        """The largest K whose fit is not rejected at this level.

        Args:
            level: bound on the p-value, in (0, 1). The fits share eigenvalues and there are several of
                them, so this is a description, not a test.

        Returns:
            K, or None if every fit is rejected.

        Raises:
            ValueError: if ``level`` is outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level is {level}; give a fraction between 0 and 1, such as 0.1")
        accepted = [fit.num_eigenvalues for fit, p in zip(self.fits, self.p_values, strict=True) if p >= level]
        return accepted[-1] if accepted else None


def scan_cutoff(
    eigenvalues: Eigenvalues,
    *,
    num_eigenvalues: Sequence[int] | None = None,
    drop_first: int = 0,
    draws: int = 1000,
    seed: int = 0,
) -> CutoffScan:
    r"""Fit the K largest eigenvalues for several K.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_eigenvalues: the K to try, in any order; None for up to 20 of them in equal ratios from 10 (or
            all, if fewer) to all positive eigenvalues.
        drop_first: how many of the largest to leave out of every fit as outliers; K counts without them.
        draws: as for `ks_p_value`. The first scan simulates every K anew, 20 ms for 1000 draws at K = 1000.
        seed: as for `ks_p_value`.

    Returns:
        The scan, see `CutoffScan`. K at which all eigenvalues are equal cannot be fitted and raise.

    Raises:
        ValueError: as `fit_power_law`, or if ``num_eigenvalues`` is empty.

    Source:
        After Clauset, Shalizi and Newman (2009), who minimise the distance over the cutoff.

    Example:
        A power law for the first 50, then an exponential decay:

        >>> k = np.arange(1.0, 201.0)
        >>> spectrum = np.where(k <= 50, 1 / k, np.exp((50 - k) / 10) / 50)
        >>> scan_cutoff(spectrum, num_eigenvalues=[25, 50, 100, 200]).largest_accepted()
        50
    """
    values, _ = fitted_eigenvalues(eigenvalues, drop_first=drop_first)
    if num_eigenvalues is None:
        smallest = min(10, values.size)
        chosen = np.unique(np.geomspace(smallest, values.size, 20).round().astype(int)).tolist()
    else:
        chosen = sorted(set(num_eigenvalues))
    if not chosen:
        raise ValueError("num_eigenvalues is empty; name at least one K, or leave it None")
    fits = tuple(fit_power_law(eigenvalues, num_eigenvalues=k, drop_first=drop_first) for k in chosen)
    return CutoffScan(fits, np.array([ks_p_value(fit, draws=draws, seed=seed) for fit in fits]))


@dataclass(frozen=True)
class OutlierCheck:
    r"""How much the j largest eigenvalues decide about a fit.

    Attributes:
        full: the fit to all.
        without: the fit without the j largest, as if they belonged to another law; K is lower by j.
        censored_slope: the slope that keeps the ranks and uses of the j largest only that they exceed
            the next one,

            .. math:: \hat s_j = \frac{1}{K - j} \Big(\sum_{i > j} \ln\frac{\lambda_i}{\lambda_K}
                + j \ln\frac{\lambda_{j + 1}}{\lambda_K}\Big).

            If the law holds throughout, it estimates the same s as the full fit, while ``without`` is
            then too low, because it takes the largest for absent.
        num_outliers: j.

    Example:
        >>> spectrum = [50.0, 40.0] + [3 * k**-1.0 for k in range(3, 53)]
        >>> check = check_outliers(spectrum, 2)
        >>> round(check.full.slope, 2), round(check.without.slope, 2), round(check.censored_slope, 2)
        (1.06, 0.84, 0.95)
    """

    full: PowerLawFit
    without: PowerLawFit
    censored_slope: float
    num_outliers: int

    @property
    def censored_slope_stderr(self) -> float:
        r"""Standard error of ``censored_slope``, :math:`\hat s_j / \sqrt{K - j}`."""
        return self.censored_slope / float(np.sqrt(self.without.num_eigenvalues))

    @property
    def slope_change(self) -> float:
        """``censored_slope`` less the full fit's slope; beyond a standard error, outliers decide."""
        return self.censored_slope - self.full.slope


def check_outliers(eigenvalues: Eigenvalues, num_outliers: int, *, num_eigenvalues: int | None = None) -> OutlierCheck:
    """Fit with and without the largest eigenvalues, and report both.

    Classifiers have about one outlier for each class (or class less one), which come from the means of the
    classes and not from the bulk.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_outliers: j, how many of the largest to distrust; at least 1.
        num_eigenvalues: K of the full fit, outliers among them; None for all positive eigenvalues.

    Returns:
        Both fits and the censored slope, see `OutlierCheck`.

    Raises:
        ValueError: as `fit_power_law`, or if ``num_outliers`` is below 1, or fewer than 3 are left.

    Source:
        The censored slope is the trimmed Hill estimator: Bhattacharya, Kallitsis and Stoev (2017).

    Example:
        An exact law passes, as dropping changes the censored slope by little:

        >>> check = check_outliers([1 / k for k in range(1, 101)], 10)
        >>> abs(check.slope_change) < check.censored_slope_stderr
        True
    """
    if num_outliers < 1:
        raise ValueError(f"num_outliers is {num_outliers}; give at least 1, for example the number of classes")
    values, _ = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues)
    left = values.size - num_outliers
    if left < MIN_EIGENVALUES:
        raise ValueError(
            f"num_outliers is {num_outliers} of {values.size} eigenvalues, and {MIN_EIGENVALUES} must be "
            "left; lower num_outliers or compute more eigenvalues"
        )
    full = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues)
    without = fit_power_law(eigenvalues, num_eigenvalues=left, drop_first=num_outliers)
    rest = np.log(values[num_outliers:]) - np.log(values[-1])
    censored = float(rest.sum() + num_outliers * rest[0]) / left
    return OutlierCheck(full, without, censored, num_outliers)
