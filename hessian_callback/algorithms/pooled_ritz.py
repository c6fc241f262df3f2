r"""The published protocol: pool the Ritz values of several Lanczos runs and fit the largest of them.

It serves comparisons. `top_eigenvalues` iterates one run until every eigenvalue has an error bound and excludes missed
eigenvalues. The protocol takes the Ritz values of a fixed number of steps:

- **Copies.** Runs from different start vectors find the same eigenvalues. An eigenvalue that all r runs have found is
  r times in the pool, and the K fitted values are about K / r distinct ones. The slope is not affected. Its standard
  error and the critical value count K independent values, and are too small by about :math:`\sqrt r`.
- **The tail.** Few of a run's Ritz values have converged. The others spread too thinly over the rest of the spectrum.
  If the top K of the pool reach into them, then the slope is too steep, or a bulk of eigenvalues looks like the tail
  of a power law.

Source: Tang et al., ICML 2025, who printed no code. Three runs and the number of steps are from their text, the
start vectors of random signs from the software that they name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.algorithms.lanczos_tridiagonal import lanczos_tridiagonal
from hessian_callback.algorithms.spectrum import Spectrum, meets_tolerance
from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.random_vectors import Purpose, rademacher_slice

__all__ = ["PooledRitzValues", "pooled_ritz_values"]


@dataclass(frozen=True)
class PooledRitzValues:
    r"""Ritz values of several runs in one list.

    Attributes:
        ritz_values: ``(r m,)``, descending, float64 on the CPU, in the eigenvalues' unit.
        residuals: norm of the residual of each Ritz vector, ``(r m,)``: a bound on the distance to *some* eigenvalue,
            which may be the same for several of them.
        num_runs: r.
        rounding: additive error of every Ritz value.
        num_matvecs: products spent.

    Example:
        >>> pool = PooledRitzValues(
        ...     ritz_values=torch.tensor([2.0, 2.0, 1.0, 0.7], dtype=torch.float64),
        ...     residuals=torch.tensor([0.0, 0.0, 0.1, 0.3], dtype=torch.float64),
        ...     num_runs=2, rounding=1e-12, num_matvecs=4,
        ... )
        >>> pool.top(3).eigenvalues
        tensor([2., 2., 1.], dtype=torch.float64)
        >>> pool.num_distinct(3)
        2
    """

    ritz_values: Tensor
    residuals: Tensor
    num_runs: int
    rounding: float
    num_matvecs: int

    def top(self, k: int, *, rtol: float = 1e-2) -> Spectrum:
        """Return the k largest values of the pool as a spectrum without bounds by index.

        Args:
            k: at least 1; all of them if there are fewer.
            rtol: an eigenvalue counts as converged if its residual is at most this part of it.

        Returns:
            A `Spectrum` with ``missed_probability`` 1.0: its ``error_bounds`` are distances to some eigenvalue,
            and copies stand side by side.

        Raises:
            TypeError: if k is no integer.
            ValueError: if it is below 1.
        """
        k = whole_number("k", k, at_least=1)
        values, bounds = self.ritz_values[:k].clone(), self.residuals[:k] + self.rounding
        return Spectrum(
            eigenvalues=values,
            error_bounds=bounds,
            converged=meets_tolerance(values, bounds, rtol, self.rounding, rtol * float(self.ritz_values.abs().max())),
            rtol=rtol,
            missed_probability=1.0,
            num_matvecs=self.num_matvecs,
            stopped="max_matvecs",
            rounding=self.rounding,
            symmetry_defect=0.0,
            ritz_values=self.ritz_values.clone(),
        )

    def num_distinct(self, k: int) -> int:
        """Count the groups among the k largest values whose residual intervals overlap.

        There are at least so many different eigenvalues. Copies of one fall into the same group.
        """
        values, reach = self.ritz_values[:k], self.residuals[:k] + self.rounding
        lowest_so_far = (values - reach).cummin(0).values
        highest_to_come = (values + reach).flip(0).cummax(0).values.flip(0)
        return int(values.numel() > 0) + int((lowest_so_far[:-1] > highest_to_come[1:]).sum())


@full_float32()
def pooled_ritz_values(
    operator: SymmetricOperator,
    *,
    num_runs: int = 3,
    num_steps: int = 1000,
    seed: int = 0,
    progress: Callable[[LanczosProgress], None] | None = None,
) -> PooledRitzValues:
    r"""Run Lanczos several times from vectors of random signs and pool the Ritz values.

    Costs ``num_runs * num_steps`` products. Every run is reorthogonalised fully.

    Args:
        operator: the matrix.
        num_runs: r, at least 1.
        num_steps: m, steps of each run, at least 1; at most P are made.
        seed: seed of the start vectors, which are drawn by coordinate.
        progress: called after every product.

    Raises:
        TypeError: if a number is of the wrong type.
        ValueError: for arguments out of range.
        ArithmeticError: when a product holds NaN or infinity, or a basis lost its orthogonality.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 501, dtype=torch.float64) ** -1.0
        >>> pool = pooled_ritz_values(MatvecOperator(lambda v: diagonal * v, 500), num_steps=40)
        >>> pool.ritz_values[:6].round(decimals=3)
        tensor([1.0000, 1.0000, 1.0000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
        >>> pool.num_matvecs
        120
    """
    num_runs, num_steps = (
        whole_number("num_runs", num_runs, at_least=1),
        whole_number("num_steps", num_steps, at_least=1),
    )
    seed = whole_number("seed", seed, at_least=0)
    planned = num_runs * min(num_steps, operator.partition.size)
    runs = []
    spent = 0

    def report(num_matvecs: int) -> None:
        if progress is not None:
            progress(LanczosProgress(spent + num_matvecs, planned, 0, planned))

    for draw in range(num_runs):
        start = rademacher_slice(
            operator.partition,
            seed=seed,
            draw=draw,
            purpose=Purpose.PAPER,
            dtype=operator.dtype,
            device=operator.device,
        )
        runs.append(lanczos_tridiagonal(operator, start, num_steps, progress=report))
        spent += runs[-1].num_matvecs
    values, order = torch.cat([run.ritz_values for run in runs]).sort(descending=True, stable=True)
    return PooledRitzValues(
        ritz_values=values,
        residuals=torch.cat([run.residuals for run in runs])[order],
        num_runs=num_runs,
        rounding=max(run.rounding for run in runs),
        num_matvecs=spent,
    )
