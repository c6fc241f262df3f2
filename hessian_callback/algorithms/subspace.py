r"""Rotation of the top eigenspace between two measurements, and a bound on it.

Principal angles between the top-k eigenspaces of two Hessians, with the bound of Davis and Kahan. The bound permits a
large angle only if the change of the Hessian is large against the eigengap.

Sources: Davis and Kahan (1970) for the bound; Parlett (1998), ch. 11, for its form with a residual; Björck and
Golub (1973) for the angles; Gur-Ari, Roberts and Dyer (2018) for the overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.distributed import Partition, Ranks
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.tall_matrices import inner_products, orthonormal_columns, triangular_factor

__all__ = ["SubspaceRotation", "principal_angles", "subspace_rotation"]


@dataclass(frozen=True)
class SubspaceRotation:
    r"""Principal angles between two computed eigenspaces of dimension k, and a bound on the largest one.

    Let U be the old Ritz vectors, :math:`\tilde U` the new ones, :math:`\tilde H` the new Hessian with eigenvalues
    :math:`\tilde\lambda_i`, :math:`M = U^T \tilde H U` and
    :math:`\delta = \lambda_{\min}(M) - \tilde\lambda_{k+1}`. If :math:`\delta > 0`, the largest angle obeys

    .. math:: \sin\theta_{\max} \;\le\; \frac{\|\tilde H U - U M\|_2}{\delta}
              + \Bigl(\frac{\sum_{i \le k} (\tilde\lambda_i - \tilde u_i^T \tilde H \tilde u_i)}
              {\tilde\lambda_k - \tilde\lambda_{k+1}}\Bigr)^{1/2} .

    The first term is the bound of Davis and Kahan on the angle between U and the exact eigenspace of
    :math:`\tilde H`. The second one bounds the angle between that space and :math:`\tilde U`, the error of the new
    Ritz vectors. The error bounds of the new eigenvalues bound the sum, so it costs no product. For well converged
    vectors it is near the root of the rounding level. The old Ritz vectors need no such term, because M and the
    residual are formed with them.

    Attributes:
        angles: principal angles, ``(k,)``, ascending, in radians from 0 to pi / 2.
        sine_bound: the right-hand side, rounding included; infinite if :math:`\delta` is not proven positive. Above 1
            it says nothing.
        gap: lower bound of :math:`\delta`, in the eigenvalues' unit.
        residual_norm: :math:`\|\tilde H U - U M\|_2`, in the same unit.
        perturbation_norm: :math:`\|\tilde H U - U \Lambda\|_2` with the old Ritz values :math:`\Lambda`. It is
            :math:`\|(\tilde H - H) U\|_2`, a lower bound of the norm of the Hessian's change, up to the residual of
            the old Ritz vectors.
        num_matvecs: products spent, k.

    Example:
        >>> rotation = SubspaceRotation(
        ...     angles=torch.tensor([0.0, torch.pi / 3], dtype=torch.float64),
        ...     sine_bound=0.9, gap=1.0, residual_norm=0.9, perturbation_norm=1.2, num_matvecs=2,
        ... )
        >>> round(rotation.largest_angle, 4), round(rotation.overlap, 4)
        (1.0472, 0.625)
    """

    angles: Tensor
    sine_bound: float
    gap: float
    residual_norm: float
    perturbation_norm: float
    num_matvecs: int

    @property
    def largest_angle(self) -> float:
        """Return the largest principal angle in radians; one lost direction makes it pi / 2."""
        return float(self.angles[-1])

    @property
    def overlap(self) -> float:
        r"""Return the mean squared cosine, :math:`\|U^T \tilde U\|_F^2 / k`: 1 for equal spaces."""
        return float(self.angles.cos().square().mean())


@full_float32()
def principal_angles(one: Tensor, other: Tensor, partition: Partition, ranks: Ranks) -> Tensor:
    r"""Return the angles between the column spaces of two tall matrices whose rows are cut over the ranks.

    .. math:: \cos\theta_i = \sigma_i(Q_1^T Q_2), \qquad \sin\theta_i = \sigma_i(Q_2 - Q_1 Q_1^T Q_2)

    Large angles are computed from the cosine and small ones from the sine, so both are accurate to the dtype.

    Args:
        one: this rank's rows, ``(slice_length, k)``, the padding zero. Columns need not be orthonormal.
        other: the same of the other matrix, ``(slice_length, l)``.
        partition: partition of the rows over the ranks.
        ranks: the processes that hold the other rows.

    Returns:
        ``(min(k, l),)``, ascending, in radians, float64 on the CPU; fewer if columns are linearly dependent.

    Raises:
        ValueError: if a matrix does not have this rank's number of rows, or is zero.

    Example:
        >>> plane = torch.eye(3, 2, dtype=torch.float64)
        >>> turned = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        >>> principal_angles(plane, turned, Partition(3, 1, 0), Ranks()).round(decimals=4)
        tensor([0.0000, 0.7854], dtype=torch.float64)
    """
    for columns in (one, other):
        if columns.ndim != 2 or columns.shape[0] != partition.slice_length:
            raise ValueError(
                f"expected {partition.slice_length} rows on this rank, got shape {tuple(columns.shape)}; "
                "pass eigenvectors of operators over the same parameters and ranks"
            )
    first = orthonormal_columns(one, partition, ranks)
    second = orthonormal_columns(other, partition, ranks)
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    if second.shape[1] == 0:
        raise ValueError("a matrix of zeros spans no space; pass eigenvectors")
    cosines_of = inner_products(first, second, ranks)
    remainder = second - first @ cosines_of.to(second)
    # A second pass, because the part of the first space that rounding left would count as an angle.
    remainder = remainder - first @ inner_products(first, remainder, ranks).to(second)
    _, upper = triangular_factor(remainder, partition, ranks)
    cosines = torch.linalg.svdvals(cosines_of).clamp(max=1)
    sines = torch.linalg.svdvals(upper).flip(0).clamp(max=1)
    angles = torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())
    # Libraries may round differently on different machines.
    return ranks.broadcast(angles.to(ranks.control_device)).cpu()


@full_float32()
def subspace_rotation(
    operator: SymmetricOperator, previous: Spectrum, current: Spectrum, *, dimension: int
) -> SubspaceRotation:
    r"""Compare the top eigenspaces of an earlier and the present Hessian; see `SubspaceRotation`.

    Costs ``dimension`` products, for the bound. The angles alone (`principal_angles`) cost none.

    Args:
        operator: the present Hessian, :math:`\tilde H`.
        previous: spectrum of the earlier one, with at least k ``eigenvectors``.
        current: spectrum of the present one, with at least k ``eigenvectors`` and k + 1 eigenvalues.
        dimension: k.

    Raises:
        TypeError: if ``dimension`` is not an integer.
        ValueError: if it is below 1, or a spectrum has too few eigenvectors or eigenvalues.
        ArithmeticError: if a product holds NaN or infinity.

    Example:
        >>> from hessian_callback.algorithms.lanczos import top_eigenvalues
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> def at(angle):
        ...     c, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
        ...     turn = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        ...     return MatvecOperator((turn @ torch.diag(torch.tensor([3.0, 1.0]).double()) @ turn.T).mv, 2)
        >>> before, now = (top_eigenvalues(at(a), k=2, return_eigenvectors=True) for a in (0.0, 0.1))
        >>> rotation = subspace_rotation(at(0.1), before, now, dimension=1)
        >>> round(rotation.largest_angle, 6), rotation.largest_angle <= rotation.sine_bound, rotation.num_matvecs
        (0.1, True, 1)
    """
    dimension = whole_number("dimension", dimension, at_least=1)
    if len(current.eigenvalues) <= dimension:
        raise ValueError(
            f"a bound for dimension={dimension} needs {dimension + 1} present eigenvalues, and there are "
            f"{len(current.eigenvalues)}; lower dimension or compute more"
        )
    old, new = (_vectors(spectrum, dimension) for spectrum in (previous, current))
    partition, ranks = operator.partition, operator.ranks
    angles = principal_angles(old, new, partition, ranks)
    residual_norm, perturbation_norm, smallest = _change(operator, old, previous.eigenvalues[:dimension])
    outside = float(current.eigenvalues[dimension] + current.error_bounds[dimension])
    gap = smallest - current.rounding - outside
    agreed = torch.tensor([residual_norm, perturbation_norm, gap], dtype=torch.float64, device=ranks.control_device)
    residual_norm, perturbation_norm, gap = ranks.broadcast(agreed).tolist()
    sine_bound = float("inf")
    if gap > 0:
        # Each of the k columns of the residual has the error of a product.
        error = dimension**0.5 * current.rounding
        sine_bound = (residual_norm + error) / gap + _ritz_vectors_error(current, dimension, gap)
    return SubspaceRotation(angles, sine_bound, gap, residual_norm, perturbation_norm, num_matvecs=dimension)


def _change(operator: SymmetricOperator, old: Tensor, values: Tensor) -> tuple[float, float, float]:
    """Multiply with the old vectors U; return ``||AU - UM||``, ``||AU - U diag(values)||`` and the smallest of M."""
    images = torch.stack([operator.matvec_slice(column.contiguous()) for column in old.T], 1)
    compressed = inner_products(old, images, operator.ranks)
    if not bool(torch.isfinite(compressed).all()):
        raise ArithmeticError(
            "a product of the operator with an eigenvector holds NaN or infinity; check the loss for overflow or a "
            "division by zero on these batches, or use float64"
        )
    compressed = (compressed + compressed.T) / 2
    norms = [
        float(torch.linalg.matrix_norm(triangular_factor(images - part, operator.partition, operator.ranks)[1], 2))
        for part in (old @ compressed.to(old), old * values.to(old))
    ]
    return norms[0], norms[1], float(torch.linalg.eigvalsh(compressed)[0])


def _ritz_vectors_error(spectrum: Spectrum, dimension: int, gap: float) -> float:
    r"""Bound the sine of the largest angle between the first k Ritz vectors and the exact eigenspace.

    With :math:`q_j = \|U^T x_j\|^2` for the eigenvectors :math:`x_j`, :math:`\sum_i u_i^T A u_i = \sum_j q_j \lambda_j`
    and :math:`\|\sin\Theta\|_F^2 = \sum_{j \le k} (1 - q_j) = \sum_{j > k} q_j`. Hence
    :math:`\sum_{i \le k} (\lambda_i - u_i^T A u_i) \ge (\lambda_k - \lambda_{k+1})\, \|\sin\Theta\|_F^2`.

    Args:
        spectrum: the eigenvalues and their bounds.
        dimension: k.
        gap: a positive lower bound of :math:`\lambda_k - \lambda_{k+1}`.
    """
    values, bounds, rounding = spectrum.eigenvalues, spectrum.error_bounds, spectrum.rounding
    own = float(values[dimension - 1] - values[dimension] - bounds[dimension]) - rounding
    missing = float(bounds[:dimension].sum()) + dimension * rounding
    return float((missing / max(gap, own)) ** 0.5)


def _vectors(spectrum: Spectrum, dimension: int) -> Tensor:
    vectors = spectrum.eigenvectors
    if vectors is None:
        raise ValueError("the spectrum holds no eigenvectors; compute it with return_eigenvectors=True")
    if vectors.shape[1] < dimension:
        raise ValueError(
            f"dimension={dimension} needs as many eigenvectors, and the spectrum holds {vectors.shape[1]}; "
            "lower dimension or compute more"
        )
    return vectors[:, :dimension]
