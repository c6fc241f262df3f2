r"""Density of all eigenvalues by stochastic Lanczos quadrature.

A Lanczos run of m steps from a random unit vector gives m nodes and weights, the Gauss quadrature of the vector's
spectral measure. Their average over vectors estimates :math:`\frac1P \sum_i \delta(\lambda - \lambda_i)`.

Sources: Ubaru, Chen and Saad (2017); Ghorbani, Krishnan and Xiao (2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.algorithms.estimate import Estimate, mean_and_stderr, student_quantile
from hessian_callback.algorithms.lanczos_tridiagonal import lanczos_tridiagonal
from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.random_vectors import Purpose, gaussian_slice

__all__ = ["SpectralDensity", "spectral_density"]


@dataclass(frozen=True)
class SpectralDensity:
    r"""Quadrature nodes and weights of the eigenvalue density, one rule for each random vector.

    .. math:: \frac1P \sum_{i=1}^P f(\lambda_i) \approx \frac1n \sum_{l=1}^n \sum_{j=1}^m w_{lj} f(\theta_{lj})

    For polynomials f of degree below 2 m the right-hand side is unbiased. Eigenvalues that are closer than
    neighbouring nodes are not resolved.

    Attributes:
        nodes: :math:`\theta`, ``(n, m)``, float64 on the CPU, each row descending, in the eigenvalues' unit.
        weights: :math:`w`, ``(n, m)``; each row sums to 1. A run that ended before m steps is padded with weight 0.
        size: P.
        rounding: additive error of every node.
        num_matvecs: products spent.

    Example:
        >>> density = SpectralDensity(
        ...     nodes=torch.tensor([[3.0, -1.0], [3.0, -1.0]], dtype=torch.float64),
        ...     weights=torch.tensor([[0.25, 0.75], [0.35, 0.65]], dtype=torch.float64),
        ...     size=100, rounding=1e-12, num_matvecs=4,
        ... )
        >>> round(density.negative_mass.value, 6)
        0.4375
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
            The mean over the random vectors. Its standard error excludes the quadrature's own error, which is small
            only if f is smooth on the scale of the nodes' spacing. Use `share_below` for a step function.
        """
        value, error = mean_and_stderr((self.weights * function(self.nodes)).sum(1).tolist())
        return Estimate(value, error, len(self.nodes), self.num_matvecs)

    def share_below(self, threshold: float, level: float = 0.95) -> tuple[float, float]:
        r"""Bound the share of the eigenvalues below a threshold :math:`t`.

        Let :math:`\theta_i > t \ge \theta_{i+1}` be the neighbouring nodes of one vector's rule. For every measure
        :math:`\mu` with this Gauss rule,

        .. math:: \sum_{j > i + 1} w_j \;\le\; \mu\bigl((-\infty, t)\bigr) \;\le\; \sum_{j \ge i} w_j .

        The interval reaches from the mean of the lower sums to the mean of the upper ones, widened by Student's
        distribution for n vectors. Its width does not vanish with more vectors: a rule cannot tell on which side of
        t the weights of the two neighbouring nodes lie. It is wide if many eigenvalues lie near t, as they do near
        zero for a network.

        Args:
            threshold: t, in the eigenvalues' unit. Eigenvalues within ``rounding`` of t count as either side.
            level: nominal coverage, between 0 and 1.

        Returns:
            ``(low, high)``, between 0 and 1.

        Raises:
            ValueError: if ``threshold`` is NaN or ``level`` is out of range.

        Source:
            Chebyshev, Markov and Stieltjes; Akhiezer, The Classical Moment Problem (1965), ch. 2.5.

        Example:
            >>> nodes = torch.tensor([[3.0, 2.0, 0.1, -2.0, -3.0]] * 2, dtype=torch.float64)
            >>> weights = torch.full((2, 5), 0.2, dtype=torch.float64)
            >>> low, high = SpectralDensity(nodes, weights, size=100, rounding=1e-12, num_matvecs=10).share_below(-0.5)
            >>> round(low, 6), round(high, 6)
            (0.2, 0.6)
        """
        if threshold != threshold:
            raise ValueError("threshold must be a number, got nan")
        # Padding repeats the smallest node at weight 0, so it must not count as a neighbour.
        used = self.weights > 0
        above = used & (self.nodes >= threshold + self.rounding)
        below = used & (self.nodes < threshold - self.rounding)
        nearest_above = torch.where(above, self.nodes, torch.inf).amin(1, keepdim=True)
        nearest_below = torch.where(below, self.nodes, -torch.inf).amax(1, keepdim=True)
        lower = (self.weights * (self.nodes < nearest_below)).sum(1)
        upper = (self.weights * (self.nodes <= nearest_above)).sum(1)
        quantile = student_quantile(level, len(self.nodes))
        (low, low_error), (high, high_error) = mean_and_stderr(lower.tolist()), mean_and_stderr(upper.tolist())
        return max(0.0, low - quantile * low_error), min(1.0, high + quantile * high_error)

    @property
    def negative_mass(self) -> Estimate:
        r"""The negative eigenvalues' part in the sum of absolute values, between 0 and 1.

        .. math:: \sum_{\lambda_i < 0} |\lambda_i| \Big/ \sum_i |\lambda_i|

        The standard error excludes the quadrature's own error: negative eigenvalues that are small against the
        spacing of the nodes are averaged with the positive ones beside them.

        Raises:
            ZeroDivisionError: if all nodes are zero.
        """
        negative = (self.weights * (-self.nodes).clamp(min=0)).sum(1)
        absolute = (self.weights * self.nodes.abs()).sum(1)
        ratio = float(negative.sum()) / float(absolute.sum())
        # To first order, the error of a ratio of two means is that of the mean of this difference.
        _, error = mean_and_stderr(((negative - ratio * absolute) / absolute.mean()).tolist())
        return Estimate(ratio, error, len(self.nodes), self.num_matvecs)

    def smoothed(self, points: Tensor, width: float) -> Tensor:
        r"""Return the density at given points, convolved with a normal density.

        .. math:: \frac1n \sum_{lj} w_{lj}\, \frac{1}{\sigma \sqrt{2\pi}}
                  \exp\Big(-\frac{(t - \theta_{lj})^2}{2 \sigma^2}\Big)

        Args:
            points: t, ``(g,)``, in the eigenvalues' unit.
            width: :math:`\sigma > 0`, in the same unit; a few times the spacing of the nodes hides the quadrature.

        Returns:
            ``(g,)``, float64, in 1 over the eigenvalues' unit; its integral is 1.

        Raises:
            ValueError: if ``width`` is not positive and finite.
        """
        if not 0 < width < float("inf"):
            raise ValueError(f"width must be positive and finite, got {width}")
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

    Costs at most ``num_vectors * num_steps`` products. More vectors lower the standard errors, more steps the spacing
    of the nodes.

    Args:
        operator: the matrix.
        num_vectors: n, at least 2, for a standard error.
        num_steps: m, at least 1.
        seed: seed of the random vectors, from 0 to 2**64 - 1.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if an argument is out of range.
        ArithmeticError: if a product holds NaN or infinity.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.tensor([1.0] * 60 + [-1.0] * 40, dtype=torch.float64))
        >>> density = spectral_density(MatvecOperator(A.mv, 100), num_vectors=20)
        >>> low, high = density.negative_mass.interval(0.999)
        >>> low < 0.4 < high, density.num_matvecs
        (True, 40)
    """
    num_vectors = whole_number("num_vectors", num_vectors, at_least=2, why=" for a standard error")
    num_steps = whole_number("num_steps", num_steps, at_least=1)
    runs = []
    for draw in range(num_vectors):
        start = gaussian_slice(
            operator.partition,
            seed=seed,
            draw=draw,
            purpose=Purpose.DENSITY,
            dtype=operator.dtype,
            device=operator.device,
        )
        runs.append(lanczos_tridiagonal(operator, start, num_steps))
    longest = max(run.num_matvecs for run in runs)
    nodes, weights = torch.zeros(2, num_vectors, longest, dtype=torch.float64, device="cpu")
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
