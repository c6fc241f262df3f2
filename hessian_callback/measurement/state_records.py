"""Records of the contents of single objects, for the snapshots of `state_guard`.

Each record remembers one object, reports whether the object has changed, and restores it.
"""
# ruff: noqa: D102 - `Record` documents the methods.

from __future__ import annotations

import argparse
import ast
import collections
import copy
import csv
import ctypes
import enum
import functools
import io
import itertools
import multiprocessing.queues
import operator
import queue
import random
import sys
import threading
import types
import warnings
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = [
    "RANDOM_GENERATORS",
    "REMEDY",
    "SCALARS",
    "SCALAR_TYPES",
    "ArrayContent",
    "ByteContent",
    "CachedFunction",
    "CellContents",
    "CheckedArray",
    "CheckedTensor",
    "ClassAttributes",
    "ComparedItems",
    "DictItems",
    "FilePosition",
    "GradientReference",
    "LateGenerators",
    "ManyItems",
    "NamedItems",
    "Path",
    "RandomGenerator",
    "Record",
    "RefusingStream",
    "ScriptedAttributes",
    "SequenceItems",
    "SetItems",
    "SlotValues",
    "StreamSlot",
    "TensorContent",
    "UnrestorableStateError",
    "WatchedTensors",
    "attributes_of",
    "cached",
    "is_cache",
    "is_of_standard_library",
    "is_of_the_user",
    "is_opaque",
    "is_stream",
    "is_user_made",
    "may_be_stream",
    "names_in",
    "own_part",
    "path_text",
    "root_of",
    "slot_names",
]

SCALARS = (type(None), bool, int, float, complex, str, bytes)
SCALAR_TYPES = frozenset(SCALARS)
REMEDY = "Pass loss_fn=..., a function of the module and one batch without side effects"

# A tensor up to this size is compared by its bytes, without a call to an operator of torch.
_COMPARED_AS_BYTES = 64 * 2**10


_Key = TypeVar("_Key")
_Answer = TypeVar("_Answer")


def cached(function: Callable[[_Key], _Answer]) -> Callable[[_Key], _Answer]:
    """Remember the answers of a function of a class, a module's name or a function's code: asked of every object."""
    return functools.lru_cache(maxsize=4096)(function)


class UnrestorableStateError(RuntimeError):
    """A loss, or the loading of samples, changes state that cannot be restored."""


# How a value is reached: the path of its owner, and text that is formatted with a key.
Path = Any


class Record(Protocol):
    """The remembered contents of one object."""

    def changed(self) -> bool:
        """Whether the object differs from its remembered contents."""

    def restore(self) -> None:
        """Write the remembered contents back."""


# -- records -----------------------------------------------------------------------------------------


