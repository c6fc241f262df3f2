"""A Hessian-vector product recorded as a CUDA graph: one launch starts all of its kernels.

A small network's product consists of a hundred kernels of a few microseconds each, and launching them one by one takes
longer than they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from hessian_callback.linalg.free_memory import free_memory

__all__ = ["Product", "RecordedProduct", "launching_dominates", "recorded", "seconds_of"]

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
        product: ``(P,) -> (P,)``, without waiting for the GPU and without random numbers.
        example: a vector of the shape, dtype and device of those to come.

    Raises:
        RuntimeError: if the product can't be recorded.
    """

    def __init__(self, product: Product, example: Tensor) -> None:
        self._vector = example.clone()
        self._graph = torch.cuda.CUDAGraph()
        device = example.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                product(self._vector)
        torch.cuda.current_stream(device).wait_stream(side)
        try:
            # Only this thread is watched: another one may copy batches to the GPU.
            with torch.cuda.device(device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = product(self._vector)
        except BaseException:
            _end_recording(self._graph, device)
            raise

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply."""
        self._vector.copy_(vector)
        self._graph.replay()
        return self._result.clone()


def recorded(product: Product, example: Tensor) -> RecordedProduct | None:
    """Record a product if that makes it faster; return ``None`` if not, and on a CPU.

    A recording is not used if its result differs from the product's by more than rounding, or if its temporary tensors
    would take more than a quarter of the free memory.
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


def _end_recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    """Let the allocator release memory again: torch leaves it waiting for the end of a recording that has failed."""
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device.index or 0, graph.pool())
