"""Leave a model, and the objects that its loss may change, as they were before a measurement.

Code that computes a loss keeps state in many places: buffers, metrics, lists of outputs, counters, random generators,
files. Three means are used, in this order.

* **Prevent.** Modules are in eval mode. Hooks that observe gradients are removed for the time of the block. Copies
  of iterators are used instead of the iterators. A stream that can be neither copied nor rewound refuses to be read.
* **Restore.** A `Snapshot` follows the references of a module or another object, remembers the contents of all
  objects that user code made, and restores them.
* **Detect.** Objects of libraries are not restored, because other threads may use them. A `Snapshot` compares them
  and names the attributes that changed; so it does for tensors and arrays that are too large to copy. It also names
  what is too much to be compared.

Nothing here needs a trainer:

    with preserve_state(model) as snapshot:
        measure(model, loss_fn, batches)
        print(snapshot.changes())
"""

from __future__ import annotations

import array
import ctypes
import functools
import gc
import io
import itertools
import mmap
import random
import signal
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import shared_memory, sharedctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler

from hessian_callback.measurement.inference_tensors import ordinary_tensors
from hessian_callback.measurement.state_records import (
    RANDOM_GENERATORS,
    REMEDY,
    SCALAR_TYPES,
    SCALARS,
    ArrayContent,
    ByteContent,
    CachedFunction,
    CellContents,
    CheckedArray,
    CheckedTensor,
    ClassAttributes,
    ComparedItems,
    DictItems,
    FilePosition,
    GradientReference,
    LateGenerators,
    ManyItems,
    NamedItems,
    Path,
    RandomGenerator,
    Record,
    ScriptedAttributes,
    SequenceItems,
    SetItems,
    SlotValues,
    StreamSlot,
    TensorContent,
    UnrestorableStateError,
    WatchedTensors,
    attributes_of,
    cached,
    is_cache,
    is_of_standard_library,
    is_of_the_user,
    is_opaque,
    is_stream,
    is_user_made,
    may_be_stream,
    names_in,
    own_part,
    path_text,
    slot_names,
)
from hessian_callback.operators.cuda_generators import own_cuda_states
from hessian_callback.operators.hooks import suspend_hooks

__all__ = [
    "Snapshot",
    "defer_signals",
    "deferrable_signals",
    "eval_mode",
    "preserve_random_state",
    "preserve_state",
]

# A tensor or array up to this size is copied, as long as all copies together stay within the total.
_COPIED_BYTES = 64 * 2**20
_COPIED_BYTES_TOTAL = 512 * 2**20
# The state of an optimizer is as large as the model, or twice that: only its small tensors are copied.
_COPIED_BYTES_OF_OPTIMIZERS = 64 * 2**10
# A counter or a running mean is smaller than this, and worth a copy anywhere.
_COPIED_BYTES_ALWAYS = 64 * 2**10
# The tensors of a data set are its samples, and rarely change.
_COPIED_BYTES_OF_DATA = 2**20
# So many bytes that are not copied are compared by checksums: a second or two.
_CHECKED_BYTES_TOTAL = 2 * 2**30
# More tensors than this are not copied one by one: each copy takes microseconds.
_COPIED_TENSORS = 10_000
# At most so many objects are visited by one call of `Snapshot.remember`, and so many of libraries. Tuples and long
# containers of numbers and texts, such as the list of files of a data set, count as one.
_VISITED = 200_000
_VISITED_OF_LIBRARIES = 5_000
# A longer container of a library is not searched, and the tensors in a longer one of the user's are only watched.
_MANY_ITEMS = 1_000

_BOOKKEEPING = frozenset({"_trainer", "_fabric"})
_MODULE_DICTIONARIES = ("_parameters", "_buffers", "_modules")

# -- the block ---------------------------------------------------------------------------------------


