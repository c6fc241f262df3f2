r"""How far the space of the top eigenvectors turns from one measurement to the next, and how far it may.

The robust low-dimensional subspace, measured: principal angles between the top-k eigenspaces of two Hessians,
and beside them the bound of Davis and Kahan, which allows a large angle only where the change of the Hessian
is large against the eigengap.

Sources: Davis and Kahan (1970) for the bound; Parlett (1998), ch. 11, for its form with a residual; Björck and
Golub (1973) for the angles; Gur-Ari, Roberts and Dyer (2018) for the overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.distributed import Partition, Ranks
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.tall_matrices import inner_products, orthonormal_columns, triangular_factor

__all__ = ["SubspaceRotation", "davis_kahan_bounds", "principal_angles", "subspace_rotation"]


@dataclass(frozen=True)
class SubspaceRotation:
    r"""Two eigenspaces of dimension k, and what the theory allows between them.

    With U the old eigenvectors, :math:`\tilde H` the new Hessian, :math:`M = U^T \tilde H U` and
    :math:`\tilde\lambda_{k+1}` the largest new eigenvalue outside the new space,

    .. math:: \|\sin\Theta\|_2 \le \frac{\|\tilde H U - U M\|_2}{\lambda_{\min}(M) - \tilde\lambda_{k+1}},

    if the denominator is positive. As :math:`\|\tilde H U - U M\| \le \|(\tilde H - H) U\|`, this is the Davis-Kahan
    bound with what the perturbation does to U in the place of its norm.

    Attributes:
        angles: principal angles, ``(k,)``, ascending, in radians from 0 to pi / 2.
        sine_bound: the right-hand side; infinite if the denominator is not positive. Above 1 it says nothing.
        gap: the denominator, in the eigenvalues' unit, with the error bound of the eigenvalue taken off.
        residual_norm: the numerator, likewise.
        perturbation_norm: :math:`\|(\tilde H - H) U\|_2`, a lower bound of the norm of the Hessian's change.
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
        """The largest principal angle in radians: a single direction that got lost makes it pi / 2."""
        return float(self.angles[-1])

    @property
    def overlap(self) -> float:
        r"""Mean squared cosine, :math:`\|U^T \tilde U\|_F^2 / k`: 1 for equal spaces, near k / P for random ones."""
        return float(self.angles.cos().square().mean())


@full_float32()
def principal_angles(one: Tensor, other: Tensor, partition: Partition, ranks: Ranks) -> Tensor:
    r"""Angles between the column spaces of two tall matrices whose rows are cut over the ranks.

    .. math:: \cos\theta_i = \sigma_i(Q_1^T Q_2), \qquad \sin\theta_i = \sigma_i(Q_2 - Q_1 Q_1^T Q_2)

    Large angles are taken from the cosine, small ones from the sine, so both come to the accuracy of the dtype.

    Args:
        one: this rank's rows, ``(slice_length, k)``, the padding zero. Columns need not be orthonormal.
        other: likewise, ``(slice_length, l)``.
        partition: how the rows are cut.
        ranks: the processes that hold the other rows.

    Returns:
        ``(min(k, l),)``, ascending, in radians, float64 on the CPU; fewer for columns that are linearly dependent.

    Raises:
        ValueError: if the matrices do not have this rank's number of rows, or one of them is zero.

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
    # Once more: what rounding left of the first space would be taken for an angle.
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

    Costs ``dimension`` products, for the bound; the angles alone (`principal_angles`) cost none.

    Args:
        operator: the present Hessian, :math:`\tilde H`.
        previous: of the earlier one, with at least k ``eigenvectors``.
        current: of the present one, with at least k ``eigenvectors`` and k + 1 eigenvalues.
        dimension: k.

    Raises:
        ValueError: if a spectrum lacks what is needed.
        ArithmeticError: when a product holds NaN or infinity.

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
    partition, ranks = operator.partition, operator.ranks
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")
    if len(current.eigenvalues) <= dimension:
        raise ValueError(
            f"a bound for dimension={dimension} needs {dimension + 1} present eigenvalues, and there are "
            f"{len(current.eigenvalues)}; lower dimension or compute more"
        )
    old, new = (_vectors(spectrum, dimension) for spectrum in (previous, current))
    angles = principal_angles(old, new, partition, ranks)
    images = torch.stack([operator.matvec_slice(column.contiguous()) for column in old.T], 1)
    compressed = inner_products(old, images, ranks)
    if not bool(torch.isfinite(compressed).all()):
        raise ArithmeticError("a product of the operator with an eigenvector holds NaN or infinity")
    compressed = (compressed + compressed.T) / 2
    residual = images - old @ compressed.to(old)
    change = images - old * previous.eigenvalues[:dimension].to(old)
    norms = [
        float(torch.linalg.matrix_norm(triangular_factor(columns, partition, ranks)[1], 2))
        for columns in (residual, change)
    ]
    outside = float(current.eigenvalues[dimension] + current.error_bounds[dimension])
    gap = float(torch.linalg.eigvalsh(compressed)[0]) - outside
    agreed = torch.tensor([*norms, gap], dtype=torch.float64, device=ranks.control_device)
    residual_norm, perturbation_norm, gap = ranks.broadcast(agreed).tolist()
    return SubspaceRotation(
        angles=angles,
        sine_bound=residual_norm / gap if gap > 0 else float("inf"),
        gap=gap,
        residual_norm=residual_norm,
        perturbation_norm=perturbation_norm,
        num_matvecs=dimension,
    )


def davis_kahan_bounds(eigenvalues: Tensor, perturbation_norm: float) -> Tensor:
    r"""Bound the angle of each single eigenvector under a perturbation of known norm.

    .. math:: \sin\angle(u_k, \tilde u_k) \le
              \frac{2\, \|\tilde H - H\|_2}{\min(\lambda_{k-1} - \lambda_k,\; \lambda_k - \lambda_{k+1})}

    Args:
        eigenvalues: of H, ``(K,)``, descending, in any unit.
        perturbation_norm: :math:`\|\tilde H - H\|_2`, in the same unit.

    Returns:
        ``(K - 1,)``: the last eigenvalue has no known gap below. Infinite where the gap is zero; above 1 it says
        nothing.

    Raises:
        ValueError: if there are fewer than 2 eigenvalues, they do not descend, or the norm is negative.

    Source:
        Davis and Kahan (1970), in the form that Tang et al. (ICML 2025) quote.

    Example:
        >>> davis_kahan_bounds(torch.tensor([4.0, 2.0, 1.0]), 0.1)
        tensor([0.1000, 0.2000], dtype=torch.float64)
    """
    values = eigenvalues.detach().cpu().double()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"expected at least 2 eigenvalues in one dimension, got shape {tuple(values.shape)}")
    gaps = -values.diff()
    if not bool((gaps >= 0).all()):
        raise ValueError("the eigenvalues must descend; sort them")
    if not perturbation_norm >= 0:
        raise ValueError(f"perturbation_norm must not be negative, got {perturbation_norm}")
    above = torch.cat([gaps.new_full((1,), float("inf")), gaps[:-1]])
    nearest = torch.minimum(above, gaps)
    return torch.where(nearest > 0, 2 * perturbation_norm / nearest, torch.inf)


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
