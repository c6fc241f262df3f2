"""A Hessian-vector product recorded as a CUDA graph: one launch starts all of its kernels.

A small network's product consists of a hundred kernels of a few microseconds each, and launching them one by one takes
longer than they do.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import Tensor

from hessian_callback.linalg.free_memory import free_memory

__all__ = ["Product", "RecordedProduct", "launching_dominates", "recorded", "seconds_of", "waits_counted"]

Product = Callable[[Tensor], Tensor]

# Share of a product's time that launches must take before recording it is tried.
_LAUNCHING = 0.5
# Share of the time that a recorded product must gain.
_MARGIN = 0.05
# Share of the free memory that the temporary tensors of a recorded product, which are never freed, may take.
_MEMORY_SHARE = 0.25
# Calls before a recording: libraries choose algorithms and make workspaces in the first ones.
_WARM_UPS = 3


def launching_dominates(launching: float, whole: float) -> bool:
    """Return whether a product's time is mostly spent on launching kernels.

    Args:
        launching: seconds until the product was queued.
        whole: seconds until it was computed.

    Example:
        >>> launching_dominates(0.9e-3, 1e-3), launching_dominates(1e-3, 20e-3)
        (True, False)
    """
    return launching >= _LAUNCHING * whole


class RecordedProduct:
    """A product whose kernels are recorded once and then launched together, on the current stream.

    What the product reads beside its vector must stay where it is. The temporary tensors keep their memory.

    Args:
        product: ``(P,) -> (P,)``, without random numbers. If it differentiates graphs, they must have been built on the
            stream of recordings, see `recorded`.
        example: a vector of the shape, dtype and device of those to come.

    Raises:
        RuntimeError: if the product can't be recorded.
    """

    def __init__(self, product: Product, example: Tensor) -> None:
        device = example.device
        with torch.inference_mode(False):
            self._vector = example.clone()
        self._product = product  # Holds what the kernels read.
        with _on_side_stream(device):
            for _ in range(_WARM_UPS):
                product(self._vector)
            # A recording that fails does damage (see `_recover`), and a product that waits would fail.
            with waits_counted() as waits:
                product(self._vector)
        if waits:
            raise RuntimeError("the product waits for the GPU, so it cannot be recorded")
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        stream = _side_stream(device)
        try:
            # Only this thread is watched: another one may copy batches to the GPU.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._result = product(self._vector)
        except BaseException:
            _recover(self._vector, pool)
            raise

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply."""
        self._vector.copy_(vector)
        self._graph.replay()
        return self._result.clone()


def recorded(product: Product, example: Tensor, build: Callable[[], Product] | None = None) -> RecordedProduct | None:
    """Record a product if that makes it faster; return ``None`` if not, and on a CPU.

    A recording is not used if its result differs from the product's by more than rounding, or if it would take more
    than a quarter of the free memory.

    Args:
        product: the product.
        example: a vector.
        build: returns the product to record, if it must be built on the stream of recordings.
    """
    device = example.device
    if device.type != "cuda":
        return None
    expected = product(example)
    launching, whole = seconds_of(product, example)
    if not launching_dominates(launching, whole):
        return None
    torch.cuda.empty_cache()
    before, room = torch.cuda.memory_reserved(device), free_memory(device)
    try:
        if build is not None:
            with _on_side_stream(device):
                product = build()
        faster = RecordedProduct(product, example)
        found = faster(example)
    except Exception:  # Whatever cannot be recorded is computed as before.
        return None
    if room is None or torch.cuda.memory_reserved(device) - before > _MEMORY_SHARE * room:
        return None
    tolerance = 1e4 * torch.finfo(expected.dtype).eps
    if not bool((found - expected).norm() <= tolerance * expected.norm()):
        return None
    return faster if seconds_of(faster, example)[1] < (1 - _MARGIN) * whole else None


def seconds_of(product: Product, vector: Tensor) -> tuple[float, float]:
    """Return the seconds until a product is queued, and until it is computed."""
    torch.cuda.synchronize(vector.device)
    began = time.perf_counter()
    product(vector)
    queued = time.perf_counter()
    torch.cuda.synchronize(vector.device)
    return queued - began, time.perf_counter() - began


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of recordings: one, because cuBLAS keeps a workspace of 32 MB for each."""
    return torch.cuda.Stream(device)


@contextmanager
def _on_side_stream(device: torch.device) -> Iterator[None]:
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """Collect torch's warnings of operations that wait for the GPU."""
    waits: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    texts = [str(warning.message) for warning in caught]
    waits += [text for text in texts if "called a synchronizing" in text]


def _recover(vector: Tensor, pool: tuple[int, int]) -> None:
    """Undo what torch leaves behind a failed recording: an allocator and a generator that wait for its end."""
    device = vector.device
    with suppress(Exception):
        index = torch.cuda.current_device() if device.index is None else device.index
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    with suppress(Exception):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_side_stream(device), capture_error_mode="thread_local"):
            vector + 1  # Anything that ends well.
