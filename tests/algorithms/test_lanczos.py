"""Eigenvalues and their bounds against dense truth: on prescribed spectra, on networks, and where Lanczos is blind."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import CASES, dense_hessian, rotated
from tests.helpers.spectra import DTYPES, SPECTRA, assert_bounds_hold, operator_of, ranks, truth_of

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


@pytest.mark.slow
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


@pytest.mark.parametrize("k", [1, 5, 20, 50])
def test_the_smallest_number_of_products_gives_k_eigenvalues(k: int) -> None:
    diagonal = ranks(500) ** -1.0
    spectrum = top_eigenvalues(MatvecOperator(lambda v: diagonal * v, 500), k, max_matvecs=k + 1)
    assert len(spectrum.eigenvalues) == k
    assert spectrum.num_matvecs == k + 1
    assert_bounds_hold(spectrum, diagonal)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_degenerate_matrices_whose_space_is_filled(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([-1.0, -1e-3, 0.0, 1e-6, 0.5, 1.0]), min_size=2, max_size=4))
    copies = data.draw(st.lists(st.integers(1, 3), min_size=len(values), max_size=len(values)))
    eigenvalues = torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(copies))
    dtype = data.draw(st.sampled_from(DTYPES))
    matrix = rotated(eigenvalues, seed=data.draw(st.integers(0, 1000)))
    k = data.draw(st.integers(1, len(eigenvalues)))
    spectrum = top_eigenvalues(operator_of(matrix, dtype), k, seed=data.draw(st.integers(0, 1000)))
    assert_bounds_hold(spectrum, truth_of(matrix, dtype))


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


@pytest.mark.parametrize("seed", range(3))
def test_many_eigenvalues_near_the_last_one_and_a_wide_lower_end(seed: int) -> None:
    """The gap that a probe must prove is a few thousandths of the spectrum's width, so it takes about 90 products."""
    outliers = np.concatenate([np.geomspace(28, 3, 9), np.linspace(1.5, 1.06, 10)])
    rest = np.concatenate([np.linspace(1.057, 0.5, 200), np.linspace(0, 0.1, 600), -np.linspace(0, 2, 300)])
    eigenvalues = torch.from_numpy(np.concatenate([outliers, rest])).sort(descending=True).values
    operator = MatvecOperator(eigenvalues.mul, len(eigenvalues), dtype=torch.float64)
    spectrum = top_eigenvalues(operator, 20, seed=seed, max_matvecs=450)
    assert spectrum.all_converged
    assert_bounds_hold(spectrum, eigenvalues)


@pytest.mark.parametrize("copies", [2, 4])
@pytest.mark.parametrize("value", [1e-2, 1e-4, 3e-5])
def test_copies_near_the_rounding_level_are_found(value: float, copies: int) -> None:
    """The second copy's part in the probe's first residual is below the level at which other chains end."""
    diagonal = torch.zeros(2000)
    diagonal[: copies + 1] = torch.tensor([1.0] + [value] * copies)
    operator = MatvecOperator(lambda v: diagonal * v, 2000, dtype=torch.float32)
    for seed in range(5):
        spectrum = top_eigenvalues(operator, copies + 1, seed=seed)
        assert_bounds_hold(spectrum, diagonal.double())
        assert spectrum.eigenvalues[-1] > 0.9 * value


def test_a_layer_whose_features_have_few_directions() -> None:
    """Every eigenvalue of its Hessian is there once for each output."""
    generator = torch.Generator().manual_seed(0)
    features, _ = torch.linalg.qr(torch.randn(600, 3, generator=generator))
    scales = torch.tensor([1.0, 1e-2, 1e-4])

    def matvec(vector: Tensor) -> Tensor:
        return ((vector.view(10, 600) @ features) * scales @ features.T).flatten()

    gram = (features.double() * scales.double()) @ features.double().T
    truth = torch.linalg.eigvalsh((gram + gram.T) / 2).flip(0).repeat_interleave(10)
    for seed in range(3):
        assert_bounds_hold(top_eigenvalues(MatvecOperator(matvec, 6000, dtype=torch.float32), 30, seed=seed), truth)


def test_going_on_through_rounding_costs_the_identity_nothing() -> None:
    operator = operator_of(torch.eye(300), torch.float32)
    assert top_eigenvalues(operator, 30).num_matvecs <= 35


