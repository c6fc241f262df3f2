"""Strategies that change valid files and states a little."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

__all__ = ["ODD_BYTES", "changed_state", "mutated", "odd_values"]

#: Pieces of text that parsers of numbers, JSON, CSV and YAML trip over.
ODD_BYTES = (
    *(b"", b"nan", b"NaN", b"-inf", b"Infinity", b"1e999", b"-1", b"1_0", b"0x10", b"True", b"null", b"~", b"1:1:1"),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"'", b",", b"\r", b"\n", b"\t", b"&a ", b"*a"),
    *(b"[", b"{", b"]", b"}", b"[" * 3000, b"9" * 5000, b"x" * 200_000, b"<b>&\"'", b"$\\frac$", "٣".encode()),
    *(b"!!python/object:os.system", b"2001-99-99", b"<<: ", b"? ", b"- ", b": "),
)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes] = ODD_BYTES) -> bytes:
    """Draw one of some files, with up to six pieces cut, repeated, overwritten or moved."""
    data = draw(st.sampled_from(list(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 5, 20, 100, 1000, 100_000])))
        piece = draw(
            st.one_of(
                st.sampled_from(list(tokens)),
                st.binary(max_size=8),
                st.just(data[start:end] * 2),
                st.integers(-(2**70), 2**70).map(lambda number: str(number).encode()),
                st.sampled_from(data.splitlines(keepends=True) or [b""]),
            )
        )
        data = data[:start] + piece + data[end:]
    return data


def odd_values() -> st.SearchStrategy[Any]:
    """Draw a value of any type that a checkpoint may hold."""
    shapes = st.sampled_from([(), (0,), (1,), (4,), (2, 3), (3, 3), (1, 1, 1)])
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.int64, torch.bool, torch.complex64, torch.bfloat16])
    tensors = st.builds(torch.ones, shapes, dtype=dtypes)
    numbers = st.one_of(st.integers(), st.sampled_from([2**63, -(2**63), 10**400]), st.floats())
    leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.binary(max_size=3), tensors)
    return st.recursive(
        leaves,
        lambda parts: st.one_of(
            st.lists(parts, max_size=3),
            st.tuples(parts),
            st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), parts, max_size=3),
        ),
        max_leaves=5,
    )


@st.composite
def changed_state(draw: st.DrawFn, states: Sequence[Any]) -> Any:
    """Draw one of some nested states, with up to three entries replaced, removed or added."""
    state = copy.deepcopy(draw(st.sampled_from(list(states))))
    for _ in range(draw(st.integers(0, 3))):
        place, keys = state, []
        while True:
            keys = (
                list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
            )
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if not (isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3))):
                _change(draw, place, key)
                break
            place = inner
        if not keys:
            state = draw(odd_values())
    return state


def _change(draw: st.DrawFn, place: Any, key: Any) -> None:
    how = draw(st.sampled_from(["replace", "replace", "tensor", "remove", "add"]))
    if how == "tensor" and isinstance(place[key], torch.Tensor) and place[key].numel():
        values = place[key].clone().flatten()
        number = draw(st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 1e308, 5e-324]))
        values[draw(st.integers(0, len(values) - 1))] = number if values.is_floating_point() else int(number == 0)
        place[key] = values.reshape(place[key].shape)
    elif how == "remove":
        del place[key]
    elif how == "add" and isinstance(place, dict):
        place[draw(st.text(max_size=4))] = draw(odd_values())
    else:
        place[key] = draw(odd_values())
