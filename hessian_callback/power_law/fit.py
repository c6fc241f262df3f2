r"""The power law of a Hessian spectrum: maximum-likelihood slope, goodness of fit, critical values.

The law reads :math:`\lambda_k = \lambda_1 k^{-s}` in rank form and
:math:`p(\lambda) = \lambda^{-\beta} / Z_c` in density form, with :math:`s = 1 / (\beta - 1)`.
Everything here is a function of the eigenvalues alone, so it serves any positive spectrum.

Source: "Investigating the Overlooked Hessian Structure: From CNNs to LLMs" (Tang et al., ICML 2025);
the critical values for a fitted exponent and the exact interval of the slope are not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

__all__ = ["Eigenvalues", "PowerLawFit", "critical_distance", "fit_power_law", "positive_eigenvalues"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
Eigenvalues: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[float]

# Fewer do not constrain anything: with the cutoff among them, two eigenvalues are always fitted exactly.
MIN_EIGENVALUES = 3

# Asymptotic quantiles of sqrt(K) d_ks where the exponent is known (Kolmogorov), rounded as in the paper.
_KNOWN_EXPONENT = {0.20: 1.07, 0.15: 1.14, 0.10: 1.22, 0.05: 1.36, 0.01: 1.63}

# The same quantiles where exponent and cutoff come from the tested eigenvalues themselves, simulated by
# `benchmarks.critical_values` (2e5 to 2e6 draws for each K). Up to K = 20 one value for each K; above,
# a + b / sqrt(K) + c / K, where a is the limit. Two standard errors of Monte Carlo: .001 in the
# 5 % row, .002 in the 1 % row; the limit at 5 % agrees with the 1.094 of the literature.
# fmt: off
_FITTED_EXPONENT_SMALL_K: dict[float, tuple[float, ...]] = {
    0.20: (
        0.754, 0.829, 0.824, 0.811, 0.824, 0.832, 0.836, 0.837, 0.838,
        0.839, 0.841, 0.843, 0.844, 0.846, 0.847, 0.847, 0.848, 0.850,
    ),
    0.15: (
        0.806, 0.872, 0.858, 0.857, 0.872, 0.878, 0.880, 0.881, 0.882,
        0.885, 0.887, 0.889, 0.890, 0.891, 0.893, 0.894, 0.895, 0.896,
    ),
    0.10: (
        0.914, 0.919, 0.894, 0.923, 0.934, 0.936, 0.938, 0.940, 0.944,
        0.947, 0.948, 0.950, 0.951, 0.952, 0.954, 0.955, 0.956, 0.958,
    ),
    0.05: (
        1.030, 0.976, 1.006, 1.022, 1.024, 1.025, 1.033, 1.038, 1.039,
        1.041, 1.043, 1.045, 1.048, 1.049, 1.050, 1.052, 1.053, 1.054,
    ),
    0.01: (
        1.129, 1.199, 1.207, 1.198, 1.219, 1.224, 1.227, 1.232, 1.235,
        1.238, 1.240, 1.242, 1.245, 1.245, 1.248, 1.250, 1.253, 1.253,
    ),
}
_FITTED_EXPONENT_LARGE_K: dict[float, tuple[float, float, float]] = {
    0.20: (0.8848, -0.1684, 0.0493),
    0.15: (0.9322, -0.1672, 0.0252),
    0.10: (0.9951, -0.1721, 0.0203),
    0.05: (1.0937, -0.1675, -0.0467),
    0.01: (1.2945, -0.1774, -0.0598),
}
# fmt: on


def critical_distance(
    num_eigenvalues: int, *, level: float = 0.05, exponent: Literal["fitted", "known"] = "fitted"
) -> float:
    r"""Largest Kolmogorov-Smirnov distance that is still compatible with a power law.

    .. math:: d_c = c_K(\alpha) / \sqrt{K}

    With ``exponent="known"`` :math:`c` is the constant of the paper, Kolmogorov's asymptotic quantile
    (1.36 at 5 %), which supposes that the exponent was known beforehand. With ``exponent="fitted"``
    :math:`c_K` accounts for exponent and cutoff having been taken from the same K eigenvalues: it is the
    simulated quantile under a power law (about 1.07 at K = 50, 1.09 at K = 1000, at 5 %). It does
    not depend on the slope, because the logarithms of a power law's values over their smallest are
    exponential and their ratios to the mean free of the scale.

    Args:
        num_eigenvalues: K, the number of eigenvalues fitted, the cutoff among them; at least 3.
        level: chance of rejecting a true power law; one of 0.20, 0.15, 0.10, 0.05, 0.01.
        exponent: whether the exponent was fitted to the same eigenvalues (as `fit_power_law` does).

    Returns:
        The distance, without unit, in (0, 1).

    Raises:
        ValueError: if ``num_eigenvalues`` is below 3, or ``level`` or ``exponent`` is not a listed one.

    Source:
        ``"known"``: Tang et al., ICML 2025. ``"fitted"``: simulation, after Lilliefors (1969).

    Example:
        >>> round(critical_distance(1000), 4), round(critical_distance(50), 3)
        (0.0344, 0.151)
        >>> round(critical_distance(1000, exponent="known"), 4)
        0.043
    """
    if num_eigenvalues < MIN_EIGENVALUES:
        raise ValueError(f"num_eigenvalues is {num_eigenvalues}; a fit needs at least {MIN_EIGENVALUES}")
    if level not in _KNOWN_EXPONENT:
        raise ValueError(
            f"level is {level}; choose one of {sorted(_KNOWN_EXPONENT)}, or use ks_p_value, which serves any level"
        )
    root = float(np.sqrt(num_eigenvalues))
    if exponent == "known":
        return _KNOWN_EXPONENT[level] / root
    if exponent == "fitted":
        small = _FITTED_EXPONENT_SMALL_K[level]
        if num_eigenvalues - MIN_EIGENVALUES < len(small):
            return small[num_eigenvalues - MIN_EIGENVALUES] / root
        a, b, c = _FITTED_EXPONENT_LARGE_K[level]
        return (a + b / root + c / num_eigenvalues) / root
    raise ValueError(f"exponent is {exponent!r}; choose 'fitted' or 'known'")


@dataclass(frozen=True)
class PowerLawFit:
    r"""A power law fitted to the K largest eigenvalues of a spectrum.

    .. math::
        \hat s = \frac{1}{K} \sum_{i=1}^{K} \ln\frac{\lambda_i}{\lambda_K}, \qquad
        \hat\beta = 1 + \frac{1}{\hat s}, \qquad
        d_{ks} = \sup_{\lambda \ge \lambda_K} |F^*(\lambda) - \hat F(\lambda)|, \quad
        F^*(\lambda) = 1 - (\lambda / \lambda_K)^{-1 / \hat s}

    All values are plain Python numbers. Only ``lambda_1`` and ``cutoff`` carry the eigenvalues' unit.

    Attributes:
        slope: :math:`\hat s`, the maximum-likelihood slope (Hill's estimator); larger is steeper.
            It is low by the factor (K - 1) / K on average, and slopes compare at equal K only.
        fit_error: :math:`d_{ks}`, two-sided Kolmogorov-Smirnov distance to the fitted law, in (0, 1).
        num_eigenvalues: K, the number of eigenvalues fitted, the cutoff among them.
        lambda_1: the largest eigenvalue fitted.
        cutoff: :math:`\lambda_K`, the smallest eigenvalue fitted.
        least_squares_slope: minus the slope of the regression line of :math:`\ln\lambda_k` on
            :math:`\ln k`. Common in the field, not in the paper; noisier than ``slope``.
        r_squared: coefficient of determination of that line. It hardly tells a power law from a
            lognormal: both give about .99.
        num_dropped: how many eigenvalues were left out because they were zero or negative.
        num_outliers_dropped: how many of the largest were left out on request (``drop_first``).

    Source:
        Tang et al., ICML 2025, for slope, exponent, distance and the 1.36 / sqrt(K) verdict.

    Example:
        >>> fit = fit_power_law([1.0, 0.5, 0.25, 0.125])
        >>> round(fit.slope, 4), fit.num_eigenvalues, fit.cutoff
        (1.0397, 4, 0.125)
        >>> low, high = fit.slope_interval(0.95)
        >>> round(low, 2), round(high, 2)
        (0.58, 6.72)
        >>> fit.within_critical_distance_fitted, fit.within_critical_distance_paper
        (True, True)
    """

    slope: float
    fit_error: float
    num_eigenvalues: int
    lambda_1: float
    cutoff: float
    least_squares_slope: float
    r_squared: float
    num_dropped: int
    num_outliers_dropped: int

    @property
    def slope_stderr(self) -> float:
        r"""Standard error of the slope, :math:`\hat s / \sqrt K` (delta method, independent values)."""
        return self.slope / float(np.sqrt(self.num_eigenvalues))

    @property
    def density_exponent(self) -> float:
        r""":math:`\hat\beta = 1 + 1 / \hat s`, the exponent of the density."""
        return 1.0 + 1.0 / self.slope

    @property
    def density_exponent_stderr(self) -> float:
        r"""Standard error of the density exponent, :math:`(\hat\beta - 1) / \sqrt K`, as in the paper."""
        return (self.density_exponent - 1.0) / float(np.sqrt(self.num_eigenvalues))

    def slope_interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Confidence interval of the slope, exact for independent values of a power law.

        Under the law :math:`K \hat s / s \sim \mathrm{Gamma}(K - 1, 1)`, so with its quantiles
        :math:`q` the interval is :math:`[K \hat s / q_{(1 + level)/2},\ K \hat s / q_{(1 - level)/2}]`.
        Eigenvalues repel each other and so are not independent: the interval is then too wide where the
        law holds, and it says nothing about the error of the eigenvalues themselves.

        Args:
            level: coverage, in (0, 1).

        Returns:
            ``(low, high)``, with equal tails; without unit.

        Raises:
            ValueError: if ``level`` is outside (0, 1).

        Example:
            >>> fit = fit_power_law([1 / k for k in range(1, 51)])
            >>> low, high = fit.slope_interval()
            >>> round(fit.slope, 3), round(low, 3), round(high, 3)
            (0.942, 0.74, 1.3)
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level is {level}; give the coverage as a fraction, such as 0.95")
        tail = (1.0 - level) / 2.0
        scaled = self.num_eigenvalues * self.slope
        shape = self.num_eigenvalues - 1
        return (
            scaled / float(special.gammainccinv(shape, tail)),
            scaled / float(special.gammaincinv(shape, tail)),
        )

    @property
    def critical_distance_paper(self) -> float:
        r"""5 % critical distance of the paper, :math:`1.36 / \sqrt K`; rejects 0.5 % of true power laws."""
        return critical_distance(self.num_eigenvalues, exponent="known")

    @property
    def critical_distance_fitted(self) -> float:
        """5 % critical distance where the exponent is fitted to the same K; see `critical_distance`."""
        return critical_distance(self.num_eigenvalues, exponent="fitted")

    @property
    def within_critical_distance_paper(self) -> bool:
        """The paper's verdict: ``fit_error < critical_distance_paper``. Lenient."""
        return self.fit_error < self.critical_distance_paper

    @property
    def within_critical_distance_fitted(self) -> bool:
        """The verdict at an honest 5 %: ``fit_error < critical_distance_fitted``."""
        return self.fit_error < self.critical_distance_fitted

    def to_dict(self) -> dict[str, float | int | bool]:
        """Fields and derived values as plain Python scalars, ready for JSON or a logger.

        Returns:
            One entry for each attribute and property, and ``slope_low`` and ``slope_high`` for the 95 %
            interval of the slope.

        Example:
            >>> fit_power_law([4.0, 2.0, 1.0, -1.0]).to_dict()["num_dropped"]
            1
        """
        low, high = self.slope_interval(0.95)
        values: dict[str, float | int | bool] = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {
            "slope_stderr": self.slope_stderr,
            "slope_low": low,
            "slope_high": high,
            "density_exponent": self.density_exponent,
            "density_exponent_stderr": self.density_exponent_stderr,
            "critical_distance_paper": self.critical_distance_paper,
            "critical_distance_fitted": self.critical_distance_fitted,
            "within_critical_distance_paper": self.within_critical_distance_paper,
            "within_critical_distance_fitted": self.within_critical_distance_fitted,
        }


def fit_power_law(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> PowerLawFit:
    r"""Fit a power law to the positive ones among some eigenvalues, by maximum likelihood.

    .. math:: \hat s = \frac{1}{K} \sum_{i=1}^{K} \ln\frac{\lambda_i}{\lambda_K}

    Zero and negative eigenvalues lie outside the theory; they are left out and counted in
    ``num_dropped``. The smallest eigenvalue fitted serves as the cutoff :math:`\lambda_K`.

    Args:
        eigenvalues: ``(n,)``, in any order and any unit; tensor on any device and of any precision,
            array or sequence. They are fitted in float64.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers, for example one for each class.
            Those left are fitted as a spectrum of their own, so K and the ranks count without the
            dropped ones, and ``num_outliers_dropped`` reports how many those were.

    Returns:
        The fit, see `PowerLawFit`.

    Raises:
        TypeError: if the eigenvalues are complex, boolean or not numbers.
        ValueError: if they are not one-dimensional, contain NaN or infinity, leave fewer than 3
            positive ones (or fewer than ``num_eigenvalues``), or are all equal.

    Source:
        Tang et al., ICML 2025. Gives the values of ``powerlaw.Fit(eigenvalues, xmin=min(eigenvalues))``.

    Example:
        The law itself, with slope 1. The estimate is low at small K by design, see `PowerLawFit`:

        >>> import torch
        >>> spectrum = 3.0 / torch.arange(1, 1001)
        >>> fit = fit_power_law(spectrum)
        >>> round(fit.slope, 3), round(fit.least_squares_slope, 3), round(fit.fit_error, 3)
        (0.996, 1.0, 0.002)
        >>> round(fit_power_law(spectrum, num_eigenvalues=50).slope, 3)
        0.942
    """
    values, num_dropped = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    log_ratios = np.log(values) - np.log(values[-1])
    slope = float(log_ratios.mean())
    least_squares_slope, r_squared = _least_squares(log_ratios)
    return PowerLawFit(
        slope=slope,
        fit_error=exponential_ks_distance(log_ratios / slope),
        num_eigenvalues=int(values.size),
        lambda_1=float(values[0]),
        cutoff=float(values[-1]),
        least_squares_slope=least_squares_slope,
        r_squared=r_squared,
        num_dropped=num_dropped,
        num_outliers_dropped=drop_first,
    )


def fitted_eigenvalues(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> tuple[FloatArray, int]:
    """Choose the eigenvalues that `fit_power_law` fits, or say why there is nothing to fit.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_eigenvalues: K, or None for all positive ones.
        drop_first: how many of the largest to leave out.

    Returns:
        Those fitted, ``(K,)``, float64, descending; and how many of all were zero or negative.

    Raises:
        TypeError: as `fit_power_law`.
        ValueError: as `fit_power_law`.

    Example:
        >>> fitted_eigenvalues([8.0, 4.0, 2.0, 1.0, -1.0], drop_first=1)
        (array([4., 2., 1.]), 1)
    """
    values, num_dropped = positive_eigenvalues(eigenvalues)
    if drop_first < 0:
        raise ValueError(f"drop_first is {drop_first}; give how many of the largest to leave out, or 0")
    num_left = max(values.size - drop_first, 0)
    if num_left < MIN_EIGENVALUES:
        without = f" without the {drop_first} largest" if drop_first else ""
        raise ValueError(
            f"a power law needs at least {MIN_EIGENVALUES} positive eigenvalues, and {num_left} of "
            f"{values.size + num_dropped} are left{without} ({num_dropped} are zero or negative); compute "
            "more eigenvalues, or use more samples if the Hessian is rank-deficient"
        )
    values = values[drop_first:]
    if num_eigenvalues is not None:
        if num_eigenvalues < MIN_EIGENVALUES:
            raise ValueError(f"num_eigenvalues is {num_eigenvalues}; fit at least {MIN_EIGENVALUES}")
        if num_eigenvalues > num_left:
            raise ValueError(
                f"num_eigenvalues is {num_eigenvalues}, but only {num_left} positive eigenvalues are there; "
                "compute more eigenvalues, lower num_eigenvalues, or leave it None to fit all of them"
            )
        values = values[:num_eigenvalues]
    if values[0] == values[-1]:
        raise ValueError(
            f"all {values.size} eigenvalues equal {values[0]:g}, so no slope exists; compute more "
            "eigenvalues, so that the spectrum decays, or check that the operator is not a multiple of the "
            "identity"
        )
    return values, num_dropped


def fitted_log_ratios(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> FloatArray:
    r"""The logarithms :math:`y_i = \ln(\lambda_i / \lambda_K)` of the eigenvalues that are fitted.

    Under a power law they are exponential with mean s.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_eigenvalues: K, or None for all positive ones.
        drop_first: how many of the largest to leave out.

    Returns:
        ``(K,)``, float64, descending; the last is zero.

    Raises:
        TypeError: as `fit_power_law`.
        ValueError: as `fit_power_law`.

    Example:
        >>> fitted_log_ratios([4.0, 2.0, 1.0]) / np.log(2.0)
        array([2., 1., 0.])
    """
    values, _ = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    ratios: FloatArray = np.log(values) - np.log(values[-1])
    return ratios


def positive_eigenvalues(eigenvalues: Eigenvalues) -> tuple[FloatArray, int]:
    """Check eigenvalues and return the positive ones in descending order.

    Args:
        eigenvalues: ``(n,)``, in any order; tensor, array or sequence of real numbers.

    Returns:
        The positive ones, ``(K,)``, float64, descending; and how many were zero or negative.

    Raises:
        TypeError: if the eigenvalues are complex, boolean or not numbers.
        ValueError: if they are not one-dimensional or contain NaN or infinity.

    Example:
        >>> positive_eigenvalues([1.0, -2.0, 3.0, 0.0])
        (array([3., 1.]), 2)
    """
    values = as_float64(eigenvalues)
    positive = values[values > 0.0]
    return np.sort(positive)[::-1], int(values.size - positive.size)


def as_float64(eigenvalues: Eigenvalues, name: str = "eigenvalues") -> FloatArray:
    """Convert to a one-dimensional float64 array of finite numbers, or say what is wrong.

    Args:
        eigenvalues: ``(n,)``; tensor, array or sequence of real numbers.
        name: what the error messages call them.

    Returns:
        ``(n,)``, float64, in the order given.

    Raises:
        TypeError: if they are complex, boolean or not numbers.
        ValueError: if they are not one-dimensional or contain NaN or infinity.

    Example:
        >>> as_float64(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        array([1., 2.])
    """
    if isinstance(eigenvalues, Tensor):
        kind = "c" if eigenvalues.is_complex() else "b" if eigenvalues.dtype == torch.bool else "f"
        _check_kind(kind, str(eigenvalues.dtype), name)
        # To the CPU first: some devices have no float64.
        values = eigenvalues.detach().cpu().to(torch.float64).numpy()
    else:
        raw = np.asarray(eigenvalues)
        _check_kind(raw.dtype.kind, str(raw.dtype), name)
        values = raw.astype(np.float64)
    if values.ndim != 1:
        raise ValueError(
            f"{name} have shape {tuple(values.shape)}; pass one spectrum of shape (n,), "
            "and fit several spectra one by one"
        )
    num_bad = int(values.size - np.isfinite(values).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} of {values.size} {name} are NaN or infinite; check that the loss and its "
            "gradient are finite on the measured batches, and measure in float32 or better"
        )
    return values


def _check_kind(kind: str, dtype: str, name: str) -> None:
    """Raise unless a numpy kind code stands for real numbers."""
    remedies = {
        "c": "pass the real eigenvalues of a symmetric operator, such as values.real",
        "b": "pass the eigenvalues themselves, not a mask",
    }
    if kind not in "fiu":
        remedy = remedies.get(kind, "pass a tensor, an array or a list of floats")
        raise TypeError(f"{name} are not real numbers (dtype {dtype}); {remedy}")


def exponential_ks_distance(scaled: FloatArray) -> float:
    r"""Two-sided Kolmogorov-Smirnov distance of values to the unit exponential law.

    .. math:: \sup_y |1 - e^{-y} - \hat F(y)|

    With :math:`y_i = \ln(\lambda_i / \lambda_K) / \hat s` this is the distance of eigenvalues to their
    fitted power law.

    Args:
        scaled: ``(K,)``, descending, not negative.

    Returns:
        The distance. The supremum is taken on both sides of every step of the empirical distribution.

    Example:
        >>> round(exponential_ks_distance(np.array([1.0, 0.0])), 4)
        0.5
    """
    num = scaled.size
    law = -np.expm1(-scaled)
    # Descending, so that the i-th value (from 0) has the fraction (num - i) / num at or below it.
    at_or_below = np.arange(num, 0, -1) / num
    below = at_or_below - 1.0 / num
    return float(max((at_or_below - law).max(), (law - below).max()))


def _least_squares(log_values: FloatArray) -> tuple[float, float]:
    """Minus the slope of the line of log values on log rank, and R squared."""
    log_rank = np.log(np.arange(1, log_values.size + 1))
    log_rank -= log_rank.mean()
    centred = log_values - log_values.mean()
    slope = float(log_rank @ centred / (log_rank @ log_rank))
    residual = centred - slope * log_rank
    return -slope, float(1.0 - residual @ residual / (centred @ centred))
