"""Checks of whole-number arguments."""

from __future__ import annotations

import numpy as np
import pytest

from hessian_callback.linalg.arguments import whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_any_integer_type_becomes_an_int(value: object) -> None:
    number = whole_number("k", value, at_least=3, below=4)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [3.0, "3", None, True, np.float64(3), float("nan"), [3]])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="k must be an integer, got"):
        whole_number("k", value, at_least=1)


def test_limits_are_named() -> None:
    with pytest.raises(ValueError, match="k must be at least 3 for a fit, got 2"):
        whole_number("k", 2, at_least=3, why=" for a fit")
    with pytest.raises(ValueError, match="k must be below 4, got 4"):
        whole_number("k", 4, at_least=3, below=4)
