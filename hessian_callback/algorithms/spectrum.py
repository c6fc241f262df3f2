"""The result of an eigenvalue computation, with what is proven about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Spectrum", "StopReason"]

StopReason = Literal["converged", "criterion", "no_more_positive", "exhausted", "max_matvecs"]


@dataclass(frozen=True)
class Spectrum:
    r"""The largest eigenvalues of a symmetric operator and an error bound for each.

    With probability at least ``1 - missed_probability`` over the random probe vector,

    .. math:: |\lambda_i - \theta_i| \le b_i \quad \text{for all } i \le k \text{ at once},

    where :math:`\lambda_i` is the operator's i-th largest eigenvalue counted with multiplicity,
    :math:`\theta_i` is ``eigenvalues[i]`` and :math:`b_i` is ``error_bounds[i]``. `lanczos` has the proof.

    Attributes:
        eigenvalues: ``(k,)``, descending, on the CPU in float64. Unconverged ones are among them:
            see ``converged``.
        error_bounds: ``(k,)``, float64, in the eigenvalues' unit; rounding included.
        converged: ``(k,)``, bool: whether the bound met the tolerance.
        missed_probability: the chance that the probe overlooked an eigenvalue that the bounds exclude.
        num_matvecs: matrix-vector products spent, probes included.
        rtol: the relative tolerance that was asked for.
        stopped: why the computation ended: ``"converged"`` (all k within tolerance), ``"criterion"`` (the criterion
            that was passed accepted the bounds before),
            ``"no_more_positive"`` (the bounds exclude further eigenvalues above the rounding level),
            ``"exhausted"`` (the operator has fewer than k dimensions) or ``"max_matvecs"``.
        rounding: the part of each bound that rounding or inexact products account for. An eigenvalue
            whose tolerance is below it cannot converge in this precision, however many products are spent.
        symmetry_defect: largest :math:`|u^T H v - v^T H u|` seen over pairs of basis vectors, an
            estimate of the products' own error.
        ritz_values: ``(m,)``, descending: all eigenvalues of the projected matrix. Those beyond the
            first k are estimates without a bound.
        eigenvectors: this rank's slice ``(slice_length, k)`` of the Ritz vectors, if they were asked for.

    Example:
        >>> spectrum = Spectrum(
        ...     eigenvalues=torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64),
        ...     error_bounds=torch.tensor([1e-9, 1e-3, 0.7], dtype=torch.float64),
        ...     converged=torch.tensor([True, True, False]),
        ...     rtol=1e-2, missed_probability=1e-4, num_matvecs=12, stopped="max_matvecs", rounding=1e-15,
        ...     symmetry_defect=0.0, ritz_values=torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64),
        ... )
        >>> spectrum.all_converged, spectrum.num_converged, spectrum.num_negative
        (False, 2, 1)
        >>> spectrum.positive_converged
        tensor([2., 1.], dtype=torch.float64)
    """

    eigenvalues: Tensor
    error_bounds: Tensor
    converged: Tensor
    rtol: float
    missed_probability: float
    num_matvecs: int
    stopped: StopReason
    rounding: float
    symmetry_defect: float
    ritz_values: Tensor
    eigenvectors: Tensor | None = None

    @property
    def all_converged(self) -> bool:
        """Whether every one of the k eigenvalues met the tolerance."""
        return bool(self.converged.all())

    @property
    def num_converged(self) -> int:
        """How many of the k eigenvalues met the tolerance."""
        return int(self.converged.sum())

    @property
    def num_negative(self) -> int:
        """Negative values beyond rounding among all Ritz values: at least so many eigenvalues are negative."""
        return int((self.ritz_values < -self.rounding).sum())

    @property
    def resolved(self) -> Tensor:
        """``(k,)``, bool: positive, and known to the relative tolerance.

        Narrower than ``converged``, which forgives an eigenvalue near zero a bound at the rounding level.
        """
        return self.error_bounds <= self.rtol * self.eigenvalues

    @property
    def positive_converged(self) -> Tensor:
        """The eigenvalues that a power law can be fitted to: the leading run of resolved ones.

        A gap in the run would shift every later rank k of lambda_k = lambda_1 k^-s, so nothing behind
        the first unresolved eigenvalue is returned.
        """
        resolved = self.resolved
        num_leading = int(torch.cumprod(resolved.to(torch.int64), dim=0).sum())
        return self.eigenvalues[:num_leading]
