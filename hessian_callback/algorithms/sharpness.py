r"""What the slope must be compared with: trace, Frobenius norm, spectral density, negative mass.

**Trace and Frobenius norm.** With Q an orthonormal basis of r columns, :math:`\Pi = I - Q Q^T` and z uniform on
the sphere of radius :math:`\sqrt{P - r}` in the complement of Q,

.. math::
    \operatorname{tr} A &= \operatorname{tr} Q^T A Q + \mathbb{E}\, z^T A z, \\
    \|A\|_F^2 &= \|A Q\|_F^2 + \mathbb{E}\, \|A z\|^2 .

Both means are taken over the same vectors and products. Q is fixed before the vectors are drawn, so given Q they
are independent, and the standard error of their mean is one; what is left to estimate is small once Q holds the
large eigenvalues. Where the top eigenvectors are at hand, Q comes free: :math:`Q^T A Q` is diagonal with the Ritz
values, and :math:`\|A Q\|_F^2 = \sum_i \theta_i^2 + \mathbb{E}\, \|Q^T A z\|^2`. Otherwise a third of the products
sketches the range (Hutch++) and a third multiplies with Q.

**Spectral density.** Stochastic Lanczos quadrature: a Lanczos run of m steps from a random unit vector gives m
nodes and weights, and their average over vectors estimates :math:`\frac1P \sum_i \delta(\lambda - \lambda_i)`.

Sources: Meyer, Musco, Musco and Woodruff (2021), Hutch++; Epperly, Tropp and Webber (2024) for vectors on the
sphere; Ubaru, Chen and Saad (2017) and Ghorbani, Krishnan and Xiao (2019) for the quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.special
import torch
from torch import Tensor

from hessian_callback.algorithms.lanczos_tridiagonal import lanczos_tridiagonal
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.random_vectors import Purpose, gaussian_slice
from hessian_callback.linalg.tall_matrices import inner_products, orthonormal_columns

__all__ = ["Estimate", "Moments", "SpectralDensity", "frobenius_norm", "moments", "spectral_density", "trace"]


@dataclass(frozen=True)
class Estimate:
    r"""The mean of a few independent draws, with its standard error.

    Attributes:
        value: the estimate.
        stderr: its standard error, in the same unit; 0 where the value is exact.
        num_vectors: the independent draws it is the mean of; 0 where the value is exact.
        num_matvecs: products it cost.

    Example:
        >>> low, high = Estimate(value=10.0, stderr=1.0, num_vectors=5, num_matvecs=5).interval(0.95)
        >>> round(low, 2), round(high, 2)
        (7.22, 12.78)
    """

    value: float
    stderr: float
    num_vectors: int
    num_matvecs: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Interval :math:`\hat x \pm t_{n-1}\, \sigma`, by Student's distribution for n draws.

        Args:
            level: its nominal coverage, between 0 and 1.

        Raises:
            ValueError: if ``level`` is out of range.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        if self.num_vectors == 0:
            return self.value, self.value
        width = float(scipy.special.stdtrit(self.num_vectors - 1, (1 + level) / 2)) * self.stderr
        return self.value - width, self.value + width


@dataclass(frozen=True)
class Moments:
    """Trace and Frobenius norm from the same products.

    Attributes:
        trace: sum of all eigenvalues.
        frobenius_norm: root of the sum of their squares.
        num_matvecs: products that both cost together.
    """

    trace: Estimate
    frobenius_norm: Estimate
    num_matvecs: int


@full_float32()
def moments(
    operator: SymmetricOperator, *, num_products: int = 30, spectrum: Spectrum | None = None, seed: int = 0
) -> Moments:
    r"""Estimate trace and Frobenius norm of a symmetric operator; the module's docstring has the estimators.

    Args:
        operator: the matrix.
        num_products: products to spend; at least 2 with ``spectrum``, at least 4 without.
        spectrum: top eigenvalues of this operator with ``eigenvectors``. They are taken out first, at no cost.
        seed: seed of the random vectors, which are drawn by coordinate.

    Returns:
        Both estimates. The standard error of the norm is that of its square over twice the norm.

    Raises:
        ValueError: if ``num_products`` is too small or ``spectrum`` holds no eigenvectors of this operator.
        ArithmeticError: when a product holds NaN or infinity.

    Example:
        >>> from hessian_callback.algorithms.lanczos import top_eigenvalues
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 201, dtype=torch.float64) ** -1.0
        >>> operator = MatvecOperator(lambda v: diagonal * v, 200)
        >>> spectrum = top_eigenvalues(operator, k=10, return_eigenvectors=True)
        >>> found = moments(operator, num_products=10, spectrum=spectrum)
        >>> low, high = found.trace.interval(0.999)
        >>> low < float(diagonal.sum()) < high, found.num_matvecs
        (True, 10)
    """
    fewest = 2 if spectrum is not None else 4
    if num_products < fewest:
        raise ValueError(f"num_products must be at least {fewest} for a standard error, got {num_products}")
    size = operator.partition.size
    if spectrum is not None:
        if spectrum.eigenvectors is None:
            raise ValueError("the spectrum holds no eigenvectors; compute it with return_eigenvectors=True")
        basis = spectrum.eigenvectors
        if basis.shape[0] != operator.partition.slice_length:
            raise ValueError(
                f"the eigenvectors have {basis.shape[0]} coordinates on this rank and the operator "
                f"{operator.partition.slice_length}; pass the spectrum of this operator"
            )
        num_spent = 0
        compressed_trace = float(spectrum.eigenvalues.sum())
        compressed_square = float(spectrum.eigenvalues.square().sum())
    else:
        basis, num_spent, compressed_trace, compressed_square = _sketch(operator, num_products, seed)
    dimensions = size - basis.shape[1]
    traces, squares = [], []
    for draw in range(num_products - num_spent if dimensions > 0 else 0):
        vector = _on_sphere(operator, basis, dimensions, seed, draw, Purpose.MOMENTS)
        image = operator.matvec_slice(vector)
        pair = torch.stack([vector, image], 1)
        products = inner_products(pair, image[:, None], operator.ranks)[:, 0].tolist()
        _check_finite(products[1])
        traces.append(products[0])
        squares.append(products[1])
        if spectrum is not None:
            squares[-1] += float(inner_products(basis, image[:, None], operator.ranks).square().sum())
    num_matvecs = num_spent + len(traces)
    trace_rest, trace_error = _mean(traces)
    square_rest, square_error = _mean(squares)
    norm = (compressed_square + square_rest) ** 0.5
    norm_error = square_error / (2 * norm) if norm > 0 else 0.0
    return Moments(
        trace=Estimate(compressed_trace + trace_rest, trace_error, len(traces), num_matvecs),
        frobenius_norm=Estimate(norm, norm_error, len(traces), num_matvecs),
        num_matvecs=num_matvecs,
    )


def trace(
    operator: SymmetricOperator, *, num_products: int = 30, spectrum: Spectrum | None = None, seed: int = 0
) -> Estimate:
    r"""Estimate the trace, :math:`\operatorname{tr} A = \sum_i \lambda_i`, in the eigenvalues' unit.

    Arguments and errors are those of `moments`, which gives the Frobenius norm for the same products.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64))
        >>> round(trace(MatvecOperator(A.mv, 4), num_products=12).value, 6)
        7.0
    """
    return moments(operator, num_products=num_products, spectrum=spectrum, seed=seed).trace


def frobenius_norm(
    operator: SymmetricOperator, *, num_products: int = 30, spectrum: Spectrum | None = None, seed: int = 0
) -> Estimate:
    r"""Estimate the Frobenius norm, :math:`\|A\|_F = (\sum_i \lambda_i^2)^{1/2}`, in the eigenvalues' unit.

    Arguments and errors are those of `moments`, which gives the trace for the same products.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.tensor([4.0, 3.0, 0.0], dtype=torch.float64))
        >>> round(frobenius_norm(MatvecOperator(A.mv, 3), num_products=12).value, 6)
        5.0
    """
    return moments(operator, num_products=num_products, spectrum=spectrum, seed=seed).frobenius_norm


@dataclass(frozen=True)
class SpectralDensity:
    r"""Quadrature nodes and weights of the eigenvalue density, one rule for each random vector.

    .. math:: \frac1P \sum_{i=1}^P f(\lambda_i) \approx \frac1n \sum_{l=1}^n \sum_{j=1}^m w_{lj} f(\theta_{lj})

    For polynomials f of degree below 2 m the right-hand side is unbiased. Eigenvalues that are closer than a
    node to its neighbours are not told apart.

    Attributes:
        nodes: :math:`\theta`, ``(n, m)``, float64 on the CPU, each row descending, in the eigenvalues' unit.
        weights: :math:`w`, ``(n, m)``; each row sums to 1. Where a run ended before m steps, 0.
        size: P.
        rounding: additive error of every node.
        num_matvecs: products spent.

    Example:
        >>> density = SpectralDensity(
        ...     nodes=torch.tensor([[3.0, -1.0], [3.0, -1.0]], dtype=torch.float64),
        ...     weights=torch.tensor([[0.25, 0.75], [0.35, 0.65]], dtype=torch.float64),
        ...     size=100, rounding=1e-12, num_matvecs=4,
        ... )
        >>> round(density.negative_share.value, 6), round(density.negative_mass.value, 6)
        (0.7, 0.4375)
    """

    nodes: Tensor
    weights: Tensor
    size: int
    rounding: float
    num_matvecs: int

    def mean(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        r"""Estimate :math:`\frac1P \sum_i f(\lambda_i)`.

        Args:
            function: f, elementwise on a float64 tensor.

        Returns:
            The mean over the random vectors. Its standard error does not hold the quadrature's own error, which
            is small where f is smooth on the scale of the nodes' spacing.
        """
        value, error = _mean((self.weights * function(self.nodes)).sum(1).tolist())
        return Estimate(value, error, len(self.nodes), self.num_matvecs)

    @property
    def negative_share(self) -> Estimate:
        """Share of the eigenvalues that are negative beyond rounding, between 0 and 1.

        Uncertain where many eigenvalues lie next to zero: one node's weight may fall on either side.
        """
        return self.mean(lambda nodes: (nodes < -self.rounding).double())

    @property
    def negative_mass(self) -> Estimate:
        r"""The negative eigenvalues' part in the sum of absolute values, between 0 and 1.

        .. math:: \sum_{\lambda_i < 0} |\lambda_i| \Big/ \sum_i |\lambda_i|

        Raises:
            ZeroDivisionError: for the zero operator, which has no such part.
        """
        negative = (self.weights * (-self.nodes).clamp(min=0)).sum(1)
        absolute = (self.weights * self.nodes.abs()).sum(1)
        ratio = float(negative.sum()) / float(absolute.sum())
        # To first order, the ratio of two means errs like the mean of this difference.
        _, error = _mean(((negative - ratio * absolute) / absolute.mean()).tolist())
        return Estimate(ratio, error, len(self.nodes), self.num_matvecs)

    def smoothed(self, points: Tensor, width: float) -> Tensor:
        r"""Return the density at given points, convolved with a normal density.

        .. math:: \frac1n \sum_{lj} w_{lj}\, \frac{1}{\sigma \sqrt{2\pi}}
                  \exp\Big(-\frac{(t - \theta_{lj})^2}{2 \sigma^2}\Big)

        Args:
            points: t, ``(g,)``, in the eigenvalues' unit.
            width: :math:`\sigma > 0`, likewise; a few times the spacing of the nodes hides the quadrature.

        Returns:
            ``(g,)``, float64, in 1 over the eigenvalues' unit; its integral is 1.

        Raises:
            ValueError: if ``width`` is not positive.
        """
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        nodes, weights = self.nodes.reshape(-1), self.weights.reshape(-1) / len(self.nodes)
        scaled = (points.to(nodes)[:, None] - nodes) / width
        kernel = torch.exp(-0.5 * scaled.square()) / (width * (2 * torch.pi) ** 0.5)
        density: Tensor = kernel @ weights
        return density


@full_float32()
def spectral_density(
    operator: SymmetricOperator, *, num_vectors: int = 4, num_steps: int = 40, seed: int = 0
) -> SpectralDensity:
    r"""Estimate the density of all eigenvalues by stochastic Lanczos quadrature.

    Costs ``num_vectors * num_steps`` products at the most. More vectors lower the standard errors, more steps
    the spacing of the nodes.

    Args:
        operator: the matrix.
        num_vectors: n, at least 2, for a standard error.
        num_steps: m, at least 1.
        seed: seed of the random vectors, which are drawn by coordinate.

    Raises:
        ValueError: for arguments out of range.
        ArithmeticError: when a product holds NaN or infinity.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.tensor([1.0] * 60 + [-1.0] * 40, dtype=torch.float64))
        >>> density = spectral_density(MatvecOperator(A.mv, 100), num_vectors=20)
        >>> low, high = density.negative_share.interval(0.999)
        >>> low < 0.4 < high, density.num_matvecs
        (True, 40)
    """
    if num_vectors < 2:
        raise ValueError(f"num_vectors must be at least 2 for a standard error, got {num_vectors}")
    runs = [
        lanczos_tridiagonal(operator, _gaussian(operator, seed, draw, Purpose.DENSITY), num_steps)
        for draw in range(num_vectors)
    ]
    longest = max(run.num_matvecs for run in runs)
    nodes, weights = torch.zeros(2, num_vectors, longest, dtype=torch.float64)
    for row, run in enumerate(runs):
        nodes[row, : run.num_matvecs], nodes[row, run.num_matvecs :] = run.ritz_values, run.ritz_values[-1]
        weights[row, : run.num_matvecs] = run.weights
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        size=operator.partition.size,
        rounding=max(run.rounding for run in runs),
        num_matvecs=sum(run.num_matvecs for run in runs),
    )


def _sketch(operator: SymmetricOperator, num_products: int, seed: int) -> tuple[Tensor, int, float, float]:
    """Basis of the sketched range, products spent, ``tr Q^T A Q`` and ``||A Q||_F^2``."""
    width = min(num_products // 3, operator.partition.size)
    images = [operator.matvec_slice(_gaussian(operator, seed, draw, Purpose.SKETCH)) for draw in range(width)]
    sketch = torch.stack(images, 1)
    _check_finite(float(inner_products(sketch, sketch, operator.ranks).diagonal().sum()))
    basis = orthonormal_columns(sketch, operator.partition, operator.ranks)
    if basis.shape[1] == 0:
        return basis, width, 0.0, 0.0
    image = torch.stack([operator.matvec_slice(column.contiguous()) for column in basis.T], 1)
    compressed = inner_products(torch.cat([basis, image], 1), image, operator.ranks)
    rank = basis.shape[1]
    return basis, width + rank, float(compressed[:rank].trace()), float(compressed[rank:].trace())


def _gaussian(operator: SymmetricOperator, seed: int, draw: int, purpose: Purpose) -> Tensor:
    return gaussian_slice(
        operator.partition, seed=seed, draw=draw, purpose=purpose, dtype=operator.dtype, device=operator.device
    )


def _on_sphere(
    operator: SymmetricOperator, basis: Tensor, dimensions: int, seed: int, draw: int, purpose: Purpose
) -> Tensor:
    """Uniform on the sphere of radius ``sqrt(dimensions)`` in the complement of a basis."""
    vector = _gaussian(operator, seed, draw, purpose)
    for _ in range(2 if basis.shape[1] else 0):
        overlaps = inner_products(basis, vector[:, None], operator.ranks)
        vector = vector - basis @ overlaps[:, 0].to(vector)
    squared = float(inner_products(vector[:, None], vector[:, None], operator.ranks))
    scaled: Tensor = vector * (dimensions / squared) ** 0.5
    return scaled


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; nothing to average is an exact zero."""
    if not values:
        return 0.0, 0.0
    draws = torch.tensor(values, dtype=torch.float64)
    return float(draws.mean()), float(draws.std() / len(values) ** 0.5)


def _check_finite(value: float) -> None:
    if not abs(value) < float("inf"):
        raise ArithmeticError(
            "a product of the operator with a random vector holds NaN or infinity; check the loss for overflow "
            "or a division by zero on these batches, or use float64"
        )