def _identical(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two iterables of one length hold the same objects; at the speed of C, for many thousands."""
    return all(map(operator.is_, one, other))


class DictItems:
    """The entries of a dictionary, or the attributes of an object, in their order."""

    def __init__(self, owner: dict[Any, Any]) -> None:
        self._owner = owner
        # A subclass may override what these do.
        self._base: Any = OrderedDict if isinstance(owner, OrderedDict) else dict
        # An ordered dictionary has an order of its own, which a copy as a dictionary would miss.
        self.kept: dict[Any, Any] = dict(self._base.items(owner)) if self._base is OrderedDict else dict.copy(owner)
        self._factory = owner.default_factory if isinstance(owner, collections.defaultdict) else None

    def changed(self) -> bool:
        owner, kept = self._owner, self.kept
        return (
            len(owner) != len(kept)
            or not _identical(self._base.values(owner), kept.values())
            or not _identical(self._base.keys(owner), kept)
        )

    def restore(self) -> None:
        if isinstance(self._owner, collections.defaultdict):
            self._owner.default_factory = self._factory
        if not self.changed():
            return
        self._base.clear(self._owner)
        for key, value in self.kept.items():
            self._base.__setitem__(self._owner, key, value)


class SequenceItems:
    """The items of a list or a deque."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._base: Any = deque if isinstance(owner, deque) else list
        self.kept: list[Any] = list(self._base.__iter__(owner))

    def changed(self) -> bool:
        return len(self._owner) != len(self.kept) or not _identical(self._base.__iter__(self._owner), self.kept)

    def restore(self) -> None:
        if self.changed():
            self._base.clear(self._owner)
            self._base.extend(self._owner, self.kept)


class ManyItems:
    """The items of the containers in a long container: too many for a record of each."""

    def __init__(self, owners: list[Any]) -> None:
        self._owners, self._kept = owners, [owner.copy() for owner in owners]

    def changed(self) -> bool:
        return any(self._differs(owner, kept) for owner, kept in zip(self._owners, self._kept, strict=True))

    @staticmethod
    def _differs(owner: Any, kept: Any) -> bool:
        if len(owner) != len(kept) or not _identical(owner, kept):
            return True
        return type(owner) is dict and not _identical(owner.values(), kept.values())

    def restore(self) -> None:
        for owner, kept in zip(self._owners, self._kept, strict=True):
            if self._differs(owner, kept):
                owner.clear()
                owner.update(kept) if type(owner) is dict else owner.extend(kept)


class NamedItems:
    """The entries of some names in a namespace, such as the global variables that a function uses."""

    def __init__(self, owner: dict[str, Any], names: Iterable[str]) -> None:
        self._owner, self._names = owner, list(names)
        self.kept = {name: owner[name] for name in self._names if name in owner}

    def changed(self) -> bool:
        missing = object()
        get, kept = self._owner.get, self.kept.get
        return any(get(name, missing) is not kept(name, missing) for name in self._names)

    def restore(self) -> None:
        if self.changed():
            for name in self._names:
                self._owner.pop(name, None)
            self._owner.update(self.kept)


class SetItems:
    """The elements of a set."""

    def __init__(self, owner: set[Any]) -> None:
        self._owner, self.kept = owner, set(owner)

    def changed(self) -> bool:
        return len(self._owner) != len(self.kept) or not set.issubset(self.kept, self._owner)

    def restore(self) -> None:
        if self.changed():
            set.clear(self._owner)
            set.update(self._owner, self.kept)


class ByteContent:
    """The contents of a bytearray or an array of the standard library."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._kept, self._bytes = owner, owner[:], bytes(memoryview(owner))

    def changed(self) -> bool:
        with memoryview(self._owner) as view:
            return view.nbytes != len(self._bytes) or view.tobytes() != self._bytes

    def restore(self) -> None:
        if self.changed():
            self._owner[:] = self._kept


class ArrayContent:
    """The contents of a numpy array."""

    def __init__(self, owner: np.ndarray[Any, Any]) -> None:
        self._owner, self._kept = owner, owner.copy()
        self._bytes = None if owner.dtype.hasobject else owner.tobytes() if owner.nbytes <= _COMPARED_AS_BYTES else None

    def changed(self) -> bool:
        owner, kept = self._owner, self._kept
        if owner.shape != kept.shape or owner.dtype != kept.dtype:
            return True
        if owner.dtype.hasobject:
            return not _identical(owner.flat, kept.flat)
        if self._bytes is not None:
            return owner.tobytes() != self._bytes
        return not np.array_equal(_as_numbers(owner), _as_numbers(kept))

    def restore(self) -> None:
        if not self.changed():
            return
        if self._owner.shape != self._kept.shape:
            self._owner.resize(self._kept.shape, refcheck=False)
        np.copyto(self._owner, self._kept)


def _as_numbers(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """View an array as bytes, so that NaN equals itself and 0.0 does not equal -0.0."""
    return np.ascontiguousarray(value).view(np.uint8)


class TensorContent:
    """The elements of a tensor, and its storage."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._inference, self._leaf = tensor.is_inference(), tensor.is_leaf
        self._version = None if self._inference else tensor._version
        own = own_part(tensor)
        # `tensor.data = other` exchanges the storage. The former one is kept, which is no copy.
        self._storage = tensor.data if type(own) is Tensor and own.shape == tensor.shape else None
        self._shape = tensor.shape
        self._address = own.data_ptr()
        self._storage_size = own.untyped_storage().nbytes()
        size = own.numel() * own.element_size()
        as_bytes = own.device.type == "cpu" and size <= _COMPARED_AS_BYTES and own.is_contiguous()
        self._bytes = ctypes.string_at(self._address, size) if self._storage is not None and as_bytes and size else None
        self._kept = own.clone()

    def changed(self) -> bool:
        """Compare versions and, for a small tensor, bytes: ``.data`` changes elements without a new version."""
        tensor = self._tensor
        if self._version is None or tensor._version != self._version or tensor.shape != self._shape:
            return True
        if self._storage is not None and tensor.data_ptr() != self._address:
            return True
        # After the address: the memory of a former storage may be free.
        return self._bytes is not None and ctypes.string_at(self._address, len(self._bytes)) != self._bytes

    def restore(self) -> None:
        tensor, storage = self._tensor, self._storage
        if self._bytes is not None and not self.changed():
            return
        with torch.inference_mode(self._inference), torch.no_grad(), _without_tracing():
            if self._leaf and not tensor.is_leaf:
                tensor.detach_()  # A change in place with a gradient made it a part of our graph.
            if storage is not None and storage.untyped_storage().nbytes() != self._storage_size:
                storage.untyped_storage().resize_(self._storage_size)
                self._address = storage.data_ptr()
            if storage is not None and (
                tensor.data_ptr() != self._address or tensor.shape != storage.shape or tensor.dtype != storage.dtype
            ):
                tensor.data = storage
            # Written only if changed: writing makes graphs that hold the tensor unusable.
            own = own_part(tensor)
            if not _same_elements(own, self._kept):
                own.copy_(self._kept)
        if not self._inference:
            self._version = tensor._version


class GradientReference:
    """The gradient of a leaf, and whether it has one."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._requires_grad, self._gradient = tensor, tensor.requires_grad, tensor.grad

    def changed(self) -> bool:
        return self._tensor.requires_grad != self._requires_grad or self._tensor.grad is not self._gradient

    def restore(self) -> None:
        if self._tensor.requires_grad != self._requires_grad:
            self._tensor.requires_grad_(self._requires_grad)
        if self._tensor.grad is not self._gradient:
            self._tensor.grad = self._gradient


class RandomGenerator:
    """The state of a random generator."""

    def __init__(self, generator: Any) -> None:
        self._write: Callable[[], object]
        if isinstance(generator, (np.random.Generator, np.random.BitGenerator)):
            bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
            state = copy.deepcopy(bits.state)
            self._write = lambda: setattr(bits, "state", state)
        elif isinstance(generator, random.Random):
            of_python = generator.getstate()
            self._write = lambda: generator.setstate(of_python)
        else:
            of_torch = generator.get_state()
            self._write = lambda: generator.set_state(of_torch)

    def changed(self) -> bool:
        return True  # To write a state is as cheap as to compare it.

    def restore(self) -> None:
        self._write()


class LateGenerators:
    """Random generators that an object of a library makes at first use: they are removed from it again.

    A collator with a seed, for example, would otherwise continue in training where it stopped in a measurement.
    """

    def __init__(self, owner: dict[str, Any]) -> None:
        self._owner, self._kept = owner, dict(owner)

    def _late(self) -> list[str]:
        late = (name for name, value in self._owner.items() if isinstance(value, RANDOM_GENERATORS))
        return [name for name in late if self._kept.get(name) is not self._owner[name]]

    def changed(self) -> bool:
        return bool(self._late())

    def restore(self) -> None:
        for name in self._late():
            if name in self._kept:
                self._owner[name] = self._kept[name]
            else:
                del self._owner[name]


class FilePosition:
    """The position in a file, and the contents of one in memory."""

    def __init__(self, file: Any, position: int) -> None:
        self._file, self._position = file, position
        self._contents = file.getvalue() if isinstance(file, (io.StringIO, io.BytesIO)) else None

    @classmethod
    def of(cls, file: Any) -> FilePosition | None:
        """Return a record of a file that is open and has a position, else ``None``."""
        try:
            return cls(file, file.tell()) if file.seekable() else None
        except (OSError, ValueError):
            return None

    def changed(self) -> bool:
        try:
            if self._file.tell() != self._position:
                return True
        except OSError:  # It is being iterated.
            return True
        return self._contents is not None and self._file.getvalue() != self._contents

    def restore(self) -> None:
        if self.changed():
            if self._contents is not None:
                self._file.seek(0)
                self._file.truncate()
                self._file.write(self._contents)
            self._file.seek(self._position)


class CellContents:
    """The object that a variable of a closure refers to."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell, self.kept = cell, cell.cell_contents

    def changed(self) -> bool:
        try:
            return self._cell.cell_contents is not self.kept
        except ValueError:  # It was deleted.
            return True

    def restore(self) -> None:
        if self.changed():
            self._cell.cell_contents = self.kept


class SlotValues:
    """The attributes of an object that are in slots."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        self._owner, self._names = owner, list(names)
        self.kept = self._present()

    def _present(self) -> dict[str, Any]:
        missing = object()
        found = ((name, getattr(self._owner, name, missing)) for name in self._names)
        return {name: value for name, value in found if value is not missing}

    def changed(self) -> bool:
        now = self._present()
        return now.keys() != self.kept.keys() or not _identical(now.values(), self.kept.values())

    def restore(self) -> None:
        for name in self._present().keys() - self.kept.keys():
            object.__delattr__(self._owner, name)
        for name, value in self.kept.items():
            if getattr(self._owner, name, None) is not value:
                object.__setattr__(self._owner, name, value)


class ClassAttributes:
    """The attributes of a class that are no functions, properties, classes, or the interpreter's own."""

    def __init__(self, owner: type) -> None:
        self._owner = owner
        self.kept = self._present()

    def _present(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self._owner).items()
            if not (
                name.startswith("__")
                or name == "_abc_impl"
                or hasattr(type(value), "__get__")
                # Called by instances; an object with a state of its own may be as well.
                or isinstance(value, (type, types.BuiltinFunctionType))
            )
        }

    def changed(self) -> bool:
        now = self._present()
        return len(now) != len(self.kept) or not _identical(now.values(), self.kept.values())

    def restore(self) -> None:
        if not self.changed():
            return
        for name in self._present().keys() - self.kept.keys():
            type.__delattr__(self._owner, name)
        for name, value in self.kept.items():
            if vars(self._owner).get(name) is not value:
                type.__setattr__(self._owner, name, value)


