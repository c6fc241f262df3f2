"""What the comparisons are worth: errors of trace estimators, and the published protocol against the strict one.

    python -m benchmarks.comparisons_report

writes benchmarks/COMPARISONS.md. Every number comes from the seeds below; some three minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.statistics_report import table
from hessian_callback.algorithms.estimate import Estimate
from hessian_callback.algorithms.lanczos import top_eigenvalues
from hessian_callback.algorithms.pooled_ritz import pooled_ritz_values
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.algorithms.trace import moments
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.measurement.split_half import sampling_stderr
from hessian_callback.power_law.fit import fit_power_law

SIZE = 2000
INDEX = torch.arange(1, SIZE + 1, dtype=torch.float64)
BULK = torch.from_numpy(np.random.default_rng(0).beta(1.5, 1.5, SIZE - 10))

SPECTRA: dict[str, Tensor] = {
    "power law, s = 1": INDEX**-1.0,
    "power law, s = 0.5": INDEX**-0.5,
    "s = 1, a quarter negative": torch.cat([INDEX[:1500] ** -1.0, -0.2 * INDEX[:500] ** -0.8]),
    "ten outliers, semicircle around 0": torch.cat([torch.linspace(8, 3, 10).double(), 0.4 * BULK - 0.2]),
    "ten outliers, positive bulk": torch.cat([torch.linspace(8, 3, 10).double(), BULK]).sort(descending=True).values,
}


def diagonal(eigenvalues: Tensor) -> MatvecOperator:
    return MatvecOperator(lambda v: eigenvalues * v, len(eigenvalues))


def xtrace(eigenvalues: Tensor, num_products: int, seed: int) -> Estimate:
    """The exchangeable estimator of Epperly, Tropp and Webber (2024), by leaving each vector out in turn."""
    size, half = len(eigenvalues), num_products // 2
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(size, half, dtype=torch.float64, generator=generator)
    basis, upper = torch.linalg.qr(eigenvalues[:, None] * vectors)
    compressed = basis.T @ (eigenvalues[:, None] * basis)
    dropped = torch.linalg.inv(upper).T
    dropped /= dropped.norm(dim=0)
    draws = []
    for number in range(half):
        missing = dropped[:, number]
        left = basis.T @ vectors[:, number]
        rest = vectors[:, number] - basis @ (left - missing * (missing @ left))
        rest *= (size - half + 1) ** 0.5 / rest.norm()
        draws.append(compressed.trace() - missing @ compressed @ missing + rest @ (eigenvalues * rest))
    values = torch.stack(draws)
    return Estimate(float(values.mean()), float(values.std() / half**0.5), half, num_products)


def _hutchpp(operator: MatvecOperator, num_products: int, spectrum: Spectrum | None, seed: int) -> Estimate:
    return moments(operator, num_matvecs=num_products, spectrum=spectrum, seed=seed).trace


def traces(draws: int) -> str:
    """Errors of three estimators for the same number of products."""
    rows = []
    for name in list(SPECTRA)[:4]:
        eigenvalues = SPECTRA[name]
        operator = diagonal(eigenvalues)
        truth = float(eigenvalues.sum())
        top = top_eigenvalues(operator, k=20, max_matvecs=400, return_eigenvectors=True)
        for products in (12, 30, 60):
            row = [name, str(products)]
            methods: list[Callable[[int], Estimate]] = [
                partial(_hutchpp, operator, products, None),
                partial(xtrace, eigenvalues, products),
                partial(_hutchpp, operator, products, top),
            ]
            for method in methods:
                found = [method(seed) for seed in range(draws)]
                error = np.sqrt(np.mean([(one.value - truth) ** 2 for one in found]))
                claimed = np.sqrt(np.mean([one.stderr**2 for one in found]))
                row += [f"{100 * error / abs(truth):.2f}", f"{claimed / error:.2f}"]
            rows.append(row)
    head = ["spectrum", "products", "Hutch++, %", "claimed / true", "XTrace, %", "claimed / true"]
    return table([*head, "top 20 taken out, %", "claimed / true"], rows)


def protocols() -> str:
    """The slope of K eigenvalues by both modes."""
    rows = []
    for name in ("power law, s = 1", "power law, s = 0.5", "ten outliers, positive bulk"):
        eigenvalues = SPECTRA[name]
        operator = diagonal(eigenvalues)
        for k in (60, 150):
            truth = fit_power_law(eigenvalues[:k]).slope
            strict = top_eigenvalues(operator, k=k, max_matvecs=12 * k)
            row = [name, str(k), f"{truth:.3f}"]
            row += [f"{fit_power_law(strict.positive_converged).slope:.3f} ({strict.num_matvecs})"]
            for runs, steps in ((3, k), (3, k // 3), (1, k)):
                pool = pooled_ritz_values(operator, num_runs=runs, num_steps=steps)
                top = pool.top(k)
                fit = fit_power_law(top.eigenvalues[top.eigenvalues > 0])
                row.append(f"{fit.slope:.3f} ({pool.num_distinct(k)}; {top.num_converged})")
            rows.append(row)
    head = ["spectrum", "K", "slope, exact", "strict (products)"]
    return table([*head, "3 runs of K steps", "3 runs of K / 3 steps", "1 run of K steps"], rows)


def halves_of_samples(draws: int) -> str:
    """What two halves of a sample say about the whole: sample covariances, population eigenvalues 1 / k."""
    rng = np.random.default_rng(1)
    rows = []
    for k, ratio in ((20, 6), (20, 20), (50, 6), (50, 10), (50, 20)):
        population = np.arange(1, 4 * k + 1.0) ** -1.0
        num = k * ratio
        slopes = []
        for _ in range(draws):
            sample = rng.standard_normal((num, 4 * k)) * population**0.5
            parts = (sample, sample[: num // 2], sample[num // 2 :])
            values = [np.linalg.eigvalsh(part.T @ part / len(part))[::-1][:k].copy() for part in parts]
            slopes.append([fit_power_law(value).slope for value in values])
        whole, first, second = np.array(slopes).T
        claimed = np.sqrt(np.mean([sampling_stderr(a, b) ** 2 for a, b in zip(first, second, strict=True)]))
        row = [str(k), str(ratio), f"{fit_power_law(population[:k]).slope:.3f}", f"{whole.mean():.3f}"]
        rows.append([*row, f"{(first + second).mean() / 2:.3f}", f"{whole.std():.4f}", f"{claimed:.4f}"])
    head = ["K", "N/K", "population", "mean slope", "mean of halves", "sd of the slope", "claimed by halves"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("COMPARISONS.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.write_text(f"""# What the comparisons are worth

Written by `python -m benchmarks.comparisons_report`. Diagonal matrices with {SIZE} rows.

## The trace

Root mean square error in percent of the trace, over {arguments.draws} draws, and the standard error that the estimator
claims over the true one. In the last two columns the 20 largest eigenvalues, which a measurement has anyway, are
taken out first.

{traces(arguments.draws)}

## The published protocol

Slope of the K largest; in brackets, for pools: how many different eigenvalues the K values prove, and how many
of the K have a residual of at most 1 %.

{protocols()}

## Halves of the sample

Covariances of N Gaussian samples in 4 K dimensions, {2 * arguments.draws} draws. Claimed: root mean square of
`sampling_stderr`, which is that of a single measurement only on average. It comes out low by up to a quarter,
because halves scatter less than in proportion; where their mean is above the slope of the whole, N is too small.

{halves_of_samples(2 * arguments.draws)}
""")


if __name__ == "__main__":
    main()
