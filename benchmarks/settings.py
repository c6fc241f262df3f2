"""The best settings of other solvers, found beforehand and given to them by hand.

    python -m benchmarks.settings mlp lenet --k 10 50

runs one long reorthogonalised Lanczos run a case. Its tridiagonal matrix stands for the Hessian: a Krylov method of no
more products does on it what it does on the network, so trying costs nothing. For each k it prints

- the number of Lanczos steps after which all k values are, and stay, within 0.8 % (what eigenthings is told),
- of a grid of ARPACK's ncv and tol, the pair that is within 0.8 % with the fewest products (what scipy is told).

The grid holds subspaces of up to 6 k vectors, more than the default of 2 k + 1.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import measured
from benchmarks.peers import error
from benchmarks.references import reference
from benchmarks.timing import pin_threads

TOLERANCE = 8e-3
SUBSPACES = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 1e-3)

# case, k: Lanczos steps, ARPACK's ncv, its tol.
BEST: dict[tuple[str, int], tuple[int, int, float]] = {
    ("mlp", 10): (21, 21, 0.03),
    ("mlp", 50): (125, 126, 0.03),
    ("mlp", 200): (679, 701, 0.01),
    ("lenet", 10): (18, 21, 0.01),
    ("lenet", 50): (233, 251, 0.001),
    ("lenet", 200): (623, 701, 0.001),
    ("resnet", 10): (26, 26, 0.03),
    ("resnet", 50): (143, 151, 0.01),
    ("gpt", 10): (25, 26, 0.03),
    ("gpt", 50): (150, 151, 0.03),
}


def best(name: str, k: int) -> tuple[int, int, float]:
    """What was found for a case, or what is safe for most."""
    return BEST.get((name, k), (6 * k, 4 * k, 0.03))


def enough_steps(diagonal: np.ndarray, off_diagonal: np.ndarray, reference: list[float]) -> int:
    """The fewest Lanczos steps from which on all values are within tolerance."""
    k = len(reference)
    steps = len(diagonal)
    while steps > k and error(list(_values(diagonal, off_diagonal, steps - 1)), reference) <= TOLERANCE:
        steps -= 1
    return steps


def best_subspace(
    diagonal: np.ndarray, off_diagonal: np.ndarray, reference: list[float]
) -> list[tuple[int, int, float]]:
    """ARPACK's pairs that are within tolerance: products, ncv, tol; the fewest products first."""
    k, size = len(reference), len(diagonal)
    start = np.zeros(size)
    start[0] = 1.0
    found = []
    for factor in SUBSPACES:
        for tol in TOLERANCES:
            ncv, products = int(factor * k) + 1, 0

            def matvec(vector: np.ndarray) -> np.ndarray:
                nonlocal products
                products += 1
                vector = vector.ravel()
                image = diagonal * vector
                image[1:] += off_diagonal * vector[:-1]
                image[:-1] += off_diagonal * vector[1:]
                return image

            operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
            if ncv >= size:
                continue
            try:
                values = eigsh(operator, k, which="LA", ncv=ncv, tol=tol, v0=start, return_eigenvectors=False)
            except ArpackNoConvergence:
                continue
            # Beyond the run's length the small matrix no longer stands for the Hessian.
            if products < size and error(values.tolist(), reference) <= TOLERANCE:
                found.append((products, ncv, tol))
    return sorted(found)


def _values(diagonal: np.ndarray, off_diagonal: np.ndarray, steps: int) -> np.ndarray:
    return eigvalsh_tridiagonal(diagonal[:steps], off_diagonal[: steps - 1])


def main() -> None:
    import torch
    from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal

    from benchmarks.peers import _eigenthings

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--k", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--steps", type=int, help="length of the run; default: 12 times the largest k")
    options = parser.parse_args()
    pin_threads()
    with sdpa_kernel(SDPBackend.MATH):
        for name in options.cases:
            case = measured(name)
            truth = reference(name, case, max(options.k))
            operator = _eigenthings(case)
            # The start that its solver takes with seed 0.
            start = torch.randn(case.num_parameters, generator=torch.Generator().manual_seed(0))
            run = lanczos_tridiagonal(operator, start, options.steps or 12 * max(options.k))
            diagonal, off_diagonal = run.alphas.double().numpy(), run.betas.double().numpy()
            for k in options.k:
                steps = enough_steps(diagonal, off_diagonal, truth[:k])
                pairs = best_subspace(diagonal, off_diagonal, truth[:k])
                print(f"({name!r}, {k}): ({steps}, {pairs[0][1]}, {pairs[0][2]:g}),  # best three: {pairs[:3]}")
            print(f"# {name}: {truth[0]:.4g} ... {truth[-1]:.4g}", flush=True)


if __name__ == "__main__":
    main()
