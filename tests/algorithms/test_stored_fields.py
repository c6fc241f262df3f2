"""Stored states: each unusable field is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hessian_callback.algorithms.stored_fields import check_fields, each, is_count, is_finite, is_level, is_tensor


@pytest.mark.parametrize("state", [None, [], "text", 3])
def test_a_state_must_be_a_mapping(state: Any) -> None:
    with pytest.raises(ValueError, match=f"the state is {type(state).__name__} and not a mapping"):
        check_fields(state, {})


def test_the_first_unusable_field_is_named() -> None:
    usable = {"size": is_count, "norm": is_level}
    check_fields({"size": 0, "norm": 0.0, "other": None}, usable)
    with pytest.raises(ValueError, match="'norm' is missing"):
        check_fields({"size": 1}, usable)
    with pytest.raises(ValueError, match="'norm' holds an unusable value"):
        check_fields({"size": 1, "norm": -1.0}, usable)


@pytest.mark.parametrize("value", [True, 1.0, -1, "1", None, torch.tensor(1)])
def test_no_counts(value: Any) -> None:
    assert not is_count(value)


@pytest.mark.parametrize("value", [1, True, math.nan, math.inf, -math.inf, "1", None, torch.tensor(1.0)])
def test_no_finite_numbers(value: Any) -> None:
    assert not is_finite(value)
    assert not is_level(value)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 4),
        torch.ones(6),
        torch.ones(2, 3).double(),
        torch.tensor([[1, 2, math.nan], [1, 2, 3]]),
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]],
    ],
    ids=["shape", "dimensions", "dtype", "nan", "list"],
)
def test_no_tensors_of_the_kind(value: Any) -> None:
    usable = is_tensor(2, 3, dtype=torch.float32)
    assert usable(torch.ones(2, 3))
    assert not usable(value)


@pytest.mark.parametrize("value", [[1, 0.5], (1,), (1, 0.5, 2), (0.5, 1), None])
def test_no_tuples_of_the_kind(value: Any) -> None:
    assert each(is_count, is_finite)((1, 0.5))
    assert not each(is_count, is_finite)(value)