def test_no_ghosts_at_two_hundred_steps() -> None:
    matrix = rotated(torch.cat([torch.tensor([1.0, 0.6, 0.3]).double(), 1e-2 * ranks(400) ** -0.1]))
    spectrum = top_eigenvalues(operator_of(matrix, torch.float32), 100, max_matvecs=200)
    assert spectrum.num_matvecs == 200
    assert spectrum.eigenvalues[3] < 0.011
    assert_bounds_hold(spectrum, truth_of(matrix, torch.float32))


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
    tight = torch.clamp(spectrum.rtol * spectrum.eigenvalues.abs(), min=4 * spectrum.rounding)
    assert (spectrum.error_bounds <= tight).all()
    # Finite differences in float32 leave small eigenvalues an error above the tolerance.
    assert spectrum.stopped == ("converged" if spectrum.all_converged else "precision")
    assert spectrum.all_converged or (hvp == "finite_difference" and dtype == torch.float32)


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


@pytest.mark.slow
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


def test_a_converged_eigenvalue_of_a_noisy_operator_is_within_the_tolerance() -> None:
    truth = ranks(200) ** -1.0
    matrix = rotated(truth)
    for noise in (1e-4, 1e-2, 5e-2):
        generator = torch.Generator().manual_seed(0)

        def matvec(vector: Tensor, noise: float = noise, generator: torch.Generator = generator) -> Tensor:
            error = torch.randn(200, dtype=torch.float64, generator=generator)
            return matrix @ vector + noise * error / error.norm()

        spectrum = top_eigenvalues(MatvecOperator(matvec, 200), 10, max_matvecs=60)
        assert_bounds_hold(spectrum, truth)
        errors = (spectrum.eigenvalues - truth[:10]).abs()
        assert (errors[spectrum.converged] <= spectrum.rtol * truth[:10][spectrum.converged]).all()
        assert (spectrum.stopped == "converged") == (noise == 1e-4)


class PerturbedOperator(MatvecOperator):
    """Products of a symmetric matrix that differs from the exact one, and products of the exact one."""

    def __init__(self, exact: Tensor, perturbation: Tensor, known: bool = True) -> None:
        super().__init__((exact + perturbation).mv, len(exact), dtype=exact.dtype)
        self.exact, self.known = exact, known
        self.calls: list[Tensor] = []

    def precise_products(self, vectors: Tensor) -> Tensor | None:
        self.calls.append(vectors)
        return self.exact @ vectors if self.known else None


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e-2])
def test_the_measured_error_of_the_run_enters_the_bounds(size: float) -> None:
    """A symmetric error is invisible to every test of symmetry."""
    truth = ranks(150) ** -1.0
    exact, perturbation = rotated(truth), rotated(size * torch.linspace(-1, 1, 150).double(), seed=1)
    operator = PerturbedOperator(exact, perturbation)
    spectrum = top_eigenvalues(operator, 8)
    assert_bounds_hold(spectrum, truth)
    assert spectrum.rounding_basis == "measured"
    # All eight directions are worth measuring, or two if the error is far below the tolerance.
    negligible = size == 1e-7
    assert size < spectrum.rounding < (8 * math.sqrt(8) if negligible else 4) * size
    assert spectrum.num_precise_products % (2 if negligible else 8) == 0
    assert not (spectrum.eigenvalues[spectrum.converged] < 20 * size).any()
    assert spectrum.num_precise_products == sum(vectors.shape[1] for vectors in operator.calls)
    vectors = operator.calls[0]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(2, dtype=torch.float64))
    # They lie in the span of the leading eigenvectors.
    assert (exact @ vectors).norm(dim=0).min() > float(truth[8])
    unmeasured = top_eigenvalues(MatvecOperator(operator.matvec_slice, 150), 8)
    assert unmeasured.rounding < 1e-12
    assert unmeasured.rounding_basis == "a-priori"
    assert unmeasured.num_precise_products == 0


class NoisyOperator(MatvecOperator):
    """Products whose error depends on every bit of the vector, as rounding does, and varies by orders of magnitude."""

    def __init__(self, exact: Tensor, size: float, seed: int) -> None:
        super().__init__(self.perturbed, len(exact), dtype=exact.dtype)
        self.exact, self.size, self.noise = exact, size, torch.Generator().manual_seed(seed)

    def perturbed(self, vector: Tensor) -> Tensor:
        image = self.exact @ vector
        size = self.size * 10 ** (-2 * float(torch.rand((), generator=self.noise)))
        sign = 1 if torch.rand((), generator=self.noise) < 0.5 else -1
        return image + sign * size * image / image.norm()

    def precise_products(self, vectors: Tensor) -> Tensor:
        return self.exact @ vectors


