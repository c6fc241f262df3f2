r"""Checks of eigenvalues and options, and the choice of the eigenvalues that a power law is fitted to.

Every statistic of this subpackage reads its input here, so that bad input has the same error everywhere and
nothing is repaired silently.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "MIN_EIGENVALUES",
    "Eigenvalues",
    "FloatArray",
    "as_float64",
    "checked_draws",
    "checked_integer",
    "fitted_eigenvalues",
    "fitted_log_ratios",
    "log_ratios",
    "positive_eigenvalues",
]

FloatArray: TypeAlias = npt.NDArray[np.float64]
Eigenvalues: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[float]

# Two eigenvalues are always fitted exactly, because the smaller one is the cutoff.
MIN_EIGENVALUES = 3


def checked_integer(value: SupportsIndex, name: str, *, minimum: int, remedy: str) -> int:
    """Return an option that counts something as a plain integer.

    Args:
        value: the option.
        name: its name, for the error messages.
        minimum: the smallest value allowed.
        remedy: what to give instead, for the error messages.

    Returns:
        The same number.

    Raises:
        TypeError: if ``value`` is not an integer. Booleans and floats are not.
        ValueError: if ``value`` is below ``minimum``.

    Example:
        >>> checked_integer(np.int64(3), "draws", minimum=1, remedy="give at least 1")
        3
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, which is not an integer; {remedy}") from None
    if integer < minimum:
        raise ValueError(f"{name} is {integer}; {remedy}")
    return integer


def checked_draws(draws: int, seed: int, *, name: str = "draws") -> tuple[int, int]:
    """Return the number of simulated power laws and the seed as plain integers.

    Args:
        draws: number of power laws, at least 1.
        seed: of the generator, at least 0.
        name: of ``draws``, for the error messages.

    Returns:
        ``(draws, seed)``.

    Raises:
        TypeError: if one of them is not an integer.
        ValueError: if ``draws`` is below 1 or ``seed`` is negative.

    Example:
        >>> checked_draws(1000, 0)
        (1000, 0)
    """
    draws = checked_integer(draws, name, minimum=1, remedy="simulate at least one power law, better 1000")
    return draws, checked_integer(seed, "seed", minimum=0, remedy="give an integer of at least 0")


def as_float64(eigenvalues: Eigenvalues, name: str = "eigenvalues") -> FloatArray:
    """Convert eigenvalues to a one-dimensional float64 array of finite numbers.

    Args:
        eigenvalues: ``(n,)``; dense tensor on any device, array or sequence of real numbers. Integers of more
            than 53 bits are rounded.
        name: how the error messages call them.

    Returns:
        ``(n,)``, float64, in the order given.

    Raises:
        TypeError: if they are complex, boolean, sparse, masked, without data or not numbers.
        ValueError: if they are not one-dimensional, or contain NaN, infinity or a number outside the range of
            float64.

    Example:
        >>> as_float64(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        array([1., 2.])
    """
    values = _tensor_values(eigenvalues, name) if isinstance(eigenvalues, Tensor) else _array_values(eigenvalues, name)
    if values.ndim != 1:
        raise ValueError(
            f"{name} have shape {tuple(values.shape)}; pass one spectrum of shape (n,), "
            "and fit several spectra one by one"
        )
    num_bad = int(values.size - np.isfinite(values).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} of {values.size} {name} are NaN or infinite; check that the loss and its "
            "gradient are finite on the measured batches, and measure in float32 or better"
        )
    return values


def positive_eigenvalues(eigenvalues: Eigenvalues) -> tuple[FloatArray, int]:
    """Return the positive eigenvalues in descending order, and how many were not positive.

    Args:
        eigenvalues: ``(n,)``, in any order; as for `as_float64`.

    Returns:
        The positive ones, ``(K,)``, float64, descending; and how many were zero or negative.

    Raises:
        TypeError: as `as_float64`.
        ValueError: as `as_float64`.

    Example:
        >>> positive_eigenvalues([1.0, -2.0, 3.0, 0.0])
        (array([3., 1.]), 2)
    """
    values = as_float64(eigenvalues)
    positive = values[values > 0.0]
    return np.sort(positive)[::-1], int(values.size - positive.size)


