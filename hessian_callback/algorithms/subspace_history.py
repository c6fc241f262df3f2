r"""Pairwise overlaps of the top eigenspaces of a run's measurements, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.linalg.tall_matrices import inner_products

__all__ = ["SubspaceHistory"]


@dataclass(frozen=True)
class _Space:
    step: int
    label: str | None
    vectors: Tensor


class SubspaceHistory:
    r"""The eigenspaces of past measurements and their overlaps.

    .. math:: o_{ij} = \frac{1}{k} \|U_i^T U_j\|_F^2

    The overlap is 1 up to rounding for equal spaces and near k / P for random ones. Each of W ranks keeps its rows of
    each :math:`U_i` on the CPU, k P / W numbers for each space. Beyond the capacity, the space whose neighbours in time
    are closest is dropped, so the rest covers the run evenly. The first and the newest space are always kept.

    Args:
        capacity: largest number of spaces, at least 1.
        max_bytes: largest memory of a rank for them; one space is always kept.

    Raises:
        TypeError: if an argument is not an integer.
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
        self.capacity = whole_number("capacity", capacity, at_least=1)
        self.max_bytes = whole_number("max_bytes", max_bytes, at_least=0)
        self._spaces: list[_Space] = []
        self._overlaps = torch.empty(0, 0, dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        """Return the number of spaces."""
        return len(self._spaces)

    @property
    def overlaps(self) -> Tensor:
        """Overlaps of the spaces in order of time, ``(n, n)``, symmetric, float64 on the CPU."""
        return self._overlaps.clone()

    @property
    def dimension(self) -> int:
        """Dimension k of the spaces; 0 if there are none."""
        return self._spaces[0].vectors.shape[1] if self._spaces else 0

    @property
    def labels(self) -> tuple[list[str], str]:
        """A name for each space and the unit of the names: epochs if no two spaces share one, else steps."""
        names = [space.label for space in self._spaces if space.label is not None]
        if len(set(names)) == len(self._spaces):
            return names, "epoch"
        return [str(space.step) for space in self._spaces], "step"

    @property
    def last_step(self) -> int | None:
        """The step of the newest space; ``None`` if there is none."""
        return self._spaces[-1].step if self._spaces else None

    def overlaps_with(self, vectors: Tensor, ranks: Ranks) -> list[float]:
        """Compare a space with those of the history, on all ranks together, without adding it.

        Args:
            vectors: this rank's rows of orthonormal columns, ``(slice_length, k)``, on any device.
            ranks: the processes that hold the other rows.

        Returns:
            An overlap for each space of the history, the same on all ranks; none if the shape differs from theirs.
        """
        if not self._spaces or self._spaces[0].vectors.shape != vectors.shape:
            return []
        with ranks.propagate_errors("comparing eigenspaces"):
            # One by one, because a device may lack memory for all; a single sum over the ranks follows.
            mine = torch.stack([inner_products(space.vectors.to(vectors), vectors, Ranks()) for space in self._spaces])
        products = ranks.all_reduce(mine.to(ranks.control_device)).cpu()
        overlaps: list[float] = (products.square().sum((1, 2)) / vectors.shape[1]).tolist()
        return overlaps

    def add(self, vectors: Tensor, overlaps: Sequence[float], *, step: int, label: str | None = None) -> None:
        """Add a space, without communication; it may be done later than the comparison.

        If its shape differs from that of the others, which happens if the parameters change, the history is cleared.

        Args:
            vectors: as in `overlaps_with`.
            overlaps: the result of `overlaps_with`.
            step: number of optimizer steps, at least that of the newest space.
            label: the epoch that ends here, or a name for the start; ``None`` for a measurement elsewhere.

        Raises:
            ValueError: if there is not one overlap for each space of the history.
        """
        if self._spaces and self._spaces[0].vectors.shape != vectors.shape:
            self.clear()
        if len(overlaps) != len(self._spaces):
            raise ValueError(
                f"the history has {len(self._spaces)} spaces and {len(overlaps)} overlaps were passed; take them from "
                "overlaps_with"
            )
        row = torch.tensor(overlaps, dtype=torch.float64, device="cpu")[None]
        self._overlaps = torch.cat([torch.cat([self._overlaps, row.T], 1), torch.cat([row, row.new_ones(1, 1)], 1)])
        self._spaces.append(_Space(step, label, vectors.cpu()))
        most = max(1, min(self.capacity, self.max_bytes // max(1, vectors.numel() * vectors.element_size())))
        while len(self._spaces) > most:
            self._drop(self._most_redundant())

    def copy(self) -> SubspaceHistory:
        """Return a history with the same spaces, to which others can be added."""
        other = type(self)(self.capacity, self.max_bytes)
        other._spaces, other._overlaps = list(self._spaces), self._overlaps
        return other

    def clear(self) -> None:
        """Remove all spaces."""
        self._spaces = []
        self._overlaps = torch.empty(0, 0, dtype=torch.float64, device="cpu")

    def _most_redundant(self) -> int:
        steps = [space.step for space in self._spaces]
        inner = range(1, len(steps) - 1)
        return min(inner, key=lambda i: steps[i + 1] - steps[i - 1], default=0)

    def _drop(self, index: int) -> None:
        del self._spaces[index]
        others = [i for i in range(len(self._overlaps)) if i != index]
        self._overlaps = self._overlaps[others][:, others]
