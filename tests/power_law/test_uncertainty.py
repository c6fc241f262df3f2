"""The extremes of the slope against every vertex, random points and a fine grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.uncertainty import slope_numerical_interval


def slope(values: np.ndarray) -> float:
    """Slope without the fit's refusal of equal values."""
    return float(np.mean(np.log(values)) - np.log(values.min()))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(0.0, 0.9)), min_size=3, max_size=5))
def test_extremes_are_those_of_a_fine_search(pairs: list[tuple[float, float]]) -> None:
    values, relative = np.array(pairs).T
    bounds = values * relative
    low, high = slope_numerical_interval(values, bounds)
    lower, upper = values - bounds, values + bounds
    # The maximum of a convex function is at a vertex of the box.
    vertices = [slope(np.array(vertex)) for vertex in itertools.product(*zip(lower, upper, strict=True))]
    assert high == pytest.approx(max(vertices), abs=1e-12)
    # For the minimum, the best spectrum for each of many possible cutoffs.
    cutoffs = np.concatenate([lower, upper, np.linspace(lower.min(), upper.min(), 200)])
    best = min(slope(np.maximum(lower, c)) for c in cutoffs if lower.min() <= c <= upper.min())
    assert low == pytest.approx(best, abs=1e-12)
    rng = np.random.default_rng(0)
    inside = [slope(rng.uniform(lower, upper)) for _ in range(200)]
    assert low - 1e-12 <= min(inside)
    assert max(inside) <= high + 1e-12


def test_no_error_leaves_the_slope() -> None:
    values = torch.arange(1, 51, dtype=torch.float64) ** -1.1
    expected = fit_power_law(values).slope
    assert slope_numerical_interval(values, torch.zeros(50)) == pytest.approx((expected, expected), rel=1e-12)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1.0, 1e300])
def test_interval_of_neighbours_contains_their_slope(scale: float) -> None:
    values = np.array([scale] * 4)
    for index in range(4):
        for _ in range(index):
            values[index] = np.nextafter(values[index], np.inf)
    expected = fit_power_law(values).slope
    assert expected > 0.0
    assert slope_numerical_interval(values, np.zeros(4)) == pytest.approx((expected, expected), rel=1e-12, abs=0.0)


def test_ritz_values_err_to_one_side() -> None:
    values = np.arange(1.0, 31) ** -1.0
    bounds = 0.02 * values
    both, above = (slope_numerical_interval(values, bounds, sides=s) for s in ("both", "above"))
    assert both[0] <= above[0] <= fit_power_law(values).slope <= above[1] < both[1]
    # The largest slope: all but the cutoff at their upper ends.
    upper = values + bounds
    upper[-1] = values[-1]
    assert above[1] == pytest.approx(slope(upper), rel=1e-12)


def test_cutoff_may_change_places() -> None:
    # The third may be as low as 0.5, below the present cutoff.
    _, high = slope_numerical_interval([8.0, 4.0, 1.5, 1.0], [0.0, 0.0, 1.0, 0.0])
    assert high == pytest.approx(slope(np.array([8.0, 4.0, 0.5, 1.0])), rel=1e-12)


def test_order_and_dropped_eigenvalues_do_not_matter() -> None:
    values, bounds = np.array([1.0, -2.0, 4.0, 0.0, 2.0]), np.array([0.1, 9.0, 0.2, 9.0, 0.3])
    expected = slope_numerical_interval([4.0, 2.0, 1.0], [0.2, 0.3, 0.1])
    assert slope_numerical_interval(values, bounds) == expected
    more = slope_numerical_interval([*values, 0.5], [*bounds, 0.6], num_eigenvalues=3)
    assert more == expected


@pytest.mark.parametrize(
    ("values", "bounds", "options", "remedy"),
    [
        ([3.0, 2.0, 1.0], [0.1, 0.1], {}, "one for each, in the same order"),
        ([3.0, 2.0, 1.0], [0.1, -0.1, 0.1], {}, "at least 0"),
        ([3.0, 2.0, 1.0], [0.1, 0.1, 1.0], {}, "allow more Hessian-vector products"),
        ([3.0, 2.0, -1.0], [0.1, 0.1, 0.1], {}, "compute more eigenvalues"),
        ([3.0, 2.0, 1.0], [0.1, 0.1, 0.1], {"num_eigenvalues": 5}, "compute more eigenvalues"),
        ([3.0, 2.0, 1.0], [0.1, 0.1, 0.1], {"sides": "below"}, "'both' or 'above'"),
        ([3.0, 2.0, 1.0], [0.1, float("nan"), 0.1], {}, "error_bounds are NaN"),
        ([1.6e308, 2.0, 1.0], [1.5e308, 0.1, 0.1], {}, "scale eigenvalues and bounds"),
        ([3.0, 2.0, 1.0], [0.1, 0.1, 0.1], {"num_eigenvalues": 2}, "at least 3"),
    ],
)
def test_errors_name_the_remedy(
    values: list[float], bounds: list[float], options: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        slope_numerical_interval(values, bounds, **options)  # type: ignore[arg-type]
