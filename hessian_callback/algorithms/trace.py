r"""Trace and Frobenius norm of a symmetric operator, from random vectors.

With Q an orthonormal basis of r columns and z uniform on the sphere of radius :math:`\sqrt{P - r}` in the complement
of Q,

.. math::
    \operatorname{tr} A &= \operatorname{tr} Q^T A Q + \mathbb{E}\, z^T A z, \\
    \|A\|_F^2 &= \|A Q\|_F^2 + \mathbb{E}\, \|A z\|^2 .

Both means are taken over the same vectors and products. Q is fixed before the vectors are drawn. Given Q the vectors
are independent, so the standard error of their mean is valid. The remainder is small if Q holds the large eigenvalues.

Top eigenvectors give Q at no cost: :math:`Q^T A Q` is diagonal with the Ritz values, and
:math:`\|A Q\|_F^2 = \sum_i \theta_i^2 + \mathbb{E}\, \|Q^T A z\|^2`. Without them a third of the products sketches the
range (Hutch++) and a third multiplies with Q.

Sources: Meyer, Musco, Musco and Woodruff (2021), Hutch++; Epperly, Tropp and Webber (2024) for vectors on the sphere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.algorithms.estimate import Estimate, check_finite, mean_and_stderr
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.random_vectors import Purpose, gaussian_slice
from hessian_callback.linalg.tall_matrices import inner_products, orthonormal_columns

__all__ = ["Moments", "frobenius_norm", "moments", "trace"]


@dataclass(frozen=True)
class Moments:
    """Trace and Frobenius norm from the same products.

    Attributes:
        trace: sum of all eigenvalues.
        frobenius_norm: root of the sum of their squares. Its standard error is that of its square over twice the norm.
        num_matvecs: products spent on both together.
    """

    trace: Estimate
    frobenius_norm: Estimate
    num_matvecs: int


@full_float32()
def moments(
    operator: SymmetricOperator, *, num_matvecs: int = 30, spectrum: Spectrum | None = None, seed: int = 0
) -> Moments:
    r"""Estimate trace and Frobenius norm of a symmetric operator; the module's docstring has the estimators.

    Args:
        operator: the matrix.
        num_matvecs: products to spend; at least 2 with ``spectrum``, at least 4 without.
        spectrum: top eigenvalues of this operator with ``eigenvectors``. They are deflated, at no cost.
        seed: seed of the random vectors, from 0 to 2**64 - 1.

    Raises:
        TypeError: if ``num_matvecs`` or ``seed`` is not an integer.
        ValueError: if one is out of range, or ``spectrum`` holds no eigenvectors of this operator.
        ArithmeticError: if a product holds NaN or infinity.

    Example:
        >>> from hessian_callback.algorithms.lanczos import top_eigenvalues
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 201, dtype=torch.float64) ** -1.0
        >>> operator = MatvecOperator(lambda v: diagonal * v, 200)
        >>> spectrum = top_eigenvalues(operator, k=10, return_eigenvectors=True)
        >>> found = moments(operator, num_matvecs=10, spectrum=spectrum)
        >>> low, high = found.trace.interval(0.999)
        >>> low < float(diagonal.sum()) < high, found.num_matvecs
        (True, 10)
    """
    fewest = 2 if spectrum is not None else 4
    num_matvecs = whole_number("num_matvecs", num_matvecs, at_least=fewest, why=" for a standard error")
    part = _sketch(operator, num_matvecs, seed) if spectrum is None else _deflation(operator, spectrum)
    traces, squares = _remainder(operator, part, num_matvecs - part.num_matvecs, seed)
    spent = part.num_matvecs + len(traces)
    trace_rest, trace_error = mean_and_stderr(traces)
    square_rest, square_error = mean_and_stderr(squares)
    norm = (part.squared_norm + square_rest) ** 0.5
    norm_error = square_error / (2 * norm) if norm > 0 else 0.0
    return Moments(
        trace=Estimate(part.trace + trace_rest, trace_error, len(traces), spent),
        frobenius_norm=Estimate(norm, norm_error, len(traces), spent),
        num_matvecs=spent,
    )


def trace(
    operator: SymmetricOperator, *, num_matvecs: int = 30, spectrum: Spectrum | None = None, seed: int = 0
) -> Estimate:
    r"""Estimate the trace, :math:`\operatorname{tr} A = \sum_i \lambda_i`, in the eigenvalues' unit.

    Arguments and errors are those of `moments`, which gives the Frobenius norm for the same products.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64))
        >>> round(trace(MatvecOperator(A.mv, 4), num_matvecs=12).value, 6)
        7.0
    """
    return moments(operator, num_matvecs=num_matvecs, spectrum=spectrum, seed=seed).trace


def frobenius_norm(
    operator: SymmetricOperator, *, num_matvecs: int = 30, spectrum: Spectrum | None = None, seed: int = 0
) -> Estimate:
    r"""Estimate the Frobenius norm, :math:`\|A\|_F = (\sum_i \lambda_i^2)^{1/2}`, in the eigenvalues' unit.

    Arguments and errors are those of `moments`, which gives the trace for the same products.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.tensor([4.0, 3.0, 0.0], dtype=torch.float64))
        >>> round(frobenius_norm(MatvecOperator(A.mv, 3), num_matvecs=12).value, 6)
        5.0
    """
    return moments(operator, num_matvecs=num_matvecs, spectrum=spectrum, seed=seed).frobenius_norm


@dataclass(frozen=True)
class _ExactPart:
    """The part of both moments that a basis Q gives without sampling.

    Attributes:
        basis: Q, this rank's rows.
        trace: ``tr Q^T A Q``.
        squared_norm: ``||A Q||_F^2``, or its part within the range of Q if ``products_known`` is false.
        products_known: whether ``A Q`` was formed.
        num_matvecs: products spent.
    """

    basis: Tensor
    trace: float
    squared_norm: float
    products_known: bool
    num_matvecs: int


def _deflation(operator: SymmetricOperator, spectrum: Spectrum) -> _ExactPart:
    basis = spectrum.eigenvectors
    if basis is None:
        raise ValueError("the spectrum holds no eigenvectors; compute it with return_eigenvectors=True")
    if basis.shape[0] != operator.partition.slice_length:
        raise ValueError(
            f"the eigenvectors have {basis.shape[0]} coordinates on this rank and the operator "
            f"{operator.partition.slice_length}; pass the spectrum of this operator"
        )
    values = spectrum.eigenvalues
    return _ExactPart(basis, float(values.sum()), float(values.square().sum()), False, 0)


def _sketch(operator: SymmetricOperator, num_matvecs: int, seed: int) -> _ExactPart:
    """Sketch the range with a third of the products, and multiply with its basis."""
    width = min(num_matvecs // 3, operator.partition.size)
    images = [operator.matvec_slice(_gaussian(operator, seed, draw, Purpose.SKETCH)) for draw in range(width)]
    sketch = torch.stack(images, 1)
    check_finite(float(inner_products(sketch, sketch, operator.ranks).diagonal().sum()))
    basis = orthonormal_columns(sketch, operator.partition, operator.ranks)
    rank = basis.shape[1]
    if rank == 0:
        return _ExactPart(basis, 0.0, 0.0, True, width)
    image = torch.stack([operator.matvec_slice(column.contiguous()) for column in basis.T], 1)
    compressed = inner_products(torch.cat([basis, image], 1), image, operator.ranks)
    return _ExactPart(basis, float(compressed[:rank].trace()), float(compressed[rank:].trace()), True, width + rank)


def _remainder(
    operator: SymmetricOperator, part: _ExactPart, num_vectors: int, seed: int
) -> tuple[list[float], list[float]]:
    """Draw ``z^T A z``, and the squared norm that the exact part lacks, once for each vector."""
    dimensions = operator.partition.size - part.basis.shape[1]
    traces, squares = [], []
    for draw in range(num_vectors if dimensions > 0 else 0):
        vector = _on_sphere(operator, part.basis, dimensions, seed, draw)
        image = operator.matvec_slice(vector)
        pair = torch.stack([vector, image], 1)
        form, square = inner_products(pair, image[:, None], operator.ranks)[:, 0].tolist()
        check_finite(square)
        if not part.products_known:
            square += float(inner_products(part.basis, image[:, None], operator.ranks).square().sum())
        traces.append(form)
        squares.append(square)
    return traces, squares


def _on_sphere(operator: SymmetricOperator, basis: Tensor, dimensions: int, seed: int, draw: int) -> Tensor:
    """Draw from the sphere of radius ``sqrt(dimensions)`` in the complement of a basis."""
    vector = _gaussian(operator, seed, draw, Purpose.MOMENTS)
    for _ in range(2 if basis.shape[1] else 0):
        overlaps = inner_products(basis, vector[:, None], operator.ranks)
        vector = vector - basis @ overlaps[:, 0].to(vector)
    squared = float(inner_products(vector[:, None], vector[:, None], operator.ranks))
    scaled: Tensor = vector * (dimensions / squared) ** 0.5
    return scaled


def _gaussian(operator: SymmetricOperator, seed: int, draw: int, purpose: Purpose) -> Tensor:
    return gaussian_slice(
        operator.partition, seed=seed, draw=draw, purpose=purpose, dtype=operator.dtype, device=operator.device
    )
