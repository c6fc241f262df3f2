"""The number of Krylov vectors that fit the memory, before any of them is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hessian_callback.linalg.free_memory import free_memory, main_memory_limits
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.operators.memory import readable_size

__all__ = ["BasisPlan", "NotEnoughMemoryError", "check_vector_room", "vector_room"]

# The rest is for everything that is not counted.
_SHARE = 0.9
# Whole vectors while a product is formed: the gathered direction, a gradient, the product, and a sum of products.
_WHOLE_VECTORS = 4

REMEDY = (
    "choose fewer parameters (parameters=r'^head'), a smaller num_eigenvalues, or more ranks, which share the vectors"
)


class NotEnoughMemoryError(MemoryError):
    """The vectors of a measurement do not fit the free memory; raised on all ranks before they are allocated."""


@dataclass(frozen=True)
class BasisPlan:
    """Where a Krylov basis is kept, and how many vectors it may have.

    Attributes:
        device: where.
        max_size: the largest number of vectors in memory; ``None`` if one for each product fits.
    """

    device: torch.device
    max_size: int | None


def vector_room(
    operator: SymmetricOperator, device: torch.device, *, kept: int = 0, budget: int | None = None
) -> int | None:
    """Return the number of basis vectors that every rank can allocate. A collective.

    On the CPU the ranks of a machine share its free memory, see `main_memory_limits`.

    Args:
        operator: the matrix whose vectors are meant; this rank keeps a slice of each.
        device: where they are kept.
        kept: further slices that the computation needs.
        budget: bytes that the basis may take on each rank; ``None``: no limit but the free memory.

    Returns:
        The smallest number over the ranks; ``None`` if no rank can tell.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> room = vector_room(MatvecOperator(lambda v: v, 1000), torch.device("cpu"))
        >>> room is None or room > 100
        True
    """
    ranks, partition = operator.ranks, operator.partition
    item = torch.finfo(operator.dtype).bits // 8
    each = item * max(1, partition.slice_length)
    sharing = ranks.num_on_host() if device.type == "cpu" else 1
    free = free_memory(device)
    room = float("inf")
    if free is not None:
        whole = _WHOLE_VECTORS * partition.size if operator.device == device else 0
        left = _SHARE * free / sharing - item * whole
        room = max(0.0, left // each - kept)
    if budget is not None:
        room = min(room, budget // each)
    smallest = float(ranks.gather([room]).min())
    return None if smallest == float("inf") else int(smallest)


def check_vector_room(
    operator: SymmetricOperator, device: torch.device, needed: int, room: int | None, budget: int | None = None
) -> None:
    """Check that a number of basis vectors fits.

    Args:
        operator: the matrix.
        device: where its basis is kept.
        needed: vectors without which there is no result.
        room: `vector_room`, the same on all ranks.
        budget: see there.

    Raises:
        NotEnoughMemoryError: if it doesn't; the message has the numbers and the remedy.
    """
    if room is None or needed <= room:
        return
    partition = operator.partition
    each = partition.slice_length * torch.finfo(operator.dtype).bits // 8
    takes = f"{needed} vectors of {partition.size:,} parameters take {readable_size(needed * each)} on each rank, and "
    if budget is not None and budget // max(1, each) <= room:
        raise NotEnoughMemoryError(
            f"{takes}{room} fit basis_budget={budget}; allow at least {needed * each}, or {REMEDY}"
        )
    where = f"on {device}"
    if device.type == "cpu":
        limits = main_memory_limits()
        where = f"within the limit of {min(limits, key=lambda name: limits[name])}" if limits else "on the CPU"
    raise NotEnoughMemoryError(
        f"{takes}{room} fit ({readable_size(free_memory(device) or 0)} are free {where}); {REMEDY}"
    )
