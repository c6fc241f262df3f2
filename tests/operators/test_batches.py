"""Batches of every type that loaders yield: counted, and cut in half."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hessian_callback.operators.batches import halves, leading_dimension, tensors

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Record:
    x: Tensor
    names: list[str]
    temperature: float = 0.5


def encoding() -> Any:
    return pytest.importorskip("transformers").BatchEncoding({"x": torch.arange(3), "mask": torch.ones(3, 2)})


X = torch.arange(3)
BATCHES: dict[str, Any] = {
    "tensor": lambda: X,
    "list": lambda: [X, torch.zeros(3, 2)],
    "named tuple": lambda: Pair(X, torch.zeros(3)),
    "dictionary": lambda: {"x": X, "scale": torch.tensor(1.0), "name": ["a", "b"]},
    "ordered": lambda: OrderedDict(x=(X, [torch.zeros(3, 7)])),
    "default": lambda: defaultdict(list, x=X),
    "user's": lambda: UserDict({"x": X, "y": {"z": X}}),
    "data class": lambda: Record(X, ["a", "b", "c"]),
    "tokenizer's": encoding,
}


@pytest.mark.parametrize("name", BATCHES)
def test_counted_and_cut(name: str) -> None:
    batch = BATCHES[name]()
    assert leading_dimension(batch) == 3
    first, second = halves(batch)
    assert type(first) is type(second) is type(batch)
    assert (leading_dimension(first), leading_dimension(second)) == (2, 1)
    for whole, one, other in zip(tensors(batch), tensors(first), tensors(second), strict=True):
        assert torch.equal(torch.cat([one, other]) if whole.dim() else one, whole)
    # What was cut is as it was.
    assert leading_dimension(batch) == 3


def test_what_is_not_a_tensor_is_cut_only_if_it_has_an_entry_for_each_sample() -> None:
    first, second = halves(Record(X, ["a", "b", "c"]))
    assert (first.names, second.names, second.temperature) == (["a", "b"], ["c"], 0.5)
    assert halves({"x": X, "kinds": ["p", "q"]})[1]["kinds"] == ["p", "q"]


@pytest.mark.parametrize(
    "batch",
    [["a"], torch.tensor(1.0), [torch.zeros(2), torch.zeros(3)], {"text": "abc"}, object()],
    ids=["no tensor", "scalar", "unequal", "text", "object"],
)
def test_what_is_not_clear_is_not_guessed_at(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"Pass batch_weight=.*counted tokens"):
        leading_dimension(batch)
    with pytest.raises(ValueError, match=r"Pass batch_weight=.*counted tokens"):
        halves(batch)


class Graphs:
    """Several graphs as one, as graph libraries collate them."""

    def __init__(self) -> None:
        self.num_graphs = 2
        self.nodes = torch.zeros(5, 3)


class Ragged:
    def __init__(self) -> None:
        self._hidden = torch.zeros(4)
        self.scale = torch.tensor(1.0)
        self.targets = torch.zeros(2)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ([torch.zeros(2), torch.zeros(3)], 2),
        (["a", torch.zeros(2), torch.zeros(3)], 2),
        ({"x": torch.zeros(2), "y": torch.zeros(3)}, 2),
        (Pair([torch.zeros(7)], torch.zeros(2)), 2),
        (Graphs(), 2),
        (Ragged(), 2),
    ],
    ids=["list", "names and tensors", "dictionary", "named tuple", "graphs", "object"],
)
def test_the_suggested_weight_is_one_that_the_batch_has(batch: Any, count: int) -> None:
    with pytest.raises(ValueError, match="Pass batch_weight") as raised:
        leading_dimension(batch)
    suggested = str(raised.value).partition("for example ")[2].partition(", or the number")[0]
    assert suggested.startswith("lambda batch: ")
    assert eval(suggested)(batch) == count


def test_one_sample_has_no_halves() -> None:
    with pytest.raises(ValueError, match="one sample"):
        halves(torch.zeros(1, 4))