def fitted_eigenvalues(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> tuple[FloatArray, int]:
    """Choose the eigenvalues that `fit_power_law` fits.

    Args:
        eigenvalues: ``(n,)``, as for `as_float64`.
        num_eigenvalues: K, at least 3; None for all positive eigenvalues.
        drop_first: how many of the largest to leave out.

    Returns:
        The fitted ones, ``(K,)``, float64, descending; and how many of all were zero or negative.

    Raises:
        TypeError: as `as_float64`, or if an option is not an integer.
        ValueError: as `as_float64`; if fewer than 3 positive eigenvalues (or fewer than ``num_eigenvalues``)
            are left, ``drop_first`` is negative, or the fitted eigenvalues are all equal.

    Example:
        >>> fitted_eigenvalues([8.0, 4.0, 2.0, 1.0, -1.0], drop_first=1)
        (array([4., 2., 1.]), 1)
    """
    drop_first = checked_integer(
        drop_first, "drop_first", minimum=0, remedy="give how many of the largest to leave out, or 0"
    )
    values, num_dropped = positive_eigenvalues(eigenvalues)
    num_left = max(values.size - drop_first, 0)
    if num_left < MIN_EIGENVALUES:
        without = f" without the {drop_first} largest" if drop_first else ""
        raise ValueError(
            f"a power law needs at least {MIN_EIGENVALUES} positive eigenvalues, and {num_left} of "
            f"{values.size + num_dropped} are left{without} ({num_dropped} are zero or negative); compute "
            "more eigenvalues, or use more samples if the Hessian is rank-deficient"
        )
    values = values[drop_first:]
    if num_eigenvalues is not None:
        num_eigenvalues = checked_integer(
            num_eigenvalues, "num_eigenvalues", minimum=MIN_EIGENVALUES, remedy=f"fit at least {MIN_EIGENVALUES}"
        )
        if num_eigenvalues > num_left:
            raise ValueError(
                f"num_eigenvalues is {num_eigenvalues}, but only {num_left} positive eigenvalues are available; "
                "compute more eigenvalues, lower num_eigenvalues, or leave it None to fit all of them"
            )
        values = values[:num_eigenvalues]
    if values[0] == values[-1]:
        raise ValueError(
            f"all {values.size} eigenvalues equal {values[0]:g}, so no slope exists; compute more "
            "eigenvalues, so that the spectrum decays, or check that the operator is not a multiple of the "
            "identity"
        )
    return values, num_dropped


def fitted_log_ratios(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> FloatArray:
    r"""Compute the logarithms :math:`y_i = \ln(\lambda_i / \lambda_K)` of the fitted eigenvalues.

    Under a power law they are exponential with mean s.

    Args:
        eigenvalues: ``(n,)``, as for `fitted_eigenvalues`.
        num_eigenvalues: K, at least 3; None for all positive eigenvalues.
        drop_first: how many of the largest to leave out.

    Returns:
        ``(K,)``, float64, descending; the last is zero.

    Raises:
        TypeError: as `fitted_eigenvalues`.
        ValueError: as `fitted_eigenvalues`.

    Example:
        >>> fitted_log_ratios([4.0, 2.0, 1.0]) / np.log(2.0)
        array([2., 1., 0.])
    """
    values, _ = fitted_eigenvalues(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    return log_ratios(values, values[-1])


def log_ratios(values: FloatArray, reference: float) -> FloatArray:
    r"""Compute :math:`\ln(v / r)` to full relative precision, without overflow.

    A difference of logarithms cancels where v and r agree in most digits: it is 0 for neighbouring
    floating-point numbers. There :math:`\mathrm{log1p}((v - r) / r)` is used, whose numerator is exact.
    Elsewhere mantissas and exponents are divided separately.

    Args:
        values: ``(n,)``, positive.
        reference: r, positive.

    Returns:
        ``(n,)``, zero only if v equals r.

    Example:
        >>> log_ratios(np.array([1.0 + 2.0**-52, 1e300]), 1.0)
        array([2.22044605e-16, 6.90775528e+02])
    """
    mantissa, exponent = np.frexp(values)
    reference_mantissa, reference_exponent = np.frexp(reference)
    far = np.log(mantissa / reference_mantissa) + (exponent - reference_exponent) * np.log(2.0)
    close = np.abs(far) < 0.5
    difference = np.where(close, values - reference, 0.0)
    ratios: FloatArray = np.where(close, np.log1p(difference / reference), far)
    return ratios


def _tensor_values(tensor: Tensor, name: str) -> FloatArray:
    kind = "c" if tensor.is_complex() else "b" if tensor.dtype == torch.bool else "f"
    _check_kind(kind, str(tensor.dtype), name)
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{name} are a sparse or quantised tensor ({tensor.layout}); pass a dense one")
    if tensor.is_meta:
        raise TypeError(f"{name} are on the meta device and have no values; compute them on a real device")
    # To the CPU first, because some devices have no float64.
    values: FloatArray = tensor.detach().cpu().to(torch.float64).numpy()
    return values


def _array_values(eigenvalues: npt.NDArray[Any] | Sequence[float], name: str) -> FloatArray:
    if np.ma.isMaskedArray(eigenvalues):
        raise TypeError(f"{name} are a masked array; pass the entries that are not masked, such as values.compressed()")
    try:
        raw = np.asarray(eigenvalues)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"{name} cannot be read as an array ({error}); {_REMEDY}") from error
    _check_kind(raw.dtype.kind, str(raw.dtype), name)
    with np.errstate(over="ignore"):
        values = raw.astype(np.float64)
    if raw.dtype.itemsize > values.dtype.itemsize and ((values == 0.0) & (raw != 0.0)).any():
        raise ValueError(f"some {name} are too small for float64; scale all of them by the same factor")
    return values


_REMEDY = "pass a tensor, an array or a list of floats"


def _check_kind(kind: str, dtype: str, name: str) -> None:
    """Raise unless a numpy kind code stands for real numbers."""
    remedies = {
        "c": "pass the real eigenvalues of a symmetric operator, such as values.real",
        "b": "pass the eigenvalues themselves, not a mask",
    }
    if kind not in "fiu":
        raise TypeError(f"{name} are not real numbers (dtype {dtype}); {remedies.get(kind, _REMEDY)}")
