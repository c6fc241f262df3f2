"""Functional twins of the metrics: one spectrum in, one scalar tensor out.

Each function takes ``eigenvalues`` (Tensor, array or sequence) of shape ``(n,)``, in any order, leaves out
those that are zero or negative, and returns a scalar tensor on the device of its input, in float64, or in
float32 where that device has no float64. None of them is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessian_callback.power_law import spectral_statistics
from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.fit import Eigenvalues, fit_power_law, fitted_eigenvalues
from hessian_callback.power_law.goodness_of_fit import ks_p_value
from hessian_callback.power_law.maximum_entropy import entropy_deficit

__all__ = [
    "effective_rank",
    "eigengap_exponent",
    "intrinsic_dimension",
    "largest_eigenvalue",
    "maximum_entropy_deficit",
    "outlier_ratio",
    "participation_ratio",
    "power_law_density_exponent",
    "power_law_fit_error",
    "power_law_num_fitted",
    "power_law_p_value",
    "power_law_r_squared",
    "power_law_slope",
    "power_law_slope_stderr",
]


def power_law_slope(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> Tensor:
    r"""Maximum-likelihood slope, :math:`\hat s = \frac{1}{K} \sum_i \ln(\lambda_i / \lambda_K)`.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar without unit; larger is steeper.

    Raises:
        ValueError: as `fit_power_law`.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> power_law_slope(1 / torch.arange(1, 1001))
        tensor(0.9956, dtype=torch.float64)
    """
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(fit.slope, eigenvalues)


def power_law_fit_error(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> Tensor:
    r"""Kolmogorov-Smirnov distance to the fitted law, :math:`\sup |F^* - \hat F|`, two-sided.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar in (0, 1); smaller is closer to a power law.

    Raises:
        ValueError: as `fit_power_law`.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> power_law_fit_error(torch.exp(-torch.arange(1, 51) / 10))
        tensor(0.1604, dtype=torch.float64)
    """
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(fit.fit_error, eigenvalues)


def power_law_slope_stderr(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> Tensor:
    r"""Standard error of the slope, :math:`\hat s / \sqrt K`.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar without unit.

    Raises:
        ValueError: as `fit_power_law`.

    Example:
        >>> power_law_slope_stderr(1 / torch.arange(1, 1001))
        tensor(0.0315, dtype=torch.float64)
    """
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(fit.slope_stderr, eigenvalues)


def power_law_density_exponent(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> Tensor:
    r"""Exponent of the density, :math:`\hat\beta = 1 + 1 / \hat s`.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar above 1.

    Raises:
        ValueError: as `fit_power_law`.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> power_law_density_exponent(1 / torch.arange(1, 1001))
        tensor(2.0044, dtype=torch.float64)
    """
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(fit.density_exponent, eigenvalues)


def power_law_r_squared(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> Tensor:
    r"""Coefficient of determination of :math:`\ln\lambda_k` on :math:`\ln k`.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar, at most 1. It hardly tells a power law from a lognormal.

    Raises:
        ValueError: as `fit_power_law`.

    Example:
        >>> power_law_r_squared(torch.exp(-torch.arange(1, 51) / 10))
        tensor(0.8260, dtype=torch.float64)
    """
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(fit.r_squared, eigenvalues)


def power_law_num_fitted(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> Tensor:
    """K, the number of eigenvalues that a fit would use.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar.

    Raises:
        ValueError: as `fit_power_law`.

    Example:
        >>> power_law_num_fitted([4.0, 2.0, 1.0, 0.0, -1.0])
        tensor(3., dtype=torch.float64)
    """
    values, _ = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(values.size, eigenvalues)


def power_law_p_value(
    eigenvalues: Eigenvalues,
    *,
    num_eigenvalues: int | None = None,
    drop_first: int = 0,
    draws: int = 1000,
    seed: int = 0,
) -> Tensor:
    """Bootstrap p-value of the fit error, exponent refitted; see `ks_p_value`.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        draws: power laws simulated, once for each K.
        seed: of the simulation.

    Returns:
        A scalar in (0, 1]; small where a power law would seldom fit so badly.

    Raises:
        ValueError: as `fit_power_law`, or if ``draws`` is below 1.

    Source:
        Clauset, Shalizi and Newman (2009).

    Example:
        >>> power_law_p_value(torch.linspace(2, 1, 1000)) < 0.01
        tensor(True)
    """
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(ks_p_value(fit, draws=draws, seed=seed), eigenvalues)


def largest_eigenvalue(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> Tensor:
    r"""The largest eigenvalue fitted, :math:`\lambda_1`, a common measure of sharpness.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar in the unit of the eigenvalues.

    Raises:
        ValueError: as `fit_power_law`.

    Example:
        >>> largest_eigenvalue([1.0, 4.0, 2.0])
        tensor(4., dtype=torch.float64)
    """
    values, _ = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(float(values[0]), eigenvalues)


def eigengap_exponent(eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0) -> Tensor:
    r"""Exponent of the eigengaps sorted by size, which theory puts at s + 1; see `fit_eigengaps`.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to take; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar without unit.

    Raises:
        ValueError: as `fit_eigengaps`.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> eigengap_exponent(1 / torch.arange(1, 1001, dtype=torch.float64))
        tensor(1.9820, dtype=torch.float64)
    """
    fit = fit_eigengaps(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(fit.exponent, eigenvalues)


def maximum_entropy_deficit(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> Tensor:
    """Entropy of the fitted power law less that of the eigenvalues; see `entropy_deficit`.

    Args:
        eigenvalues: ``(n,)``.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        A scalar in nats; near zero for a power law.

    Raises:
        ValueError: as `entropy_deficit`.

    Source:
        Tang et al., ICML 2025, for the argument.

    Example:
        >>> maximum_entropy_deficit(torch.exp(-torch.arange(100) / 10))
        tensor(0.2968, dtype=torch.float64)
    """
    result = entropy_deficit(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return _scalar(result.deficit, eigenvalues)


def effective_rank(eigenvalues: Eigenvalues) -> Tensor:
    """Exponential of the entropy of the eigenvalues' shares; see `spectral_statistics.effective_rank`.

    Args:
        eigenvalues: ``(n,)``.

    Returns:
        A scalar, at least 1.

    Raises:
        ValueError: if no eigenvalue is positive.

    Example:
        >>> effective_rank([4.0, 2.0, 1.0, 1.0])
        tensor(3.3636, dtype=torch.float64)
    """
    return _scalar(spectral_statistics.effective_rank(eigenvalues), eigenvalues)


def intrinsic_dimension(eigenvalues: Eigenvalues) -> Tensor:
    """Trace over the largest eigenvalue; see `spectral_statistics.intrinsic_dimension`.

    Args:
        eigenvalues: ``(n,)``.

    Returns:
        A scalar, at least 1.

    Raises:
        ValueError: if no eigenvalue is positive.

    Example:
        >>> intrinsic_dimension([4.0, 2.0, 2.0])
        tensor(2., dtype=torch.float64)
    """
    return _scalar(spectral_statistics.intrinsic_dimension(eigenvalues), eigenvalues)


def participation_ratio(eigenvalues: Eigenvalues) -> Tensor:
    """Squared trace over squared Frobenius norm; see `spectral_statistics.participation_ratio`.

    Args:
        eigenvalues: ``(n,)``.

    Returns:
        A scalar, at least 1.

    Raises:
        ValueError: if no eigenvalue is positive.

    Example:
        >>> participation_ratio([2.0, 1.0, 1.0])
        tensor(2.6667, dtype=torch.float64)
    """
    return _scalar(spectral_statistics.participation_ratio(eigenvalues), eigenvalues)


def outlier_ratio(eigenvalues: Eigenvalues, num_classes: int) -> Tensor:
    r""":math:`\lambda_1 / \lambda_{C + 1}`; see `spectral_statistics.outlier_ratio`.

    Args:
        eigenvalues: ``(n,)``.
        num_classes: C, at least 1.

    Returns:
        A scalar, at least 1.

    Raises:
        ValueError: if fewer than C + 1 eigenvalues are positive.

    Example:
        >>> outlier_ratio([8.0, 6.0, 2.0, 1.0], num_classes=2)
        tensor(4., dtype=torch.float64)
    """
    return _scalar(spectral_statistics.outlier_ratio(eigenvalues, num_classes), eigenvalues)


def widest_float(device: torch.device) -> torch.dtype:
    """The most precise floating-point type of a device.

    Args:
        device: any.

    Returns:
        float64, or float32 where there is no float64.

    Example:
        >>> widest_float(torch.device("cpu")), widest_float(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _scalar(value: float, like: Eigenvalues) -> Tensor:
    device = like.device if isinstance(like, Tensor) else torch.device("cpu")
    return torch.tensor(value, dtype=widest_float(device), device=device)