@contextmanager
def preserve_state(model: nn.Module, *others: Any) -> Iterator[Snapshot]:
    """Evaluate losses of a model in eval mode and restore all its state afterwards.

    Inside the block all modules are in eval mode, gradients are enabled, hooks on gradients are removed (see
    `suspend_hooks`), and the random generators may be used. Afterwards, also if an exception passes through, modes,
    hooks, random generators and everything that the snapshot remembers are as before.

    Args:
        model: the model.
        *others: other objects that the loss uses, such as data sets.

    Yields:
        The snapshot. `Snapshot.remember` adds objects to it.

    Raises:
        UnrestorableStateError: if the block changed a tensor or array in place that was not copied, or read a stream
            that cannot be rewound.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> with preserve_state(model):
        ...     _ = model.train()(torch.randn(4, 2))
        >>> model[0].running_mean
        tensor([0., 0.])
    """
    with ExitStack() as stack:
        # Tensors made inside must be ordinary ones: they are differentiated twice.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(ordinary_tensors(model))
        stack.enter_context(preserve_random_state())
        stack.enter_context(eval_mode(model))
        stack.enter_context(suspend_hooks(model))
        snapshot = stack.enter_context(Snapshot())
        for value in (model, *others):
            snapshot.remember(value)
        yield snapshot


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore Python's, numpy's and torch's global random states afterwards, on all devices in use.

    Example:
        >>> before = random.getstate()
        >>> with preserve_random_state():
        ...     _ = random.random(), torch.rand(1)
        >>> random.getstate() == before
        True
    """
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with own_cuda_states():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model and all its submodules in eval mode, and restore the mode of each afterwards.

    Modules made by ``torch.jit.script`` and ``torch.jit.trace`` keep their mode in C++; theirs is restored as well.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with eval_mode(model):
        ...     [module.training for module in model.modules()]
        [False, False, False]
        >>> [module.training for module in model.modules()]
        [True, True, False]
    """
    # A frozen scripted module has no mode.
    modes = [(module, mode) for module in model.modules() if (mode := getattr(module, "training", None)) is not None]
    try:
        for module, _ in modes:
            # Set directly: an overridden `train` may do more than set the mode.
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def deferrable_signals() -> set[int]:
    """Return the signals that `defer_signals` defers by default.

    Not SIGINT, as Ctrl-C must interrupt at once, nor timers, SIGCHLD, and signals that report a fault of the process.
    """
    names = ["INT", "KILL", "STOP", "CHLD", "ALRM", "VTALRM", "PROF", "ABRT", "BUS", "FPE", "ILL", "SEGV", "SYS"]
    names += ["TRAP", "PIPE", "WINCH"]
    return {int(number) for number in signal.valid_signals()} - {getattr(signal, f"SIG{n}", None) for n in names}