class ScriptedAttributes:
    """The attributes of a scripted or traced module that are kept in C++ and are not tensors."""

    def __init__(self, module: Any) -> None:
        self._module = module
        names: Iterable[str] = ["training"]
        with suppress(Exception):  # A module that was loaded from a file has no description of its attributes.
            names = [*names, *module._concrete_type.get_attributes()]
        self.kept = {name: copy.deepcopy(value) for name, value in self._values(names)}

    def _values(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        for name in dict.fromkeys(names):
            value = getattr(self._module, name, None)
            # A list or dictionary comes as a copy of the one in C++.
            if isinstance(value, (bool, int, float, str, list, dict)):
                yield name, value

    def changed(self) -> bool:
        # Those with tensors cannot be compared; tensors in them are restored as those of the module are not.
        with suppress(RuntimeError):
            return dict(self._values(self.kept)) != self.kept
        return False

    def restore(self) -> None:
        for name, value in self._values(self.kept):
            with suppress(RuntimeError):
                if value != self.kept[name]:
                    setattr(self._module, name, copy.deepcopy(self.kept[name]))


class ComparedItems:
    """The entries of a library's container or the attributes of its object, to be compared only."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._kept: Any = dict(owner) if isinstance(owner, dict) else list(owner)
        self._form = "[{!r}]"
        if isinstance(owner, dict) and all(isinstance(key, str) and key.isidentifier() for key in owner):
            self._form = ".{}"

    def changed_parts(self) -> list[str]:
        """Return the changed entries, each as text that follows the path of the owner."""
        if isinstance(self._owner, set):
            return [] if set(self._kept) == self._owner else [""]
        if not isinstance(self._owner, dict):
            if len(self._owner) != len(self._kept):
                return [""]
            pairs = enumerate(zip(self._kept, self._owner, strict=True))
            return [f"[{index}]" for index, (before, now) in pairs if not _same_value(before, now)]
        missing = object()
        return [
            self._form.format(key)
            for key, value in self._kept.items()
            if value is not None and not is_cache(key) and not _same_value(value, self._owner.get(key, missing))
        ]


class WatchedTensors:
    """Tensors that are compared by their versions, which all changes in place by torch's functions increase."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors, self._versions = tensors, [tensor._version for tensor in tensors]

    def changed_parts(self) -> list[str]:
        return [""] if self._versions != [tensor._version for tensor in self._tensors] else []


class CheckedArray:
    """The contents of an array, compared by a checksum: that takes no memory, and less time than a copy."""

    def __init__(self, owner: np.ndarray[Any, Any]) -> None:
        self._owner, self._kept = owner, self._state(owner)

    @staticmethod
    def _state(owner: np.ndarray[Any, Any]) -> Any:
        checksum = 0
        # In pieces, so that no copy is made of an array whose elements are apart in memory.
        flags: Any = ["external_loop", "buffered", "grow_inner", "zerosize_ok"]
        pieces: Any = np.nditer(np.asarray(owner), flags=flags, order="C", buffersize=2**16)
        for piece in pieces:
            checksum = zlib.crc32(piece.view(np.uint8), checksum)
        return owner.shape, owner.dtype, checksum

    def changed_parts(self) -> list[str]:
        return [""] if self._state(self._owner) != self._kept else []


class CheckedTensor:
    """The memory of a tensor, compared by a checksum.

    An array of numpy that shares the memory changes it without a new version of the tensor, and so does ``.data``.
    """

    def __init__(self, owner: Tensor) -> None:
        self._owner, self._kept = owner, self._state(owner)

    @staticmethod
    def _state(owner: Tensor) -> Any:
        own = own_part(owner)
        size = own.numel() * own.element_size()
        # A storage can be freed; only that of a plain tensor is known to be at its address.
        if type(own) is not Tensor or own.device.type != "cpu" or own.layout != torch.strided or own.data_ptr() == 0:
            return None
        if not own.is_contiguous() or own.untyped_storage().nbytes() < size:
            return None
        # Not through `numpy`, after which the storage could not be resized any more.
        memory = (ctypes.c_char * size).from_address(own.data_ptr())
        return own.shape, own.dtype, zlib.crc32(memory)

    def changed_parts(self) -> list[str]:
        return [""] if self._state(self._owner) != self._kept else []


def is_cache(name: Any) -> bool:
    """Whether an attribute is named like a cache or a flag that a warning was given."""
    return isinstance(name, str) and any(word in name.lower() for word in ("cache", "warn", "_iterator"))


def _same_value(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) in SCALAR_TYPES:
        # NaN does not equal itself.
        return bool(one == other) or bool(one != one and other != other)
    if isinstance(one, types.MethodType):  # Made anew each time that it is read.
        return one.__func__ is other.__func__ and one.__self__ is other.__self__
    if isinstance(one, np.ndarray):
        return bool(one.shape == other.shape) and bool(one.tobytes() == other.tobytes())
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return False


# -- streams -----------------------------------------------------------------------------------------


def _discard(*_: Any, **__: Any) -> None:
    return None


CachedFunction = type(functools.lru_cache(lambda: None))


class StreamSlot:
    """A place that refers to an iterator, a stream or a cached function, with a stand-in inside the block.

    An iterator has a copy there, a cached function one with an empty cache, and a stream one that refuses.
    """

    def __init__(self, owner: Any, key: Any, original: Any, kept: Any, path: str) -> None:
        self._owner, self._key, self._original, self._kept = owner, key, original, kept
        self._refusing = None
        if _is_channel(type(original)) or _copied_iterator(original) is None:
            self._refusing = RefusingStream(original, path)

    def renew(self) -> None:
        """Refer to a new copy at the position of the original."""
        self._put(self._refusing or _copied_iterator(self._original))

    def end(self) -> None:
        """Refer to the original again."""
        self._put(self._original)

    def _put(self, value: Any) -> None:
        self._kept[self._key] = value
        if isinstance(self._owner, type):
            type.__setattr__(self._owner, self._key, value)
            return
        if isinstance(self._owner, types.CellType):
            self._owner.cell_contents = value
            return
        base: Any = next(base for base in (OrderedDict, dict, list, deque) if isinstance(self._owner, base))
        base.__setitem__(self._owner, self._key, value)


class RefusingStream:
    """Stands for a stream inside the block: it refuses to be read, and takes nothing that this thread writes.

    Everything else is passed on: what other threads write, and reading from a file that can be rewound.
    """

    def __init__(self, original: Any, path: str) -> None:
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_thread", threading.get_ident())
        object.__setattr__(self, "_path", path)
        writes = isinstance(original, io.IOBase) and FilePosition.of(original) is not None
        object.__setattr__(self, "_reads", writes or is_writer(type(original)))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._original)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UnrestorableStateError(
            f"the measurement would read {self._path} (a {type(self._original).__name__}), whose position cannot be "
            f"restored, so training would miss what was read. {REMEDY}, or dataloader=..., a loader of its own data"
        )

    def __next__(self) -> Any:
        return next(self._original) if self._reads else self._refuse()

    def __iter__(self) -> Any:
        return iter(self._original) if self._reads else self._refuse()

    def __enter__(self) -> RefusingStream:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name in _READING and not self._reads:
            return self._refuse
        if threading.get_ident() == self._thread and _takes(self._original, name):
            return _discard
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __bool__(self) -> bool:
        return bool(self._original)

    def __len__(self) -> int:
        return len(self._original)

    def __deepcopy__(self, memo: Any) -> RefusingStream:
        return self


