"""Loaders as an epoch uses them: how several are combined, and reading from one without disturbing another reader."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import worker as _worker

from hessian_callback.measurement.errors import SampleError
from hessian_callback.measurement.state_records import RefusingStream, is_user_made

__all__ = [
    "Combination",
    "check_starts_anew",
    "closing_after",
    "combination_of",
    "fresh_iterator",
    "iterates_as_torch",
    "iterates_in_its_own_way",
    "single_worker",
    "stateful_parts",
]

_MODES = ("sequential", "min_size", "max_size", "max_size_cycle")
_NOTHING: Any = [0]


@dataclass(frozen=True)
class Combination:
    """Several loaders, and how an epoch combines their batches.

    Attributes:
        loaders: the loaders.
        combine: makes a step's batch from one batch of each loader, ``None`` for a loader that is exhausted. In
            sequential mode a step's batch is that of a single loader.
        mode: ``"sequential"``: one loader after the other; ``"min_size"``: until the first one is exhausted;
            ``"max_size"``: until all are, with ``None`` for exhausted ones; ``"max_size_cycle"``: until all are, and
            exhausted ones begin again.
        limits: the number of batches that an epoch takes from each loader, on each rank; ``None`` for all.
        in_order: whether an epoch takes the batches in the data set's order whatever the sampler is.
    """

    loaders: tuple[Any, ...]
    combine: Callable[[list[Any]], Any]
    mode: str
    limits: tuple[float, ...] | None = None
    in_order: bool = False

    def limit(self, number: int) -> float:
        """Return the number of batches that an epoch takes from a loader."""
        return math.inf if self.limits is None else self.limits[number]


def combination_of(loader: Any, mode: str = "sequential") -> Combination:
    """Return the loaders that a loader or a structure of loaders consists of.

    Args:
        loader: a loader, a list, tuple or dictionary of loaders, or Lightning's ``CombinedLoader``, which is
            recognised by its attributes.
        mode: how the loaders of a list, tuple or dictionary are combined. A ``CombinedLoader`` has a mode of its own.

    Example:
        >>> pair = combination_of({"a": DataLoader(range(4)), "b": DataLoader(range(2))}, "min_size")
        >>> len(pair.loaders), pair.combine([1, 2])
        (2, {'a': 1, 'b': 2})
    """
    if isinstance(loader, Combination):
        return loader
    limits = None
    if all(hasattr(loader, name) for name in ("flattened", "iterables", "limits", "_mode")):
        mode, limits = loader._mode, loader.limits
        leaves, structure = list(loader.flattened), loader._spec
    else:
        leaves, structure = tree_flatten(loader)
        # A list of batches is a loader by itself.
        if not all(_is_loader(leaf) for leaf in leaves if leaf is not None):
            leaves, structure = tree_flatten(None)
            leaves = [loader]
    if mode not in _MODES:
        raise SampleError(f"the loaders are combined in an unknown mode, {mode!r}; use one of {', '.join(_MODES)}")
    if not any(leaf is not None for leaf in leaves):
        leaves = []

    def combine(batches: list[Any]) -> Any:
        return tree_unflatten(batches, structure)

    return Combination(
        loaders=tuple(leaves),
        combine=_only if mode == "sequential" else combine,
        mode=mode,
        limits=None if limits is None else tuple(float(limit) for limit in limits),
    )


def _only(batches: list[Any]) -> Any:
    return batches[0]


def _is_loader(leaf: Any) -> bool:
    return isinstance(leaf, Iterable) and not isinstance(leaf, (Tensor, np.ndarray, str, bytes, Mapping))


def stateful_parts(loader: Any) -> list[Any]:
    """Return the objects that reading from loaders may change: data sets, samplers, collate functions, generators.

    Args:
        loader: as for `samples.collect`.

    Example:
        >>> [type(part).__name__ for part in stateful_parts(DataLoader(range(4)))]
        ['range', 'SequentialSampler', 'BatchSampler', 'function']
    """
    parts: list[Any] = []
    for leaf in combination_of(loader).loaders:
        if type(leaf) is not DataLoader:
            parts.append(leaf)
        if isinstance(leaf, DataLoader):
            parts += [leaf.dataset, leaf.sampler, leaf.batch_sampler, leaf.collate_fn, leaf.generator]
    return [part for part in parts if part is not None]


def iterates_as_torch(loader: Any) -> bool:
    """Whether a loader is a ``DataLoader`` whose class leaves the iteration to torch."""
    return isinstance(loader, DataLoader) and all(
        getattr(type(loader), name) is getattr(DataLoader, name)
        for name in ("__iter__", "_get_iterator", "_index_sampler")
    )


def iterates_in_its_own_way(part: Any) -> bool:
    """Whether a part of a loader is an object of a library that iterates and may keep its position in attributes.

    Such a loader may count its epochs, for example. The same objects of the user, data sets and samplers are restored
    anyway.
    """
    return _is_iterable_object(part) and not (
        isinstance(part, (DataLoader, Dataset, Sampler, list, tuple, set, Mapping)) or is_user_made(type(part))
    )


def closing_after(iterator: Any) -> Any:
    """Return a context manager that closes a generator, as its ``finally`` may release a resource."""
    return closing(iterator) if hasattr(iterator, "close") else nullcontext(iterator)


def fresh_iterator(loader: Any) -> Iterator[Any]:
    """Iterate from the start, in this process, apart from the iterators and workers that training uses."""
    if iterates_as_torch(loader):
        options: dict[str, Any] = {"batch_size": loader.batch_size, "collate_fn": loader.collate_fn}
        return iter(DataLoader(loader.dataset, num_workers=0, drop_last=loader.drop_last, **options))
    return iter(_without_workers(loader))


def _without_workers(loader: Any, depth: int = 0) -> Any:
    """Return a copy of a loader, and of the loaders inside it, that loads in this process; itself if it has none."""
    if isinstance(loader, DataLoader):
        copied = copy.copy(loader)
        settings = {"num_workers": 0, "persistent_workers": False, "prefetch_factor": None, "timeout": 0}
        # Past the class's assignment, which refuses changes.
        vars(copied).update(settings, pin_memory=False, _iterator=None, _DataLoader__multiprocessing_context=None)
    elif depth < 3 and _is_users_object(loader) and not isinstance(loader, Dataset):
        copied = loader
    else:
        return loader
    for name, value in list(vars(loader).items()):
        if name != "_iterator" and (inner := _without_workers(value, depth + 1)) is not value:
            copied = copy.copy(loader) if copied is loader else copied
            vars(copied)[name] = inner
    return copied


def check_starts_anew(stream: Any, *, shared: bool) -> None:
    """Refuse a stream that continues where it was, because reading samples would use up the run's data.

    Args:
        stream: the loader.
        shared: whether the run reads it as well.

    Raises:
        SampleError: if the stream is an iterator, or holds an iterator, an open file, a queue or a connection.
    """
    name = type(stream).__name__
    # Asking a loader for an iterator may already restart its workers.
    if hasattr(type(stream), "__next__") and iter(stream) is stream:
        raise SampleError(
            f"the loader ({name}) is an iterator, so reading samples would use up its data; pass a DataLoader or "
            "another iterable that starts anew each time"
        )
    place = _position_in(stream) if shared else None
    if place is not None:
        raise SampleError(
            f"the loader ({name}) reads on from {place} wherever that was left, so reading samples would use up its "
            "data; pass dataloader=my_loader, a separate DataLoader or another iterable that starts anew each time"
        )


def _position_in(stream: Any) -> str | None:
    """Return the name of an object in a stream that has a position of its own, and its type; ``None`` without one."""
    own = set(vars(DataLoader(_NOTHING))) - {"dataset"}
    seen: set[int] = set()

    def search(value: Any, name: str, depth: int) -> str | None:
        if id(value) in seen or depth > 8:
            return None
        seen.add(id(value))
        if _has_position(value):
            return f"{name} (a {value.__class__.__name__})"
        if isinstance(value, Mapping) and len(value) <= 100:
            items = [(f"{name}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)) and len(value) <= 100:
            items = [(f"{name}[{place}]", item) for place, item in enumerate(value)]
        elif isinstance(value, (Dataset, DataLoader)) or _is_users_object(value) or _is_iterable_object(value):
            skipped = own if isinstance(value, DataLoader) else set()
            items = [(f"{name}.{key}", item) for key, item in vars(value).items() if key not in skipped]
        else:
            return None
        return next(filter(None, (search(item, place, depth + 1) for place, item in items)), None)

    found = search(stream, "its", 0)
    return None if found is None else found.replace("its.", "its ", 1)


def _is_iterable_object(value: Any) -> bool:
    """Whether an object of any origin iterates over something that its attributes may refer to."""
    known = isinstance(value, (type, types.ModuleType, Tensor, nn.Module))
    return not known and hasattr(type(value), "__iter__") and isinstance(getattr(value, "__dict__", None), dict)


def _has_position(value: Any) -> bool:
    """Whether reading from an object moves it, and its attributes don't show where it is."""
    if type(value) is RefusingStream:
        return True
    if isinstance(value, (type, types.ModuleType)):
        return False
    if hasattr(value, "readline") and hasattr(value, "read"):
        return not getattr(value, "closed", False) and (not hasattr(value, "readable") or value.readable())
    if all(hasattr(value, name) for name in ("get", "put", "empty")) or hasattr(value, "recv"):
        return not _is_users_object(value)
    if not hasattr(type(value), "__next__") or _is_users_object(value) or isinstance(value, Dataset):
        return False
    return iter(value) is value


def _is_users_object(value: Any) -> bool:
    """Whether an object is of the user's making, so that its attributes are its state."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType)):
        return False
    if not isinstance(getattr(value, "__dict__", None), dict):
        return False
    module = type(value).__module__
    if module.partition(".")[0] in sys.stdlib_module_names and module != "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


@contextmanager
def single_worker(dataset: Any, seed: int, num_workers: int) -> Iterator[None]:
    """Let ``torch.utils.data.get_worker_info`` describe a single worker, if the loader has workers at all."""
    before = _worker._worker_info
    if num_workers and before is None:
        _worker._worker_info = _worker.WorkerInfo(id=0, num_workers=1, seed=seed, dataset=dataset)
    try:
        yield
    finally:
        _worker._worker_info = before
