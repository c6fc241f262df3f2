"""Simulate the critical values of the fit error that `hessian_callback.power_law.critical_values` tabulates.

    python -m benchmarks.critical_values

prints both tables as Python source, with two standard errors of Monte Carlo. It takes ten minutes on one core.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt

from hessian_callback.power_law.goodness_of_fit import simulate_ks_distances

LEVELS = (0.20, 0.15, 0.10, 0.05, 0.01)
SMALL = tuple(range(3, 21))
LARGE = (20, 25, 30, 35, 40, 50, 60, 70, 80, 100, 120, 150, 200, 250, 300, 400, 500, 700, 1000, 1500, 2000, 3000)
SEED = 2025
NUM_BATCHES = 20


def quantiles(num_eigenvalues: int, draws: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Compute upper quantiles of sqrt(K) d_ks at each level, and their standard errors from batches."""
    scaled = np.sqrt(num_eigenvalues) * simulate_ks_distances(num_eigenvalues, draws, seed=SEED)
    upper = 1.0 - np.array(LEVELS)
    per_batch = np.quantile(scaled.reshape(NUM_BATCHES, -1), upper, axis=1)
    return np.quantile(scaled, upper), per_batch.std(axis=1, ddof=1) / np.sqrt(NUM_BATCHES)


def draws_for(num_eigenvalues: int) -> int:
    """Return the number of draws: fewer for large K, whose draws are expensive and whose quantiles share one fit."""
    return 2_000_000 if num_eigenvalues <= 100 else 1_000_000 if num_eigenvalues <= 1000 else 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of draws")
    scale = parser.parse_args().scale

    results = {}
    for num in sorted({*SMALL, *LARGE}):
        draws = max(NUM_BATCHES * 50, int(scale * draws_for(num)) // NUM_BATCHES * NUM_BATCHES)
        results[num] = quantiles(num, draws)

    print("_FITTED_EXPONENT_SMALL_K = {")
    for column, level in enumerate(LEVELS):
        row = ", ".join(f"{results[num][0][column]:.3f}" for num in SMALL)
        error = 2 * max(results[num][1][column] for num in SMALL)
        print(f"    {level:.2f}: ({row}),  # two standard errors: {error:.4f}")
    print("}\n_FITTED_EXPONENT_LARGE_K = {")
    root = np.sqrt(np.array(LARGE))
    design = np.stack([np.ones_like(root), 1 / root, 1 / root**2], axis=1)
    for column, level in enumerate(LEVELS):
        value = np.array([results[num][0][column] for num in LARGE])
        error = np.array([results[num][1][column] for num in LARGE])
        weighted = design / error[:, None]
        coefficients = np.linalg.lstsq(weighted, value / error, rcond=None)[0]
        covariance = np.linalg.inv(weighted.T @ weighted)
        predicted_error = np.sqrt(np.einsum("ij,jk,ik->i", design, covariance, design)).max()
        chi_square = (((value - design @ coefficients) / error) ** 2).sum()
        print(
            f"    {level:.2f}: ({', '.join(f'{c:.4f}' for c in coefficients)}),"
            f"  # two standard errors: {2 * predicted_error:.4f}; chi square {chi_square:.0f} of {len(LARGE) - 3}"
        )
    print("}")


if __name__ == "__main__":
    main()
