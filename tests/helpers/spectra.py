"""Symmetric operators with prescribed spectra, and the comparison of their eigenvalues with the truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hessian_callback import Spectrum
from hessian_callback.linalg.linear_operator import MatvecOperator

DTYPES = [torch.float64, torch.float32]


def ranks(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "power law": lambda: ranks(400) ** -1.0,
    "slow power law": lambda: ranks(400) ** -0.5,
    "indefinite": lambda: torch.cat([ranks(200) ** -1.0, -0.3 * ranks(200) ** -1.0]),
    "every one twice": lambda: (ranks(150) ** -1.0).repeat_interleave(2),
    "five times": lambda: torch.cat([torch.full((5,), 3.0), torch.full((5,), 2.0), ranks(200) ** -1.0]),
    "nearly degenerate": lambda: torch.cat([1 + 1e-9 * ranks(6), 0.5 + 1e-6 * ranks(6), 0.1 * ranks(200) ** -1.0]),
    "identity": lambda: torch.ones(60),
    "two values": lambda: torch.cat([torch.full((4,), 2.0), torch.ones(80)]),
    "rank 8": lambda: torch.cat([ranks(8) ** -1.0, torch.zeros(100)]),
    "zero": lambda: torch.zeros(50),
    "negative definite": lambda: -(ranks(80) ** -0.3),
    "spikes and a semicircle": lambda: torch.cat(
        [torch.linspace(3, 8, 10), torch.from_numpy(np.random.default_rng(0).beta(1.5, 1.5, 300) * 2 - 1)]
    ),
    "tiny": lambda: 1e-12 * ranks(100) ** -1.0,
    "huge": lambda: 1e12 * ranks(100) ** -1.0,
}


def operator_of(matrix: Tensor, dtype: torch.dtype = torch.float64) -> MatvecOperator:
    matrix = matrix.to(dtype)
    return MatvecOperator(matrix.mv, len(matrix), dtype=dtype)


def truth_of(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.eigvalsh(matrix.to(dtype).to(torch.float64)).flip(0)


def assert_bounds_hold(spectrum: Spectrum, truth: Tensor) -> None:
    """Assert that every eigenvalue, by its index, lies within its bound."""
    # The error of LAPACK's dense eigenvalues.
    oracle_error = 4 * len(truth) ** 0.5 * torch.finfo(torch.float64).eps * truth.abs().max()
    errors = (spectrum.eigenvalues - truth[: len(spectrum.eigenvalues)]).abs()
    assert (errors <= spectrum.error_bounds + oracle_error).all(), (errors / spectrum.error_bounds).max()
