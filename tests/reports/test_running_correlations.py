"""Rank correlations against their definitions and torchmetrics, and intervals against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.regression import kendall_rank_corrcoef, spearman_corrcoef

from hessian_callback.reports.running_correlations import rank_correlation

few = st.integers(0, 4).map(float)


@given(pairs=st.lists(st.tuples(few, few), min_size=5, max_size=12))
@settings(max_examples=60, deadline=None)
def test_coefficients_agree_with_definitions_and_torchmetrics(pairs: list[tuple[float, float]]) -> None:
    x, y = map(np.array, zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(ValueError, match="constant"):
            rank_correlation(x, y)
        return
    signs = [np.sign(values[:, None] - values[None, :]) for values in (x, y)]
    tau_b = (signs[0] * signs[1]).sum() / math.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    rho = np.corrcoef(*(sign.sum(axis=1) for sign in signs))[0, 1]  # Mid-ranks up to a linear map.
    for kind, expected, other in (("kendall", tau_b, kendall_rank_corrcoef), ("spearman", rho, spearman_corrcoef)):
        found = rank_correlation(x, y, kind=kind)
        assert found.value == pytest.approx(expected, abs=1e-12)
        assert found.value == pytest.approx(float(other(torch.tensor(x), torch.tensor(y))), abs=1e-6)
        assert -1 <= found.low <= found.value <= found.high <= 1


def test_values_that_differ_in_the_last_digit_are_ranked() -> None:
    x = [1 + n * np.finfo(float).eps for n in range(6)]
    for kind in ("kendall", "spearman"):
        assert rank_correlation(x, range(6), kind=kind).value == pytest.approx(1, abs=4 * np.finfo(float).eps)


@pytest.mark.parametrize("kind", ["kendall", "spearman"])
def test_the_interval_of_a_perfect_order_is_wide_for_few_pairs(kind: str) -> None:
    found = [rank_correlation(range(num), range(num), kind=kind) for num in (5, 10, 30)]
    assert [one.high for one in found] == pytest.approx([1.0] * 3, abs=1e-12)
    assert found[0].low < 0.6 < found[1].low < found[2].low < 1
    mirrored = rank_correlation(range(5), [-n for n in range(5)], kind=kind)
    assert (mirrored.low, mirrored.high) == pytest.approx((-1, -found[0].low))


@pytest.mark.parametrize("kind", ["kendall", "spearman"])
@pytest.mark.parametrize("num", [5, 12])
def test_intervals_cover_independent_pairs(kind: str, num: int) -> None:
    rng, draws, covered = np.random.default_rng(0), 400, 0
    truth = 2 / math.pi * math.asin(0.5) if kind == "kendall" else 6 / math.pi * math.asin(0.25)
    for _ in range(draws):
        x, noise = rng.standard_normal((2, num))
        found = rank_correlation(x, 0.5 * x + math.sqrt(0.75) * noise, kind=kind)
        covered += found.low <= truth <= found.high
    # Nominal 95 %, less three binomial standard errors.
    assert covered / draws > 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], {}, "at least 5"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], {}, "5 and 4"),
        ([1, 2, 3, 4, math.nan], [1, 2, 3, 4, 5], {}, "finite"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], {"kind": "pearson"}, "pearson"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], {"level": 1.0}, "level"),
    ],
)
def test_bad_input_raises_an_error_that_names_it(x: list[float], y: list[float], options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rank_correlation(x, y, **options)
