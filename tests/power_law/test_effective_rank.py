"""Effective ranks on spectra where they are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.power_law.effective_rank import (
    effective_rank,
    intrinsic_dimension,
    outlier_ratio,
    participation_ratio,
)

RANKS = [effective_rank, intrinsic_dimension, participation_ratio]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("num", [1, 2, 17])
def test_equal_eigenvalues_count_one_by_one(rank: Callable[..., float], num: int) -> None:
    assert rank(np.full(num, 0.3)) == pytest.approx(num, rel=1e-12)
    # A dominant eigenvalue counts alone.
    assert rank([1e200, *[1e-200] * num]) == pytest.approx(1.0, rel=1e-12)


def test_closed_forms() -> None:
    geometric = 2.0 ** -np.arange(60)
    assert intrinsic_dimension(geometric) == pytest.approx(2.0, rel=1e-12)
    assert participation_ratio(geometric) == pytest.approx(3.0, rel=1e-12)
    # Entropy of the geometric law with ratio 1/2: 2 ln 2.
    assert effective_rank(geometric) == pytest.approx(4.0, rel=1e-12)
    assert outlier_ratio(geometric, num_classes=10) == 2.0**10


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(1e-6, 1e6))
def test_bounds_unit_and_order(values: list[float], scale: float) -> None:
    for rank in RANKS:
        result = rank(values)
        assert 1 - 1e-12 <= result <= len(values) + 1e-9
        assert rank(scale * np.array(values[::-1])) == pytest.approx(result, rel=1e-10)
    assert participation_ratio(values) <= effective_rank(values) * (1 + 1e-12)


@pytest.mark.parametrize("rank", RANKS)
def test_nonpositive_eigenvalues_are_left_out(rank: Callable[..., float]) -> None:
    assert rank(torch.tensor([2.0, -5.0, 1.0, 0.0])) == pytest.approx(rank([2.0, 1.0]), rel=1e-12)
    with pytest.raises(ValueError, match="pass the largest eigenvalues"):
        rank([-1.0, 0.0])
    with pytest.raises(ValueError, match="NaN"):
        rank([1.0, math.nan])


def test_outlier_ratio_needs_one_more_than_the_classes() -> None:
    assert outlier_ratio([1.0, 4.0, 2.0, -3.0], num_classes=2) == 4.0
    with pytest.raises(ValueError, match="compute more eigenvalues"):
        outlier_ratio([4.0, 2.0, 1.0, -3.0], num_classes=3)
    with pytest.raises(ValueError, match="give the number of classes"):
        outlier_ratio([4.0, 2.0, 1.0], num_classes=0)
    with pytest.raises(TypeError, match="not an integer; give the number of classes"):
        outlier_ratio([4.0, 2.0, 1.0], num_classes=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="overflows"):
        outlier_ratio([1e300, 1e-300], num_classes=1)
