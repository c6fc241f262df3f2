r"""Run Lanczos for a fixed number of steps, with full reorthogonalisation.

The result is the Gauss quadrature of the start vector's spectral measure. Spectral densities and the published protocol
use it. `lanczos` iterates until error bounds hold instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from hessian_callback.algorithms.decomposition import Decomposition
from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.linear_operator import SymmetricOperator

__all__ = ["LanczosTridiagonal", "lanczos_tridiagonal"]


@dataclass(frozen=True)
class LanczosTridiagonal:
    r"""Ritz values and quadrature weights of m Lanczos steps from a start vector :math:`v`, converged or not.

    Attributes:
        ritz_values: :math:`\theta_j`, ``(m,)``, descending, float64 on the CPU; in the eigenvalues' unit.
        weights: :math:`w_j`, ``(m,)``, with sum 1: :math:`\sum_j w_j f(\theta_j)` equals :math:`v^T f(A)\, v`
            for :math:`\|v\| = 1` and every polynomial f of degree below 2 m.
        residuals: :math:`\|A y_j - \theta_j y_j\|` of the Ritz vectors, ``(m,)``: the distance to *some* eigenvalue of
            A is at most that, rounding excluded.
        rounding: additive error of every Ritz value, from products and arithmetic.
        num_matvecs: products spent, m.
    """

    ritz_values: Tensor
    weights: Tensor
    residuals: Tensor
    rounding: float
    num_matvecs: int


def lanczos_tridiagonal(
    operator: SymmetricOperator,
    start: Tensor,
    num_steps: int,
    *,
    progress: Callable[[int], None] | None = None,
) -> LanczosTridiagonal:
    r"""Run Lanczos from a start vector for a number of steps, or until its Krylov space is exhausted.

    Args:
        operator: the matrix.
        start: this rank's slice of the start vector, ``(slice_length,)``, of any length but zero.
        num_steps: m, at least 1; one product each.
        progress: called after every product with the number of them.

    Returns:
        The run; it has fewer than ``num_steps`` Ritz values if the Krylov space of the start vector is smaller.

    Raises:
        TypeError: if ``num_steps`` is no integer.
        ValueError: if it is below 1, or the start vector is zero or not finite.
        ArithmeticError: when the operator returns NaN or infinity, or when the basis lost its orthogonality.

    Source:
        Golub and Meurant (2010), ch. 3 and 4, for the quadrature.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> run = lanczos_tridiagonal(MatvecOperator(A.mv, 2), torch.ones(2, dtype=torch.float64), 5)
        >>> run.ritz_values.round(decimals=6), run.weights.round(decimals=6), run.num_matvecs
        (tensor([3., 1.], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64), 2)
    """
    num_steps = whole_number("num_steps", num_steps, at_least=1)
    decomposition = Decomposition(operator, seed=0)
    if not bool(torch.isfinite(start).all()):
        raise ValueError("the start vector holds NaN or infinity")
    if not decomposition.begin(start):
        raise ValueError("the start vector is zero")
    num_steps = min(num_steps, operator.partition.size)
    while True:
        if progress is not None:
            progress(decomposition.num_matvecs)
        if decomposition.size == num_steps or not decomposition.chains:
            break
        decomposition.expand(decomposition.chains[0])
    decomposition.check_orthogonality()
    diagonal, links = decomposition.projection().recurrence(floor=0.0)
    if decomposition.size == operator.partition.size:
        links[-1] = 0.0
    if len(diagonal) == 1:
        values, vectors = diagonal, np.ones((1, 1))
    else:
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, links[:-1])
    rows = np.stack([values, vectors[0] ** 2, links[-1] * np.abs(vectors[-1])])[:, ::-1].copy()
    ranks = operator.ranks
    agreed = ranks.broadcast(torch.from_numpy(rows).to(ranks.control_device)).cpu()
    return LanczosTridiagonal(
        ritz_values=agreed[0].clone(),
        weights=agreed[1].clone(),
        residuals=agreed[2].clone(),
        rounding=decomposition.rounding,
        num_matvecs=decomposition.num_matvecs,
    )
