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
# Short vectors are allocated in larger blocks of up to so many bytes and vectors, because each block costs a call.
_CHEAP_BYTES, _CHEAP_ROWS = 2**26, 256
# So few inner products are formed faster without BLAS.
_FEW_ROWS = 2
# Numbers in float64 that a change of basis holds at a time.
_CHUNK = 2**22


class KrylovBasis:
    """Orthonormal vectors in the operator's dtype, this rank's slice of each, as rows of a few blocks.

    Blocks are allocated as the basis grows, so that growing copies nothing, and every operation is a matrix-vector
    product per block, which reads the basis once.

    Args:
        operator: the matrix; the vectors have its dtype and this rank's part of its rows.
        device: where to keep the vectors; default: the operator's device.
        most: the largest number of vectors that is ever allocated; ``None``: no limit.

    Attributes:
        size: number of vectors.
        most: see above.
    """

    def __init__(
        self, operator: SymmetricOperator, device: torch.device | str | None = None, most: int | None = None
    ) -> None:
        self._home = operator.device
        self._like = torch.empty(0, dtype=operator.dtype, device=operator.device if device is None else device)
        self._length = operator.partition.slice_length
        self._blocks: list[Tensor] = []
        self._capacity = 0
        self.most = most
        self.size = 0

    def append(self, vector: Tensor) -> None:
        """Append a vector.

        Raises:
            IndexError: if the basis is full.
        """
        if self.size == self._capacity:
            cheap = _CHEAP_BYTES // max(1, self._length * self._like.element_size())
            rows = max(_FIRST_BLOCK, self.size // _GROWTH, min(cheap, _CHEAP_ROWS))
            if self.most is not None:
                rows = min(rows, self.most - self.size)
            if rows <= 0:
                raise IndexError(f"the basis holds {self.most} vectors, its largest number")
            self._blocks.append(self._like.new_empty(rows, self._length))
            self._capacity += rows
        self._row(self.size).copy_(vector)
        self.size += 1

    def vector(self, index: int) -> Tensor:
        """Return a vector, on the operator's device."""
        return self._row(index).to(self._home)

    def _row(self, index: int) -> Tensor:
        for block in self._blocks:
            if index < len(block):
                return block[index]
            index -= len(block)
        raise IndexError("the basis has no such vector")

    def rows(self, first: int) -> Iterator[Tensor]:
        """Yield the vectors from ``first`` on, on the device of the basis."""
        for block in self._filled(self.size):
            yield from block[max(first, 0) :]
            first -= len(block)

    def branch(self, size: int, most: int | None = None) -> KrylovBasis:
        """Return a basis that shares the first ``size`` vectors and grows independently, up to ``most`` of its own."""
        other = copy.copy(self)
        other._blocks = self._filled(size)
        other._capacity = other.size = size
        other.most = None if most is None else size + most
        return other

    def remove(self, index: int) -> None:
        """Remove a vector; the later ones move up."""
        for later in range(index + 1, self.size):
            self._row(later - 1).copy_(self._row(later))
        self.size -= 1

    def transform(self, weights: Tensor) -> None:
        """Replace the vectors V by V W, ``(N, m)`` with ``m <= N``, in place, rounded once from float64.

        The memory of the vectors that disappear is kept for later ones.
        """
        blocks = self._filled(self.size)
        for columns, part in self._chunks():
            rows = (weights.to(part).t() @ part).to(self._like)
            first = 0
            for block in blocks:
                replaced = rows[first : first + len(block)]
                block[: len(replaced), columns] = replaced
                first += len(replaced)
        self.size = weights.shape[1]

    def gram(self) -> Tensor:
        """Compute ``V^T V`` of this rank's slices in float64, ``(N, N)``."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64, device="cpu")
        for _, part in self._chunks():
            total += (part @ part.t()).cpu()
        return total

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the coordinates, and all vectors there in float64, ``(N, width)``."""
        blocks = self._filled(self.size)
        # MPS has no float64.
        where = self._like.device if self._like.device.type != "mps" else torch.device("cpu")
        width = max(1, _CHUNK // self.size)
        for start in range(0, self._length, width):
            columns = slice(start, start + width)
            yield columns, torch.cat([block[:, columns].to(where, torch.float64) for block in blocks])

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
    if len(rows) <= _FEW_ROWS:
        return (rows * vector).sum(1, dtype=torch.float64)
    pieces = vector.split(LONGEST_SUM)
    partial = vector.new_empty(len(pieces), len(rows))
    for part, piece, out in zip(rows.split(LONGEST_SUM, 1), pieces, partial.unbind(), strict=True):
        torch.mv(part, piece, out=out)
    return partial.sum(0, dtype=torch.float64)


def _precise(values: Tensor) -> Tensor:
    if values.device.type == "mps":  # has no float64
        values = values.cpu()
    return values.to(torch.float64)
