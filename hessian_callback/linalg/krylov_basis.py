"""A Krylov basis whose vectors are cut over the ranks, and its inner products at the precision of the dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.tall_matrices import LONGEST_SUM

__all__ = ["KrylovBasis", "row_products"]

# Vectors in the first block of the basis, and the share by which later ones grow it: large enough for BLAS, small
# enough to allocate little in advance.
_FIRST_BLOCK = 32
_GROWTH = 16


class KrylovBasis:
    """Orthonormal vectors in the operator's dtype, this rank's slice of each, as rows of a few blocks.

    Blocks are allocated as the basis grows, so that growing copies nothing, and every operation is a matrix-vector
    product per block, which reads the basis once.
    """

    def __init__(self, operator: SymmetricOperator, device: torch.device | str | None = None) -> None:
        self._home = operator.device
        self._like = torch.empty(0, dtype=operator.dtype, device=operator.device if device is None else device)
        self._length = operator.partition.slice_length
        self._blocks: list[Tensor] = []
        self._capacity = 0
        self.size = 0

    def append(self, vector: Tensor) -> None:
        """Append a vector."""
        if self.size == self._capacity:
            rows = max(_FIRST_BLOCK, self.size // _GROWTH)
            self._blocks.append(self._like.new_empty(rows, self._length))
            self._capacity += rows
        self._blocks[-1][self.size - self._capacity] = vector
        self.size += 1

    def vector(self, index: int) -> Tensor:
        """Return a vector, on the operator's device."""
        for block in self._blocks:
            if index < len(block):
                return block[index].to(self._home)
            index -= len(block)
        raise IndexError("the basis has no such vector")

    def rows(self, first: int) -> Iterator[Tensor]:
        """Yield the vectors from ``first`` on, on the device of the basis."""
        for block in self._filled(self.size):
            yield from block[max(first, 0) :]
            first -= len(block)

    def branch(self, size: int) -> KrylovBasis:
        """Return a basis that shares the first ``size`` vectors and grows independently."""
        other = copy.copy(self)
        other._blocks = self._filled(size)
        other._capacity = other.size = size
        return other

    def coefficients(self, vector: Tensor) -> Tensor:
        """Compute ``V^T w`` of this rank's slices, ``(N,)`` in float64."""
        vector = vector.to(self._like.device)
        return torch.cat([row_products(block, vector) for block in self._filled(self.size)]).to(self._home)

    def subtract(self, vector: Tensor, coefficients: Tensor) -> None:
        """Subtract ``V h`` from ``w``, in place."""
        here = vector.to(self._like.device)  # the vector itself, if the basis is on its device
        blocks = self._filled(self.size)
        for block, part in zip(blocks, coefficients.to(self._like).split([len(b) for b in blocks]), strict=True):
            here.addmv_(block.t(), part, alpha=-1)
        if here is not vector:
            vector.copy_(here)

    def combine(self, weights: Tensor) -> Tensor:
        """Compute ``V S``, ``(N, k) -> (slice_length, k)``; ``S`` may have fewer rows than there are vectors."""
        result = self._like.new_zeros(self._length, weights.shape[1])
        blocks = self._filled(len(weights))
        for block, part in zip(blocks, weights.to(self._like).split([len(b) for b in blocks]), strict=True):
            result.addmm_(block.t(), part)
        return result.to(self._home)

    def _filled(self, size: int) -> list[Tensor]:
        """Return the first ``size`` vectors, block by block."""
        filled = []
        for block in self._blocks:
            if size <= 0:
                break
            filled.append(block[:size])
            size -= len(block)
        return filled


def row_products(rows: Tensor, vector: Tensor) -> Tensor:
    """Multiply ``(m, n), (n,) -> (m,)``; the result is in float64, see `LONGEST_SUM`."""
    if vector.device.type != "cpu" or len(vector) <= LONGEST_SUM:
        return _precise(rows.mv(vector))
    partial = [
        part.mv(piece) for part, piece in zip(rows.split(LONGEST_SUM, 1), vector.split(LONGEST_SUM), strict=True)
    ]
    return torch.stack(partial).sum(0, dtype=torch.float64)


def _precise(values: Tensor) -> Tensor:
    if values.device.type == "mps":  # has no float64
        values = values.cpu()
    return values.to(torch.float64)
