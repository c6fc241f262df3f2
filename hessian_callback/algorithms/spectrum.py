"""The result of an eigenvalue computation: values, error bounds and their justification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RoundingBasis", "Spectrum", "StopReason", "meets_tolerance"]

StopReason = Literal["converged", "criterion", "no_more_positive", "precision", "exhausted", "max_matvecs"]
RoundingBasis = Literal["a-priori", "measured", "assumed"]


def meets_tolerance(values: Tensor, bounds: Tensor, rtol: float, rounding: float, negligible: float) -> Tensor:
    """Return which eigenvalues count as converged.

    Either the bound is at most ``rtol`` times the eigenvalue. Or the eigenvalue can't be told from zero: its bound
    covers zero, is at most four rounding levels, and these are negligible.

    Args:
        values: eigenvalues, ``(k,)``.
        bounds: their error bounds, ``(k,)``.
        rtol: relative tolerance.
        rounding: rounding level.
        negligible: absolute error that is negligible beside the largest eigenvalue.

    Returns:
        ``(k,)``, bool.

    Example:
        >>> values = torch.tensor([1.0, 1e-5, 1e-9], dtype=torch.float64)
        >>> bounds = torch.tensor([4e-6, 4e-6, 4e-6], dtype=torch.float64)
        >>> meets_tolerance(values, bounds, rtol=1e-2, rounding=4e-6, negligible=1e-2)
        tensor([ True, False,  True])
    """
    near_zero = (values.abs() <= bounds) & (bounds <= 4 * rounding)
    return (bounds <= rtol * values.abs()) | (near_zero & (4 * rounding <= negligible))


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
        converged: ``(k,)``, bool: whether the bound met the tolerance, see `meets_tolerance`.
        missed_probability: bound on the probability that a probe overlooked an eigenvalue that the bounds exclude.
        num_matvecs: matrix-vector products spent, probes included; those of ``num_precise_products`` are not.
        rtol: the requested relative tolerance.
        stopped: why the computation ended: ``"converged"`` (all k within tolerance), ``"criterion"`` (the criterion
            accepted the bounds before), ``"no_more_positive"`` (the bounds exclude further eigenvalues above the
            rounding level), ``"precision"`` (all bounds are at most four rounding levels, and further products can't
            make them meet the tolerance), ``"exhausted"`` (the operator has fewer than k dimensions) or
            ``"max_matvecs"``.
        rounding: the part of each bound that covers rounding and inexact products. An eigenvalue whose tolerance is
            below it cannot converge in this precision.
        symmetry_defect: the Frobenius norm of the differences :math:`u^T A v - v^T A u` over pairs of basis vectors; if
            rounding can't explain them, extrapolated to all directions.
        ritz_values: ``(m,)``, descending: all eigenvalues of the projected matrix. Those beyond the
            first k are estimates without a bound. A restart drops the smallest ones.
        eigenvectors: this rank's slice ``(slice_length, k)`` of the Ritz vectors, if they were requested.
        rounding_basis: the source of the error of a product in ``rounding``: ``"measured"`` (the run was compared with
            products of higher precision), ``"a-priori"`` (float64, a multiple of the machine precision) or
            ``"assumed"`` (a multiple of the machine precision of float32 or less, which cancellation in the loss can
            exceed). The documentation's page "Error bounds" lists what else is proven, measured and assumed.
        num_precise_products: products in higher precision that measured rounding errors.
        num_restarts: number of times that a full basis was reduced to its leading Ritz vectors.

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
    rounding_basis: RoundingBasis = "assumed"
    num_precise_products: int = 0
    num_restarts: int = 0

    @property
    def all_converged(self) -> bool:
        """Whether every one of the k eigenvalues met the tolerance."""
        return bool(self.converged.all())

    @property
    def num_converged(self) -> int:
        """Number of the k eigenvalues that met the tolerance."""
        return int(self.converged.sum())

    @property
    def num_negative(self) -> int:
        """Number of Ritz values below minus the rounding level: at least so many eigenvalues are negative.

        Pooled runs count copies as well.
        """
        return int((self.ritz_values < -self.rounding).sum())

    @property
    def resolved(self) -> Tensor:
        """``(k,)``, bool: positive, and known to the relative tolerance.

        Narrower than ``converged``, which also holds for eigenvalues that can't be told from zero.
        """
        return self.error_bounds <= self.rtol * self.eigenvalues

    @property
    def positive_converged(self) -> Tensor:
        """The eigenvalues that a power law can be fitted to: the leading run of resolved ones.

        A gap would shift every later rank k of lambda_k = lambda_1 k^-s, so the run ends before the first unresolved
        eigenvalue.
        """
        resolved = self.resolved
        num_leading = int(torch.cumprod(resolved.to(torch.int64), dim=0).sum())
        return self.eigenvalues[:num_leading]
