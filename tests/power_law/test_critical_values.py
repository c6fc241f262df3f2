"""Critical values against sorted draws and the known limit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hessian_callback.power_law.critical_values import critical_distance
from hessian_callback.power_law.fit import fit_power_law


@pytest.mark.parametrize(("num", "expected"), [(50, 0.1512), (1000, 0.0344)])
def test_critical_distance_of_a_fitted_exponent(num: int, expected: float) -> None:
    assert critical_distance(num) == pytest.approx(expected, abs=1e-4)
    fit = fit_power_law(np.arange(1.0, num + 1) ** -1.0)
    assert fit.critical_distance_fitted == critical_distance(num)
    assert fit.critical_distance_paper == pytest.approx(1.36 / math.sqrt(num), rel=1e-12)


@pytest.mark.parametrize("num", [3, 4, 10, 20, 21, 37, 300])
@pytest.mark.parametrize("level", [0.2, 0.05, 0.01])
def test_critical_distance_rejects_as_often_as_it_says(num: int, level: float) -> None:
    # Independent of the table's own simulation: sorted draws, and the fit itself on a few of them.
    rng = np.random.default_rng([7, num])
    draws = 20_000
    log_ratios = np.sort(rng.standard_exponential((draws, num)), axis=1)
    log_ratios -= log_ratios[:, :1]
    law = -np.expm1(-log_ratios / log_ratios.mean(axis=1, keepdims=True))
    upper = np.arange(1, num + 1) / num
    distance = np.maximum(upper - law, law - upper + 1 / num).max(axis=1)
    for row in range(3):
        assert fit_power_law(np.exp(log_ratios[row])).fit_error == pytest.approx(distance[row], rel=1e-9)
    rate = np.mean(distance >= critical_distance(num, level=level))
    assert rate == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / draws))


def test_critical_distance_has_no_seam_and_the_known_limit() -> None:
    scaled = [critical_distance(num) * math.sqrt(num) for num in range(10, 200)]
    assert np.abs(np.diff(scaled)).max() < 0.006
    # Lilliefors' test for the exponential law: 1.094 / sqrt(n).
    assert critical_distance(10**8) * 10**4 == pytest.approx(1.094, abs=0.001)


@pytest.mark.parametrize(
    ("num", "options", "error", "remedy"),
    [
        (50, {"level": 0.03}, ValueError, "use ks_p_value"),
        (2, {}, ValueError, "at least 3"),
        (50, {"exponent": "guessed"}, ValueError, "'fitted' or 'known'"),
        (50.5, {}, TypeError, "is not an integer; a fit needs at least 3"),
        (True, {}, TypeError, "is not an integer"),
    ],
)
def test_errors_name_the_remedy(num: int, options: dict[str, object], error: type[Exception], remedy: str) -> None:
    with pytest.raises(error, match=remedy):
        critical_distance(num, **options)  # type: ignore[arg-type]
