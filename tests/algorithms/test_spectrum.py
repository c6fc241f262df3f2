"""What may be fitted of a spectrum."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hessian_callback import Spectrum


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


@pytest.mark.parametrize("last", [0.0, -0.5])
def test_zero_and_negative_eigenvalues_are_counted_and_not_fitted(last: float) -> None:
    values = spectrum([1, 0.5, last], [1e-6] * 3)
    assert values.positive_converged.tolist() == [1, 0.5]
    assert values.num_negative == (last < 0)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spectrum([1.0], [0.1]).num_matvecs = 3  # type: ignore[misc]
