r"""What the top eigenspaces of a run's measurements have in common, each with each, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.linalg.tall_matrices import inner_products

__all__ = ["SubspaceHistory"]


@dataclass(frozen=True)
class _Kept:
    step: int
    label: str | None
    vectors: Tensor


class SubspaceHistory:
    r"""Keep the eigenspaces of past measurements, and their overlaps.

    .. math:: o_{ij} = \frac{1}{k} \|U_i^T U_j\|_F^2,

    1 up to rounding for equal spaces, near k / P for random ones. Each of W ranks keeps its rows of each
    :math:`U_i` on the CPU, k P / W numbers for each space. When there are too many, those go whose neighbours in time
    are closest, so that the rest covers the run evenly; the first and the newest stay.

    Args:
        capacity: the most spaces to keep, at least 1.
        max_bytes: the most memory of a rank for them; one is always kept.

    Raises:
        ValueError: if ``capacity`` is below 1 or ``max_bytes`` negative.

    Source:
        Gur-Ari, Roberts and Dyer (2018) for the overlap.

    Example:
        >>> spaces = SubspaceHistory()
        >>> for step, columns in enumerate([[0, 1], [1, 2], [1, 2]]):
        ...     vectors = torch.eye(3, dtype=torch.float64)[:, columns]
        ...     spaces.add(vectors, spaces.overlaps_with(vectors, Ranks()), step=step)
        >>> spaces.overlaps
        tensor([[1.0000, 0.5000, 0.5000],
                [0.5000, 1.0000, 1.0000],
                [0.5000, 1.0000, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, capacity: int = 24, max_bytes: int = 2**30) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.capacity, self.max_bytes = capacity, max_bytes
        self._kept: list[_Kept] = []
        self._overlaps = torch.empty(0, 0, dtype=torch.float64)

    def __len__(self) -> int:
        """Return how many spaces are kept."""
        return len(self._kept)

    @property
    def overlaps(self) -> Tensor:
        """Overlaps of the kept spaces, ``(n, n)``, symmetric, in float64 on the CPU, in order of time."""
        return self._overlaps.clone()

    @property
    def dimension(self) -> int:
        """Dimension k of the kept spaces; 0 while there are none."""
        return self._kept[0].vectors.shape[1] if self._kept else 0

    @property
    def labels(self) -> tuple[list[str], str]:
        """A name for each space, and what the names count: epochs where each space has another, else steps."""
        names = [kept.label for kept in self._kept if kept.label is not None]
        if len(set(names)) == len(self._kept):
            return names, "epoch"
        return [str(kept.step) for kept in self._kept], "step"

    @property
    def last_step(self) -> int | None:
        """The step of the newest space; ``None`` while there is none."""
        return self._kept[-1].step if self._kept else None

    def overlaps_with(self, vectors: Tensor, ranks: Ranks) -> list[float]:
        """Compare a space with the kept ones, on all ranks together; nothing is kept yet.

        Args:
            vectors: this rank's rows of orthonormal columns, ``(slice_length, k)``, on any device.
            ranks: the processes that hold the other rows.

        Returns:
            An overlap for each kept space, the same on all ranks; none if the shape is not that of the kept ones.
        """
        if not self._kept or self._kept[0].vectors.shape != vectors.shape:
            return []
        with ranks.propagate_errors("comparing eigenspaces"):
            # One by one, as a device may have no room for all; what each rank has is summed once.
            mine = torch.stack([inner_products(kept.vectors.to(vectors), vectors, Ranks()) for kept in self._kept])
        products = ranks.all_reduce(mine.to(ranks.control_device)).cpu()
        overlaps: list[float] = (products.square().sum((1, 2)) / vectors.shape[1]).tolist()
        return overlaps

    def add(self, vectors: Tensor, overlaps: Sequence[float], *, step: int, label: str | None = None) -> None:
        """Keep a space; without communication, so that it may be done later than the comparison.

        Where the parameters have become others, so that nothing can be compared, the history begins anew.

        Args:
            vectors: as in `overlaps_with`.
            overlaps: what that returned.
            step: optimizer steps taken, not fewer than those of the last one.
            label: the epoch that ends here, or a name for the start; ``None`` for a measurement at another place.

        Raises:
            ValueError: if there is not one overlap for each kept space.
        """
        if self._kept and self._kept[0].vectors.shape != vectors.shape:
            self.clear()
        if len(overlaps) != len(self._kept):
            raise ValueError(
                f"{len(self._kept)} spaces are kept and {len(overlaps)} overlaps given; take them from overlaps_with"
            )
        row = torch.tensor(overlaps, dtype=torch.float64)[None]
        self._overlaps = torch.cat([torch.cat([self._overlaps, row.T], 1), torch.cat([row, torch.ones(1, 1)], 1)])
        self._kept.append(_Kept(step, label, vectors.cpu()))
        most = max(1, min(self.capacity, self.max_bytes // max(1, vectors.numel() * vectors.element_size())))
        while len(self._kept) > most:
            self._drop(self._least_missed())

    def copy(self) -> SubspaceHistory:
        """Return a history with the same spaces, to which others can be added."""
        other = type(self)(self.capacity, self.max_bytes)
        other._kept, other._overlaps = list(self._kept), self._overlaps
        return other

    def clear(self) -> None:
        """Forget everything."""
        self._kept = []
        self._overlaps = torch.empty(0, 0, dtype=torch.float64)

    def _least_missed(self) -> int:
        steps = [kept.step for kept in self._kept]
        inner = range(1, len(steps) - 1)
        return min(inner, key=lambda i: steps[i + 1] - steps[i - 1], default=0)

    def _drop(self, index: int) -> None:
        del self._kept[index]
        others = [i for i in range(len(self._overlaps)) if i != index]
        self._overlaps = self._overlaps[others][:, others]
