"""Random vectors cut over the ranks, drawn by global coordinate.

Coordinate i of a vector depends only on the seed, the purpose and the number of the draw. It does not depend on the
number of ranks, the padding or the device. No global generator is used.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.distributed import Partition

__all__ = ["Purpose", "gaussian_slice", "rademacher_slice"]

# Coordinates of one counter of the random stream. Another value would change the vectors of every seed.
_STREAM_CHUNK = 1 << 16


class Purpose(IntEnum):
    """Purpose of a vector: computations with the same seed must not share vectors.

    Example:
        >>> Purpose.SOLVER.value
        0
    """

    SOLVER = 0
    SKETCH = 1
    MOMENTS = 2
    DENSITY = 3
    PAPER = 4


def gaussian_slice(
    partition: Partition,
    *,
    seed: int,
    draw: int,
    purpose: Purpose = Purpose.SOLVER,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Draw this rank's slice of a standard normal vector, ``(slice_length,)``, zero padded.

    Args:
        partition: how the vector is cut.
        seed: from 0 to 2**64 - 1.
        draw: number of the vector, from 0 to 2**32 - 1; vectors of different numbers are independent.
        purpose: purpose of the vector.
        dtype: dtype of the slice.
        device: device of the slice.

    Raises:
        TypeError: if ``seed`` or ``draw`` is not an integer.
        ValueError: if one is out of range.

    Example:
        >>> whole = gaussian_slice(Partition(5, 1, 0), seed=0, draw=0)
        >>> halves = [gaussian_slice(Partition(5, 2, rank), seed=0, draw=0) for rank in range(2)]
        >>> torch.equal(torch.cat(halves)[:5], whole)
        True
    """
    return _drawn(partition, seed, draw, purpose, _normal).to(device, dtype)


def rademacher_slice(
    partition: Partition,
    *,
    seed: int,
    draw: int,
    purpose: Purpose = Purpose.SOLVER,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Draw this rank's slice of a vector of random signs, ``(slice_length,)``, zero padded.

    Args:
        partition: how the vector is cut.
        seed: from 0 to 2**64 - 1.
        draw: number of the vector, from 0 to 2**32 - 1; vectors of different numbers are independent.
        purpose: purpose of the vector.
        dtype: dtype of the slice.
        device: device of the slice.

    Raises:
        TypeError: if ``seed`` or ``draw`` is not an integer.
        ValueError: if one is out of range.

    Example:
        >>> signs = rademacher_slice(Partition(1000, 1, 0), seed=0, draw=0)
        >>> sorted(set(signs.tolist()))
        [-1.0, 1.0]
    """
    return _drawn(partition, seed, draw, purpose, _signs).to(device, dtype)


def _normal(stream: np.random.Generator) -> NDArray[np.float64]:
    return stream.standard_normal(_STREAM_CHUNK)


def _signs(stream: np.random.Generator) -> NDArray[Any]:
    return 2 * stream.integers(0, 2, _STREAM_CHUNK, dtype=np.int8) - 1


def _drawn(
    partition: Partition,
    seed: int,
    draw: int,
    purpose: Purpose,
    values_of: Callable[[np.random.Generator], NDArray[Any]],
) -> Tensor:
    seed = whole_number("seed", seed, at_least=0, below=2**64)
    draw = whole_number("draw", draw, at_least=0, below=2**32)
    piece = np.zeros(partition.slice_length)
    key = np.array([seed, draw + (int(purpose) << 32)], dtype=np.uint64)
    for chunk in range(partition.start // _STREAM_CHUNK, -(-partition.stop // _STREAM_CHUNK)):
        # A counter-based generator: any coordinate can be drawn without those before it.
        stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, chunk]))
        values = values_of(stream)
        first = max(partition.start, chunk * _STREAM_CHUNK)
        stop = min(partition.stop, (chunk + 1) * _STREAM_CHUNK)
        piece[first - partition.start : stop - partition.start] = values[
            first - chunk * _STREAM_CHUNK : stop - chunk * _STREAM_CHUNK
        ]
    return torch.from_numpy(piece)
