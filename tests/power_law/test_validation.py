"""Which input is refused, with which remedy, and that the rest is read exactly."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.validation import as_float64, checked_draws, fitted_log_ratios, log_ratios

ZIPF = np.arange(1.0, 51.0) ** -1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_precision_are_fitted_in_float64(dtype: torch.dtype) -> None:
    tensor = torch.tensor(ZIPF).to(dtype).requires_grad_()
    fit = fit_power_law(tensor)
    assert fit.slope == pytest.approx(fit_power_law(ZIPF).slope, rel=4 * torch.finfo(dtype).eps)
    assert fit == fit_power_law(tensor.detach().double().numpy())
    assert fit == fit_power_law(tensor.detach().double().tolist())


def test_integers_are_numbers() -> None:
    assert fit_power_law([8, 4, 2, 1]) == fit_power_law([8.0, 4.0, 2.0, 1.0])
    assert fit_power_law(torch.tensor([8, 4, 2, 1])) == fit_power_law([8.0, 4.0, 2.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_tensors_are_numbers(dtype: torch.dtype) -> None:
    assert fit_power_law(torch.tensor([8, 4, 2, 1], dtype=dtype)) == fit_power_law([8.0, 4.0, 2.0, 1.0])


@pytest.mark.skipif(np.finfo(np.longdouble).maxexp == 1024, reason="long double is float64 here")
@pytest.mark.parametrize(("power", "remedy"), [(-400, "too small for float64"), (400, "NaN or infinite")])
def test_numbers_outside_the_range_of_float64_are_refused(power: int, remedy: str) -> None:
    values = np.longdouble(10) ** np.array([power, 1, 0], dtype=np.longdouble)
    with pytest.raises(ValueError, match=remedy):
        as_float64(values)


@settings(deadline=None, max_examples=200)
@given(st.floats(5e-324, 1.7e308), st.floats(5e-324, 1.7e308) | st.integers(-3, 3))
def test_log_ratio_has_full_precision(reference: float, other: float) -> None:
    if isinstance(other, int):  # A neighbour.
        steps, other = other, reference
        for _ in range(abs(steps)):
            other = float(np.nextafter(other, np.inf if steps > 0 else 0.0))
        if not 0.0 < other < np.inf:
            return
    with mpmath.workprec(200):
        exact = float(mpmath.log(mpmath.mpf(other) / mpmath.mpf(reference)))
    assert log_ratios(np.array([other]), reference)[0] == pytest.approx(exact, rel=1e-14, abs=0.0)


def test_log_ratios_of_neighbours_are_not_zero() -> None:
    values = [1.0, np.nextafter(1.0, 2.0), np.nextafter(np.nextafter(1.0, 2.0), 2.0)]
    np.testing.assert_allclose(fitted_log_ratios(values), np.array([2.0, 1.0, 0.0]) * 2.0**-52, rtol=1e-15)


@pytest.mark.parametrize(
    ("draws", "seed", "error", "remedy"),
    [
        (0, 0, ValueError, "better 1000"),
        (2.5, 0, TypeError, "better 1000"),
        (10, -1, ValueError, "seed is -1; give an integer of at least 0"),
        (10, 1.5, TypeError, "give an integer of at least 0"),
        (10, None, TypeError, "give an integer of at least 0"),
    ],
)
def test_draws_and_seed_are_checked(draws: int, seed: int, error: type[Exception], remedy: str) -> None:
    with pytest.raises(error, match=remedy):
        checked_draws(draws, seed)


@pytest.mark.parametrize(
    ("eigenvalues", "options", "error", "remedy"),
    [
        ([1.0, float("nan"), 2.0, 3.0], {}, ValueError, "check that the loss and its gradient are finite"),
        ([1.0, float("inf"), 2.0, 3.0], {}, ValueError, "measure in float32 or better"),
        ([2.0, 1.0, -1.0, 0.0], {}, ValueError, "compute more eigenvalues, or use more samples"),
        ([], {}, ValueError, "compute more eigenvalues"),
        ([2.0, 1.0, 0.5], {"drop_first": 1}, ValueError, "2 of 3 are left without the 1 largest"),
        ([2.0, 2.0, 2.0], {}, ValueError, "so that the spectrum decays"),
        ([[3.0, 2.0, 1.0]], {}, ValueError, r"one spectrum of shape \(n,\)"),
        (torch.tensor(1.0), {}, ValueError, r"one spectrum of shape \(n,\)"),
        ([3.0, 2.0, 1.0], {"num_eigenvalues": 4}, ValueError, "lower num_eigenvalues"),
        ([3.0, 2.0, 1.0], {"num_eigenvalues": 2}, ValueError, "fit at least 3"),
        ([3.0, 2.0, 1.0], {"drop_first": -1}, ValueError, "how many of the largest to leave out"),
        ([3.0 + 1j, 2.0, 1.0], {}, TypeError, r"values\.real"),
        (torch.ones(3, dtype=torch.complex64), {}, TypeError, r"values\.real"),
        ([True, True, False], {}, TypeError, "not a mask"),
        (torch.tensor([True, False, True]), {}, TypeError, "not a mask"),
        (["a", "b", "c"], {}, TypeError, "a list of floats"),
        ([[1.0, 2.0], [3.0]], {}, TypeError, "cannot be read as an array"),
        ([10**400, 2, 1], {}, TypeError, "a list of floats"),
        (scipy.sparse.eye(3), {}, TypeError, "a list of floats"),
        (torch.ones(3).to_sparse(), {}, TypeError, "pass a dense one"),
        (torch.ones(3, device="meta"), {}, TypeError, "on a real device"),
        (np.ma.masked_array([3.0, 2.0, 1.0], mask=[0, 1, 0]), {}, TypeError, r"values\.compressed"),
        ([1.0], {}, ValueError, "1 of 1 are left"),
        ([0.0, 0.0, 0.0], {}, ValueError, r"3 are zero or negative\); compute more"),
        ([-1.0, -2.0, -3.0], {}, ValueError, "use more samples"),
        ([3.0, 2.0, 1.0], {"num_eigenvalues": 2.5}, TypeError, "not an integer; fit at least 3"),
        ([3.0, 2.0, 1.0], {"num_eigenvalues": True}, TypeError, "not an integer"),
        ([3.0, 2.0, 1.0], {"drop_first": 0.5}, TypeError, "how many of the largest"),
    ],
)
def test_unfittable_input_names_the_remedy(
    eigenvalues: object, options: dict[str, int], error: type[Exception], remedy: str
) -> None:
    with pytest.raises(error, match=remedy):
        fit_power_law(eigenvalues, **options)  # type: ignore[arg-type]
