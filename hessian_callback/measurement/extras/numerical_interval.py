r"""The slopes that the eigenvalues' error bounds allow, as an extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.measurement.extras.base import Examination, Extra, Finding
from hessian_callback.power_law.uncertainty import slope_numerical_interval

__all__ = ["NumericalInterval", "numerical_interval_of"]


@dataclass(frozen=True, kw_only=True)
class NumericalInterval(Extra):
    """The smallest and the largest slope that the eigenvalues' error bounds allow; costs nothing.

    Logs ``slope_numerical_low`` and ``slope_numerical_high``.
    """

    name: ClassVar[str] = "numerical_interval"
    keys: ClassVar[Mapping[str, str]] = {
        "slope_numerical_low": "smallest slope that the eigenvalues' error bounds allow",
        "slope_numerical_high": "largest slope that they allow",
    }
    needs_bounds: ClassVar[bool] = True

    def compute(self, examination: Examination) -> Finding | None:
        """Compute the interval; ``None`` without a fit."""
        if examination.fit is None:
            return None
        low, high = numerical_interval_of(examination.spectrum, examination.fit.num_eigenvalues)
        return Finding({"slope_numerical_low": low, "slope_numerical_high": high})


def numerical_interval_of(spectrum: Spectrum, num_eigenvalues: int) -> tuple[float, float]:
    r"""Compute the smallest and largest slope that a spectrum's error bounds allow.

    Exact products never put a Ritz value above the eigenvalue of its rank, so the i-th eigenvalue lies in
    :math:`[\theta_i - \rho, \theta_i + b_i]`, where :math:`\rho` is the rounding level.

    Args:
        spectrum: eigenvalues with bounds by rank.
        num_eigenvalues: K, how many of them were fitted.

    Returns:
        ``(low, high)``; see `slope_numerical_interval`.

    Raises:
        ValueError: if an eigenvalue is not above the rounding level, or K is out of range.

    Example:
        >>> import torch
        >>> from hessian_callback.algorithms.lanczos import top_eigenvalues
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 301, dtype=torch.float64) ** -1.0
        >>> spectrum = top_eigenvalues(MatvecOperator(lambda v: diagonal * v, 300), k=20, rtol=0.01)
        >>> low, high = numerical_interval_of(spectrum, 20)
        >>> low <= float((diagonal[:20] / diagonal[19]).log().mean()) <= high, high - low < 0.02
        (True, True)
    """
    rounding = spectrum.rounding
    return slope_numerical_interval(
        spectrum.eigenvalues[:num_eigenvalues] - rounding,
        spectrum.error_bounds[:num_eigenvalues] + rounding,
        sides="above",
        num_eigenvalues=num_eigenvalues,
    )
