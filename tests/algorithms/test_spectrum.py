"""Which eigenvalues of a spectrum count as converged, and which can be fitted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hessian_callback import Spectrum
from hessian_callback.algorithms.spectrum import meets_tolerance


def spectrum(eigenvalues: list[float], bounds: list[float], rtol: float = 1e-2) -> Spectrum:
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    return Spectrum(
        eigenvalues=values,
        error_bounds=torch.tensor(bounds, dtype=torch.float64),
        converged=torch.ones(len(values), dtype=torch.bool),
        rtol=rtol,
        missed_probability=1e-3,
        num_matvecs=10,
        stopped="converged",
        rounding=1e-6,
        symmetry_defect=0.0,
        ritz_values=values,
    )


def test_nothing_behind_an_unresolved_eigenvalue_is_fitted() -> None:
    """It would move up a rank."""
    assert spectrum([4, 3, 2, 1], [0.01, 0.5, 0.01, 0.001]).positive_converged.tolist() == [4]


def test_converged_at_the_rounding_level_is_not_resolved() -> None:
    near_zero = spectrum([1, 1e-5], [1e-6, 3e-6])
    assert near_zero.all_converged
    assert near_zero.resolved.tolist() == [True, False]


@pytest.mark.parametrize(
    ("value", "bound", "negligible", "expected"),
    [
        (1.0, 1e-2, 1e-2, True),
        (1.0, 1.1e-2, 1e-2, False),
        (1e-5, 4e-6, 1e-2, False),  # 40 % of the value
        (3e-6, 4e-6, 1e-2, True),  # can't be told from zero
        (-3e-6, 4e-6, 1e-2, True),
        (3e-6, 5e-6, 1e-2, False),  # above four rounding levels
        (3e-6, 4e-6, 1e-6, False),  # rounding is not negligible
        (0.0, 0.0, 0.0, True),
        (0.0, 4e-6, float("inf"), True),
    ],
)
def test_the_tolerance(value: float, bound: float, negligible: float, expected: bool) -> None:
    values, bounds = (torch.tensor([x], dtype=torch.float64) for x in (value, bound))
    assert meets_tolerance(values, bounds, 1e-2, 1e-6, negligible).tolist() == [expected]


def test_a_state_of_an_earlier_version_has_an_assumed_rounding_level() -> None:
    saved = {field.name: getattr(spectrum([1.0], [0.1]), field.name) for field in dataclasses.fields(Spectrum)}
    del saved["rounding_basis"]
    assert Spectrum(**saved).rounding_basis == "assumed"


@pytest.mark.parametrize("last", [0.0, -0.5])
def test_zero_and_negative_eigenvalues_are_counted_and_not_fitted(last: float) -> None:
    values = spectrum([1, 0.5, last], [1e-6] * 3)
    assert values.positive_converged.tolist() == [1, 0.5]
    assert values.num_negative == (last < 0)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spectrum([1.0], [0.1]).num_matvecs = 3  # type: ignore[misc]
