"""Restarts keep a decomposition, its bounds and its limit of memory; compared with dense arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessian_callback.algorithms import lanczos
from hessian_callback.algorithms.decomposition import Decomposition
from hessian_callback.algorithms.lanczos import LanczosProgress, top_eigenvalues
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.algorithms.thick_restart import kept_at_ends, thick_restart
from hessian_callback.linalg.krylov_basis import KrylovBasis
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import rotated
from tests.helpers.ranks import DiagonalOperator, run_ranks
from tests.helpers.spectra import DTYPES, operator_of, ranks

BOTH_ENDS = torch.cat([ranks(100) ** -0.3, -0.7 * ranks(50) ** -0.3])


def vectors_of(decomposition: Decomposition) -> Tensor:
    """Return the basis, ``(N, P)`` in float64."""
    return torch.stack([decomposition.basis.vector(index) for index in range(decomposition.size)]).double()


def check(decomposition: Decomposition, matrix: Tensor, num_restarts: int) -> None:
    """Check ``V^T V = I`` and ``A V = V H + R`` with dense arithmetic."""
    basis, size = vectors_of(decomposition), decomposition.size
    eps = decomposition.eps
    assert torch.linalg.matrix_norm(basis @ basis.T - torch.eye(size), 2) <= 10 * math.sqrt(size) * eps
    projection = decomposition.projection()
    remainder = basis @ matrix.double() - torch.from_numpy(projection.dense()) @ basis
    for chain in decomposition.chains:
        remainder[chain.column] -= chain.residual.double()
        assert (basis @ chain.residual.double()).abs().max() <= 20 * eps
    assert torch.linalg.matrix_norm(remainder, 2) <= (100 + 10 * num_restarts) * eps
    residuals = torch.stack([chain.residual.double() for chain in decomposition.chains])
    assert torch.allclose(residuals @ residuals.T, torch.from_numpy(projection.gram), atol=100 * eps, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_the_decomposition_holds_after_restarts(num_chains: int, dtype: torch.dtype) -> None:
    matrix = rotated(BOTH_ENDS).to(dtype)
    decomposition = Decomposition(operator_of(matrix, dtype), seed=0, most_vectors=45)
    for chain in range(num_chains):
        decomposition.begin()
        for _ in range(9):
            decomposition.expand(decomposition.chains[chain])
    for number in range(4):
        while decomposition.size < 45:
            decomposition.expand(decomposition.chains[decomposition.size % num_chains])
        before = decomposition.projection().ritz_values
        decomposition.restart(20, 4)
        kept = np.concatenate([before[:20], before[-4:]])
        assert np.allclose(decomposition.projection().ritz_values, kept, atol=1e-13)
        assert (decomposition.size, decomposition.num_kept, decomposition.num_restarts) == (24, 24, number + 1)
        check(decomposition, matrix, number + 1)
    decomposition.expand(decomposition.chains[0])
    check(decomposition, matrix, 4)
    assert decomposition.projection().is_single_chain == (num_chains == 1)


def test_a_restart_of_a_single_chain_is_a_lanczos_run_from_a_filtered_vector() -> None:
    """The tridiagonal matrix and the vectors are those of Lanczos from the first vector of the new basis."""
    matrix = rotated(BOTH_ENDS)
    first = Decomposition(operator_of(matrix), seed=0)
    first.begin()
    while first.size < 30:
        first.expand(first.chains[0])
    first.restart(8)
    again = Decomposition(operator_of(matrix), seed=0)
    again.begin(first.basis.vector(0).clone())
    while again.size < 5:  # Later ones depend on the first one ever more strongly.
        again.expand(again.chains[0])
    assert torch.allclose(vectors_of(first)[:5], vectors_of(again), atol=1e-6)
    assert np.allclose(first.projection().diagonal[:5], again.projection().diagonal, atol=1e-6)


def test_counts_out_of_range_are_refused() -> None:
    decomposition = Decomposition(operator_of(rotated(BOTH_ENDS)), seed=0)
    decomposition.begin()
    decomposition.begin()
    for count in [0, 1, 3]:
        with pytest.raises(ValueError, match=f"{count} vectors can't be kept of 2 with 2 chains"):
            thick_restart(decomposition.projection(), count)


@given(
    values=st.lists(st.floats(-10, 10), min_size=6, max_size=40, unique=True),
    wanted=st.integers(1, 3),
    more=st.integers(0, 2),
)
def test_the_kept_ends_have_the_largest_gap_ratio(values: list[float], wanted: int, more: int) -> None:
    ritz = np.sort(values)[::-1]
    largest, smallest = kept_at_ends(ritz, wanted, wanted + more)
    assert largest + smallest == wanted + more
    assert largest >= wanted

    def ratio(q: int) -> float:
        p = wanted + more - q
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return float((ritz[wanted - 1] - ritz[p]) / (ritz[p] - ritz[len(ritz) - 1 - q]))

    ratios = [value for value in map(ratio, range(more + 1)) if not math.isnan(value)]
    assert math.isnan(ratio(smallest)) or ratio(smallest) >= max(ratios) * (1 - 1e-12)


# -- bounds ----------------------------------------------------------------------------------------


def diagonal_operator(values: Tensor) -> MatvecOperator:
    return MatvecOperator(lambda vector: values * vector, len(values), dtype=values.dtype)


def holds(spectrum: Spectrum, values: Tensor) -> bool:
    truth = values.double().sort(descending=True).values[: len(spectrum.eigenvalues)]
    return bool(((spectrum.eigenvalues - truth).abs() <= spectrum.error_bounds + 1e-14 * truth.abs().max()).all())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 25),
    room=st.integers(12, 40),
    decay=st.floats(0.2, 2),
    copies=st.integers(1, 3),
    negative=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_bounds_hold_with_clusters_copies_and_negative_eigenvalues(
    seed: int, k: int, room: int, decay: float, copies: int, negative: float, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    values = np.repeat(np.arange(1, 401) ** -decay, rng.choice([1, copies], 400))
    values *= np.where(rng.random(len(values)) < negative / 2, -1, 1)
    diagonal = torch.from_numpy(values).to(dtype)
    spectrum = top_eigenvalues(diagonal_operator(diagonal), k, max_basis_size=k + room, seed=seed)
    assert holds(spectrum, diagonal)
    assert spectrum.num_matvecs <= max(10 * k, 50)


def test_fewer_positive_eigenvalues_than_wanted_end_the_run() -> None:
    values = torch.cat([ranks(30) ** -1.0, -0.02 - 0.1 * ranks(570) ** -0.5])
    spectrum = top_eigenvalues(diagonal_operator(values), 40, max_basis_size=56, positive_only=True)
    assert spectrum.stopped == "no_more_positive"
    assert spectrum.num_restarts > 0
    assert holds(spectrum, values)


def test_a_copy_across_the_last_eigenvalue_is_found() -> None:
    """A Krylov space never has a second copy: a second chain must join and pass through restarts."""
    values = torch.cat([ranks(10) ** -0.5, ranks(10)[3:8] ** -0.5, 0.2 * torch.linspace(-1, 1, 500)]).double()
    spectrum = top_eigenvalues(diagonal_operator(values), 14, max_basis_size=30, max_matvecs=600)
    assert spectrum.all_converged
    assert spectrum.num_restarts > 2
    assert holds(spectrum, values)


def test_products_stay_near_those_of_an_unlimited_basis() -> None:
    values = ranks(3000) ** -0.5
    free = top_eigenvalues(diagonal_operator(values), 50)
    limited = top_eigenvalues(diagonal_operator(values), 50, max_basis_size=62)
    assert limited.all_converged
    assert limited.num_restarts > 5
    assert limited.num_matvecs <= 1.25 * free.num_matvecs


@pytest.mark.parametrize("width", [1.0, 2.0])
def test_a_small_basis_suffices_where_the_lower_end_is_wide(width: float) -> None:
    """A probe needs hundreds of products, and the complement of a full basis does not get any smaller."""
    values = torch.cat([ranks(1000) ** -1.0, -width * torch.linspace(0, 1, 1000)]).double()
    spectrum = top_eigenvalues(diagonal_operator(values), 30, max_basis_size=42, max_matvecs=1200)
    assert spectrum.all_converged
    assert holds(spectrum, values)


def test_eigenvectors_and_the_criterion_are_those_of_the_limited_run() -> None:
    values = ranks(500) ** -1.0
    calls = []

    def accepts(lower: Tensor, upper: Tensor) -> bool:
        calls.append((lower, upper))
        return bool(((upper - lower) <= 0.2 * lower).all())

    spectrum = top_eigenvalues(diagonal_operator(values), 20, max_basis_size=34, return_eigenvectors=True)
    assert spectrum.num_restarts > 0
    assert spectrum.eigenvectors is not None
    rayleigh = (spectrum.eigenvectors.T * values) @ spectrum.eigenvectors
    assert torch.allclose(rayleigh, torch.diag(spectrum.eigenvalues), atol=1e-12)
    loose = top_eigenvalues(diagonal_operator(values), 20, rtol=1e-4, max_basis_size=34, criterion=accepts)
    assert loose.stopped == "criterion"
    assert calls


# -- memory, arguments -----------------------------------------------------------------------------


def test_no_more_vectors_are_stored_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the basis and of a running probe together."""
    stored: list[int] = []
    append = KrylovBasis.append

    def counted(self: KrylovBasis, vector: Tensor) -> None:
        append(self, vector)
        stored.append(len({row.data_ptr() for basis in alive for block in basis._blocks for row in block}))

    alive: list[KrylovBasis] = []
    branch = Decomposition.branch

    def branched(self: Decomposition, *arguments: Any) -> Decomposition:
        other = branch(self, *arguments)
        alive[1:] = [other.basis]
        return other

    initialise = KrylovBasis.__init__

    def made(self: KrylovBasis, *arguments: Any) -> None:
        initialise(self, *arguments)
        alive.append(self)

    monkeypatch.setattr(KrylovBasis, "append", counted)
    monkeypatch.setattr(KrylovBasis, "__init__", made)
    monkeypatch.setattr(Decomposition, "branch", branched)
    spectrum = top_eigenvalues(diagonal_operator(ranks(500) ** -0.5), 20, max_basis_size=36)
    assert spectrum.num_restarts > 1
    assert 30 <= max(stored) <= 36