_QUEUES = (
    queue.Queue,
    queue.SimpleQueue,
    multiprocessing.queues.Queue,
    multiprocessing.queues.SimpleQueue,
)
_PUTTING = frozenset(["put", "put_nowait"])
_WRITING = frozenset(["write", "writelines", "writestr", "truncate", "close", "writerow", "writerows", "writeheader"])
_CSV_WRITER = type(csv.writer(io.StringIO()))


@cached
def is_writer(kind: type) -> bool:
    """Whether a class writes what it is given to a file: to a table, or for TensorBoard."""
    # Temporary and encoded files, and archives, are no `io.IOBase`.
    if issubclass(kind, (_CSV_WRITER, csv.DictWriter)) or root_of(kind) in ("tempfile", "codecs", "zipfile"):
        return True
    return any(base.__name__ == "SummaryWriter" and not is_of_the_user(base.__module__) for base in kind.__mro__)


def _is_channel(kind: type) -> bool:
    return issubclass(kind, (io.IOBase, *_QUEUES)) or is_writer(kind)


def _takes(original: Any, name: str) -> bool:
    """Whether a method gives something to a stream that would stay there."""
    if isinstance(original, _QUEUES):
        return name in _PUTTING
    return name in _WRITING or (is_writer(type(original)) and name.startswith("add_"))