@contextmanager
def defer_signals(numbers: Iterable[int] | None = None) -> Iterator[list[int]]:
    """Call the handlers of signals only after the block.

    A handler may save a checkpoint, and inside the block parameters may be perturbed. Only signals with a handler
    written in Python are deferred. Outside the main thread, which alone runs handlers, nothing is deferred.

    Args:
        numbers: the signals; default: `deferrable_signals`.

    Yields:
        The signals that have arrived so far, in order. Each is raised once after the block for every arrival.

    Example:
        >>> before = signal.signal(signal.SIGTERM, lambda *_: print("handled"))
        >>> with defer_signals() as arrived:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print("still inside")
        still inside
        handled
        >>> _ = signal.signal(signal.SIGTERM, before)
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    chosen = deferrable_signals() if numbers is None else set(numbers)
    handlers = {number: handler for number in chosen if callable(handler := signal.getsignal(number))}
    # The block may end, by an exception, before all handlers are replaced.
    try:
        for number in handlers:
            signal.signal(number, lambda received, _: arrived.append(received))
        yield arrived
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


# -- the snapshot ------------------------------------------------------------------------------------

# How an object is treated: only searched for random generators, compared, or restored.
_SEARCHED, _COMPARED, _RESTORED = 1, 2, 3


class Snapshot:
    """The state of objects at one time, and the means to restore it.

    References are followed from each remembered object: attributes, slots, containers of all kinds and their
    subclasses, class attributes of the user's classes. Tensors, arrays, containers, attributes, random generators and
    files are restored. Objects of libraries are compared only, but random generators inside them are restored, and
    so are data sets, samplers and optimizers. At most 200,000 objects are visited; `unchecked` names the others.

    Leave the block, or call `close`, to end it: iterators are replaced by copies until then.

    Example:
        >>> from collections import Counter
        >>> counts = Counter("a")
        >>> with Snapshot() as snapshot:
        ...     snapshot.remember(counts)
        ...     counts.update("abc")
        >>> counts
        Counter({'a': 1})
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        # Holds the objects, so that no id is used twice.
        self._seen: dict[int, tuple[Any, int]] = {}
        self._records: list[Record] = []
        self._loss_records: list[Record] = []
        self._empty: list[Any] = []
        # Of libraries: a change is named.
        self._compared: list[tuple[ComparedItems | CheckedArray, Path]] = []
        # Too large to copy: a change is an error.
        self._watched: list[tuple[WatchedTensors | CheckedTensor | CheckedArray, str, Path]] = []
        self._unchecked: dict[str, None] = {}
        # Global variables, by the namespace that has them.
        self._globals: dict[int, set[str]] = {}
        self._slots: list[StreamSlot] = []
        self._copied_bytes = 0
        self._copied_tensors = 0
        self._checked_bytes = 0

    def __enter__(self) -> Snapshot:
        """Return the snapshot."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore everything and end the snapshot."""
        try:
            self.restore()
        finally:
            self.close()

    def remember(
        self,
        value: Any,
        *,
        copy_tensors: bool = True,
        restore: bool = False,
        restore_libraries: bool = False,
        name: str | None = None,
    ) -> None:
        """Remember an object and all objects that it refers to.

        Args:
            value: the object: a module, data set, loader, optimizer, or any other.
            copy_tensors: whether tensors and arrays above 64 KiB are copied, up to 64 MiB each and 512 MiB together.
                Those that are not copied are compared by their versions and checksums, and cannot be restored.
            restore: whether the object itself is restored even if its class is of a library.
            restore_libraries: whether libraries' objects that it refers to are restored as well, and not compared
                only. For objects that no other thread uses, such as a data set and its transforms.
            name: its name in messages; default: the name of its class.
        """
        limit = _COPIED_BYTES if copy_tensors else _COPIED_BYTES_ALWAYS
        _Walk(self, limit, restore_libraries=restore_libraries).run(value, name or type(value).__name__, force=restore)

    def restore(self) -> None:
        """Restore everything. May be called several times.

        Raises:
            UnrestorableStateError: if a tensor or array that was not copied has changed, or an object could not be
                restored.
        """
        failures: list[str] = []
        for slot in self._slots:
            slot.renew()
        self._clear_empty()
        # Latest first: references are restored last, after the contents of the objects that they refer to.
        for record in reversed(self._records):
            try:
                record.restore()
            except Exception as error:  # noqa: PERF203 - the others must be restored all the same
                failures.append(f"{type(error).__name__}: {error}")
        if failures:
            raise UnrestorableStateError(f"state could not be restored after a measurement ({failures[0]}). {REMEDY}")
        changed = self._changed_in_place()
        if changed:
            raise UnrestorableStateError(
                f"the loss, or the loading of its samples, changed {next(iter(changed.values()))} in place, which a "
                f"measurement must not do to a run; it was not copied, because it is too large or a library's object "
                f"holds it. {REMEDY}, or dataloader=..., a loader of its own data"
            )

    def restore_loss_state(self) -> None:
        """Restore everything that the value of a loss may depend on, except for parameters that are trained.

        For a call after each evaluation of a loss that changes state: every evaluation then begins at the same state,
        so that the loss is a function of parameters and batch. Global random generators, gradients, ``requires_grad``
        and trainable parameters are left to the caller. The cost grows with the number of objects, about a
        microsecond each, and not with their size: large tensors are compared by their version.
        """
        for slot in self._slots:
            slot.renew()
        self._clear_empty()
        for record in self._loss_records:
            if record.changed():
                record.restore()

    def changes(self) -> list[str]:
        """Return the paths of state that has changed and is not restored, such as ``"Net.simulator.position"``.

        Call it inside the block, after the loss was evaluated. These are attributes of libraries' objects, and tensors
        and arrays that were not copied. Attributes that are new, or were ``None``, count as caches, and are not listed.
        """
        found = list(self._changed_in_place())
        for record, path in self._compared:
            found += [path_text(path) + part for part in record.changed_parts()]
        return list(dict.fromkeys(found))

    def unchecked(self) -> list[str]:
        """Return the paths of state that is neither restored nor compared, because it is too much."""
        return list(self._unchecked)

    def close(self) -> None:
        """Put the original iterators in the places of their copies. Nothing is restored afterwards."""
        for slot in self._slots:
            slot.end()
        self._forget()

    def _clear_empty(self) -> None:
        # Most containers of a module are empty, so all of them are checked by one call.
        if any(self._empty):
            for container in self._empty:
                if container:
                    container.clear()

    def _changed_in_place(self) -> dict[str, str]:
        """Return the paths of changed tensors and arrays that were not copied, and their kinds and paths as text."""
        changed = [(path_text(path), kind) for record, kind, path in self._watched if record.changed_parts()]
        return {path: f"the {kind} {path}" for path, kind in changed}

    def _add(self, record: Record, *, of_loss: bool = True) -> None:
        self._records.append(record)
        if of_loss:
            self._loss_records.append(record)

    def _watch(self, tensors: list[Tensor], path: Path) -> None:
        # A tensor made in inference mode has no version.
        tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        if tensors:
            self._watched.append((WatchedTensors(tensors), "tensor", path))

    def _may_check(self, size: int) -> bool:
        """Whether so many more bytes may be compared by a checksum; counts them if so."""
        fits = self._checked_bytes + size <= _CHECKED_BYTES_TOTAL
        self._checked_bytes += size if fits else 0
        return fits


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from looking through the many new objects again and again: most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Walk:
    """One traversal of references, breadth first: near objects are reached before the limit.

    Global variables come after attributes, and the items of long containers come last.
    """

    def __init__(self, snapshot: Snapshot, copied_bytes: int, *, restore_libraries: bool = False) -> None:
        self._snapshot = snapshot
        self._restore_libraries = restore_libraries
        self._copied_bytes = copied_bytes
        self._queue: deque[tuple[Any, Path, int, int]] = deque()
        self._global: deque[tuple[Any, Path, int, int]] = deque()
        self._long: deque[tuple[Iterable[Any], Path, int, int]] = deque()
        # Classes whose instances are not visited, and classes of tuples. Sets, for the items of long containers.
        self._inert, self._tuples = set(SCALAR_TYPES), {tuple}
        self._left = _VISITED
        self._left_of_libraries = _VISITED_OF_LIBRARIES

    def run(self, value: Any, name: str, *, force: bool) -> None:
        if force and not isinstance(value, (Tensor, nn.Module, torch.optim.Optimizer)):
            self._snapshot._seen[id(value)] = value, _RESTORED
            self._attributes(value, name, self._copied_bytes)
        else:
            self._queue.append((value, name, _RESTORED, self._copied_bytes))
        with _without_garbage_collection():
            while self._queue or self._global or self._long:
                if self._queue:
                    self._visit(*self._queue.popleft())
                elif self._global:
                    self._visit(*self._global.popleft())
                else:
                    self._many(*self._long.popleft())

    def _push(self, items: Iterable[Any], path: Path, form: str, keys: Iterable[Any], mode: int, limit: int) -> None:
        for key, item in zip(keys, items, strict=False):
            if type(item) not in SCALAR_TYPES:
                self._queue.append((item, (path, form, key), mode, limit))

    def _visit(self, value: Any, path: Path, mode: int, limit: int) -> None:
        method = _method_for(type(value))
        if method is None:
            return
        kept = self._snapshot._seen.get(id(value))
        if kept is not None and kept[1] >= mode:
            return
        if self._left <= 0:
            self._snapshot._unchecked[path_text(path)] = None
            self._queue.clear()  # What else was found lies near it.
            return
        self._snapshot._seen[id(value)] = value, mode
        self._left -= 1
        method(self, value, path, mode, limit)

    # -- kinds of values -----------------------------------------------------------------------------

    def _generator(self, generator: Any, path: Path, mode: int, limit: int) -> None:
        self._snapshot._add(RandomGenerator(generator))

    def _bytes(self, value: Any, path: Path, mode: int, limit: int) -> None:
        if mode == _RESTORED:
            self._snapshot._add(ByteContent(value))

    def _buffer(self, value: Any, path: Path, mode: int, limit: int) -> None:
        with suppress(ValueError):  # An empty one, or a file that is closed.
            self._array(np.frombuffer(value, np.uint8), path, mode, limit)

    def _view(self, view: memoryview, path: Path, mode: int, limit: int) -> None:
        with suppress(ValueError):  # A released one.
            self._queue.append((view.obj, path, mode, limit))

    def _shared(self, value: Any, path: Path, mode: int, limit: int) -> None:
        """Visit memory that processes share. Its lock is left alone: another process may hold it."""
        inner = value.buf if isinstance(value, shared_memory.SharedMemory) else value.get_obj()
        self._queue.append((inner, path, mode, limit))

    def _file(self, file: io.IOBase, path: Path, mode: int, limit: int) -> None:
        if mode == _RESTORED and (record := FilePosition.of(file)) is not None:
            self._snapshot._add(record)

    def _module(self, module: nn.Module, path: Path, mode: int, limit: int) -> None:
        if mode == _SEARCHED:
            return
        attributes = module.__dict__
        # The dictionaries of hooks are attributes as well.
        self._items(attributes, path, ".{}", limit, of_loss=True)
        for name in _MODULE_DICTIONARIES:
            inner = attributes.get(name)
            if isinstance(inner, dict) and id(inner) not in self._snapshot._seen:
                self._snapshot._seen[id(inner)] = inner, _RESTORED
                # Engines exchange parameters during an evaluation; see `restore_loss_state`.
                self._items(inner, path, ".{}", limit, of_loss=name != "_parameters")
        if isinstance(module, torch.jit.ScriptModule):
            self._scripted(module, path, limit)
        self._class(type(module), path)

    def _scripted(self, module: torch.jit.ScriptModule, path: Path, limit: int) -> None:
        tensors = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in tensors:
            self._queue.append((tensor, (path, ".{}", name), _RESTORED, limit))
        for name, child in module.named_children():
            self._queue.append((child, (path, ".{}", name), _RESTORED, limit))
        self._snapshot._add(ScriptedAttributes(module))

    def _container(self, container: Any, path: Path, mode: int, limit: int) -> None:
        long = len(container) > _MANY_ITEMS
        if isinstance(container, tuple):
            self._sequence(container, path, mode, limit)
        elif mode == _RESTORED:
            if not container and type(container) in (dict, OrderedDict, list, set, deque):
                self._snapshot._empty.append(container)
                return
            if isinstance(container, dict):
                self._items(container, path, "[{!r}]", limit)
            elif isinstance(container, set):
                elements = SetItems(container)
                self._snapshot._add(elements)
                self._sequence(elements.kept, path, mode, limit)
            else:
                record = SequenceItems(container)
                self._snapshot._add(record)
                self._substitute(container, path, "[{!r}]", record.kept)
                self._sequence(record.kept, path, mode, limit)
        elif not long:
            if mode == _COMPARED:
                self._snapshot._compared.append((ComparedItems(container), path))
            if isinstance(container, dict):
                self._push(list(container.values()), path, "[{!r}]", list(container), mode, limit)
            else:
                self._push(list(container), path, "[{!r}]", itertools.count(), mode, limit)
        if type(container).__module__ != "builtins" and type(container).__module__ != "collections":
            self._attributes(container, path, limit, mode=mode)

    def _sequence(self, items: Any, path: Path, mode: int, limit: int) -> None:
        if len(items) > _MANY_ITEMS:
            self._long.append((items, path, mode, limit))
        elif isinstance(items, set):
            self._push(items, path, "[...]", itertools.repeat(None), mode, limit)
        else:
            self._push(items, path, "[{!r}]", itertools.count(), mode, limit)

    def _items(self, owner: dict[Any, Any], path: Path, form: str, limit: int, *, of_loss: bool = True) -> None:
        record = DictItems(owner)
        self._snapshot._add(record, of_loss=of_loss)
        kept = record.kept
        self._substitute(owner, path, form, kept)
        if len(kept) > _MANY_ITEMS:
            self._long.append((kept.values(), path, _RESTORED, limit))
            return
        for key, value in kept.items():
            if type(value) in SCALAR_TYPES or key in _BOOKKEEPING:
                continue
            if type(value) in (dict, OrderedDict) and not value:
                # Of the 20 attributes of a module a dozen are empty dictionaries.
                if id(value) not in self._snapshot._seen:
                    self._snapshot._seen[id(value)] = value, _RESTORED
                    self._snapshot._empty.append(value)
            else:
                self._queue.append((value, (path, form, key), _RESTORED, limit))

    def _many(self, items: Iterable[Any], path: Path, mode: int, limit: int) -> None:
        """Visit the items of a long container.

        Tensors are watched, and dictionaries and lists are remembered together; those in tuples as well.
        """
        path = (path, "[...]", None)
        seen, inert, tuples = self._snapshot._seen, self._inert, self._tuples
        kinds = set(map(type, items))
        self._tuples |= {kind for kind in kinds if issubclass(kind, tuple) and kind.__dictoffset__ == 0}
        if kinds <= tuples:
            # The list of files and classes of a data set, for example: a million of them take no time this way.
            kinds = set(map(type, itertools.chain.from_iterable(items)))
        self._inert |= {kind for kind in kinds if _method_for(kind) is None}
        if kinds <= inert:
            return
        tensors: list[Tensor] = []
        containers: list[Any] = []
        stack = [iter(items)]
        while stack:
            for item in stack[-1]:
                kind = type(item)
                if kind in inert or (kind in tuples and inert.issuperset(map(type, item))):
                    continue
                if kind is Tensor:
                    tensors.append(item)
                    continue
                if _method_for(kind) is None:
                    inert.add(kind)
                    continue
                if len(self._queue) >= self._left:
                    self._snapshot._unchecked[path_text(path)] = None
                    stack.clear()
                    break
                if kind in tuples:
                    # Free as an item. Tuples inside others may be many more than there are objects.
                    self._left -= len(stack) > 1
                    stack.append(iter(item))
                    break
                if mode == _RESTORED and (kind is dict or kind is list) and id(item) not in seen:
                    self._left -= 1
                    seen[id(item)] = item, mode
                    containers.append(item)
                    values = item.values() if kind is dict else item
                    if inert.issuperset(map(type, values)):
                        continue
                    stack.append(iter(values))
                    break
                self._queue.append((item, path, mode, limit))
            else:
                stack.pop()
        if tensors and mode != _SEARCHED:
            self._snapshot._watch(tensors, path)
        if containers:
            self._snapshot._add(ManyItems(containers), of_loss=False)

    def _substitute(self, owner: Any, path: Path, form: str, kept: Any) -> None:
        """Replace iterators, and streams that cannot be rewound, in a container or in attributes.

        ``kept`` is that of the record, so that the record does not undo the substitution.
        """
        values = kept.values() if isinstance(kept, dict) else kept
        if not any(map(may_be_stream, set(map(type, values)))):
            return
        for key, value in list(kept.items() if isinstance(kept, dict) else enumerate(kept)):
            if not may_be_stream(type(value)) or not is_stream(value):
                continue
            self._stand_in(StreamSlot(owner, key, value, kept, path_text((path, form, key))), value, path)
            self._snapshot._seen[id(kept[key])] = kept[key], _RESTORED

    def _stand_in(self, slot: StreamSlot, value: Any, path: Path) -> None:
        self._snapshot._slots.append(slot)
        slot.renew()
        self._snapshot._seen[id(value)] = value, _RESTORED
        if isinstance(value, io.IOBase):
            self._file(value, path, _RESTORED, 0)
        elif isinstance(value, CachedFunction):
            self._queue.append((value.__wrapped__, path, _RESTORED, self._copied_bytes))

    def _tensor(self, tensor: Tensor, path: Path, mode: int, limit: int) -> None:
        if mode != _RESTORED:
            if mode == _COMPARED:
                self._snapshot._watch([tensor], path)
            return
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)) or tensor.is_meta:
            return
        attributes = tensor.__dict__
        if attributes:
            self._items(attributes, path, ".{}", limit)
        else:
            self._snapshot._empty.append(attributes)
        inference = tensor.is_inference()
        own = own_part(tensor)
        size = own.numel() * own.element_size()
        state = self._snapshot
        if tensor.is_leaf and not inference:
            # Remembered first and so restored last: a gradient must have the type of its tensor.
            state._add(GradientReference(tensor), of_loss=False)
            if tensor.grad is not None:
                self._queue.append((tensor.grad, (path, ".{}", "grad"), _RESTORED, limit))
        copied = (
            size <= limit
            and state._copied_bytes + size <= _COPIED_BYTES_TOTAL
            and state._copied_tensors < _COPIED_TENSORS
            and tensor.layout == torch.strided
            # A sharded model frees the storage of whole parameters.
            and (size == 0 or own.data_ptr() != 0)
        )
        # Trainable parameters belong to the caller of `restore_loss_state`.
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        if copied:
            state._copied_bytes += size
            state._copied_tensors += 1
            state._add(TensorContent(tensor), of_loss=not trained)
            return
        state._watch([tensor], path)
        # Engines write to parameters, and put them back.
        if not isinstance(tensor, nn.Parameter) and own.device.type == "cpu" and state._may_check(size):
            state._watched.append((CheckedTensor(tensor), "tensor", path))

    def _array(self, value: np.ndarray[Any, Any], path: Path, mode: int, limit: int) -> None:
        state = self._snapshot
        holds_objects = value.dtype.hasobject
        if value.dtype.names and holds_objects:
            names = value.dtype.names
            self._push([value[name] for name in names], path, "[{!r}]", names, mode, limit)
        elif holds_objects:
            self._sequence(value.ravel().tolist(), path, mode, limit)
        if mode == _SEARCHED or not value.flags.writeable:
            return
        # References take little memory.
        small = holds_objects or (value.nbytes <= limit and state._copied_bytes + value.nbytes <= _COPIED_BYTES_TOTAL)
        if mode == _RESTORED and small:
            state._copied_bytes += value.nbytes
            state._add(ArrayContent(value))
        elif holds_objects:
            return  # The references of a library.
        elif not state._may_check(value.nbytes):
            state._unchecked[path_text(path)] = None
        elif mode == _RESTORED:
            state._watched.append((CheckedArray(value), "array", path))
        else:
            state._compared.append((CheckedArray(value), path))

    def _callable(self, value: Any, path: Path, mode: int, limit: int) -> None:
        """Follow what a function refers to. The closure of a method is only searched, that of its class."""
        if isinstance(value, types.MethodType):
            self._queue.append((value.__self__, path, mode, limit))
            self._queue.append((value.__func__, path, _SEARCHED, limit))
        elif isinstance(value, functools.partial):
            self._queue.append((value.func, path, mode, limit))
            self._push([*value.args, *value.keywords.values()], path, "(...)", itertools.repeat(None), mode, limit)
        elif isinstance(value, types.CellType):
            with suppress(ValueError):  # An empty cell.
                contents = value.cell_contents
                if mode == _RESTORED:
                    record = CellContents(value)
                    self._snapshot._add(record)
                    if may_be_stream(type(contents)) and is_stream(contents):
                        slot = StreamSlot(value, "kept", contents, vars(record), path_text(path))
                        self._stand_in(slot, contents, path)
                self._queue.append((contents, path, mode, limit))
        elif is_of_the_user(value.__module__ or ""):
            limit = min(self._copied_bytes, _COPIED_BYTES_OF_DATA)
            # It is restored also if a library's object refers to it, such as a loader to a collator.
            enclosing = mode if mode == _SEARCHED else _RESTORED
            self._push(value.__closure__ or (), path, "(...)", itertools.repeat(None), enclosing, limit)
            defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            self._push(defaults, path, "(...)", itertools.repeat(None), _RESTORED, limit)
            if value.__dict__:
                self._items(value.__dict__, path, ".{}", limit)
            else:
                self._snapshot._empty.append(value.__dict__)
            self._globals(value)

    def _globals(self, function: types.FunctionType) -> None:
        """Visit the global variables that a function names, also those of other modules of the user's."""
        names = names_in(function.__code__)
        for namespace in (function.__globals__, *map(vars, _modules_named(function, names))):
            known = self._snapshot._globals.setdefault(id(namespace), set())
            record = NamedItems(namespace, [name for name in names if name not in known])
            known.update(names)
            self._snapshot._add(record)
            self._substitute(namespace, "", "{}", record.kept)
            for name, value in record.kept.items():
                if isinstance(value, type):
                    self._class(value, name)
                elif (method := _method_for(type(value))) is not None:
                    # Other threads may use objects of libraries. Large arrays are mostly data.
                    mode = _COMPARED if method is _Walk._object else _RESTORED
                    self._global.append((value, name, mode, min(self._copied_bytes, _COPIED_BYTES_OF_DATA)))

    def _object(self, value: Any, path: Path, mode: int, limit: int) -> None:
        kind = type(value)
        if isinstance(value, (torch.optim.Optimizer, LRScheduler)) and mode != _SEARCHED:
            self._snapshot._seen[id(value)] = value, _RESTORED
            self._attributes(value, path, min(limit, _COPIED_BYTES_OF_OPTIMIZERS))
        elif mode != _SEARCHED and (isinstance(value, (Dataset, Sampler)) or is_user_made(kind)):
            # Restored also if a library's object refers to it.
            self._snapshot._seen[id(value)] = value, _RESTORED
            if isinstance(value, Dataset):
                limit = min(limit, _COPIED_BYTES_OF_DATA)
            elif isinstance(value, Sampler):
                limit = _COPIED_BYTES  # It may shuffle its indices in place.
            self._attributes(value, path, limit)
            self._class(kind, path)
        else:
            self._library_object(value, path, mode, limit)

    def _library_object(self, value: Any, path: Path, mode: int, limit: int) -> None:
        attributes = attributes_of(value)
        if attributes is None or self._left_of_libraries <= 0:
            return
        self._left_of_libraries -= 1
        if self._restore_libraries and mode == _RESTORED:
            self._attributes(value, path, limit)
            return
        mode = min(mode, _COMPARED)
        self._snapshot._add(LateGenerators(attributes))
        if mode == _COMPARED:
            self._snapshot._compared.append((ComparedItems(attributes), path))
        for key, item in list(attributes.items()):
            if type(item) not in SCALAR_TYPES and not is_cache(key):
                self._queue.append((item, (path, ".{}", key), mode, limit))

    def _attributes(self, value: Any, path: Path, limit: int, *, mode: int = _RESTORED) -> None:
        if mode != _RESTORED:
            return
        attributes = attributes_of(value)
        if attributes is not None:
            self._items(attributes, path, ".{}", limit)
        slots = slot_names(type(value))
        if slots:
            record = SlotValues(value, slots)
            self._snapshot._add(record)
            self._push(record.kept.values(), path, ".{}", record.kept, _RESTORED, limit)

    def _class(self, kind: type, path: Path) -> None:
        """Remember attributes of the user's classes, and random generators that their methods use."""
        for base in kind.__mro__:
            if id(base) in self._snapshot._seen or not is_user_made(base):
                continue
            self._snapshot._seen[id(base)] = base, _RESTORED
            record = ClassAttributes(base)
            self._snapshot._add(record)
            self._push(record.kept.values(), base.__name__, ".{}", record.kept, _RESTORED, self._copied_bytes)
            for name, value in list(vars(base).items()):
                if isinstance(value, CachedFunction):
                    self._stand_in(StreamSlot(base, name, value, {}, path_text((path, ".{}", name))), value, path)
                for function in _functions_of(value):
                    self._queue.append((function, path, _SEARCHED, 0))


