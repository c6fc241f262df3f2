"""The state guard without a trainer: prevented, restored and detected changes."""

from __future__ import annotations

import array
import collections
import csv
import functools
import importlib
import io
import itertools
import mmap
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from hessian_callback.measurement import state_guard
from hessian_callback.measurement.state_guard import (
    Snapshot,
    defer_signals,
    eval_mode,
    preserve_state,
)
from hessian_callback.measurement.state_records import UnrestorableStateError
from hessian_callback.operators.hooks import suspend_hooks

# -- containers and objects --------------------------------------------------------------------------


class Mapping_(dict[Any, Any]):
    """Overrides what a guard might call."""

    def clear(self) -> None:
        raise AssertionError("the guard called an overridden method")

    update = __setitem__ = clear  # type: ignore[assignment]


class List_(list[Any]):
    def extend(self, *_: Any) -> None:
        raise AssertionError("the guard called an overridden method")


class Point:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("unset", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


Pair = collections.namedtuple("Pair", ["one", "two"])


def picture(value: Any) -> Any:
    """Describe a nested structure, with the identity of all mutable objects."""
    if isinstance(value, torch.Tensor):
        # A copy: a storage that numpy shares cannot be resized again.
        return "tensor", id(value), value.dtype, value.shape, bits(value), value.requires_grad
    if isinstance(value, np.ndarray):
        return "array", id(value), value.tolist()
    if isinstance(value, Point):
        return "point", id(value), picture(vars(value))
    if isinstance(value, Slotted):
        return "slotted", id(value), [picture(getattr(value, name, "absent")) for name in Slotted.__slots__]
    if isinstance(value, types.SimpleNamespace):
        return "namespace", id(value), picture(vars(value))
    if isinstance(value, dict):
        return type(value), id(value), [(key, picture(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), id(value), [picture(item) for item in value]
    if isinstance(value, set):
        return "set", id(value), sorted(value)
    if isinstance(value, (bytearray, array.array)):
        return type(value), id(value), bytes(value)
    return value


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone().numpy().tobytes()


def structures() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.integers(-(10**12), 10**12),
        st.floats(allow_nan=False),
        st.text(max_size=3),
        st.lists(st.floats(width=32), max_size=4).map(lambda x: torch.tensor(x)),
        st.lists(st.integers(-5, 5), max_size=4).map(np.array),
        st.binary(max_size=4).map(bytearray),
        st.lists(st.integers(0, 9), max_size=4).map(lambda x: array.array("l", x)),
        st.sets(st.integers(0, 9), max_size=4),
        st.lists(st.sampled_from("abc"), max_size=4).map(Counter),
    )

    def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(inner, max_size=4)
        dicts = st.dictionaries(st.sampled_from("abcdef"), inner, max_size=4)
        return st.one_of(
            lists,
            lists.map(tuple),
            lists.map(List_),
            lists.map(lambda x: deque(x, maxlen=4)),
            dicts,
            dicts.map(OrderedDict),
            dicts.map(Mapping_),
            dicts.map(lambda x: defaultdict(list, x)),
            dicts.map(lambda x: types.SimpleNamespace(**x)),
            st.tuples(inner, inner).map(lambda x: Pair(*x)),
            inner.map(Point),
            inner.map(Slotted),
        )

    return st.recursive(leaves, grown, max_leaves=12)


def inside(value: Any) -> Iterator[Any]:
    """All objects in a structure that can be changed."""
    if isinstance(value, (Point, types.SimpleNamespace)):
        yield value
        yield from inside(list(vars(value).values()))
    elif isinstance(value, Slotted):
        yield value
        yield from inside([value.value])
    elif isinstance(value, dict):
        yield value
        yield from inside(list(value.values()))
    elif isinstance(value, (list, tuple, deque)):
        if not isinstance(value, tuple):
            yield value
        for item in value:
            yield from inside(item)
    elif isinstance(value, (set, bytearray, array.array, np.ndarray, torch.Tensor)):
        yield value


def disturb(value: Any, how: random.Random) -> None:
    """Change an object in one of the ways that its kind allows."""
    kinds: list[Callable[[], Any]]
    if isinstance(value, (Point, types.SimpleNamespace)):
        kinds = [lambda: setattr(value, "value", 7), lambda: setattr(value, "new", [1]), lambda: vars(value).clear()]
    elif isinstance(value, Slotted):
        kinds = [lambda: setattr(value, "value", 7), lambda: setattr(value, "unset", 1)]
    elif isinstance(value, dict):
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        first = next(iter(value), "first")
        kinds = [
            lambda: base.__setitem__(value, "new", 1),
            lambda: base.__setitem__(value, first, [3]),
            lambda: base.clear(value),
            lambda: base.pop(value, first, None),
            # Last, as after `move_to_end`.
            lambda: base.__setitem__(value, first, base.pop(value, first, None)),
        ]
    elif isinstance(value, (list, deque)):
        kinds = [
            lambda: value.append(1),
            lambda: value.reverse(),
            lambda: value.__setitem__(0, "other") if value else None,
            lambda: value.clear(),
        ]
    elif isinstance(value, set):
        kinds = [lambda: value.add(99), lambda: value.clear()]
    elif isinstance(value, (bytearray, array.array)):
        kinds = [lambda: value.append(1), lambda: value.__setitem__(0, 77) if value else None]
    elif isinstance(value, np.ndarray):
        kinds = [lambda: value.fill(3), lambda: value.resize(9, refcheck=False)]
    else:
        kinds = [
            lambda: value.add_(1),
            lambda: value.data.mul_(-1),
            lambda: None if value.requires_grad else value.resize_(7),
            lambda: setattr(value, "data", torch.ones(5, dtype=torch.float64)),
            lambda: value.requires_grad_(),
            lambda: setattr(value, "hung", [1]),
        ]
    with torch.no_grad(), suppress(ValueError):  # An array that does not own its memory cannot be resized.
        how.choice(kinds)()


@pytest.mark.slow
@given(structures(), st.integers(0, 2**32), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_any_structure_is_restored_again_and_again(structure: Any, seed: int, rounds: int) -> None:
    module, how = nn.Linear(1, 1), random.Random(seed)
    module.state = structure
    before = picture(structure)
    with Snapshot() as snapshot:
        snapshot.remember(module)
        for number in range(rounds):
            for value in how.choices(list(inside(module.state)) or [[]], k=3):
                disturb(value, how)
            module.more = 1
            if how.random() < 0.3:
                module.state = None
            if number % 2:
                snapshot.restore_loss_state()
            else:
                snapshot.restore()
            if number % 2 == 0:
                assert picture(module.state) == before
                assert not hasattr(module, "more")
            else:
                assert not hasattr(module, "more")
                # `requires_grad` is left to the caller.
                for value in inside(structure):
                    if isinstance(value, torch.Tensor):
                        value.requires_grad_(False)
                assert picture(module.state) == before
    assert module.state is structure
    assert picture(structure) == before


def test_deep_structures_do_not_exhaust_the_stack() -> None:
    innermost: list[Any] = []
    outer = innermost
    for _ in range(5000):
        outer = [outer]
    ring = Point(None)
    ring.value = [ring, outer]
    with Snapshot() as snapshot:
        snapshot.remember(ring)
        innermost.append(1)
    assert innermost == []


class Counted(nn.Module):
    """Counts in its class, as code does by mistake or for all instances together."""

    calls = 0
    seen: list[int] = []  # noqa: RUF012

    @classmethod
    def count(cls) -> None:
        cls.calls += 1
        cls.seen.append(1)
        cls.late = True  # type: ignore[attr-defined]


def test_class_attributes_of_the_users_classes_are_restored() -> None:
    class Derived(Counted):
        pass

    with preserve_state(Derived()):
        Derived.count()
        Counted.count()
    assert Counted.calls == 0
    assert Counted.seen == []
    assert not hasattr(Derived, "late")
    assert "calls" not in vars(Derived)


class Noisy:
    """Called like a function, with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def test_callable_objects_that_are_class_attributes_are_restored() -> None:
    class Augmented:
        transform = Noisy()
        mean = torchmetrics.MeanMetric()

    holder = Augmented()
    with preserve_state(nn.Linear(1, 1), holder):
        holder.transform()
        holder.mean.update(3.0)
        Augmented.transform = Noisy()
    assert holder.transform.calls == 0
    assert float(holder.mean.weight) == 0


def test_what_functions_hold_is_restored() -> None:
    count, seen = 0, []

    def collate(batch: Any, calls: list[int] = []) -> Any:  # noqa: B006 - the fault
        nonlocal count
        count += 1
        seen.append(batch)
        calls.append(1)
        collate.calls = getattr(collate, "calls", 0) + 1  # type: ignore[attr-defined]
        return torch.utils.data.default_collate(batch)

    loader = DataLoader([1, 2], collate_fn=collate)
    with preserve_state(nn.Linear(1, 1), loader):
        assert len(list(loader)) == 2
        assert count == 2
    assert (count, seen) == (0, [])
    assert collate.__defaults__ == ([],)
    assert not hasattr(collate, "calls")


class Cached:
    """Keeps what it draws."""

    @functools.lru_cache(maxsize=8)  # noqa: B019 - the fault
    def noise(self, index: int) -> float:
        return random.random()


@functools.cache
def drawn(index: int) -> float:
    return random.random()


def uses_drawn(index: int) -> float:
    return drawn(index)


def test_cached_functions_have_an_empty_cache_in_the_block() -> None:
    holder = Cached()
    holder.inner = functools.lru_cache(lambda index: random.random())  # type: ignore[attr-defined]
    enclosed = functools.lru_cache(lambda index: random.random())
    holder.uses = lambda index: uses_drawn(index) + enclosed(index)  # type: ignore[attr-defined]
    functions = [holder.noise, holder.inner, holder.uses]  # type: ignore[attr-defined]
    before = [function(0) for function in functions]
    whole = vars(Cached)["noise"], drawn
    with preserve_state(nn.Linear(1, 1), holder) as snapshot:
        inside = [holder.noise(1), holder.inner(1), holder.uses(1)]  # type: ignore[attr-defined]
        assert [holder.noise(1), holder.inner(1), holder.uses(1)] == inside  # type: ignore[attr-defined]
        snapshot.restore_loss_state()
        assert holder.noise(1) != inside[0]
    assert whole == (vars(Cached)["noise"], drawn)
    assert [function(0) for function in functions] == before
    assert [whole[0].cache_info().currsize, holder.inner.cache_info().currsize, drawn.cache_info().currsize] == [1] * 3  # type: ignore[attr-defined]
    drawn.cache_clear()


@pytest.mark.parametrize("mode", ["w", "a", "r+"])
def test_files_are_not_written_to(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    module = nn.Linear(1, 1)
    with open(path, mode) as file:
        file.write("kept\n")
        module.logs = [file]
        module.log = lambda text: file.write(text)
        with preserve_state(module):
            module.logs[0].write("measured\n")
            module.log("measured\n")
            print("measured", file=module.logs[0])
        assert module.logs[0] is file
        assert file.write("kept as well\n") == 13
        file.write("also kept\n")
    text = path.read_text()
    assert "measured" not in text
    assert text.endswith("kept\nkept as well\nalso kept\n")


def test_temporary_files_and_archives_get_nothing(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    with tempfile.NamedTemporaryFile("w+") as file, zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        module.file, module.archive = file, archive
        file.write("before ")
        with preserve_state(module):
            module.file.write("measured ")
            module.archive.writestr("measured", "x")
        file.write("after")
        file.seek(0)
        assert file.read() == "before after"
        assert archive.namelist() == []


def test_tables_and_writers_for_tensorboard_get_nothing(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    with open(tmp_path / "rows.csv", "w", newline="") as file, SummaryWriter(str(tmp_path)) as writer:
        module.rows, module.named, module.writer = csv.writer(file), csv.DictWriter(file, ["x"]), writer
        module.rows.writerow([1])
        with preserve_state(module):
            module.rows.writerow([2])
            module.named.writerow({"x": 3})
            module.writer.add_scalar("x", 2.0, 2)
        module.named.writerow({"x": 4})
        module.writer.add_scalar("x", 4.0, 4)
    assert (tmp_path / "rows.csv").read_text().split() == ["1", "4"]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("x")] == [4.0]


@pytest.mark.parametrize("kind", [list, deque, dict], ids=["list", "deque", "dict"])
def test_long_containers_are_restored_entry_by_entry(kind: Any) -> None:
    items: list[Any] = [(torch.zeros(1), number) for number in range(15_000)] + [{"priority": 1.0}, [2]]
    buffer = dict(enumerate(items)) if kind is dict else kind(items)
    module = nn.Linear(1, 1)
    module.buffer = buffer
    with preserve_state(module):
        buffer[12_000] = "other"
        buffer[3] = "other"
        buffer[15_000]["priority"] = 2.0
        buffer[15_001].append(3)
    assert [buffer[number] for number in range(15_000)] == items[:15_000]
    assert (buffer[15_000], buffer[15_001]) == ({"priority": 1.0}, [2])


def test_a_tensor_in_a_long_container_is_watched() -> None:
    module = nn.Linear(1, 1)
    module.buffer = [(torch.zeros(1), number) for number in range(2000)]
    with (
        pytest.raises(UnrestorableStateError, match=r"the tensor Linear\.buffer\[\.\.\.\] in place"),
        preserve_state(module),
    ):
        module.buffer[7][0].add_(1)


def test_what_is_too_much_to_be_compared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_guard, "_VISITED", 3000)
    monkeypatch.setattr(state_guard, "_CHECKED_BYTES_TOTAL", 2**20)
    module = nn.Linear(1, 1)
    module.points = [Point(number) for number in range(5000)]
    module.frames = np.zeros(2**24)
    module.near = near = Point(0)
    with preserve_state(module) as snapshot:
        assert set(snapshot.unchecked()) == {"Linear.points[...]", "Linear.frames"}
        near.value = module.points[0].value = 7
    assert (near.value, module.points[0].value) == (0, 0)


def test_nothing_is_named_where_all_is_compared() -> None:
    module = nn.Linear(1, 1)
    module.points = [Point(number) for number in range(5000)]
    module.samples = [(Path(str(number)), (number, str(number))) for number in range(300_000)]
    with preserve_state(module) as snapshot:
        assert snapshot.unchecked() == []


# -- tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 100_000], ids=["small", "large"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(1),
        lambda t: t.data.add_(1),
        lambda t: setattr(t, "data", t.data + 1),
        lambda t: setattr(t, "data", t.data.double()),
        lambda t: setattr(t, "data", t.data[:2]),
        lambda t: t.resize_(1),
        lambda t: t.unsqueeze_(0),
        lambda t: t.mul_(torch.ones(1, requires_grad=True)),
        lambda t: t.neg_(),
        lambda t: t.untyped_storage().resize_(0),
    ],
    ids=["add", "data_add", "data", "double", "slice", "resize", "unsqueeze", "graph", "neg", "freed"],
)
def test_buffers_are_restored_bit_for_bit(size: int, change: Callable[[torch.Tensor], Any]) -> None:
    module = nn.Module()
    original = torch.randn(size)
    original[0], original[1] = torch.nan, 0.0
    module.register_buffer("state", original.clone())
    buffer = module.state
    with Snapshot() as snapshot:
        snapshot.remember(module)
        for restore in (snapshot.restore, snapshot.restore):
            change(buffer)
            restore()
            assert buffer.shape == original.shape
            assert buffer.dtype == original.dtype
            assert buffer.is_leaf
            assert bits(buffer) == bits(original)
    assert module.state is buffer


def test_unchanged_tensors_are_not_written() -> None:
    """Writing would invalidate a graph of the user's, also where a tensor holds NaN, which does not equal itself."""
    module = nn.Module()
    module.register_buffer("state", torch.tensor([torch.nan, 1.0]))
    weight = torch.ones(2, requires_grad=True)
    product = (weight * module.state).sum()
    with Snapshot() as snapshot:
        snapshot.remember(module)
        snapshot.restore()
        snapshot.restore_loss_state()
    product.backward()
    assert weight.grad is not None


def test_trained_parameters_are_left_to_the_caller_of_restore_loss_state() -> None:
    model = nn.BatchNorm1d(2)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model.frozen = frozen
    with Snapshot() as snapshot:
        snapshot.remember(model)
        with torch.no_grad():
            model.weight.add_(1)  # As a finite difference does.
            frozen.add_(1)  # As a momentum encoder does.
            model.running_mean.add_(1)
        model.bias.grad = torch.ones(2)
        snapshot.restore_loss_state()
        assert model.weight.tolist() == [2, 2]
        assert model.bias.grad is not None
        assert frozen.tolist() == [1, 1]
        assert model.running_mean.tolist() == [0, 0]
        snapshot.restore()
        assert model.weight.tolist() == [1, 1]
        assert model.bias.grad is None


class Stateful(nn.Module):
    """A loss that depends on earlier calls in five ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("scale", torch.ones(()))
        self.hidden: torch.Tensor | None = None
        self.calls, self.outputs = itertools.count(1), []
        self.noise = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.mul_(0.5)
        out = self.layer(x).mean() * self.scale * next(self.calls)
        if self.hidden is not None:
            out = out + self.hidden
        self.hidden = out.detach()
        self.outputs.append(out.item())
        return out + len(self.outputs) + torch.rand((), generator=self.noise)


def test_a_stateful_loss_becomes_a_function() -> None:
    model, x = Stateful(), torch.ones(3, 2)
    with preserve_state(model) as snapshot:
        values = []
        for _ in range(4):
            values.append(model(x).item())
            snapshot.restore_loss_state()
        assert len(set(values)) == 1
        gradient = torch.autograd.grad(model(x), model.layer.weight)[0]
        assert gradient.isfinite().all()
    assert model(x).item() == values[0]


def test_attributes_hung_on_parameters_are_restored() -> None:
    model = nn.Linear(2, 2)
    model.weight.sample_gradients = kept = [1]
    with preserve_state(model):
        model.weight.sample_gradients = torch.ones(2)
        model.bias.other = 1
        kept.append(2)
    assert model.weight.sample_gradients is kept
    assert kept == [1]
    assert not hasattr(model.bias, "other")


# -- hooks -------------------------------------------------------------------------------------------


def test_hooks_on_gradients_do_not_run_and_are_restored() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    events: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: events.append(name)

    handles = {
        "tensor": model[0].weight.register_hook(note("tensor")),
        "tensor again": model[0].weight.register_hook(note("tensor again")),
        "accumulated": model[0].weight.register_post_accumulate_grad_hook(note("accumulated")),
        "backward": model[0].register_full_backward_hook(note("backward")),
        "pre": model[2].register_full_backward_pre_hook(note("pre")),
        "everywhere": nn.modules.module.register_module_full_backward_hook(note("everywhere")),
        "forward everywhere": nn.modules.module.register_module_forward_hook(note("forward everywhere")),
        "in the block": model[0].bias.register_hook(note("in the block")),
    }
    try:
        model(torch.ones(1, 2)).sum().backward()
        expected, before = [name for name in events if name != "in the block"], set(events)
        assert before == set(handles)
        events.clear()
        hooks = model[0].weight._backward_hooks
        with preserve_state(model):
            gradients = torch.autograd.grad(model(torch.ones(1, 2)).sum(), list(model.parameters()), create_graph=True)
            sum(g.square().sum() for g in gradients).backward()
            handles["in the block"].remove()
            model[0].register_full_backward_hook(note("never"))
            assert events == []
        assert model[0].weight._backward_hooks is hooks
        model.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        assert events == expected
        events.clear()
    finally:
        for handle in handles.values():
            handle.remove()
    model(torch.ones(1, 2)).sum().backward()
    assert events == []


def structural(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    if name == "pruning":
        prune.random_unstructured(layer, "weight", amount=0.4)
    elif name == "old weight norm":
        torch.nn.utils.weight_norm(layer)
    elif name == "weight norm":
        parametrizations.weight_norm(layer)
    elif name == "old spectral norm":
        torch.nn.utils.spectral_norm(layer)
    elif name == "spectral norm":
        parametrizations.spectral_norm(layer)
    else:
        layer.register_forward_hook(lambda module, args, out: out * 2)
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return nn.Sequential(layer, nn.Tanh())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "name", ["pruning", "old weight norm", "weight norm", "old spectral norm", "spectral norm", "forward hooks"]
)
def test_structural_hooks_keep_working(name: str) -> None:
    model, x = structural(name), torch.randn(4, 3)
    with torch.no_grad():
        for parameter in model.parameters():  # The weight must be computed anew from its parts.
            parameter.mul_(0.7)
    expected = model.eval()(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    with preserve_state(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# -- modes -------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.calls: int = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.dropout(self.norm(x))


def compiled(kind: str) -> nn.Module:
    if kind == "trace":
        return torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.ones(2, 3))
    scripted = torch.jit.script(Block())
    if kind == "load":
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        return torch.jit.load(file)
    return scripted


@pytest.mark.parametrize("kind", ["script", "trace", "load"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_and_traced_modules_get_their_modes_and_state_back(kind: str) -> None:
    inner = compiled(kind)
    model = nn.Sequential(nn.Linear(3, 3), inner, nn.Sequential(compiled(kind)))
    next(child for child in inner.children()).eval()  # Each submodule has a mode of its own.
    model.hidden = [compiled(kind)]
    modes = [module.training for module in model.modules()]
    assert True in modes[2:]
    assert False in modes
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with preserve_state(model):
        assert not any(module.training for module in model.modules())
        model.train()
        model(torch.randn(4, 3))
        model.hidden[0].eval()
    assert [module.training for module in model.modules()] == modes
    assert model.hidden[0].training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if kind == "script":
        assert inner.calls == 0


def test_a_frozen_scripted_module_has_no_mode() -> None:
    model = nn.Sequential(torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval())), nn.Dropout())
    with eval_mode(model):
        assert not model[1].training
    assert model[1].training


def test_a_train_method_of_the_users_is_not_called() -> None:
    class Frozen(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("the guard called train()")

    with preserve_state(nn.Sequential(Frozen(1, 1))):
        pass


# -- iterators and streams ---------------------------------------------------------------------------

ITERATORS: dict[str, Callable[[], Any]] = {
    "count": lambda: itertools.count(3),
    "count of floats": lambda: itertools.count(0.5, -0.25),
    "cycle": lambda: itertools.cycle([1, 2, 3]),
    "list": lambda: iter(list(range(20))),
    "tuple": lambda: iter(tuple(range(20))),
    "range": lambda: iter(range(20)),
    "reversed": lambda: reversed(list(range(20))),
    "dict": lambda: iter(dict.fromkeys(range(20))),
    "string": lambda: iter("abcdefghijklmnopq"),
    "enumerate": lambda: enumerate(iter(range(20))),
    "zip": lambda: zip(itertools.count(), iter(range(20)), strict=False),
    "map": lambda: map(str, iter(range(20))),
    "filter": lambda: filter(None, iter(range(20))),
    "chain": lambda: itertools.chain(iter(range(3)), itertools.cycle([7, 8])),
    "islice": lambda: itertools.islice(itertools.count(), 1, 20, 2),
    "tee": lambda: itertools.tee(iter(range(20)))[0],
    "permutations": lambda: itertools.permutations(range(4)),
}


@given(st.sampled_from(sorted(ITERATORS)), st.integers(0, 4), st.integers(0, 4), st.sampled_from(["attribute", "list"]))
@settings(max_examples=120, deadline=None)
def test_iterators_go_on_where_they_were(kind: str, earlier: int, inside: int, place: str) -> None:
    if sys.version_info >= (3, 14) and kind not in ("count", "list", "tuple", "range", "reversed", "dict", "string"):
        return  # Iterators of itertools cannot be copied there; they refuse to be read.
    module, reference = nn.Linear(1, 1), ITERATORS[kind]()
    original = ITERATORS[kind]()
    module.stream = original if place == "attribute" else [original]

    def stream() -> Any:
        return module.stream if place == "attribute" else module.stream[0]

    for _ in range(earlier):
        assert next(original) == next(reference)
    ahead = [next(reference) for _ in range(inside + 1)]
    with preserve_state(module) as snapshot:
        for _ in range(2):
            assert [next(stream()) for _ in range(inside)] == ahead[:inside]
            snapshot.restore_loss_state()
    assert stream() is original
    assert [next(original) for _ in range(inside + 1)] == ahead


def test_items_of_an_iterator_are_not_copied() -> None:
    items = [torch.zeros(1)]
    module = nn.Linear(1, 1)
    module.stream = iter(items)
    with preserve_state(module):
        assert next(module.stream) is items[0]


def generated() -> Iterator[int]:
    yield from range(9)


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (generated, next),
        (generated, lambda s: s.send(None)),
        (lambda: map(str, generated()), next),
        (lambda: iter(lambda: 1, 2), next),
        (lambda: iter(torch.utils.data.DataLoader(list(range(9)))), next),
        (lambda: _filled(queue.Queue()), lambda s: s.get()),
        (lambda: _filled(queue.SimpleQueue()), lambda s: s.get_nowait()),
        (lambda: os.fdopen(_pipe()), lambda s: s.readline()),
    ],
    ids=["generator", "send", "map", "callable", "loader", "queue", "simple queue", "pipe"],
)
def test_a_stream_that_cannot_be_rewound_refuses_to_be_read(make: Any, read: Any) -> None:
    module = nn.Linear(1, 1)
    module.settings = {"stream": make()}
    original = module.settings["stream"]
    with preserve_state(module):
        assert isinstance(module.settings["stream"], type(original))
        with pytest.raises(UnrestorableStateError, match=r"would read Linear\.settings\['stream'\] .* Pass loss_fn="):
            read(module.settings["stream"])
    assert module.settings["stream"] is original
    read(original)
    if hasattr(original, "close"):
        original.close()


def _filled(some: Any) -> Any:
    some.put(1)
    return some


def _pipe() -> int:
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    return reading


@pytest.mark.parametrize("kind", [queue.Queue, queue.PriorityQueue, queue.SimpleQueue])
def test_a_queue_takes_items_of_other_threads_alone(kind: Any) -> None:
    module = nn.Linear(1, 1)
    module.queue = kind()
    with preserve_state(module):
        thread = threading.Thread(target=lambda: module.queue.put("theirs"))
        thread.start()
        thread.join()
        module.queue.put("ours")
        module.queue.put_nowait("ours")
    assert module.queue.get_nowait() == "theirs"
    assert module.queue.empty()


def test_the_bytes_behind_a_view_are_restored() -> None:
    module = nn.Linear(1, 1)
    module.view = memoryview(bytearray(2))
    with preserve_state(module):
        module.view[0] = 1
    assert bytes(module.view) == bytes(2)


def test_mapped_memory_and_attributes_of_a_thread_are_restored() -> None:
    module = nn.Linear(1, 1)
    module.mapped, module.local = mmap.mmap(-1, 8), threading.local()
    module.local.calls = [0]
    with preserve_state(module):
        module.mapped[0] = 1
        module.local.calls.append(1)
        module.local.more = 1
    assert bytes(module.mapped) == bytes(8)
    assert vars(module.local) == {"calls": [0]}
    module.mapped.close()


def test_objects_in_the_fields_of_an_array_are_restored() -> None:
    module, entry = nn.Linear(1, 1), [0]
    module.values = np.array([(1, entry), (2, [0])], dtype=[("number", "i4"), ("entry", object)])
    with preserve_state(module):
        entry.append(1)
        module.values["number"] = 7
        module.values["entry"][1] = None
    assert entry == [0]
    assert module.values["number"].tolist() == [1, 2]
    assert module.values["entry"][1] == [0]


@pytest.mark.parametrize("mode", ["r", "rb", "r+", "memory", "bytes in memory"])
def test_files_go_on_where_they_were(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntwo\nthree\n")
    module = nn.Linear(1, 1)
    if mode == "memory":
        module.file = io.StringIO("one\ntwo\nthree\n")
    elif mode == "bytes in memory":
        module.file = io.BytesIO(b"one\ntwo\nthree\n")
    else:
        module.file = path.open(mode)
    module.file.readline()
    with module.file:
        with preserve_state(module):
            assert len(module.file.readlines()) == 2
            if "memory" in mode:
                module.file.write("more" if mode == "memory" else b"more")
        assert module.file.readline().strip() in ("two", b"two")
        if "memory" in mode:
            assert len(module.file.getvalue()) == len("one\ntwo\nthree\n")


def test_a_file_that_is_being_iterated_refuses_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntwo\n")
    module = nn.Linear(1, 1)
    with path.open() as module.file:
        next(module.file)  # From here on its position is not known.
        with pytest.raises(UnrestorableStateError, match=r"would read Linear\.file"), preserve_state(module):
            next(module.file)
        assert next(module.file) == "two\n"


# -- random generators and libraries -----------------------------------------------------------------

LIBRARY = """
import numpy as np, random, torch
class Simulator:
    def __init__(self):
        self.position, self.steps, self.track, self.memory = np.zeros(2), 0, [0], {"last": 0}
        self._cache, self.lazy, self.table = {}, None, torch.zeros(2)
        self.rng, self.inner = np.random.default_rng(0), {"deep": [random.Random(0)]}
    def step(self):
        self.position += 1; self.steps += 1; self.track.append(1); self.memory["last"] = 1; self.table.add_(1)
    def read(self):
        self._cache["x"] = 1; self.lazy = 1; self.found = 2; self.rng.random(); self.inner["deep"][0].random()
class Collator:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
    def __call__(self, rows):
        return torch.rand(len(rows), generator=self.generator)
class Holder:
    def __init__(self, what):
        self.what = what
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module that lies where installed ones do."""
    folder = tmp_path_factory.mktemp("lib") / "site-packages"
    folder.mkdir()
    (folder / "a_library_of_a_test.py").write_text(LIBRARY)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("a_library_of_a_test")
    sys.path.remove(str(folder))


def test_a_simulator_of_a_library_is_detected_and_named(library: Any) -> None:
    module = nn.Linear(1, 1)
    module.parts = [library.Simulator()]
    with suppress(UnrestorableStateError), preserve_state(module) as snapshot:
        assert snapshot.changes() == []
        module.parts[0].read()
        assert snapshot.changes() == []
        module.parts[0].step()
        assert set(snapshot.changes()) == {
            "Linear.parts[0].position",
            "Linear.parts[0].steps",
            "Linear.parts[0].track",
            "Linear.parts[0].memory.last",
            "Linear.parts[0].table",
        }


def test_objects_of_libraries_are_restored_on_request(library: Any) -> None:
    simulator = library.Simulator()
    with Snapshot() as snapshot:
        snapshot.remember(library.Holder([simulator]), copy_tensors=False, restore_libraries=True)
        simulator.step()
        simulator.read()
        assert snapshot.changes() == []
    fresh = library.Simulator()
    assert (simulator.steps, simulator.track, simulator.memory) == (0, [0], {"last": 0})
    assert np.array_equal(simulator.position, fresh.position)
    assert torch.equal(simulator.table, fresh.table)
    assert simulator.rng.random() == fresh.rng.random()
    assert (simulator._cache, simulator.lazy, hasattr(simulator, "found")) == ({}, None, False)


def test_random_generators_in_objects_of_libraries_are_restored(library: Any) -> None:
    simulator, collator = library.Simulator(), library.Collator(3)
    loader = torch.utils.data.DataLoader(list(range(4)), batch_size=2, collate_fn=collator)
    reference = library.Simulator(), library.Collator(3)
    with Snapshot() as snapshot:
        snapshot.remember([simulator, functools.partial(print, loader)])
        simulator.read()
        list(loader)
    assert simulator.rng.random() == reference[0].rng.random()
    assert simulator.inner["deep"][0].random() == reference[0].inner["deep"][0].random()
    assert torch.equal(collator([1]), reference[1]([1]))


def test_a_library_object_that_holds_the_users_has_it_restored(library: Any) -> None:
    point = Point([1])
    model = nn.BatchNorm1d(2)
    with Snapshot() as snapshot:
        snapshot.remember(library.Holder({"a": (point, model)}))
        point.value.append(2)
        model(torch.randn(3, 2))
        assert snapshot.changes() == []
    assert point.value == [1]
    assert model.running_mean.tolist() == [0, 0]


GENERATOR = np.random.default_rng(0)


def helper() -> float:
    return float(GENERATOR.random())


class Augmented(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> float:
        return index + (lambda: helper())()


def test_random_generators_in_closures_and_global_variables_are_restored() -> None:
    inner, defaults = np.random.RandomState(0), random.Random(0)

    def collate(rows: Any, draw: Any = defaults) -> float:
        return float(inner.rand()) + draw.random()

    expected = np.random.RandomState(0).rand() + random.Random(0).random()
    state = GENERATOR.bit_generator.state
    with Snapshot() as snapshot:
        snapshot.remember(Augmented())
        snapshot.remember(collate)
        Augmented()[0]
        collate(None)
    assert GENERATOR.bit_generator.state == state
    assert collate(None) == expected


OTHER_MODULE = """
CALLS, SEEN = 0, []
def note():
    global CALLS, LATE
    CALLS += 1; LATE = 1; SEEN.append(1)
"""


COLLATE_BY = {
    "function": "def collate(rows):\n    other.note()",
    "attribute": "def collate(rows):\n    other.SEEN.append(1)",
    "attribute of a package": "def collate(rows):\n    package.inner.SEEN.append(1); package.inner.CALLS += 1",
    "imported inside": "def collate(rows):\n    import globals_of_a_test as inside\n    inside.CALLS += 1",
    "property": (
        "class Collate:\n    @property\n    def noted(self):\n        return other.note()\n"
        "    def __call__(self, rows):\n        return self.noted\ncollate = Collate()"
    ),
}


@pytest.mark.parametrize("how", COLLATE_BY)
def test_global_variables_of_another_module_are_restored(how: str, tmp_path: Path) -> None:
    (tmp_path / "globals_of_a_test.py").write_text(OTHER_MODULE)
    sys.path.insert(0, str(tmp_path))
    try:
        other = importlib.import_module("globals_of_a_test")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("globals_of_a_test", None)
    sys.modules["globals_of_a_test"] = other
    package = types.ModuleType("package_of_a_test")
    package.inner = other  # type: ignore[attr-defined]
    namespace: dict[str, Any] = {"other": other, "package": package, "__name__": "__main__"}
    exec(COLLATE_BY[how], namespace)
    try:
        with Snapshot() as snapshot:
            snapshot.remember(namespace["collate"])
            namespace["collate"](None)
    finally:
        del sys.modules["globals_of_a_test"]
    assert (other.CALLS, other.SEEN, hasattr(other, "LATE")) == (0, [], False)


def test_an_object_of_a_library_in_a_global_variable_is_named(library: Any) -> None:
    namespace: dict[str, Any] = {"SIMULATOR": library.Simulator(), "__name__": "__main__"}
    exec("def collate(rows):\n    SIMULATOR.step()\n    SIMULATOR.rng.random()", namespace)
    with suppress(UnrestorableStateError), Snapshot() as snapshot:
        snapshot.remember(namespace["collate"], restore_libraries=True)
        namespace["collate"](None)
        assert "SIMULATOR.steps" in snapshot.changes()
    assert namespace["SIMULATOR"].rng.random() == library.Simulator().rng.random()


# -- signals -----------------------------------------------------------------------------------------


@pytest.fixture
def handled() -> Iterator[list[int]]:
    events: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT]
    before = {number: signal.signal(number, lambda n, _: events.append(n)) for number in numbers}
    yield events
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_deferred_and_raised_in_order(handled: list[int]) -> None:
    sent = [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    with suppress(ValueError), defer_signals() as arrived:
        for number in sent:
            os.kill(os.getpid(), number)
        assert handled == []
        assert arrived == sent
        raise ValueError
    assert handled == sent


def test_an_interrupt_is_not_deferred(handled: list[int]) -> None:
    with defer_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert handled == [signal.SIGINT]


def test_only_chosen_signals_are_deferred(handled: list[int]) -> None:
    with defer_signals([signal.SIGUSR2]):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert handled == [signal.SIGUSR1]
    assert handled == [signal.SIGUSR1, signal.SIGUSR2]


def test_a_handler_that_raises_does_not_keep_the_others_from_being_restored() -> None:
    def fail(*_: Any) -> None:
        raise KeyError

    before = signal.signal(signal.SIGUSR1, fail)
    try:
        with pytest.raises(KeyError), defer_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is fail
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- the block ---------------------------------------------------------------------------------------


def test_a_plain_loop_trains_alike_with_and_without_measurements() -> None:
    def train(measured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(5):
            x = torch.randn(8, 3)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if measured:
                with preserve_state(model, optimizer):
                    assert not model.training
                    model.train()(torch.randn(4, 3)).sum().backward()
                    optimizer.param_groups[0]["lr"] = 5.0
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(map(torch.equal, train(True), train(False)))


def test_errors_while_restoring_do_not_keep_the_rest_from_being_restored(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    module = nn.Linear(1, 1)
    module.outputs, module.file, module.last = [], path.open(), Point([])

    def disturb_and_close() -> None:
        with preserve_state(module):
            module.outputs.append(1)
            module.last.value.append(1)
            module.file.close()

    with pytest.raises(UnrestorableStateError, match=r"could not be restored.*closed file.*Pass loss_fn="):
        disturb_and_close()
    assert module.outputs == []
    assert module.last.value == []


def test_a_large_tensor_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_guard, "_COPIED_BYTES", 8)
    model = nn.BatchNorm1d(9)
    found: list[str] = []

    def change() -> None:
        with preserve_state(model) as snapshot:
            model.running_mean.add_(1)
            found.extend(snapshot.changes())

    with pytest.raises(
        UnrestorableStateError, match=r"changed the tensor BatchNorm1d\.running_mean in place.*loss_fn="
    ):
        change()
    assert found == ["BatchNorm1d.running_mean"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros((90, 110)).T,
        lambda: np.zeros((100, 200))[::2, ::3],
        lambda: np.zeros(9_000, dtype="datetime64[s]"),
        lambda: np.zeros(9_000, dtype=[("a", "i4"), ("b", "f8")]),
        lambda: np.zeros(9_000).view(np.recarray),
    ],
    ids=["transposed", "strided", "dates", "records", "subclass"],
)
def test_a_large_array_is_watched(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_guard, "_COPIED_BYTES", 8)
    module, values = nn.Linear(1, 1), make()
    module.values = values
    with preserve_state(module) as snapshot:
        assert snapshot.changes() == []

    def change() -> None:
        with preserve_state(module):
            np.random.default_rng(0).shuffle(values)
            values[values.shape[0] // 2] = np.ones((), values.dtype)

    with pytest.raises(UnrestorableStateError, match=r"changed the array Linear\.values in place.*loss_fn="):
        change()


def test_a_large_tensor_can_be_resized_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum through numpy would make its storage one that cannot be resized."""
    monkeypatch.setattr(state_guard, "_COPIED_BYTES", 8)
    module = nn.Linear(1, 1)
    module.values = torch.zeros(9)
    with preserve_state(module):
        pass
    assert module.values.resize_(20).shape == (20,)


def test_hooks_alone() -> None:
    model = nn.Linear(1, 1)
    with suspend_hooks(model):
        handle = model.weight.register_hook(print)
        assert model.weight._backward_hooks
    assert model.weight._backward_hooks  # Registered in a block of hooks alone, it is the caller's.
    handle.remove()