_READING = frozenset(
    [
        *("get", "get_nowait", "peek", "read", "read1", "readall", "readinto", "readinto1", "readline", "readlines"),
        *("send", "throw"),
    ]
)


@cached
def may_be_stream(kind: type) -> bool:
    """Whether instances of a class may be streams; asked of every attribute, and so remembered."""
    if _is_channel(kind) or kind is CachedFunction:
        return True
    if not hasattr(kind, "__next__") or issubclass(kind, (nn.Module, Tensor, Dataset, dict, list, RefusingStream)):
        return False
    # The position of an iterator that the user wrote is in its attributes, which are restored.
    return not is_user_made(kind) and root_of(kind) != "unittest"


def is_stream(value: Any) -> bool:
    """Whether a value continues where it was when it is read again, and cannot be rewound in its place."""
    if isinstance(value, io.IOBase):
        if value.closed or isinstance(value, (io.StringIO, io.BytesIO)):
            return False
        # What is printed may be seen twice.
        written = value.writable() and value not in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        return written or (value.readable() and FilePosition.of(value) is None)
    if type(value) is CachedFunction:
        return is_of_the_user(value.__module__ or "")
    return True


def _copied_iterator(iterator: Any) -> Any:
    """Return a copy of an iterator at its position, which shares the items with it; ``None`` if there is no way.

    The copy of a cached function has an empty cache.
    """
    kind = type(iterator)
    if kind is CachedFunction:
        return functools.lru_cache(**iterator.cache_parameters())(iterator.__wrapped__)
    if not hasattr(kind, "__next__") or root_of(kind) not in ("builtins", "itertools"):
        return None
    # One that calls a function for each item changes whatever the function changes.
    if kind.__name__ == "callable_iterator" or kind is types.GeneratorType:
        return None
    with warnings.catch_warnings(), suppress(Exception):
        # Deprecated for itertools since Python 3.12. From 3.14 on it raises, and the iterator counts as a stream.
        warnings.simplefilter("ignore", DeprecationWarning)
        if kind is itertools.count:
            # Its text is "count(start)" or "count(start, step)", and has no successor.
            return itertools.count(*ast.literal_eval(repr(iterator).removeprefix("count").replace(")", ",)")))
        if hasattr(kind, "__copy__"):
            return copy.copy(iterator)
        function, arguments, *state = iterator.__reduce__()
        made = function(*map(_inner_copy, arguments))
        if state and state[0] is not None:
            made.__setstate__(_inner_copy(state[0]))
        return made
    return None