def test_a_limit_below_the_wanted_eigenvalues_is_refused() -> None:
    with pytest.raises(ValueError, match="max_basis_size=31 is too small for k=20; allow at least 32 vectors"):
        top_eigenvalues(diagonal_operator(ranks(500) ** -1.0), 20, max_basis_size=31)
    with pytest.raises(ValueError, match="max_basis_size"):
        top_eigenvalues(diagonal_operator(ranks(500) ** -1.0), 20, max_basis_size=0)


def test_a_small_space_ignores_the_limit() -> None:
    assert top_eigenvalues(diagonal_operator(ranks(150) ** -0.2), 20, max_basis_size=32).num_restarts == 0


# -- rounding --------------------------------------------------------------------------------------


def test_a_decomposition_that_no_longer_belongs_to_the_matrix_is_found() -> None:
    """A product at the end is compared with the stored ones, and raises the bounds."""
    values = ranks(500) ** -1.0
    products = 0

    def drifting(vector: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return (values + 1e-6 * products) * vector

    spectrum = top_eigenvalues(MatvecOperator(drifting, 500), 20, max_basis_size=34)
    assert spectrum.num_restarts > 0
    assert spectrum.rounding >= 1e-6


# -- checkpoints and ranks -------------------------------------------------------------------------


class Killed(Exception):
    """Ends a run as a kill does."""


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    values = ranks(600) ** -0.7
    arguments: dict[str, Any] = {"k": 20, "max_basis_size": 36}
    whole = top_eigenvalues(diagonal_operator(values), **arguments)
    assert whole.num_restarts > 2
    for products in range(30, whole.num_matvecs, 16):

        def kill(now: LanczosProgress, products: int = products) -> None:
            if now.num_matvecs == products:
                raise Killed

        folder = tmp_path / str(products)
        checkpoint: dict[str, Any] = {"checkpoint": folder, "checkpoint_every": 0}
        with pytest.raises(Killed):
            top_eigenvalues(diagonal_operator(values), progress=kill, **checkpoint, **arguments)
        seen: list[LanczosProgress] = []
        resumed = top_eigenvalues(diagonal_operator(values), progress=seen.append, **checkpoint, **arguments)
        assert seen[0].num_matvecs > products / 2
        assert torch.equal(resumed.eigenvalues, whole.eigenvalues)
        assert torch.equal(resumed.error_bounds, whole.error_bounds)
        assert not folder.exists()


def test_a_run_goes_on_with_less_memory(tmp_path: Path) -> None:
    values = ranks(600) ** -0.7
    checkpoint: dict[str, Any] = {"checkpoint": tmp_path / "run", "checkpoint_every": 0}

    def kill(now: LanczosProgress) -> None:
        if now.num_matvecs == 60:
            raise Killed

    with pytest.raises(Killed):
        top_eigenvalues(diagonal_operator(values), 20, progress=kill, **checkpoint)
    with pytest.raises(lanczos.CheckpointError, match=r"has 5\d vectors, and 3\d are allowed; allow more"):
        top_eigenvalues(diagonal_operator(values), 20, max_basis_size=36, **checkpoint)
    seen: list[int] = []
    spectrum = top_eigenvalues(
        diagonal_operator(values),
        20,
        max_basis_size=66,
        progress=lambda now: seen.append(now.num_matvecs),
        **checkpoint,
    )
    assert seen[0] > 50
    assert spectrum.all_converged
    assert holds(spectrum, values)


def on_rank(rank: int) -> Spectrum:
    return top_eigenvalues(DiagonalOperator(600), 5, max_basis_size=22)


@pytest.mark.distributed
def test_ranks_restart_together() -> None:
    first, second = (outcome.value for outcome in run_ranks(on_rank, 2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.error_bounds, second.error_bounds)
    alone = top_eigenvalues(diagonal_operator(torch.arange(1.0, 601) ** -0.2), 5, max_basis_size=22)
    assert first.num_restarts > 1
    assert torch.allclose(first.eigenvalues, alone.eigenvalues, rtol=1e-2)
    assert holds(first, torch.arange(1.0, 601) ** -0.2)
