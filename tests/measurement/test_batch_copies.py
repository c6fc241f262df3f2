"""Tests of copies of batches: nothing that a loss does to its copy is seen in the batch, whatever the class."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding
from transformers.utils import ModelOutput

from hessian_callback.measurement.batch_copies import copy_batch, map_tensors
from hessian_callback.operators.batches import tensors


class Pair(NamedTuple):
    x: torch.Tensor
    y: Any


class MyTuple(tuple):
    """A tuple with attributes."""


class MyList(list):
    """A list with attributes."""


class MyDict(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("assigned")


@dataclass
class Data:
    x: torch.Tensor
    y: Any = None


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


@attrs.frozen
class Attrs:
    x: torch.Tensor


class Slots:
    __slots__ = ("__hidden", "x")

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.__hidden = x * 1

    @property
    def hidden(self) -> torch.Tensor:
        return self.__hidden


class Counting:
    """Assignments have side effects."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__dict__["x"] = x

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError("assigned")


class Store:
    def __init__(self, parent: Any, x: torch.Tensor) -> None:
        self.mapping = {"x": x}
        self.parent = weakref.ref(parent)

    def __copy__(self) -> Any:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, mapping=copy.copy(self.mapping))
        return other


class Graph:
    """An object whose parts refer to it, with a copy of its own, as graph libraries have them."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__dict__["store"] = Store(self, x)

    def __getattr__(self, name: str) -> Any:
        if "store" not in self.__dict__:
            raise RuntimeError("not initialised")
        return self.store.mapping[name]

    def __copy__(self) -> Any:
        other = type(self).__new__(type(self))
        other.__dict__["store"] = copy.copy(self.store)
        other.store.parent = weakref.ref(other)
        return other


def attribute(kind: Callable[[torch.Tensor], Any]) -> tuple[Any, Any]:
    return kind, lambda batch: batch.x


def entry(kind: Callable[[torch.Tensor], Any], key: Any = "x") -> tuple[Any, Any]:
    return kind, lambda batch: batch[key]


CLASSES: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "tensor": (lambda x: x, lambda batch: batch),
    "list": entry(lambda x: [x], 0),
    "tuple": entry(lambda x: (x, 1), 0),
    "named tuple": attribute(lambda x: Pair(x, "y")),
    "subclass of tuple": entry(lambda x: MyTuple([x]), 0),
    "subclass of list": entry(lambda x: MyList([x]), 0),
    "subclass of dict": entry(lambda x: MyDict(x=x)),
    "dict": entry(lambda x: {"x": x}),
    "ordered": entry(lambda x: OrderedDict(x=x)),
    "default": entry(lambda x: defaultdict(list, x=x)),
    "user dict": entry(lambda x: UserDict(x=x)),
    "deque": entry(lambda x: deque([x], maxlen=2), 0),
    "dataclass": attribute(Data),
    "frozen dataclass": attribute(Frozen),
    "attrs": attribute(Attrs),
    "slots": attribute(Slots),
    "hidden slot": (Slots, lambda batch: batch.hidden),
    "own assignment": attribute(Counting),
    "graph": attribute(Graph),
    "nested": (lambda x: {"a": [Data(torch.ones(1), Pair(x, None))]}, lambda batch: batch["a"][0].y.x),
    "packed": (lambda x: pack_sequence([x, x[:1]]), lambda batch: batch.data),
    "result": (lambda x: torch.max(x[None], 0), lambda batch: batch.values),
    "encoding": entry(lambda x: BatchEncoding({"x": x})),
    "model output": entry(lambda x: ModelOutput(x=x)),
    "in an array": (lambda x: {"x": x.numpy()}, lambda batch: torch.from_numpy(batch["x"])),
    "attribute of a tensor": (lambda x: hanging(torch.ones(1), x), lambda batch: batch.extra),
}


def hanging(tensor: Any, extra: Any) -> Any:
    tensor.extra = extra
    return tensor


@pytest.mark.parametrize("name", CLASSES)
def test_a_change_of_the_copy_stays_in_the_copy(name: str) -> None:
    make, find = CLASSES[name]
    batch = make(torch.zeros(3))
    before = find(batch).clone()
    shared: set[type] = set()
    copied = copy_batch(batch, shared)
    assert type(copied) is type(batch)
    assert not shared
    assert torch.equal(find(copied), before)
    find(copied).add_(1)
    assert torch.equal(find(batch), before)
    assert not torch.equal(find(copied), before)


def test_containers_are_new_ones() -> None:
    batch = {"x": torch.zeros(1), "names": ["a"], "more": [{"y": 1}]}
    copied = copy_batch(batch)
    copied.pop("x")
    copied["names"].append("b")
    copied["more"][0].clear()
    assert list(batch) == ["x", "names", "more"]
    assert batch["names"] == ["a"]
    assert batch["more"] == [{"y": 1}]


def test_a_graph_library_keeps_its_references() -> None:
    copied = copy_batch(Graph(torch.zeros(1)))
    assert copied.store.parent() is copied


def test_one_object_in_two_places_is_one_in_the_copy() -> None:
    x, inner = torch.zeros(1), Data(torch.ones(1))
    batch: list[Any] = [x, {"x": x}, inner, inner]
    batch.append(batch)
    copied = copy_batch(batch)
    assert copied[0] is copied[1]["x"] is not x
    assert copied[2] is copied[3] is not inner
    assert copied[4] is copied


def test_what_is_no_data_is_shared() -> None:
    module, lock, function = torch.nn.Linear(1, 1), threading.Lock(), lambda: None
    batch = {"module": module, "lock": lock, "function": function, "kind": int, "data": torch.utils.data.Dataset()}
    shared: set[type] = set()
    copied = copy_batch(batch, shared)
    assert all(copied[key] is batch[key] for key in batch)
    assert not shared  # none of these changes under a loss, so none is reported


class Uncopyable:
    def __init__(self) -> None:
        self.x = torch.zeros(1)

    def __copy__(self) -> Any:
        raise RuntimeError("a handle")


def test_what_cannot_be_copied_is_reported() -> None:
    shared: set[type] = set()
    batch = [Uncopyable(), (number for number in range(3))]
    copied = copy_batch(batch, shared)
    assert copied[0] is batch[0]
    assert {kind.__name__ for kind in shared} == {"Uncopyable", "generator"}


STRUCTURES = st.recursive(
    st.builds(lambda n: torch.zeros(n), st.integers(0, 3)) | st.integers() | st.text(max_size=2) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.builds(Data, inner, inner)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@given(STRUCTURES)
@settings(max_examples=60, deadline=None)
def test_every_tensor_of_a_structure_is_replaced_once(batch: Any) -> None:
    calls: list[torch.Tensor] = []

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return tensor + 1

    found = list(tensors(map_tensors(batch, replaced)))
    assert len(found) == len(list(tensors(batch)))
    assert all(bool((tensor == 1).all()) for tensor in found)
    assert all(bool((tensor == 0).all()) for tensor in tensors(batch))
    assert len(calls) == len({id(tensor) for tensor in calls})


def test_arrays_are_copied() -> None:
    batch = {"x": np.zeros(2)}
    copied = copy_batch(batch)
    copied["x"] += 1
    assert batch["x"].tolist() == [0, 0]