def _inner_copy(value: Any) -> Any:
    """Copy the iterators inside a reduction. A list in the state of `itertools.cycle` grows, so it is copied."""
    if type(value) is tuple:
        return tuple(list(part) if type(part) is list else _inner_copy(part) for part in value)
    if not hasattr(type(value), "__next__"):
        return value
    copied = _copied_iterator(value)
    if copied is None:
        raise TypeError(f"cannot copy a {type(value).__name__}")
    return copied


# -- kinds of objects --------------------------------------------------------------------------------

RANDOM_GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)

# Classes of the standard library that hold data and nothing else.
_PLAIN = (
    threading.local,
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
)
_LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
# Of Lightning's classes those that the user's data module has as bases.
_DATA_MODULES = frozenset({"LightningDataModule", "DataHooks", "HyperparametersMixin"})
# Instances may be used by other threads or processes.
_CONCURRENT = frozenset({"threading", "queue", "multiprocessing", "asyncio", "concurrent", "socket", "subprocess"})
_LIBRARIES = frozenset({"torch", "torchvision", "torchaudio", "torchmetrics", "numpy", "hessian_callback"}) | _LIGHTNING


def root_of(kind: type) -> str:
    """Return the name of the package that defines a class."""
    return str(getattr(kind, "__module__", "")).partition(".")[0]


