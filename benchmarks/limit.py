"""The limit that the eigenvalue tables are measured against: the fewest products, each as fast as any exact one.

Nobody can stop at that number: whether the k values are within 1 % is read off against the reference.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case
from benchmarks.peers import MEMORY, error
from benchmarks.timing import timed
from hessian_callback import HessianOperator
from hessian_callback.algorithms.decomposition import Decomposition
from hessian_callback.linalg.linear_operator import SymmetricOperator

ENGINES = ("double_backward", "linearize")
# Products that one engine is timed by in a round.
_TIMED = 5


class FastestProduct:
    """The exact engines side by side, with graphs and traces that are built beforehand and not timed."""

    def __init__(self, case: Case) -> None:
        self.operators = {
            engine: HessianOperator(case.model, case.loss_fn, case.batches, hvp=engine, memory_budget=MEMORY)
            for engine in ENGINES
        }
        self._vector = torch.ones(case.num_parameters)

    def seconds(self) -> dict[str, float]:
        """Seconds of a product by each engine."""
        return {
            engine: timed(partial(operator.matvec, self._vector), _TIMED) for engine, operator in self.operators.items()
        }

    def close(self) -> None:
        """Release graphs and traces."""
        for operator in self.operators.values():
            operator.close()


def fewest_products(operator: SymmetricOperator, truth: list[float], tolerance: float) -> int:
    """Return the number of Lanczos steps after which the leading Ritz values are within a tolerance of the truth.

    The run is that of `top_eigenvalues` with the same seed: its start vector, reorthogonalised in full.
    """
    decomposition = Decomposition(operator, seed=0)
    decomposition.begin()
    while decomposition.chains and error(decomposition.projection().ritz_values.tolist(), truth) > tolerance:
        decomposition.expand(decomposition.chains[0])
    return decomposition.num_matvecs
