"""The small matrices of a decomposition: Gauss-Radau bounds against dense eigenvalues."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.algorithms.decomposition import Decomposition
from hessian_callback.algorithms.ritz import Projection
from tests.helpers.cases import rotated
from tests.helpers.spectra import operator_of, ranks, truth_of


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(4, 40), tail=st.integers(1, 12), decay=st.floats(0.2, 2))
def test_radau_bounds_hold_and_are_sharper(seed: int, size: int, tail: int, decay: float) -> None:
    """With the complement's largest eigenvalue known exactly, and so with no luck involved."""
    first = max(1, size - tail)
    matrix = rotated(torch.cat([ranks(40) ** -decay, -0.5 * ranks(40) ** -decay]), seed=seed)
    decomposition = Decomposition(operator_of(matrix), seed=seed)
    decomposition.begin()
    while decomposition.size < size:
        decomposition.expand(decomposition.chains[0])
    projection = decomposition.projection()

    def largest_beyond(count: int) -> float:
        basis = torch.stack([decomposition.basis.vector(index) for index in range(count)])
        complement = torch.eye(80, dtype=torch.float64) - basis.T @ basis
        return float(torch.linalg.eigvalsh(complement @ matrix @ complement)[-1])

    truth = truth_of(matrix).numpy()[:10]
    bounds = projection.radau_bounds(first, largest_beyond(first) + 1e-12, 10)
    assert (bounds >= truth - 1e-9).all()
    # As if nothing were known of the residual in the complement of the same vectors.
    shorter = Projection(
        projection.diagonal[:first],
        [link for link in projection.couplings if link[0] < first],
        [first - 1],
        np.array([[next(value for row, _, value in projection.couplings if row == first) ** 2]]),
    )
    assert (bounds <= shorter.upper_bounds(largest_beyond(first) + 1e-12, 10) + 1e-9).all()


def test_a_limit_that_the_basis_contradicts_bounds_nothing() -> None:
    decomposition = Decomposition(operator_of(rotated(ranks(80) ** -1.0)), seed=0)
    decomposition.begin()
    for _ in range(20):
        decomposition.expand(decomposition.chains[0])
    projection = decomposition.projection()
    shown = projection.tail(10).ritz_values[0]
    assert np.isinf(projection.radau_bounds(10, 0.99 * shown, 5)).all()
    assert np.isfinite(projection.radau_bounds(10, 1.01 * shown, 5)).all()
