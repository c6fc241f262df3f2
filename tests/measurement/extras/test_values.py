"""The numbers of the extras against dense eigenvalues."""

from __future__ import annotations

import pytest
import torch

from hessian_callback import fit_power_law
from hessian_callback.measurement.extras.density import Density
from hessian_callback.measurement.extras.numerical_interval import numerical_interval_of
from hessian_callback.measurement.extras.outlier_ratio import OutlierRatio
from hessian_callback.measurement.extras.subspace import Subspace
from hessian_callback.measurement.extras.trace import FrobeniusNorm, Trace
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.measurer import Measurer
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.solvers import Lanczos
from hessian_callback.operators.hessian import HessianOperator
from tests.helpers.problems import batches, cross_entropy, network, problem

K = 8
PLACE = Place(0, 1, "epoch")


@pytest.fixture(scope="module")
def eigenvalues() -> torch.Tensor:
    """All eigenvalues of the problem's Hessian, descending, by a dense solver."""
    operator = HessianOperator(network(), cross_entropy, batches())
    identity = torch.eye(operator.num_parameters, dtype=torch.float64)
    dense = torch.stack([operator.matvec(column) for column in identity])
    return torch.linalg.eigvalsh((dense + dense.T) / 2).flip(0)


@pytest.fixture(scope="module")
def measured() -> Measurement:
    extras = [Trace(num_hvps=40), FrobeniusNorm(num_hvps=40), Density(num_hvps=160), OutlierRatio(num_classes=2)]
    measurer = Measurer(K, extras=[*extras, "numerical_interval"], solver=Lanczos(rtol=1e-6))
    return measurer.measure(problem(), PLACE).measurement


@pytest.mark.slow
def test_eigenvalues_and_slope(measured: Measurement, eigenvalues: torch.Tensor) -> None:
    assert measured.spectrum is not None
    torch.testing.assert_close(measured.spectrum.eigenvalues, eigenvalues[:K], rtol=1e-6, atol=0)
    assert measured.slope == pytest.approx(fit_power_law(eigenvalues[:K]).slope, rel=1e-5)


@pytest.mark.slow
def test_trace_and_frobenius_norm(measured: Measurement, eigenvalues: torch.Tensor) -> None:
    values = measured.comparisons
    assert abs(values["trace"] - float(eigenvalues.sum())) <= 5 * values["trace_stderr"] + 1e-9
    assert abs(values["frobenius_norm"] - float(eigenvalues.norm())) <= 5 * values["frobenius_norm_stderr"] + 1e-9


def test_negative_mass(measured: Measurement, eigenvalues: torch.Tensor) -> None:
    expected = float(eigenvalues.clamp(max=0).abs().sum() / eigenvalues.abs().sum())
    values = measured.comparisons
    assert abs(values["negative_mass"] - expected) <= 5 * values["negative_mass_stderr"] + 1e-3
    assert measured.density is not None


def test_outlier_ratio_and_numerical_interval(measured: Measurement, eigenvalues: torch.Tensor) -> None:
    values = measured.comparisons
    assert values["outlier_ratio"] == pytest.approx(float(eigenvalues[0] / eigenvalues[2]), rel=1e-5)
    truth = fit_power_law(eigenvalues[:K]).slope
    assert values["slope_numerical_low"] <= truth <= values["slope_numerical_high"]


def test_rounding_widens_the_numerical_interval(measured: Measurement) -> None:
    """An eigenvalue may lie below its Ritz value by as much as products are wrong."""
    from dataclasses import replace

    assert measured.spectrum is not None
    narrow = numerical_interval_of(measured.spectrum, K)
    wide = numerical_interval_of(replace(measured.spectrum, rounding=1e-4), K)
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]
    with pytest.raises(ValueError, match="positive"):
        numerical_interval_of(replace(measured.spectrum, rounding=100.0), K)


def test_subspace_of_an_unchanged_problem_has_not_turned() -> None:
    measurer = Measurer(K, extras=[Subspace(dimension=3)], solver=Lanczos(rtol=1e-8))
    first = measurer.measure(problem(), PLACE)
    second = measurer.measure(problem(), PLACE, states=first.states)
    assert "subspace_angle" not in first.measurement.comparisons
    assert second.measurement.comparisons["subspace_angle"] < 1e-6
    assert second.measurement.comparisons["subspace_overlap"] == pytest.approx(1.0)


def test_subspace_of_other_parameters_is_not_compared() -> None:
    measurer = Measurer(K, extras=["subspace"])
    first = measurer.measure(problem(), PLACE)
    second = measurer.measure(problem(parameters="^0"), PLACE, states=first.states)
    assert "subspace_angle" not in second.measurement.comparisons
    assert not second.measurement.not_compared


@pytest.mark.slow
def test_two_measurements_from_the_same_states_do_not_disturb_each_other() -> None:
    """States are values: a measurement that is given up leaves them as they were."""
    measurer = Measurer(K, extras=["subspace"])
    first = measurer.measure(problem(), PLACE, draws_figures=True)
    spaces = first.states["subspace"].spaces
    results = [measurer.measure(problem(), PLACE, states=first.states, draws_figures=True) for _ in range(2)]
    assert [len(result.states["subspace"].spaces) for result in results] == [2, 2]
    assert len(spaces) == 1
