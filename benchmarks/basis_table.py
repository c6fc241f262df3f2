"""The cost of a limited Krylov basis: products and seconds with and without restarts.

    python -m benchmarks.basis_table --cells mlp:50 lenet:50 resnet:50 gpt:50 lenet:200 --output benchmarks/BASIS.md

One thread. A cell is a case and k. The basis has no limit, and then at most 2 k, 1.5 k and, up to k = 200, k + 12
vectors. A ratio of times compares runs of one process that follow each other. The report is written after each cell.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import CASES, measured
from benchmarks.peers import error
from benchmarks.references import reference
from benchmarks.statistics_report import table
from benchmarks.timing import circumstances, pin_threads
from hessian_callback import HessianOperator, Spectrum, top_eigenvalues
from hessian_callback.algorithms.lanczos import LanczosProgress

#: Largest k with reference eigenvalues in float64. Beyond it the run without a limit is the reference.
LARGEST_REFERENCE = 200

HEAD = ["case", "k", "vectors at most", "memory", "within 1 %", "proven", "restarts", "seconds", "time / no limit"]


def limits(k: int) -> list[int | None]:
    """Return the limits that are compared."""
    larger = [None, 2 * k, int(1.5 * k)]
    # At k = 1000 a basis of k + 12 vectors would be rewritten after every fifth product, for hours.
    return [*larger, k + 12] if k <= LARGEST_REFERENCE else larger


class Watch:
    """Keep the Ritz values of every check."""

    def __init__(self) -> None:
        self.checks: list[tuple[int, Tensor]] = []

    def __call__(self, now: LanczosProgress) -> None:
        if now.ritz_values is not None and (not self.checks or now.ritz_values is not self.checks[-1][1]):
            self.checks.append((now.num_matvecs, now.ritz_values))

    def first_within(self, tolerance: float, truth: list[float]) -> str:
        """Return the products after which all Ritz values were first as close to the truth."""
        found = (str(spent) for spent, values in self.checks if error(values.tolist(), truth) <= tolerance)
        return next(found, "–")


def rows_of(name: str, k: int) -> list[list[str]]:
    """Measure one case."""
    case = measured(name)
    truth = None if k > LARGEST_REFERENCE else spectrum_of(reference(name, case, k))
    rows, first = [], 0.0
    for limit in limits(k):
        watch = Watch()
        began = time.perf_counter()
        with HessianOperator(case.model, case.loss_fn, case.batches) as operator:
            spectrum = top_eigenvalues(operator, k, max_basis_size=limit, max_matvecs=20 * k, progress=watch)
        seconds = time.perf_counter() - began
        first = first or seconds
        truth = truth or (spectrum.eigenvalues, spectrum.error_bounds)
        check(spectrum, *truth)
        vectors = spectrum.num_matvecs if limit is None else limit
        rows.append(
            [
                name,
                str(k),
                "no limit" if limit is None else str(limit),
                f"{vectors * case.num_parameters * 4 / 1e6:.0f} MB",
                watch.first_within(0.01, truth[0].tolist()),
                str(spectrum.num_matvecs) if spectrum.all_converged else f"{spectrum.num_matvecs} ({spectrum.stopped})",
                str(spectrum.num_restarts),
                f"{seconds:.1f}",
                f"{seconds / first:.2f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    return rows


def spectrum_of(reference: list[float]) -> tuple[Tensor, Tensor]:
    """Return reference eigenvalues with their error bounds."""
    values = torch.tensor(reference, dtype=torch.float64)
    return values, torch.full_like(values, 1e-6 * reference[0])


def check(spectrum: Spectrum, truth: Tensor, bounds: Tensor) -> None:
    """Raise an error if an eigenvalue lies outside its bound."""
    beyond = (spectrum.eigenvalues - truth).abs() - bounds - spectrum.error_bounds
    if not bool((beyond <= 0).all()):
        raise ArithmeticError(f"an eigenvalue lies outside its error bound by {float(beyond.max()):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["mlp:50", "lenet:50", "resnet:50", "gpt:50", "lenet:200"])
    parser.add_argument("--output", type=Path, help="write the report there")
    options = parser.parse_args()
    pin_threads()
    torch.manual_seed(0)
    rows = []
    for cell in options.cells:
        name, _, k = cell.partition(":")
        if name not in CASES or not k.isdecimal():
            parser.error(f"a cell is CASE:K with a case of {', '.join(CASES)}, got {cell}")
        rows += rows_of(name, int(k))
        if options.output is not None:
            options.output.write_text(report(options.cells, rows), encoding="utf-8")


def report(cells: list[str], rows: list[list[str]]) -> str:
    return f"""# A limited Krylov basis

Written by `python -m benchmarks.basis_table --cells {" ".join(cells)}`. {circumstances(1)} *Within 1 %*:
products until all k Ritz values were, at a check of the solver, compared with eigenvalues in float64 (at k = 1000 with
the run without a limit). *Proven*: until all error bounds were, probes included. No eigenvalue is outside its bound.
Both numbers are of one start vector.

{table(HEAD, rows)}
"""


if __name__ == "__main__":
    main()
