"""Checks of options: accepted types, refused types, ranges, messages."""

from __future__ import annotations

import ast
import copy
import math
import pickle
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hessian_callback import _options as options
from hessian_callback._options import (
    MAX_SEED,
    OptionError,
    check_bool,
    check_callable,
    check_choice,
    check_each,
    check_int,
    check_mapping,
    check_number,
    check_path,
    check_str,
    optional,
)
from hessian_callback.measurement.measurer import Measurer

BOOLEANS = [True, False, np.True_, np.array(False), torch.tensor(True)]
NO_NUMBERS = [
    *BOOLEANS,
    "4GB",
    "1",
    b"1",
    "",
    None,
    [],
    [1],
    {1: 2},
    1j,
    np.complex64(1),
    torch.tensor(1 + 0j),
    np.array([1]),
    torch.tensor([1]),
    np.array("1"),
    np.timedelta64(1, "s"),
    torch.tensor(1, device="meta"),
    Decimal(1),
    object(),
    int,
]
NO_INTEGERS = [*NO_NUMBERS, 1.5, 2.0, math.nan, math.inf, np.float32(2), torch.tensor(2.0), Fraction(2, 1), 1e6]


def name(value: object) -> str:
    """A test's name that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


INTEGERS = [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
NUMBERS = [*INTEGERS, 3.0, np.float32(3), np.float64(3), np.array(3.0), torch.tensor(3.0), Fraction(3, 1)]


@pytest.mark.parametrize("value", INTEGERS, ids=name)
def test_integers_of_any_library_become_int(value: Any) -> None:
    found = check_int("n", value, at_least=3, at_most=3)
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize("value", NUMBERS, ids=name)
def test_numbers_of_any_library_become_float(value: Any) -> None:
    found = check_number("x", value, at_least=3, at_most=3)
    assert type(found) is float
    assert found == 3.0


@pytest.mark.parametrize("value", NO_INTEGERS, ids=name)
def test_no_other_type_is_an_integer(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^every_n must be an integer of at least 1, got "):
        check_int("every_n", value, at_least=1)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=name)
def test_no_other_type_is_a_number(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^rtol must be a number, got "):
        check_number("rtol", value, finite=False)


@pytest.mark.parametrize("value", BOOLEANS, ids=name)
def test_booleans_of_any_library_become_bool(value: Any) -> None:
    found = check_bool("verbose", value)
    assert type(found) is bool
    assert found == bool(value)


@pytest.mark.parametrize(
    "value", ["no", "True", "", None, 0, 1, 1.0, np.int64(1), torch.tensor(1), [], [True]], ids=name
)
def test_no_other_type_is_a_boolean(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^verbose must be True or False, got "):
        check_bool("verbose", value)


@given(st.integers(), st.integers(), st.integers())
def test_integers_are_allowed_within_their_closed_range(value: int, low: int, high: int) -> None:
    if low <= value <= high:
        assert check_int("n", value, at_least=low, at_most=high) == value
    else:
        with pytest.raises(OptionError, match=f"^n must be an integer between {low} and {high}, got "):
            check_int("n", value, at_least=low, at_most=high)


@given(st.floats(), st.floats(allow_nan=False), st.booleans(), st.booleans())
def test_numbers_are_allowed_within_their_range(value: float, bound: float, lower: bool, strict: bool) -> None:
    keyword = {(True, True): "above", (True, False): "at_least", (False, True): "below", (False, False): "at_most"}
    allowed = value > bound if lower else value < bound
    allowed = allowed or (not strict and value == bound)
    limits: Any = {keyword[lower, strict]: bound}
    if allowed:
        assert check_number("x", value, finite=False, **limits) == value
    else:
        with pytest.raises(OptionError):
            check_number("x", value, finite=False, **limits)


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), torch.tensor(math.nan)], ids=name)
@pytest.mark.parametrize("finite", [True, False])
def test_nan_is_never_a_number(value: Any, finite: bool) -> None:
    with pytest.raises(OptionError, match="nan"):
        check_number("x", value, finite=finite)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", [math.inf, 10**400, 10**5000], ids=["inf", "10^400", "10^5000"])
def test_numbers_too_large_for_a_float_count_as_infinite(value: float, sign: int) -> None:
    assert check_number("x", sign * value, finite=False) == sign * math.inf
    with pytest.raises(OptionError, match=r"^x must be a finite number, got "):
        check_number("x", sign * value)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_the_largest_seed_is_that_of_the_generators(seed: int) -> None:
    torch.Generator().manual_seed(MAX_SEED)
    assert np.array([MAX_SEED], dtype=np.uint64)[0] == MAX_SEED
    with pytest.raises(OptionError, match=r"^seed must be an integer between 0 and 18446744073709551615, got "):
        check_int("seed", seed, at_least=0, at_most=MAX_SEED)


def test_ranges_are_named_in_the_message() -> None:
    for limits, words in (
        ({}, "a finite number"),
        ({"above": 0}, "a finite number above 0"),
        ({"above": 0, "below": 1}, "a finite number above 0 and below 1"),
        ({"above": 0, "at_most": 1}, "a finite number above 0 and of at most 1"),
        ({"at_least": 0, "at_most": 1}, "a finite number between 0 and 1"),
    ):
        with pytest.raises(OptionError, match=f"^share must be {words}, got 'x'$"):
            check_number("share", "x", **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["Min", "", " min", None, 0, ["min"], {"min"}, b"min"], ids=name)
def test_a_choice_is_one_of_its_strings(value: Any) -> None:
    assert check_choice("mode", "min", ("min", "max")) == "min"
    with pytest.raises(OptionError, match=r"^mode must be 'min', 'max' or 'both', got "):
        check_choice("mode", value, ("min", "max", "both"))
    with pytest.raises(OptionError, match=r"^mode must be 'min', got "):
        check_choice("mode", value, ("min",))


@pytest.mark.parametrize("value", [None, 1, b"name", ["name"], Path("name")], ids=name)
def test_only_strings_are_strings(value: Any) -> None:
    assert check_str("prefix", "name") == "name"
    with pytest.raises(OptionError, match=r"^prefix must be a string that is not empty, got "):
        check_str("prefix", value)
    with pytest.raises(OptionError, match=r"^prefix must be a string, got "):
        check_str("prefix", value, empty=True)


def test_an_empty_string_is_refused_unless_allowed() -> None:
    assert check_str("prefix", "", empty=True) == ""
    with pytest.raises(OptionError, match=r"^prefix must be a string that is not empty, got ''$"):
        check_str("prefix", "")


@pytest.mark.parametrize("value", ["", "a\0b", None, 1, b"run", ["run"]], ids=name)
def test_only_paths_are_paths(value: Any) -> None:
    assert check_path("folder", "run") == check_path("folder", Path("run")) == "run"
    with pytest.raises(OptionError, match=r"^folder must be a path that is not empty, got "):
        check_path("folder", value)


def test_only_callables_are_callable() -> None:
    assert check_callable("loss_fn", math.sqrt) is math.sqrt
    with pytest.raises(OptionError, match=r"^loss_fn must be callable, got 1$"):
        check_callable("loss_fn", 1)


@pytest.mark.parametrize("value", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), iter([1, 2])])
def test_each_item_of_any_iterable_is_checked(value: Any) -> None:
    assert check_each(check_int, "at_steps", value, at_least=1) == (1, 2)


def test_the_refused_item_is_named() -> None:
    with pytest.raises(OptionError, match=r"^at_steps\[1\] must be an integer of at least 0, got 1\.5$"):
        check_each(check_int, "at_steps", [1, 1.5], at_least=0)


@pytest.mark.parametrize("value", ["trace", b"trace", {"trace": 1}, None, 3, np.array(3), torch.tensor(3)], ids=name)
def test_a_single_value_is_no_list(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^extras must be a list, got "):
        check_each(check_str, "extras", value)


@pytest.mark.parametrize("value", [1, "^head", ["^head"], [("head", "^head")]], ids=name)
def test_only_mappings_are_mappings(value: Any) -> None:
    assert check_mapping("groups", {"head": "^head"}) == {"head": "^head"}
    assert check_mapping("groups", None) == {}
    with pytest.raises(OptionError, match=r"^groups must be a mapping, got "):
        check_mapping("groups", value)
    with pytest.raises(OptionError, match=r"^groups must be a mapping, got "):
        Measurer(groups=value)


@pytest.mark.parametrize("value", [1, {"trace": 1}, None], ids=name)
def test_extras_are_a_list(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^extras must be a list, got "):
        Measurer(extras=value)


def test_only_solvers_are_solvers() -> None:
    with pytest.raises(OptionError, match=r"^solver must be a Solver, such as Lanczos\(rtol=0.05\), got 1$"):
        Measurer(solver=1)  # type: ignore[arg-type]


def test_an_optional_value_may_be_none() -> None:
    assert optional(check_int, "n", None, at_least=1) is None
    assert optional(check_int, "n", 2, at_least=1) == 2
    with pytest.raises(OptionError, match=r"^n must be None or an integer of at least 1, got 0$"):
        optional(check_int, "n", 0, at_least=1)


class Nasty:
    def __repr__(self) -> str:
        raise RuntimeError("no representation")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, list(range(10**5)), np.zeros((99, 99)), "a\nb", Nasty(), 10**5000], ids=type
)
def test_messages_are_short_and_of_one_line(value: Any) -> None:
    with pytest.raises(OptionError) as raised:
        check_int("n", value, at_most=1)
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


def test_errors_survive_pickling_between_processes() -> None:
    error = OptionError("n", "an integer", 1.5)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(other) == str(error) == "n must be an integer, got 1.5"
    assert isinstance(error, ValueError)


def test_the_checks_need_no_lightning() -> None:
    tree = ast.parse(Path(str(options.__file__)).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.split(".")[0] in ("lightning", "hessian_callback")]
