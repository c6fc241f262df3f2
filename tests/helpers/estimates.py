"""Diagonal matrices with known spectra that count their products, and the coverage of intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hessian_callback.linalg.linear_operator import MatvecOperator


def index(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "power law": lambda: index(300) ** -1.0,
    "indefinite": lambda: torch.cat([index(200) ** -1.0, -0.3 * index(100) ** -0.7]),
    "spikes and a semicircle": lambda: torch.cat(
        [torch.linspace(3, 8, 10).double(), torch.from_numpy(np.random.default_rng(0).beta(1.5, 1.5, 290) * 2 - 1)]
    ),
}


class Counted(MatvecOperator):
    def __init__(self, eigenvalues: Tensor, dtype: torch.dtype = torch.float64) -> None:
        eigenvalues = eigenvalues.to(dtype)
        super().__init__(lambda v: eigenvalues * v, len(eigenvalues), dtype=dtype)
        self.num_products = 0

    def matvec_slice(self, vector: Tensor) -> Tensor:
        self.num_products += 1
        return super().matvec_slice(vector)


def coverage(intervals: Sequence[tuple[float, float]], truth: float) -> float:
    """Return the share of intervals that hold the truth."""
    inside = [low <= truth <= high for low, high in intervals]
    return sum(inside) / len(inside)
