r"""Fits at several cutoffs, and fits without the largest eigenvalues.

Slopes at different K do not estimate one number, because slopes at small K are too low. A scan shows up to which
K a power law holds. It does not choose K, and neither function changes the result of `fit_power_law`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.goodness_of_fit import ks_p_value
from hessian_callback.power_law.validation import (
    MIN_EIGENVALUES,
    Eigenvalues,
    FloatArray,
    checked_integer,
    fitted_eigenvalues,
    log_ratios,
)

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
        """``(len(fits),)``, K of each fit."""
        return tuple(fit.num_eigenvalues for fit in self.fits)

    @property
    def slopes(self) -> FloatArray:
        """``(len(fits),)``, the slope at each K, without a factor K / (K - 1) for its bias."""
        return np.array([fit.slope for fit in self.fits])

    @property
    def fit_errors(self) -> FloatArray:
        """``(len(fits),)``, the Kolmogorov-Smirnov distance at each K."""
        return np.array([fit.fit_error for fit in self.fits])

    def largest_accepted(self, level: float = 0.1) -> int | None:
        """Return the largest K whose fit is not rejected at this level.

        Args:
            level: limit of the p-value, in (0, 1). The fits share eigenvalues and are several, so this is a
                description, not a test.

        Returns:
            K, or None if every fit is rejected.

        Raises:
            ValueError: if ``level`` is outside (0, 1).

        Example:
            >>> scan_cutoff([1 / k for k in range(1, 31)], num_eigenvalues=[10, 20]).largest_accepted()
            20
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
        num_eigenvalues: values of K, in any order; None for up to 20 of them in equal ratios from 10 (or
            from all positive eigenvalues, if they are fewer) to all positive eigenvalues.
        drop_first: how many of the largest to leave out of every fit as outliers; K counts without them.
        draws: as for `ks_p_value`. The first scan simulates each K, 20 ms for 1000 draws at K = 1000.
        seed: as for `ks_p_value`.

    Returns:
        The scan, see `CutoffScan`.

    Raises:
        TypeError: as `fit_power_law` and `ks_p_value`.
        ValueError: as `fit_power_law` and `ks_p_value` for each K, or if ``num_eigenvalues`` is empty.

    Source:
        After Clauset, Shalizi and Newman (2009), who minimise the distance over the cutoff.

    Example:
        A power law for the first 50 eigenvalues, then an exponential decay:

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
        raise ValueError("num_eigenvalues is empty; give at least one K, or leave it None")
    fits = tuple(fit_power_law(eigenvalues, num_eigenvalues=k, drop_first=drop_first) for k in chosen)
    return CutoffScan(fits, np.array([ks_p_value(fit, draws=draws, seed=seed) for fit in fits]))


@dataclass(frozen=True)
class OutlierCheck:
    r"""Influence of the j largest eigenvalues on a fit.

    Attributes:
        full: the fit to all K eigenvalues.
        without: the fit without the j largest, as if they belonged to another law; its K is lower by j.
        censored_slope: the slope with unchanged ranks that uses only that the j largest exceed the next one,

            .. math:: \hat s_j = \frac{1}{K - j} \Big(\sum_{i > j} \ln\frac{\lambda_i}{\lambda_K}
                + j \ln\frac{\lambda_{j + 1}}{\lambda_K}\Big).

            If the law holds for all K, it estimates the same s as the full fit. ``without`` is then too low,
            because it treats the largest as absent.
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
        r"""Standard error of ``censored_slope`` for independent values, :math:`\hat s_j / \sqrt{K - j}`."""
        return self.censored_slope / float(np.sqrt(self.without.num_eigenvalues))

    @property
    def slope_change(self) -> float:
        """``censored_slope`` less the slope of the full fit. Beyond a standard error, outliers dominate the fit."""
        return self.censored_slope - self.full.slope


def check_outliers(eigenvalues: Eigenvalues, num_outliers: int, *, num_eigenvalues: int | None = None) -> OutlierCheck:
    r"""Fit a spectrum with and without its largest eigenvalues.

    .. math:: \hat s_j = \frac{1}{K - j} \Big(\sum_{i > j} \ln\frac{\lambda_i}{\lambda_K}
        + j \ln\frac{\lambda_{j + 1}}{\lambda_K}\Big)

    The Hessian of a classifier has about one outlier for each class, or one less. They come from the means of the
    classes and not from the bulk.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_outliers: j, the number of possible outliers; at least 1.
        num_eigenvalues: K of the full fit, outliers included; None for all positive eigenvalues.

    Returns:
        Both fits and the censored slope, see `OutlierCheck`.

    Raises:
        TypeError: as `fit_power_law`, or if ``num_outliers`` is not an integer.
        ValueError: as `fit_power_law`, or if ``num_outliers`` is below 1, or fewer than 3 eigenvalues are left.

    Source:
        The censored slope is the trimmed Hill estimator: Bhattacharya, Kallitsis and Stoev (2017).

    Example:
        For an exact law the censored slope differs little from the slope of all:

        >>> check = check_outliers([1 / k for k in range(1, 101)], 10)
        >>> abs(check.slope_change) < check.censored_slope_stderr
        True
    """
    num_outliers = checked_integer(
        num_outliers, "num_outliers", minimum=1, remedy="give at least 1, for example the number of classes"
    )
    values, _ = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues)
    left = values.size - num_outliers
    if left < MIN_EIGENVALUES:
        raise ValueError(
            f"num_outliers is {num_outliers} of {values.size} eigenvalues, but {MIN_EIGENVALUES} must be "
            "left; lower num_outliers or compute more eigenvalues"
        )
    full = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues)
    without = fit_power_law(eigenvalues, num_eigenvalues=left, drop_first=num_outliers)
    rest = log_ratios(values[num_outliers:], values[-1])
    censored = float(rest.sum() + num_outliers * rest[0]) / left
    return OutlierCheck(full, without, censored, num_outliers)
