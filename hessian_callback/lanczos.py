r"""The largest eigenvalues of a symmetric operator, each with an error bound that is proven.

**The decomposition.** Lanczos with full reorthogonalisation builds an orthonormal basis
:math:`V \in \mathbb{R}^{P \times N}` with

.. math:: A V = V H + R, \qquad V^T R = 0, \qquad H = V^T A V,

where :math:`H` is small and :math:`R` has one non-zero column per *chain*: a chain is one Krylov
sequence, and a plain run has a single one (then :math:`H` is tridiagonal). The eigenvalues
:math:`\theta_1 \ge \theta_2 \ge \dots` of :math:`H` are the Ritz values.

**Two-sided bounds, index by index.** In a basis that starts with :math:`V`,

.. math:: A = \begin{pmatrix} H & R^T \\ R & C \end{pmatrix}, \qquad C = (I - V V^T) A (I - V V^T).

Cauchy's interlacing gives :math:`\theta_i \le \lambda_i`. If :math:`\lambda_{\max}(C) \le u`, replacing
:math:`C` by :math:`u I` can only raise every eigenvalue, hence

.. math:: \theta_i \;\le\; \lambda_i(A) \;\le\; \max\bigl(\lambda_i(\hat H_u), u\bigr),
          \qquad \hat H_u = \begin{pmatrix} H & R^T \\ R & u I \end{pmatrix},

with :math:`R` compressed to its few columns. The bound is of second order in the residual, counts
multiplicities, and needs neither gaps nor clusters; both sides are eigenvalues of small matrices.

**Nothing missed.** What remains is :math:`u`. A Krylov space can be blind to an eigenvector: always to
further copies of a multiple eigenvalue, and to what an unlucky start is orthogonal to. So a fresh
Gaussian vector :math:`z`, orthogonal to the *whole* basis, starts a short Lanczos run on :math:`C`. Let
:math:`p_0, p_1, \dots, p_m` be the orthonormal polynomials of that run (its three-term recurrence). If
:math:`C w = \mu w` with :math:`\mu > u \ge` all zeros of :math:`p_m`, the Christoffel bound on a point mass
says :math:`(w^T z)^2 \le \chi(u) = 1 / \sum_j p_j(u)^2`. That is deterministic; and for a uniformly random
unit vector in :math:`d = P - N` dimensions, :math:`(w^T z)^2 \sim \mathrm{Beta}(1/2, (d-1)/2)`. So

.. math:: \Pr\bigl[\lambda_{\max}(C) > u \text{ unseen}\bigr] \le I_{\chi(u)}\bigl(\tfrac12, \tfrac{d-1}{2}\bigr),

valid for a run of any length, also one stopped by looking at it. As the basis holds the converged vectors
*and* the half-converged ones, :math:`C` lies far below :math:`\theta_k` and some ten products suffice. When the
probe sees an eigenvalue above :math:`u` instead, its vectors join the basis and the run goes on.

**Rounding** enters each bound as an additive term: the operator's own a-priori error, plus the
asymmetry :math:`|v_i^T A v_j - v_j^T A v_i|` that the reorthogonalisation measures anyway.

References: Parlett, *The Symmetric Eigenvalue Problem* (1998), ch. 10-13, for interlacing and Lanczos;
Akhiezer, *The Classical Moment Problem* (1965), ch. 2, for the bound on a point mass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import scipy.special
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_callback.linear_operator import SymmetricOperator
from hessian_callback.random_vectors import gaussian_slice
from hessian_callback.spectrum import Spectrum, StopReason

__all__ = ["LanczosProgress", "top_eigenvalues"]

_Array = NDArray[np.float64]

# Vectors in one block of the basis: large enough for BLAS, small enough to allocate little in advance.
_BLOCK = 32
# Longest sum that is left to BLAS on a CPU, whose few accumulators lose two or three digits over a million terms;
# beyond it, partial sums are added in float64. GPUs sum in a tree.
_LONGEST_SUM = 8192


@dataclass(frozen=True)
class LanczosProgress:
    """Where a running eigenvalue computation stands, reported after every product.

    Attributes:
        num_hvps: products spent so far.
        max_hvps: products it may spend.
        num_converged: eigenvalues that were within tolerance at the last check.
        k: eigenvalues asked for.
    """

    num_hvps: int
    max_hvps: int
    num_converged: int
    k: int


def top_eigenvalues(
    operator: SymmetricOperator,
    k: int = 50,
    *,
    rtol: float = 1e-2,
    max_hvps: int | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    probe_level: float = 1e-3,
    positive_only: bool = False,
    return_eigenvectors: bool = False,
    progress: Callable[[LanczosProgress], None] | None = None,
    basis_device: torch.device | str | None = None,
) -> Spectrum:
    r"""Compute the k largest eigenvalues (algebraically) of a symmetric operator.

    An eigenvalue counts as converged when its error bound :math:`b_i` (see `Spectrum`) is at most
    :math:`\max(\text{rtol}\,|\theta_i|,\; 4 \rho)`, :math:`\rho` being the rounding level.

    Args:
        operator: the matrix; a `HessianOperator`, or a `MatvecOperator` around any function.
        k: eigenvalues wanted. With fewer than ``k`` dimensions all of them are returned.
        rtol: relative tolerance of each eigenvalue.
        max_hvps: products to spend at the most, the probe for missed eigenvalues included; ``None``: 10 k
            (at least 50). The best values found, with their true bounds, are returned when it is reached.
        seed: seed of the start and probe vectors. They are drawn by coordinate, so the number of ranks and
            the device don't change them, and from a private stream, so no global generator moves.
        start: start vector, shape ``(P,)``, instead of the Gaussian one.
        probe_level: bound on the probability that the probe overlooked an eigenvalue.
        positive_only: stop as soon as no further eigenvalue above the rounding level exists, even when
            fewer than ``k`` are positive; what is returned behind the last positive one may then be unconverged.
        return_eigenvectors: also form the Ritz vectors, this rank's slice of each.
        progress: called after every product.
        basis_device: where to keep the basis, one vector for each product; default: the operator's device. On the
            CPU it costs a transfer of three vectors a product, and leaves the device to the products.

    Returns:
        The eigenvalues with their bounds, and how they were come by.

    Raises:
        ValueError: for arguments out of range.
        ArithmeticError: when the operator returns NaN or infinity, or when the basis lost its orthogonality.

    Example:
        >>> from hessian_callback.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.arange(1, 101, dtype=torch.float64) ** -1.0)
        >>> spectrum = top_eigenvalues(MatvecOperator(A.mv, 100), k=3)
        >>> spectrum.all_converged, spectrum.stopped
        (True, 'converged')
        >>> truth = torch.tensor([1, 1 / 2, 1 / 3], dtype=torch.float64)
        >>> bool((abs(spectrum.eigenvalues - truth) <= spectrum.error_bounds).all())
        True
    """
    size = operator.partition.size
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol}")
    if not 0 < probe_level < 1:
        raise ValueError(f"probe_level must lie between 0 and 1, got {probe_level}")
    if max_hvps is None:
        max_hvps = max(10 * k, 50)
    if max_hvps < min(k + 1, size):
        raise ValueError(
            f"max_hvps={max_hvps} cannot give k={k} eigenvalues; allow at least {min(k + 1, size)} products"
        )
    solver = _Solver(operator, k, rtol, max_hvps, seed, probe_level, positive_only, progress, basis_device)
    return solver.solve(start, return_eigenvectors)


class _Basis:
    """Orthonormal vectors in the operator's dtype, this rank's slice of each, as rows of fixed blocks.

    Blocks are allocated as the basis grows, so that growing copies nothing, and every operation is a
    matrix-vector product per block.
    """

    def __init__(self, operator: SymmetricOperator, device: torch.device | str | None = None) -> None:
        self._home = operator.device
        self._like = torch.empty(0, dtype=operator.dtype, device=operator.device if device is None else device)
        self._length = operator.partition.slice_length
        self._blocks: list[Tensor] = []
        self.size = 0

    def append(self, vector: Tensor) -> None:
        block, row = divmod(self.size, _BLOCK)
        if block == len(self._blocks):
            self._blocks.append(self._like.new_empty(_BLOCK, self._length))
        self._blocks[block][row] = vector
        self.size += 1

    def _filled(self) -> list[Tensor]:
        full, rest = divmod(self.size, _BLOCK)
        return self._blocks[:full] + ([self._blocks[full][:rest]] if rest else [])

    def coefficients(self, vector: Tensor) -> Tensor:
        """``V^T w`` of this rank's slices, ``(N,)`` in float64."""
        vector = vector.to(self._like.device)
        return torch.cat([_inner_products(block, vector) for block in self._filled()]).to(self._home)

    def subtract(self, vector: Tensor, coefficients: Tensor) -> None:
        """``w -= V h`` in place."""
        coefficients = coefficients.to(self._like)
        here = vector.to(self._like.device)  # the vector itself, if the basis is on its device
        for block, part in zip(self._filled(), coefficients.split(_BLOCK), strict=True):
            here.addmv_(block.t(), part, alpha=-1)
        if here is not vector:
            vector.copy_(here)

    def combine(self, weights: Tensor) -> Tensor:
        """``V S``, ``(N, k) -> (slice_length, k)``; ``S`` may have fewer rows than there are vectors."""
        result = self._like.new_zeros(self._length, weights.shape[1])
        blocks = self._filled()[: -(-weights.shape[0] // _BLOCK)]
        for block, part in zip(blocks, weights.to(self._like).split(_BLOCK), strict=True):
            result.addmm_(block[: part.shape[0]].t(), part)
        return result.to(self._home)


@dataclass(eq=False)
class _Chain:
    """One Krylov sequence: the residual that its next vector comes from."""

    residual: Tensor
    column: int  # the basis vector whose image the residual is what is left of
    detached: bool = False  # whether vectors of other chains were subtracted since


@dataclass(frozen=True)
class _Projection:
    """The small matrices of ``A V = V H + R``: ``H``, and the inner products of R's columns.

    Attributes:
        diagonal: of ``H``.
        couplings: its other entries, as (row, column, value) with row > column.
        columns: the columns in which ``R`` is not zero.
        gram: inner products of these columns.
    """

    diagonal: _Array
    couplings: list[tuple[int, int, float]]
    columns: list[int]
    gram: _Array

    @property
    def size(self) -> int:
        return len(self.diagonal)

    @cached_property
    def _off_diagonal(self) -> _Array | None:
        """The off-diagonal, if ``H`` is one unbroken chain that at most its last vector leads out of."""
        links = self.couplings
        if len(links) != self.size - 1 or any(row != column + 1 for row, column, _ in links):
            return None
        if self.columns not in ([], [self.size - 1]):
            return None
        return np.array([value for _, _, value in links])

    def dense(self) -> _Array:
        matrix = np.diag(self.diagonal)
        for row, column, value in self.couplings:
            matrix[row, column] = matrix[column, row] = value
        return matrix

    def bordered(self, border: float) -> _Array:
        """``[[H, R^T], [R, border I]]``, which bounds ``A`` from above when ``border`` bounds the complement."""
        # R = W L with orthonormal W: the border holds L^T, a root of the Gram matrix.
        values, vectors = np.linalg.eigh(self.gram)
        root = vectors * np.sqrt(np.maximum(values, 0))
        size, width = self.size, len(self.columns)
        matrix = np.zeros((size + width, size + width))
        matrix[:size, :size] = self.dense()
        matrix[self.columns, size:] = root
        matrix[size:, self.columns] = root.T
        matrix[range(size, size + width), range(size, size + width)] = border
        return matrix

    @cached_property
    def ritz_values(self) -> _Array:
        """Eigenvalues of ``H``, descending: lower bounds of the operator's."""
        if self._off_diagonal is None:
            return _descending(scipy.linalg.eigvalsh(self.dense()))
        return _tridiagonal_eigenvalues(self.diagonal, self._off_diagonal)

    def upper_bounds(self, border: float, k: int) -> _Array:
        """Upper bounds of the k largest eigenvalues, given a bound on the complement's."""
        if self._off_diagonal is None:
            values = _descending(scipy.linalg.eigvalsh(self.bordered(border)))
        elif self.columns:
            off = np.append(self._off_diagonal, np.sqrt(self.gram[0, 0]))
            values = _tridiagonal_eigenvalues(np.append(self.diagonal, border), off)
        else:
            values = self.ritz_values
        upper = np.full(k, border)
        upper[: len(values)] = np.maximum(values[:k], border)
        return upper

    def eigenvectors(self, k: int) -> _Array:
        """Eigenvectors of ``H`` for its k largest eigenvalues, ``(N, k)``."""
        first = self.size - k
        if self._off_diagonal is None or self.size == 1:
            _, vectors = scipy.linalg.eigh(self.dense(), subset_by_index=(first, self.size - 1))
        else:
            _, vectors = scipy.linalg.eigh_tridiagonal(
                self.diagonal, self._off_diagonal, select="i", select_range=(first, self.size - 1)
            )
        reversed_order: _Array = vectors[:, ::-1]
        return reversed_order

    def tail(self, first: int) -> _Projection:
        """The part of the basis from vector ``first`` on: the compression of ``A`` to those vectors."""
        couplings = [(row - first, column - first, value) for row, column, value in self.couplings if column >= first]
        kept = [position for position, column in enumerate(self.columns) if column >= first]
        columns = [self.columns[position] - first for position in kept]
        return _Projection(self.diagonal[first:], couplings, columns, self.gram[np.ix_(kept, kept)])

    def recurrence(self, floor: float) -> tuple[_Array, _Array]:
        """Diagonal (m) and off-diagonal (m) of an unbroken chain; the last link leads out of it.

        A link of less than ``floor``, the rounding level, counts as ``floor``: what lies below it was not seen.
        """
        assert self._off_diagonal is not None, "only a single chain has a recurrence"
        last = float(np.sqrt(self.gram[0, 0])) if self.columns else 0.0
        return self.diagonal, np.append(self._off_diagonal, max(last, floor))


class _Decomposition:
    """``A V = V H + R`` and the operations that keep it true: begin a chain, expand one."""

    def __init__(self, operator: SymmetricOperator, seed: int, basis_device: torch.device | str | None = None) -> None:
        self.operator = operator
        self.basis = _Basis(operator, basis_device)
        self.chains: list[_Chain] = []
        self.norm = 0.0  # a lower bound of ||A||
        self.asymmetry = 0.0
        self.eps = float(torch.finfo(operator.dtype).eps)
        self.num_hvps = 0
        self._gram: _Array = np.zeros((0, 0))
        self._diagonal: list[float] = []
        self._couplings: list[tuple[int, int, float]] = []
        self._seed = seed
        self._draws = 0

    @property
    def size(self) -> int:
        return self.basis.size

    def projection(self) -> _Projection:
        columns = [chain.column for chain in self.chains]
        return _Projection(np.array(self._diagonal), list(self._couplings), columns, self._gram)

    # -- growing -------------------------------------------------------------------------------

    def begin(self, start: Tensor | None = None) -> bool:
        """Start a chain from a vector, or a fresh Gaussian one, made orthogonal to the basis.

        Returns whether there was anything left to start from.
        """
        if start is None:
            start = gaussian_slice(
                self.operator.partition,
                seed=self._seed,
                draw=self._draws,
                dtype=self.operator.dtype,
                device=self.operator.device,
            )
            self._draws += 1
        before = self._norm_of(start)
        for _ in range(2 if self.size else 0):
            self._orthogonalise(start)
        after = self._norm_of(start)
        if not after > 100 * self.eps * before:
            return False
        vector = start / after
        if self.chains:
            # The residuals must stay orthogonal to the basis, which is about to grow.
            overlaps = self._reduced(_inner_products(self._residuals(), vector)).tolist()
            self._detach(vector, self.chains, overlaps)
        self._multiply(vector, None)
        return True

    def expand(self, chain: _Chain) -> bool:
        """Take a chain's residual into the basis and multiply.

        Returns whether it could: a small residual may turn out to be rounding, and the chain to have ended.
        """
        position = self.chains.index(chain)
        beta = float(np.sqrt(self._gram[position, position]))
        vector = chain.residual / beta
        if chain.detached or beta < 1e4 * self.eps * self.norm:
            # Cancellation, or the division, has enlarged what the two passes left of the basis.
            for _ in range(2):
                self._orthogonalise(vector)
            length = self._norm_of(vector)
            if length < 0.5:
                self._drop(position)
                return False
            vector /= length
        self._couplings.append((self.size, chain.column, beta))
        others = [other for other in self.chains if other is not chain]
        overlaps = np.delete(self._gram[position], position) / beta
        self._detach(vector, others, overlaps.tolist())
        self._multiply(vector, chain)
        return True

    def _drop(self, position: int) -> None:
        del self.chains[position]
        self._gram = np.delete(np.delete(self._gram, position, axis=0), position, axis=1)

    def _detach(self, vector: Tensor, chains: list[_Chain], overlaps: list[float]) -> None:
        for chain, overlap in zip(chains, overlaps, strict=True):
            self._couplings.append((self.size, chain.column, overlap))
            chain.residual.add_(vector, alpha=-overlap)
            chain.detached = True

    def _multiply(self, vector: Tensor, chain: _Chain | None) -> None:
        """Append a unit vector that is orthogonal to the basis, and split its image."""
        index = self.size
        self.basis.append(vector)
        image = self.operator.matvec_slice(vector)
        self.num_hvps += 1
        # A product may hand out its argument or memory of its own; the residual is changed in place.
        image = image.clone(memory_format=torch.contiguous_format)
        first = self._orthogonalise(image)
        second = self._orthogonalise(image)
        if chain is None:
            chain = _Chain(image, index)
            self.chains.append(chain)
        else:
            chain.residual, chain.column, chain.detached = image, index, False
        residuals = self._residuals()
        gram = self._reduced(torch.cat([_inner_products(residuals, residual) for residual in residuals]))
        # One transfer to the host a step.
        first, second, gram = torch.cat([first, second, gram]).cpu().split([index + 1, index + 1, len(gram)])
        coefficients: _Array = (first + second).numpy()
        self._gram = gram.numpy().reshape(len(self.chains), len(self.chains))
        self._diagonal.append(float(coefficients[index]))
        position = self.chains.index(chain)
        squared = float(self._gram[position, position])
        if not np.isfinite(squared):
            raise ArithmeticError(
                f"the product of the operator with basis vector {index} holds NaN or infinity; "
                "check the loss for overflow or a division by zero on these batches, or use float64"
            )
        self.norm = max(self.norm, float(np.sqrt(squared + coefficients @ coefficients)))
        self._measure_asymmetry(coefficients)
        noisy = float(second @ second) > 100 * squared
        for position in reversed(range(len(self.chains))):
            # Where only rounding is left, the chain has ended in an invariant subspace.
            small = self._gram[position, position] <= (8 * self.eps * self.norm) ** 2
            if small or (noisy and self.chains[position] is chain):
                self._drop(position)

    def _residuals(self) -> Tensor:
        return torch.stack([chain.residual for chain in self.chains])

    def _orthogonalise(self, vector: Tensor) -> Tensor:
        """Remove the basis from a vector, in place; return the coefficients, ``(N,)`` in float64."""
        coefficients = self._reduced(self.basis.coefficients(vector))
        self.basis.subtract(vector, coefficients)
        return coefficients

    def _reduced(self, values: Tensor) -> Tensor:
        """Sum small values over the ranks, in float64."""
        ranks = self.operator.ranks
        return values if ranks.world_size == 1 else ranks.all_reduce(values.to(ranks.control_device))

    def _norm_of(self, vector: Tensor) -> float:
        return float(self._reduced(_inner_products(vector[None], vector)).sqrt())

    def _measure_asymmetry(self, coefficients: _Array) -> None:
        """Compare ``v_i . A v_j`` with ``v_j . A v_i``, which earlier steps fixed, for the newest j and all i."""
        index = len(coefficients) - 1
        expected = np.zeros(index)
        for row, column, value in reversed(self._couplings):
            if row != index:
                break
            expected[column] = value
        # Twice the largest column stands for the norm of a skew matrix with random entries.
        self.asymmetry = max(self.asymmetry, 2 * float(np.linalg.norm(coefficients[:index] - expected)))

    # -- arithmetic ----------------------------------------------------------------------------

    @property
    def rounding(self) -> float:
        """The additive error of every Ritz value and bound, from inexact products and arithmetic."""
        a_priori = (self.operator.relative_error + 24 * self.eps) * self.norm
        return max(a_priori + self.asymmetry, 64 * float(torch.finfo(self.operator.dtype).tiny))

    def check_orthogonality(self) -> None:
        """Test ``||(V^T V - I) x|| <= 10 sqrt(N) eps`` on a random unit ``x``."""
        x = np.random.default_rng(self._seed).standard_normal(self.size)
        x /= np.linalg.norm(x)
        vector = self.basis.combine(torch.from_numpy(x)[:, None])[:, 0].contiguous()
        error = float(np.linalg.norm(self._reduced(self.basis.coefficients(vector)).cpu().numpy() - x))
        if not error <= 10 * np.sqrt(self.size) * self.eps:
            raise ArithmeticError(
                f"the Krylov basis lost its orthogonality ({error:.1e} after {self.size} vectors); "
                "compute in float64, or report the operator: its products are not those of one symmetric matrix"
            )


class _Probe:
    """What Lanczos runs of random vectors in a complement say about its largest eigenvalue.

    There is one run, unless it ends in an invariant subspace; then a fresh vector begins another.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[_Array, _Array, int]] = []
        self.largest_seen = -np.inf

    def update(self, run: _Projection, *, dimensions: int, rounding: float, new: bool) -> None:
        """Take note of a run as it stands: its small matrix, and the dimensions its vector was drawn in.

        Of an error of norm ``rounding`` in some direction, ``rounding / sqrt(dimensions)`` points along a given
        eigenvector: less than that was not seen.
        """
        self.largest_seen = max(self.largest_seen, float(run.ritz_values[0]))
        recurrence = run.recurrence(floor=rounding / np.sqrt(dimensions))
        if not new:
            self._runs.pop()
        self._runs.append((*recurrence, dimensions))

    def missed_probability(self, bound: float) -> float:
        r"""The chance that all runs overlook an eigenvalue above ``bound``: :math:`\prod I_\chi(1/2, (d-1)/2)`."""
        if bound <= self.largest_seen:
            return 1.0
        probability = 1.0
        for diagonal, off_diagonal, dimensions in self._runs:
            mass = _point_mass_bound(diagonal, off_diagonal, bound)
            if dimensions == 1:  # the vector is the eigenvector
                probability *= float(mass >= 1)
            else:
                probability *= float(scipy.special.betainc(0.5, (dimensions - 1) / 2, mass))
        return probability

    def confident_bound(self, level: float) -> float:
        """The smallest bound whose missed probability is at most ``level``, to three digits of its excess."""
        step = max(abs(self.largest_seen), *(float(off[-1]) for _, off, _ in self._runs)) * 1e-6
        while self.missed_probability(self.largest_seen + step) > level:
            step *= 2
        low, high = step / 2, step
        for _ in range(10):
            middle = (low + high) / 2
            if self.missed_probability(self.largest_seen + middle) > level:
                low = middle
            else:
                high = middle
        return self.largest_seen + high


class _Solver:
    """Grow the basis until the bounds hold, and prove that nothing was missed."""

    def __init__(
        self,
        operator: SymmetricOperator,
        k: int,
        rtol: float,
        max_hvps: int,
        seed: int,
        level: float,
        positive_only: bool,
        progress: Callable[[LanczosProgress], None] | None,
        basis_device: torch.device | str | None,
    ) -> None:
        self._operator = operator
        self._dimensions = operator.partition.size
        self._wanted = k
        self._k = min(k, self._dimensions)
        self._rtol = rtol
        self._max_hvps = max_hvps
        self._level = level
        self._positive_only = positive_only
        self._progress = progress
        self._num_converged = 0
        self._num_probes = 0
        self._decomposition = _Decomposition(operator, seed, basis_device)
        # The last products are kept for a probe, so that what is returned unconverged has true bounds too.
        self._reserve = min(12, max(1, max_hvps // 5))

    def solve(self, start: Tensor | None, return_eigenvectors: bool) -> Spectrum:
        decomposition = self._decomposition
        if start is not None:
            start = self._operator.partition.cut(start.to(self._operator.device, self._operator.dtype))
            if not decomposition.begin(start):
                raise ValueError("the start vector is zero; pass another one, or none for a Gaussian vector")
        else:
            decomposition.begin()
        self._report()
        next_check = self._k
        chain: _Chain | None = None
        while decomposition.size < self._dimensions:
            if decomposition.size >= next_check or not decomposition.chains:
                limit = self._provable_limit()
                if limit is not None:
                    before = decomposition.projection()
                    probe, ruled_out = self._probe(limit)
                    border = self._agreed(probe.confident_bound(self._level))
                    if ruled_out:
                        return self._result(before, min(limit, border), "converged", return_eigenvectors)
                    if decomposition.num_hvps >= self._max_hvps:
                        return self._result(decomposition.projection(), border, "max_hvps", return_eigenvectors)
                next_check = decomposition.size + max(1, decomposition.size // 50)
                chain = None
                if limit is not None:
                    continue  # The probe may have filled the space.
            if decomposition.num_hvps >= self._max_hvps - self._reserve:
                probe, _ = self._probe(None)
                border = self._agreed(probe.confident_bound(self._level))
                if decomposition.size < self._dimensions:
                    return self._result(decomposition.projection(), border, "max_hvps", return_eigenvectors)
            elif decomposition.chains:
                # Chosen anew at each check only: it takes the eigenvectors of H.
                if chain not in decomposition.chains:
                    chain = self._most_useful_chain()
                if decomposition.expand(chain):
                    self._report()
            elif decomposition.begin():
                self._report()
            else:
                break
        # The basis spans the whole space: H is A.
        stopped: StopReason = "converged" if self._wanted <= self._dimensions else "exhausted"
        return self._result(decomposition.projection(), -np.inf, stopped, return_eigenvectors)

    # -- bounds --------------------------------------------------------------------------------

    def _tolerance(self, ritz: _Array) -> _Array:
        tolerance: _Array = np.maximum(self._rtol * np.abs(ritz), 4 * self._decomposition.rounding)
        return tolerance

    @property
    def _zero(self) -> float:
        """Up to here, an eigenvalue can't be told from zero."""
        return 2 * self._decomposition.rounding

    def _needed(self, ritz: _Array) -> int:
        """How many of the leading eigenvalues have to be known."""
        num_positive = int(np.sum(ritz[: self._k] > self._zero))
        if not self._positive_only or num_positive == 0:
            return self._k
        # The positive ones, and one more: its upper bound shows that there are no others.
        return min(num_positive + 1, self._k)

    def _sufficient(self, projection: _Projection, limit: float) -> bool:
        """Whether the bounds are tight enough, if the complement's eigenvalues are at most ``limit``."""
        ritz = projection.ritz_values[: self._k]
        upper = projection.upper_bounds(limit, self._k)
        known = np.zeros(self._k, dtype=bool)
        known[: len(ritz)] = upper[: len(ritz)] - ritz + self._decomposition.rounding <= self._tolerance(ritz)
        if self._positive_only and ritz[0] > self._zero:
            known |= upper <= self._zero
        self._num_converged = int(np.sum(np.cumprod(known)))
        return bool(known[: self._needed(ritz)].all())

    def _provable_limit(self) -> float | None:
        """The largest limit on the complement under which the bounds are tight enough.

        None while the complement is believed to reach above it.
        """
        projection = self._decomposition.projection()
        limit = self._believed_limit(projection)
        if not self._agreed(float(self._sufficient(projection, limit))):
            return None
        ritz = projection.ritz_values
        last = self._needed(ritz) - 1
        tolerated = ritz[last] + self._tolerance(ritz)[last] if last < len(ritz) else self._zero
        high = max(float(tolerated), self._zero if self._positive_only else -np.inf)
        for _ in range(12):
            middle = (limit + high) / 2
            if self._sufficient(projection, middle):
                limit = middle
            else:
                high = middle
        return self._agreed(limit)

    def _believed_limit(self, projection: _Projection) -> float:
        """An estimate of the complement's largest eigenvalue, from the latest basis vectors.

        They lie in the complement of the basis as it was before them.
        """
        if not projection.columns:
            return float(min(projection.ritz_values[-1], 0.0))
        latest = min(projection.size, max(8, projection.size // 24))
        return float(projection.tail(projection.size - latest).ritz_values[0])

    def _most_useful_chain(self) -> _Chain:
        """The chain whose residual stands most in the way of the k largest Ritz values."""
        chains = self._decomposition.chains
        if len(chains) == 1:
            return chains[0]
        projection = self._decomposition.projection()
        count = min(self._k, projection.size)
        vectors = projection.eigenvectors(count)
        weights = np.abs(vectors) / self._tolerance(projection.ritz_values[:count])
        scores = [
            np.sqrt(projection.gram[position, position]) * np.max(weights[chain.column])
            for position, chain in enumerate(chains)
        ]
        return chains[int(self._agreed(float(np.argmax(scores))))]

    # -- probing -------------------------------------------------------------------------------

    def _probe(self, limit: float | None) -> tuple[_Probe, bool]:
        """Look for eigenvalues above ``limit`` in the complement of the basis.

        Returns the probe, and whether it ruled them out. It ends when it did, when it found one, when it takes too
        long, or when the products are spent: without a limit, only then. Its vectors stay in the basis.
        """
        decomposition = self._decomposition
        first = decomposition.size
        longest = max(24, first // 4)
        self._num_probes += 1
        probe = _Probe()
        while decomposition.begin():
            start = decomposition.size - 1
            while True:
                self._report()
                size = decomposition.size
                run = decomposition.projection().tail(start)
                rounding = max(decomposition.eps * decomposition.norm, np.finfo(float).tiny)
                probe.update(run, dimensions=self._dimensions - start, rounding=rounding, new=size == start + 1)
                if limit is not None:
                    if self._agreed(probe.missed_probability(limit)) <= self._level:
                        return probe, True
                    if self._agreed(probe.largest_seen) > limit or size - first >= longest:
                        return probe, False
                if decomposition.num_hvps >= self._max_hvps or size == self._dimensions:
                    return probe, False
                own = [chain for chain in decomposition.chains if chain.column == size - 1]
                if not own or not decomposition.expand(own[0]):
                    break
        raise ArithmeticError("a random vector lies in the span of fewer vectors than there are dimensions")

    # -- reporting -----------------------------------------------------------------------------

    def _agreed(self, value: float) -> float:
        """Rank 0's value on all ranks: libraries may round differently on different machines."""
        ranks = self._operator.ranks
        if ranks.world_size == 1:
            return value
        return float(ranks.broadcast(torch.tensor([value], dtype=torch.float64, device=ranks.control_device)))

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(
                LanczosProgress(self._decomposition.num_hvps, self._max_hvps, self._num_converged, self._wanted)
            )

    def _result(
        self, projection: _Projection, border: float, stopped: StopReason, return_eigenvectors: bool
    ) -> Spectrum:
        decomposition = self._decomposition
        decomposition.check_orthogonality()
        count = min(self._k, projection.size)
        ritz = projection.ritz_values
        rounding = decomposition.rounding
        upper = projection.upper_bounds(border, count)
        values = torch.from_numpy(np.concatenate([ritz, upper[:count] - ritz[:count] + rounding]))
        values = self._operator.ranks.broadcast(values.to(self._operator.ranks.control_device)).cpu()
        ritz_values, bounds = values.split([len(ritz), count])
        eigenvalues = ritz_values[:count].clone()
        if stopped == "converged" and self._needed(ritz) < self._wanted:
            stopped = "no_more_positive"
        vectors = None
        if return_eigenvectors:
            vectors = decomposition.basis.combine(torch.from_numpy(projection.eigenvectors(count).copy()))
        return Spectrum(
            eigenvalues=eigenvalues,
            error_bounds=bounds.clone(),
            converged=bounds <= torch.clamp(self._rtol * eigenvalues.abs(), min=4 * rounding),
            rtol=self._rtol,
            missed_probability=0.0 if border == -np.inf else min(1.0, self._num_probes * self._level),
            num_hvps=decomposition.num_hvps,
            stopped=stopped,
            rounding=rounding,
            symmetry_defect=decomposition.asymmetry,
            ritz_values=ritz_values.clone(),
            eigenvectors=vectors,
        )


def _inner_products(rows: Tensor, vector: Tensor) -> Tensor:
    """``(m, n), (n,) -> (m,)`` in float64; see `_LONGEST_SUM`."""
    if vector.device.type != "cpu":
        return _precise(rows.mv(vector))
    partial = [
        part.mv(piece) for part, piece in zip(rows.split(_LONGEST_SUM, 1), vector.split(_LONGEST_SUM), strict=True)
    ]
    return torch.stack(partial).sum(0, dtype=torch.float64)


def _precise(values: Tensor) -> Tensor:
    if values.device.type == "mps":  # has no float64
        values = values.cpu()
    return values.to(torch.float64)


def _point_mass_bound(diagonal: _Array, off_diagonal: _Array, point: float) -> float:
    r""":math:`1 / \sum_{j=0}^m p_j(x)^2` for the orthonormal polynomials of a three-term recurrence."""
    before, current, total = 0.0, 1.0, 1.0
    link = 0.0
    for centre, following in zip(diagonal, off_diagonal, strict=True):
        before, current = current, ((point - centre) * current - link * before) / following
        link = following
        if abs(current) > 1e100:  # far beyond any probability of interest
            return 0.0
        total += current**2
    return 1 / total


def _tridiagonal_eigenvalues(diagonal: _Array, off_diagonal: _Array) -> _Array:
    if len(diagonal) == 1:
        return diagonal.copy()
    return _descending(scipy.linalg.eigvalsh_tridiagonal(diagonal, off_diagonal, lapack_driver="sterf"))


def _descending(ascending: _Array) -> _Array:
    reversed_order: _Array = ascending[::-1]
    return reversed_order