@pytest.mark.parametrize("k", [1, 2])
def test_errors_that_change_from_product_to_product_are_those_of_the_run(k: int) -> None:
    """Repeated products along the Ritz vectors would have other errors than those that made the eigenvalues."""
    truth = torch.cat([torch.tensor([1.0, 0.5]).double(), 1e-3 * ranks(60) ** -1.0])
    unlike = 0
    for seed in range(20):
        operator = NoisyOperator(torch.diag(truth), 1e-5, seed)
        spectrum = top_eigenvalues(operator, k, seed=seed, return_eigenvectors=True)
        assert_bounds_hold(spectrum, truth)
        assert spectrum.eigenvectors is not None
        errors = [(operator.perturbed(v) - operator.exact @ v).norm() for v in spectrum.eigenvectors.T]
        unlike += int(float((spectrum.eigenvalues - truth[:k]).abs().max()) > 2 * max(errors))
    assert unlike > 0


@pytest.mark.parametrize("k", [1, 2])
def test_without_higher_precision_repeated_products_show_the_errors(k: int) -> None:
    """Cross-entropy at a small loss cancels in float64, too."""

    class Imprecise(NoisyOperator):
        def precise_products(self, vectors: Tensor) -> None:  # type: ignore[override]
            return None

    truth = torch.cat([torch.tensor([1.0, 0.5]).double(), 1e-3 * ranks(60) ** -1.0])
    for seed in range(10):
        spectrum = top_eigenvalues(Imprecise(torch.diag(truth), 1e-5, seed), k, seed=seed)
        assert spectrum.rounding_basis == "a-priori"
        assert spectrum.num_precise_products == 0
        assert spectrum.rounding > 1e-7  # far above the a-priori level


def test_errors_are_measured_again_where_the_basis_has_grown() -> None:
    """The second copy of the eigenvalue joins after the first measurement; the error lies along it."""
    truth = torch.cat([torch.tensor([1.0, 1.0]).double(), 0.1 * ranks(150) ** -1.0])
    for seed in range(5):
        first = torch.zeros(152, dtype=torch.float64)
        first[[0, 2, 5]] = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
        perturbation = torch.zeros(152, 152, dtype=torch.float64)
        perturbation[1, 1] = -1e-4
        operator = PerturbedOperator(torch.diag(truth), perturbation)
        spectrum = top_eigenvalues(operator, 2, seed=seed, start=first)
        assert_bounds_hold(spectrum, truth)
        assert len(operator.calls) == 2
        assert spectrum.rounding >= 1e-4


def test_an_error_along_a_single_ritz_vector_is_covered() -> None:
    truth = ranks(100) ** -1.0
    for index in range(8):
        perturbation = torch.zeros(100, 100, dtype=torch.float64)
        perturbation[index, index] = 1e-4
        for seed in range(3):
            spectrum = top_eigenvalues(PerturbedOperator(torch.diag(truth), perturbation), 8, seed=seed)
            assert_bounds_hold(spectrum, truth)


@pytest.mark.parametrize("k", [3, 12])
def test_errors_that_cancel_in_a_sum_of_ritz_vectors_are_covered(k: int) -> None:
    """The errors of two products along Ritz vectors are equal, so they cancel in half of all sums with signs."""
    truth = ranks(60) ** -1.0
    both = torch.zeros(60, dtype=torch.float64)
    both[:2] = 1
    operator = PerturbedOperator(torch.diag(truth), 1e-4 * torch.outer(both, both))
    for seed in range(12):
        operator.calls.clear()
        spectrum = top_eigenvalues(operator, k, seed=seed)
        assert_bounds_hold(spectrum, truth)
        assert spectrum.rounding < 2e-3
        assert spectrum.num_precise_products % min(k, 8) == 0


def test_small_errors_are_measured_along_two_vectors_only() -> None:
    operator = PerturbedOperator(rotated(ranks(100) ** -1.0), torch.zeros(100, 100).double())
    spectrum = top_eigenvalues(operator, 10)
    assert [vectors.shape[1] for vectors in operator.calls] == [2] * len(operator.calls)
    assert spectrum.num_precise_products == 2 * len(operator.calls)