@cached
def is_opaque(kind: type) -> bool:
    """Whether a class runs training, or is used by other threads: its instances are left alone."""
    if issubclass(kind, nn.Module):
        return False
    for base in kind.__mro__:
        root = root_of(base)
        if root in _CONCURRENT or root == "hessian_callback":
            return True
        if root in _LIGHTNING and base.__name__ not in _DATA_MODULES:
            return True
    return issubclass(kind, enum.Enum)


def is_of_standard_library(kind: type) -> bool:
    """Whether a class is of the standard library."""
    return root_of(kind) in sys.stdlib_module_names and root_of(kind) != "__main__"


@cached
def is_user_made(kind: type) -> bool:
    """Whether a class is of the user's making: its attributes are data, not the machinery of a library."""
    return issubclass(kind, _PLAIN) or (not is_opaque(kind) and is_of_the_user(str(kind.__module__)))


@cached
def is_of_the_user(module: str) -> bool:
    """Whether a module is neither of the standard library nor installed."""
    root = module.partition(".")[0]
    if root == "__main__":
        return True
    if not root or root in _LIBRARIES or root in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the dictionary of an object's attributes, past whatever its class thinks of it."""
    # The attributes of this thread.
    base: Any = threading.local if isinstance(value, threading.local) else object
    try:
        attributes = base.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


@cached
def slot_names(kind: type) -> tuple[str, ...]:
    """Return the names of the slots that the user's classes among the bases of a class define."""
    return tuple(
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, types.MemberDescriptorType) and is_user_made(base)
    )


@cached
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """Return the global names that a function uses, and those of functions inside it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return tuple(dict.fromkeys(itertools.chain(code.co_names, *inner)))


def path_text(path: Path) -> str:
    """Return a path as text, such as ``Net.outputs[3].total``."""
    parts: list[str] = []
    while isinstance(path, tuple):
        path, form, key = path
        # Tensors are keys in the state of an optimizer.
        parts.append(form.format(key) if type(key) in SCALAR_TYPES else f"[{type(key).__name__}]")
    return str(path) + "".join(reversed(parts))


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: of a sharded one its shard, as comparing the whole is a collective."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals itself, and 0.0 does not equal -0.0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if type(one) is Tensor and not one.is_quantized and not one.is_neg() and not one.is_conj():
        if one.is_complex():
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        integer = _INTEGERS.get(one.element_size())
        if integer is not None:
            one, other = one.view(integer), other.view(integer)
    return torch.equal(one, other)


@contextmanager
def _without_tracing() -> Iterator[None]:
    """Keep what is done inside out of the graph that a surrounding ``make_fx`` records."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield
