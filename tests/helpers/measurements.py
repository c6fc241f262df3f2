"""Measurements made by hand, for figures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.measurement.measurement import Measurement, When
from hessian_callback.power_law.fit import fit_power_law


def power_law(slope: float, k: int = 50) -> Tensor:
    return 4.0 * torch.arange(1, k + 1, dtype=torch.float64) ** -slope


def measure(
    eigenvalues: Tensor,
    *,
    bounds: Tensor | None = None,
    epoch: int = 3,
    step: int = 30,
    when: When = "epoch",
    reason: str | None = None,
    drop_first: int = 0,
) -> Measurement:
    bounds = 1e-3 * eigenvalues.abs() if bounds is None else bounds
    spectrum = Spectrum(
        eigenvalues=eigenvalues,
        error_bounds=bounds,
        converged=bounds <= 1e-2 * eigenvalues.abs(),
        rtol=1e-2,
        missed_probability=1e-6,
        num_matvecs=180,
        stopped="converged",
        rounding=1e-9,
        symmetry_defect=0.0,
        ritz_values=eigenvalues,
    )
    leading = spectrum.positive_converged
    fit = fit_power_law(leading, drop_first=drop_first) if len(leading) - drop_first >= 3 else None
    return Measurement(epoch=epoch, step=step, when=when, spectrum=spectrum, fit=fit, reason=reason, seconds=1.5)


def with_density(density: SpectralDensity | None, measurement: Measurement | None = None) -> Measurement:
    return replace(measurement or measure(power_law(0.8)), density=density)


def nodes(*rows: list[tuple[float, float]], size: int = 100) -> SpectralDensity:
    both = torch.tensor(rows, dtype=torch.float64)
    return SpectralDensity(
        nodes=both[..., 0], weights=both[..., 1], size=size, rounding=0.0, num_matvecs=both[..., 0].numel()
    )


def failure(reason: str = "the loss is NaN") -> Measurement:
    return Measurement(epoch=4, step=40, when="epoch", spectrum=None, fit=None, reason=reason, seconds=0.1)