def test_an_error_that_cannot_be_measured_is_assumed() -> None:
    matrix = rotated(ranks(60) ** -1.0)
    unknown = PerturbedOperator(matrix.float(), torch.zeros(60, 60), known=False)
    assert top_eigenvalues(unknown, 3).rounding_basis == "assumed"
    assert top_eigenvalues(operator_of(matrix, torch.float32), 3).rounding_basis == "assumed"


def test_binary_cross_entropy_at_a_small_loss() -> None:
    """sigmoid(x) - y cancels in float32, and the error is symmetric."""
    torch.manual_seed(0)
    inputs = torch.randn(50, 4)
    inputs[:, 0] = inputs[:, 0].sign() * (1 + inputs[:, 0].abs() / 4)
    labels = (inputs[:, 0] > 0).float()
    model = torch.nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[12.0, 0, 0, 0]]))
        model.bias.zero_()

    def loss_fn(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])

    single = HessianOperator(model, loss_fn, [(inputs, labels)])
    precise = HessianOperator(copy.deepcopy(model).double(), loss_fn, [(inputs.double(), labels.double())])

    truth = torch.linalg.eigvalsh(torch.stack([precise.matvec(v) for v in torch.eye(5).double()])).flip(0)
    spectrum = top_eigenvalues(single, 3)
    assert_bounds_hold(spectrum, truth)
    assert spectrum.rounding_basis == "measured"


def test_the_rounding_level_is_relative_to_the_norm_of_the_whole_matrix() -> None:
    eigenvalues = torch.cat([ranks(100) ** -1.0, torch.tensor([-50.0]).double()])
    spectrum = top_eigenvalues(operator_of(rotated(eigenvalues)), 3)
    assert spectrum.rounding >= 0.999 * 32 * torch.finfo(torch.float64).eps * 50


def test_an_eigenvalue_below_the_noise_is_unresolved() -> None:
    eigenvalues = torch.cat([torch.tensor([1e6, 1.0]), 1e-3 * ranks(60)]).double().sort(descending=True).values
    spectrum = top_eigenvalues(operator_of(rotated(eigenvalues), torch.float32), 10, max_matvecs=60)
    assert spectrum.resolved.tolist() == [True] + [False] * 9
    assert spectrum.positive_converged.tolist() == spectrum.eigenvalues[:1].tolist()


@pytest.mark.slow
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
    spectrum = top_eigenvalues(operator_of(matrix), 5, rtol=1e-6, return_eigenvectors=True)
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
        ({"k": 2.5}, r"k must be an integer, got 2\.5"),
        ({"k": "3"}, "k must be an integer, got '3'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, r"seed must be an integer, got 0\.5"),
        ({"seed": 2**64}, "seed must be below"),
        ({"max_matvecs": 20.0}, "max_matvecs must be an integer"),
        ({"rtol": math.nan}, "between 0 and 1"),
        ({"start": torch.eye(30)[0].to_sparse()}, "start must be a dense real tensor"),
        ({"start": torch.zeros(30, dtype=torch.complex64)}, "start must be a dense real tensor"),
        ({"start": np.ones(30)}, r"start must be a dense real tensor of shape \(30,\), got ndarray"),
        ({"start": torch.full((30,), math.inf)}, "the start vector holds NaN or infinity"),
        ({"rtol": 0.0}, "between 0 and 1"),
        ({"probe_level": 1.0}, "between 0 and 1"),
        ({"k": 10, "max_matvecs": 10}, "allow at least 11 products"),
        ({"start": torch.zeros(30)}, "start vector is zero"),
        ({"start": torch.zeros(3)}, r"expected a vector of shape \(30,\)"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        top_eigenvalues(operator_of(rotated(ranks(30))), **kwargs)


@pytest.mark.parametrize(
    "matrix", [torch.eye(3), np.eye(3), torch.eye(3).to_sparse()], ids=["dense", "numpy", "sparse"]
)
def test_a_matrix_instead_of_an_operator(matrix: Any) -> None:
    with pytest.raises(ValueError, match=r"operator must be a SymmetricOperator, got .*; wrap a matrix A as"):
        top_eigenvalues(matrix, 1)


def test_integers_of_numpy_are_integers() -> None:
    operator = operator_of(rotated(ranks(30)))
    assert len(top_eigenvalues(operator, np.int64(2), seed=np.int32(1)).eigenvalues) == 2  # type: ignore[arg-type]


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
