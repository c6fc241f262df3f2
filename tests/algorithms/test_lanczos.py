"""Eigenvalues and their bounds against dense truth: on prescribed spectra, on networks, and where Lanczos is blind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessian_callback import HessianOperator, Spectrum, top_eigenvalues
from hessian_callback.algorithms.decomposition import Decomposition
from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.algorithms.missed_eigenvalues import Probe
from hessian_callback.algorithms.ritz import Projection
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import CASES, dense_hessian, rotated

DTYPES = [torch.float64, torch.float32]


def ranks(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "power law": lambda: ranks(400) ** -1.0,
    "slow power law": lambda: ranks(400) ** -0.5,
    "indefinite": lambda: torch.cat([ranks(200) ** -1.0, -0.3 * ranks(200) ** -1.0]),
    "every one twice": lambda: (ranks(150) ** -1.0).repeat_interleave(2),
    "five times": lambda: torch.cat([torch.full((5,), 3.0), torch.full((5,), 2.0), ranks(200) ** -1.0]),
    "nearly degenerate": lambda: torch.cat([1 + 1e-9 * ranks(6), 0.5 + 1e-6 * ranks(6), 0.1 * ranks(200) ** -1.0]),
    "identity": lambda: torch.ones(60),
    "two values": lambda: torch.cat([torch.full((4,), 2.0), torch.ones(80)]),
    "rank 8": lambda: torch.cat([ranks(8) ** -1.0, torch.zeros(100)]),
    "zero": lambda: torch.zeros(50),
    "negative definite": lambda: -(ranks(80) ** -0.3),
    "spikes and a semicircle": lambda: torch.cat(
        [torch.linspace(3, 8, 10), torch.from_numpy(np.random.default_rng(0).beta(1.5, 1.5, 300) * 2 - 1)]
    ),
    "tiny": lambda: 1e-12 * ranks(100) ** -1.0,
    "huge": lambda: 1e12 * ranks(100) ** -1.0,
}


def operator_of(matrix: Tensor, dtype: torch.dtype = torch.float64) -> MatvecOperator:
    matrix = matrix.to(dtype)
    return MatvecOperator(matrix.mv, len(matrix), dtype=dtype)


def truth_of(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.eigvalsh(matrix.to(dtype).to(torch.float64)).flip(0)


def assert_bounds_hold(spectrum: Spectrum, truth: Tensor) -> None:
    """Every eigenvalue, by its index, lies within its bound."""
    # What LAPACK's own dense truth is good for.
    oracle_error = 4 * len(truth) ** 0.5 * torch.finfo(torch.float64).eps * truth.abs().max()
    errors = (spectrum.eigenvalues - truth[: len(spectrum.eigenvalues)]).abs()
    assert (errors <= spectrum.error_bounds + oracle_error).all(), (errors / spectrum.error_bounds).max()


# -- prescribed spectra ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectra(name: str, dtype: torch.dtype) -> None:
    matrix = rotated(SPECTRA[name]())
    truth = truth_of(matrix, dtype)
    spectrum = top_eigenvalues(operator_of(matrix, dtype), 10, max_matvecs=min(len(matrix), 250))
    assert_bounds_hold(spectrum, truth)
    assert spectrum.all_converged
    assert spectrum.stopped == "converged"
    tolerance = torch.clamp(spectrum.rtol * truth[:10].abs(), min=4 * spectrum.rounding)
    assert ((spectrum.eigenvalues - truth[:10]).abs() <= tolerance).all()
    assert spectrum.num_matvecs < len(matrix)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bounds_hold_on_any_spectrum(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12), label="distinct")
    copies = data.draw(st.lists(st.integers(1, 4), min_size=len(values), max_size=len(values)), label="copies")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    eigenvalues = torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(copies))
    k = data.draw(st.integers(1, len(eigenvalues)), label="k")
    matrix = rotated(eigenvalues, seed=data.draw(st.integers(0, 5), label="seed"))
    budget = data.draw(st.none() | st.integers(k + 1, 40), label="max_matvecs")
    seed = data.draw(st.integers(0, 3), label="start")
    spectrum = top_eigenvalues(operator_of(matrix, dtype), k, seed=seed, max_matvecs=budget)
    assert spectrum.num_matvecs <= (budget or max(10 * k, 50))
    assert_bounds_hold(spectrum, truth_of(matrix, dtype))


@pytest.mark.parametrize("exponent", [0.3, 0.45, 0.48, 0.5, 0.53, 0.6, 0.75, 0.95])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_hold_where_squares_underflow(exponent: float, dtype: torch.dtype) -> None:
    scale = torch.finfo(dtype).tiny ** exponent
    for values in ([-1.0, -1.0, 0.0], [1.0, 0.5, 0.25, -1.0]):
        matrix = rotated(torch.tensor(values, dtype=torch.float64) * scale, seed=1)
        assert_bounds_hold(top_eigenvalues(operator_of(matrix, dtype), 1), truth_of(matrix, dtype))


@pytest.mark.parametrize("budget", [11, 20, 30, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_hold_where_the_products_run_out(budget: int, dtype: torch.dtype) -> None:
    matrix = rotated(ranks(300) ** -0.5)
    spectrum = top_eigenvalues(operator_of(matrix, dtype), 10, max_matvecs=budget)
    assert spectrum.stopped == "max_matvecs"
    assert not spectrum.all_converged
    assert spectrum.num_matvecs == budget
    assert_bounds_hold(spectrum, truth_of(matrix, dtype))


def test_more_eigenvalues_wanted_than_there_are() -> None:
    matrix = rotated(ranks(7))
    spectrum = top_eigenvalues(operator_of(matrix), 20)
    assert spectrum.stopped == "exhausted"
    assert spectrum.missed_probability == 0
    assert spectrum.num_matvecs == 7
    torch.testing.assert_close(spectrum.eigenvalues, ranks(7).flip(0), rtol=1e-12, atol=0)


def test_a_single_dimension() -> None:
    spectrum = top_eigenvalues(MatvecOperator(lambda v: 3 * v, 1), 1)
    assert spectrum.eigenvalues.tolist() == [3.0]
    assert spectrum.num_matvecs == 1


def test_positive_only_stops_when_no_positive_eigenvalue_is_left() -> None:
    matrix = rotated(torch.cat([ranks(8) ** -1.0, torch.zeros(100)]))
    spectrum = top_eigenvalues(operator_of(matrix), 50, positive_only=True)
    assert spectrum.stopped == "no_more_positive"
    assert spectrum.num_matvecs < 15
    torch.testing.assert_close(spectrum.positive_converged, ranks(8) ** -1.0, rtol=1e-10, atol=0)


def test_positive_only_with_negative_eigenvalues_beyond() -> None:
    values = torch.cat([ranks(6) ** -1.0, -(ranks(90) ** -1.0)])
    spectrum = top_eigenvalues(operator_of(rotated(values)), 20, positive_only=True)
    assert spectrum.stopped == "no_more_positive"
    assert len(spectrum.positive_converged) == 6
    assert spectrum.num_negative > 0
    assert_bounds_hold(spectrum, truth_of(rotated(values)))


# -- what a Krylov space can't see -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_start_vector_that_is_orthogonal_to_an_eigenvector(dtype: torch.dtype) -> None:
    eigenvalues = ranks(200) ** -1.0
    matrix = torch.diag(eigenvalues)
    start = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start[2] = 0  # lambda_3 can't be reached from here, up to rounding
    spectrum = top_eigenvalues(operator_of(matrix, dtype), 10, start=start)
    assert_bounds_hold(spectrum, truth_of(matrix, dtype))
    assert spectrum.all_converged


def test_a_start_vector_that_is_an_eigenvector() -> None:
    matrix = torch.diag(ranks(100) ** -1.0)
    start = torch.zeros(100, dtype=torch.float64)
    start[40] = 1
    spectrum = top_eigenvalues(operator_of(matrix), 5, start=start)
    torch.testing.assert_close(spectrum.eigenvalues, ranks(5) ** -1.0, rtol=1e-8, atol=0)


def test_duplicated_units_and_a_start_of_equal_signs() -> None:
    """The eigenvector (e_1 - e_2)/sqrt 2 is exactly orthogonal to half of all Rademacher vectors."""
    matrix = torch.diag(torch.cat([torch.tensor([1.0, 1.0]), 0.5 * ranks(100) ** -1.0]).double())
    matrix[0, 1] = matrix[1, 0] = -0.25
    spectrum = top_eigenvalues(operator_of(matrix), 4, start=torch.ones(102, dtype=torch.float64))
    torch.testing.assert_close(spectrum.eigenvalues, truth_of(matrix)[:4], rtol=1e-8, atol=0)


def test_no_ghosts_at_two_hundred_steps() -> None:
    matrix = rotated(torch.cat([torch.tensor([1.0, 0.6, 0.3]).double(), 1e-2 * ranks(400) ** -0.1]))
    spectrum = top_eigenvalues(operator_of(matrix, torch.float32), 100, max_matvecs=200)
    assert spectrum.num_matvecs == 200
    assert spectrum.eigenvalues[3] < 0.011
    assert_bounds_hold(spectrum, truth_of(matrix, torch.float32))


def test_the_probe_misses_no_more_often_than_it_says() -> None:
    """A run of m steps from a random vector, against an eigenvalue that is hard to see."""
    eigenvalues = torch.cat([torch.tensor([1.02]).double(), torch.linspace(-1, 1, 60).double()])
    operator = operator_of(torch.diag(eigenvalues))
    bound, level, runs = 1.01, 0.2, 400
    passed = 0
    for seed in range(runs):
        run = Decomposition(operator, seed)
        run.begin()
        probe = Probe()
        for step in range(14):
            probe.update(run.projection(), dimensions=61, smallest_link=1e-16, new=step == 0)
            if probe.missed_probability(bound) <= level:
                passed += 1
                break
            run.expand(run.chains[0])
    # Three standard deviations above the level that was promised.
    assert passed / runs <= level + 3 * math.sqrt(level * (1 - level) / runs)
    assert passed > 0, "the probe must be able to be wrong, or this shows nothing"


def test_the_confident_bound_covers_the_truth() -> None:
    operator = operator_of(torch.diag(ranks(200) ** -1.0))
    level, runs, misses = 0.05, 400, 0
    for seed in range(runs):
        run = Decomposition(operator, seed)
        run.begin()
        for _ in range(3):
            run.expand(run.chains[0])
        probe = Probe(level)
        probe.update(run.projection(), dimensions=200, smallest_link=1e-16, new=True)
        bound = probe.confident_bound()
        excess = bound - probe.largest_seen
        assert probe.missed_probability(bound) <= level
        if excess > 1e-5:  # not tightened further
            assert probe.missed_probability(probe.largest_seen + 0.99 * excess) > level
        misses += bound < 1
    assert misses / runs <= level + 3 * math.sqrt(level * (1 - level) / runs)


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_networks_against_their_dense_hessian(name: str, dtype: torch.dtype, hvp: str) -> None:
    case, precise = CASES[name](dtype), CASES[name](torch.float64)
    precise.model.load_state_dict(case.model.state_dict())
    precise.batches = torch.utils._pytree.tree_map(
        lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, case.batches
    )
    truth = torch.linalg.eigvalsh(dense_hessian(precise)).flip(0)
    operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, hvp=hvp)
    spectrum = top_eigenvalues(operator, 8)
    assert_bounds_hold(spectrum, truth)
    assert spectrum.all_converged


def test_scipy_on_the_same_operator() -> None:
    case = CASES["attention"]()
    operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights)
    size = operator.num_parameters
    linear = scipy.sparse.linalg.LinearOperator(
        (size, size), matvec=lambda v: operator.matvec(torch.from_numpy(v.ravel())).numpy(), dtype=np.float64
    )
    oracle = np.sort(scipy.sparse.linalg.eigsh(linear, 8, which="LA", return_eigenvectors=False))[::-1]
    spectrum = top_eigenvalues(operator, 8, rtol=1e-8)
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), oracle, rtol=1e-8)


def test_curvlinops_under_our_solver() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    case = CASES["mlp"]()
    oracle = curvlinops.HessianLinearOperator(
        case.model,
        torch.nn.CrossEntropyLoss(),
        list(case.model.parameters()),
        case.batches,
        check_deterministic=False,
    )
    theirs = top_eigenvalues(MatvecOperator(lambda v: oracle @ v, oracle.shape[0]), 8, rtol=1e-8)
    ours = top_eigenvalues(HessianOperator(case.model, case.loss_fn, case.batches), 8, rtol=1e-8)
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=1e-8, atol=0)


def test_an_operator_that_is_not_symmetric_widens_the_bounds() -> None:
    matrix = rotated(ranks(200) ** -1.0)
    skew = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    skew = 1e-4 * (skew - skew.T) / torch.linalg.matrix_norm(skew - skew.T, 2)
    spectrum = top_eigenvalues(operator_of(matrix + skew), 10)
    assert spectrum.symmetry_defect > 1e-5
    assert_bounds_hold(spectrum, truth_of(matrix))


def test_an_eigenvalue_below_the_noise_is_said_to_be_unresolved() -> None:
    eigenvalues = torch.cat([torch.tensor([1e6, 1.0]), 1e-3 * ranks(60)]).double().sort(descending=True).values
    spectrum = top_eigenvalues(operator_of(rotated(eigenvalues), torch.float32), 10, max_matvecs=60)
    assert spectrum.resolved.tolist() == [True] + [False] * 9
    assert spectrum.positive_converged.tolist() == spectrum.eigenvalues[:1].tolist()


# -- the decomposition -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_the_decomposition_holds(num_chains: int, dtype: torch.dtype) -> None:
    matrix = rotated(torch.cat([ranks(100) ** -1.0, -(ranks(50) ** -1.0)])).to(dtype)
    decomposition = Decomposition(operator_of(matrix, dtype), seed=0)
    for chain in range(num_chains):
        decomposition.begin()
        for _ in range(11):
            decomposition.expand(decomposition.chains[chain])
    decomposition.expand(decomposition.chains[0])
    basis = torch.stack([decomposition.basis.vector(index) for index in range(decomposition.size)])
    size = decomposition.size
    eps = torch.finfo(dtype).eps
    gram = basis.double() @ basis.double().T
    assert torch.linalg.matrix_norm(gram - torch.eye(size), 2) <= 10 * math.sqrt(size) * eps
    remainder = basis.double() @ matrix.double() - torch.from_numpy(decomposition.projection().dense()) @ basis.double()
    for chain in decomposition.chains:
        remainder[chain.column] -= chain.residual.double()
    assert torch.linalg.matrix_norm(remainder, 2) <= 100 * eps


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_parameters(dtype: torch.dtype) -> None:
    """Sums of so many terms must not cost the basis its orthogonality."""
    size = 1_200_000
    diagonal = torch.cat([torch.tensor([4.0, 2.0, 1.0]), torch.linspace(-0.1, 0.1, size - 3)]).to(dtype)
    spectrum = top_eigenvalues(MatvecOperator(lambda v: diagonal * v, size, dtype=dtype), 3)
    assert_bounds_hold(spectrum, diagonal.double().sort(descending=True).values)
    assert spectrum.all_converged


def test_a_criterion_sees_bounds_that_hold_and_ends_the_run() -> None:
    matrix = rotated(ranks(400) ** -0.5)
    truth = truth_of(matrix)[:20]
    asked = []

    def criterion(lower: Tensor, upper: Tensor) -> bool:
        assert (lower <= truth + 1e-12).all()
        asked.append(upper)
        return bool((upper <= 1.1 * lower).all())

    spectrum = top_eigenvalues(operator_of(matrix), 20, criterion=criterion)
    assert asked
    assert spectrum.stopped == "criterion"
    assert_bounds_hold(spectrum, truth)
    assert spectrum.num_matvecs < top_eigenvalues(operator_of(matrix), 20).num_matvecs


def test_eigenvectors() -> None:
    matrix = rotated(ranks(150) ** -1.0)
    spectrum = top_eigenvalues(operator_of(matrix), 5, return_eigenvectors=True)
    vectors = spectrum.eigenvectors
    assert vectors is not None
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ vectors, vectors * spectrum.eigenvalues, rtol=0, atol=1e-3)


# -- reproducibility, progress, arguments ----------------------------------------------------------


def test_the_seed_decides() -> None:
    operator = operator_of(rotated(ranks(200) ** -1.0), torch.float32)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = top_eigenvalues(operator, 5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.eigenvalues, top_eigenvalues(operator, 5, seed=3).eigenvalues)
    assert not torch.equal(first.eigenvalues, top_eigenvalues(operator, 5, seed=4).eigenvalues)


def test_progress_is_reported_after_every_product() -> None:
    seen: list[LanczosProgress] = []
    spectrum = top_eigenvalues(operator_of(rotated(ranks(100) ** -1.0)), 5, progress=seen.append)
    assert [progress.num_matvecs for progress in seen] == list(range(1, spectrum.num_matvecs + 1))
    assert seen[0].max_matvecs == 50
    assert max(progress.num_converged for progress in seen) == 5
    assert seen[0].ritz_values is None
    assert seen[-1].ritz_values is not None
    torch.testing.assert_close(seen[-1].ritz_values, spectrum.eigenvalues, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"rtol": 0.0}, "between 0 and 1"),
        ({"probe_level": 1.0}, "between 0 and 1"),
        ({"k": 10, "max_matvecs": 10}, "allow at least 11 products"),
        ({"start": torch.zeros(30)}, "start vector is zero"),
        ({"start": torch.zeros(3)}, r"expected a vector of shape \(30,\)"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(operator_of(rotated(ranks(30))), **kwargs)


def test_nan_in_a_product_is_reported() -> None:
    def matvec(vector: Tensor) -> Tensor:
        calls.append(1)
        return vector * (float("nan") if len(calls) == 5 else 2) + vector.roll(1) + vector.roll(-1)

    calls: list[int] = []
    with pytest.raises(ArithmeticError, match="basis vector 4 holds NaN or infinity; check the loss"):
        top_eigenvalues(MatvecOperator(matvec, 30), 10)


def test_a_basis_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one device can show it: what goes from one to the other is a copy."""
    matrix = rotated(SPECTRA["five times"]())
    here = top_eigenvalues(operator_of(matrix), 20, return_eigenvectors=True)
    original = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **kwargs: original(tensor, *args, **kwargs).clone())
    there = top_eigenvalues(operator_of(matrix), 20, return_eigenvectors=True, basis_device="cpu")
    assert torch.equal(here.eigenvalues, there.eigenvalues)
    assert here.eigenvectors is not None
    assert there.eigenvectors is not None
    assert torch.equal(here.eigenvectors, there.eigenvectors)
