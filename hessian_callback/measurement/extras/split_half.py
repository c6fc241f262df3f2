"""The slopes on two halves of the samples as an extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hessian_callback.measurement.extras.base import Examination, Extra, Finding
from hessian_callback.measurement.split_half import assign_halves, check_parts, cut_large, sampling_stderr

__all__ = ["SplitHalf"]


@dataclass(frozen=True, kw_only=True)
class SplitHalf(Extra):
    r"""The slopes :math:`s_1, s_2` on two random halves of the samples, and :math:`\sigma = |s_1 - s_2| / 2`.

    Logs ``slope_half_1``, ``slope_half_2`` and ``slope_sampling_stderr``, for as much work as the measurement itself.
    See `split_half` for the statistics.
    """

    name: ClassVar[str] = "split_half"
    keys: ClassVar[Mapping[str, str]] = {
        "slope_half_1": "slope on one random half of the samples",
        "slope_half_2": "slope on the other half",
        "slope_sampling_stderr": "half of their absolute difference, the standard error of the slope",
    }
    needs_operator: ClassVar[bool] = False

    def expected_hvps(self, hvps_per_spectrum: int) -> int:
        """Return the products expected: each half takes as many as a spectrum, on half of the samples."""
        return hvps_per_spectrum

    def compute(self, examination: Examination) -> Finding | None:
        """Measure both halves; ``None`` without a fit on all samples."""
        if examination.fit is None:
            return None
        problem = examination.problem
        batches, weights, keys = cut_large(
            problem.batches, problem.weights, problem.keys, problem.ranks, batch_weight=problem.batch_weight
        )
        check_parts(
            problem.loss_fn,
            problem.model,
            (problem.batches, problem.weights),
            (batches, weights),
            problem.ranks,
        )
        half_of = assign_halves(keys, weights, problem.ranks, seed=examination.seed)
        slopes, num_hvps = [], 0
        for half in (0, 1):
            chosen = [position for position, other in enumerate(half_of) if other == half]
            part = problem.on_samples(
                [batches[n] for n in chosen], [weights[n] for n in chosen], [keys[n] for n in chosen]
            )
            spectrum = examination.solve(part, f"half={half + 1}")
            num_hvps += spectrum.num_matvecs
            fit, reason = examination.solver.fit(spectrum, examination.num_eigenvalues)
            if fit is None or fit.num_eigenvalues != examination.fit.num_eigenvalues:
                raise ValueError(
                    f"half {half + 1} has no slope of {examination.fit.num_eigenvalues} eigenvalues: {reason}"
                )
            slopes.append(fit.slope)
        values = {"slope_half_1": slopes[0], "slope_half_2": slopes[1]}
        return Finding({**values, "slope_sampling_stderr": sampling_stderr(*slopes)}, num_hvps)