def _modules_named(function: types.FunctionType, names: Sequence[str]) -> list[types.ModuleType]:
    """Return the user's modules that a function names, such as ``package`` and ``inner`` in ``package.inner.count``."""
    waiting: list[Any] = [function.__globals__.get(name) for name in names]
    waiting += [sys.modules.get(name) for name in names]  # Imported inside the function.
    found: dict[int, types.ModuleType] = {}
    while waiting:
        one = waiting.pop()
        if isinstance(one, types.ModuleType) and id(one) not in found and is_of_the_user(one.__name__):
            found[id(one)] = one
            waiting += [vars(one).get(name) for name in names]
    return list(found.values())


def _functions_of(value: Any) -> list[types.FunctionType]:
    """Return the functions of an attribute of a class."""
    if isinstance(value, property):
        parts = [value.fget, value.fset, value.fdel]
    elif isinstance(value, functools.cached_property):
        parts = [value.func]
    else:
        parts = [value.__func__ if isinstance(value, (classmethod, staticmethod)) else value]
    return [part for part in parts if isinstance(part, types.FunctionType)]


# The first row with a class of the value's decides.
_METHODS: list[tuple[tuple[type, ...], Callable[..., None] | None]] = [
    ((*SCALARS, type, types.ModuleType), None),
    (RANDOM_GENERATORS, _Walk._generator),
    ((Tensor,), _Walk._tensor),
    ((nn.Module,), _Walk._module),
    ((tuple, dict, list, set, deque), _Walk._container),
    ((np.ndarray,), _Walk._array),
    ((bytearray, array.array), _Walk._bytes),
    ((mmap.mmap, ctypes.Array, ctypes.Structure, ctypes.Union, ctypes._SimpleCData), _Walk._buffer),
    ((memoryview,), _Walk._view),
    ((sharedctypes.SynchronizedBase, shared_memory.SharedMemory), _Walk._shared),
    ((types.FunctionType, types.MethodType, functools.partial, types.CellType), _Walk._callable),
    ((io.IOBase,), _Walk._file),
]


@cached
def _method_for(kind: type) -> Callable[..., None] | None:
    """Return the method of `_Walk` that visits the instances of a class; ``None`` if they are left alone."""
    for kinds, method in _METHODS:
        if issubclass(kind, kinds):
            return method
    if is_user_made(kind):
        return _Walk._object
    # The objects of the standard library are mostly machinery, such as threads and loggers, or values, such as paths.
    # Those of other libraries that have no attributes are values as well, such as numbers of numpy.
    left_alone = is_opaque(kind) or is_of_standard_library(kind) or kind.__dictoffset__ == 0
    return None if left_alone else _Walk._object
