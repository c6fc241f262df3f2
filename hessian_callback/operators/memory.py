"""Memory that vectors may take, and the memory that an autograd graph holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian_callback.linalg.free_memory import free_memory

__all__ = [
    "Results",
    "SavedTensors",
    "count_saved_tensors",
    "device_with_room",
    "is_out_of_memory",
    "readable_size",
    "refuses_to_be_counted",
]


def device_with_room(device: torch.device, num_bytes: float, budget: int | None = None) -> torch.device:
    """Return where to keep vectors that are used now and then: on a device, or on the CPU if they would fill it.

    Args:
        device: where they are used.
        num_bytes: what they take.
        budget: bytes that they may take there; default: a quarter of what is free.

    Example:
        >>> device_with_room(torch.device("cuda"), num_bytes=1e9, budget=10**8)
        device(type='cpu')
    """
    if device.type == "cpu":
        return device
    if budget is None:
        free = free_memory(device)
        if free is None:
            return device
        budget = free // 4
    return device if num_bytes <= budget else torch.device("cpu")


# What allocators say in an error of no type of its own.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory, on any device.

    Example:
        >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def readable_size(num_bytes: float) -> str:
    """Return a number of bytes to three digits.

    Example:
        >>> readable_size(0), readable_size(123_456), readable_size(7.9e10)
        ('0 B', '123 kB', '79 GB')
    """
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"


class SavedTensors:
    """What a graph keeps alive, counted by storage: tensors that share memory count once."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        """Tensors in ``exclude`` exist without the graph and are not counted."""
        self._excluded = {_storage(part) for tensor in exclude for part in _dense_parts(tensor)}
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, and all of a sparse tensor's."""
        for part in _dense_parts(tensor):
            storage = _storage(part)
            if storage not in self._excluded:
                self._sizes[storage] = part.untyped_storage().nbytes()

    @property
    def num_bytes(self) -> int:
        """Bytes counted so far."""
        return sum(self._sizes.values())


@contextmanager
def count_saved_tensors(exclude: Iterable[Tensor]) -> Iterator[SavedTensors]:
    """Count the bytes that autograd saves for backward inside the block.

    Example:
        >>> x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
        >>> with count_saved_tensors([x]) as saved:
        ...     y = x.exp().sum()  # saves its result, 1000 numbers of 8 bytes
        >>> saved.num_bytes
        8000
    """
    saved = SavedTensors(exclude)

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        # The tensor itself would hold the node that holds it.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class Results(TorchDispatchMode):
    """Count the bytes of all results inside the block, which a graph may keep: at least those that it does.

    For losses that transform functions by ``torch.func``, which refuse to have what they save counted.

    Example:
        >>> with Results() as results:
        ...     y = torch.ones(1000, dtype=torch.float64).exp().sum()
        >>> results.num_bytes
        16008
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def add(self, tensor: Tensor) -> None:
        """Count nothing: a result was counted when it was made."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(results) if isinstance(one, Tensor)]
        self.num_bytes += sum(part.numel() * part.element_size() for one in tensors for part in _dense_parts(one))
        return results


def refuses_to_be_counted(error: BaseException) -> bool:
    """Return whether an error is that of a transform of ``torch.func`` inside `count_saved_tensors`."""
    return any(words in str(error) for words in ("saved tensor hooks", "invalid python storage"))


def _dense_parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return the tensors that hold a tensor's numbers: itself, or the indices and values of a sparse one."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,) if tensor.layout == torch.strided else ()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
