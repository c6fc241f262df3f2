r"""Compute the largest eigenvalues of a symmetric operator, each with an error bound.

Lanczos with full reorthogonalisation builds :math:`A V = V H + R`. The eigenvalues of H bound those of A from below
(Cauchy's interlacing). A bordered or Gauss-Radau matrix bounds them from above, given a bound on the eigenvalues of the
complement of the basis. That bound comes from a short Lanczos run of a random vector in the complement (the Christoffel
function and a Beta distribution). Rounding enters each bound as an additive term.

The page "Error bounds" of the documentation states and proves the theorem, and says which parts of the rounding term
are proven, measured and assumed.

References: Parlett, *The Symmetric Eigenvalue Problem* (1998), ch. 10-13, for interlacing and Lanczos;
Akhiezer, *The Classical Moment Problem* (1965), ch. 2, for the bound on a point mass; Golub and Meurant, *Matrices,
Moments and Quadrature with Applications* (2010), ch. 6, for Gauss-Radau bounds of quadratic forms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_callback.algorithms.decomposition import Chain, Decomposition
from hessian_callback.algorithms.missed_eigenvalues import Probe, level_of_run
from hessian_callback.algorithms.ritz import Projection
from hessian_callback.algorithms.solver_checkpoint import DEFAULT_SECONDS, CheckpointError, SolverCheckpoint
from hessian_callback.algorithms.spectrum import RoundingBasis, Spectrum, StopReason, meets_tolerance
from hessian_callback.algorithms.stored_fields import check_fields, each, is_count, is_finite, is_tensor
from hessian_callback.algorithms.thick_restart import kept_at_ends
from hessian_callback.linalg.arguments import whole_number
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator

__all__ = ["LanczosProgress", "top_eigenvalues"]

_Array = NDArray[np.float64]

# Smallest number of vectors beyond k that a limited basis needs, and the least of them that are new after a restart.
_LEAST_ROOM, _LEAST_NEW = 12, 5
# Part of the vectors beyond k that a restart keeps. More of them speed up convergence, and make restarts frequent.
_KEPT_SHARE = 0.75
# Length of the tail whose recurrence sharpens the bounds, in a small basis.
_TAIL = 12
# A limited basis is believed to have converged if the smallest wanted Ritz value has moved by at most this part of its
# tolerance, within the latest tenth of all products.
_STEADY, _LATEST = 0.25, 0.1
_USUAL_RTOL = 0.01
# Largest number of vectors that a probe stores if the basis is limited.
_WIDEST_WINDOW = 6
# Products that a probe may take, however small the basis is.
_LONGEST_PROBE = 64
# A probe is given up if it is expected to take this factor longer than it may, once it has taken so many products. One
# beside a limited basis never is, because the complement stays as it is.
_HOPELESS, _LEAST_TRIED = 1.5, 16
# What a vain probe has seen is believed until the basis has grown by this part, or at least so many vectors.
_PATIENCE, _LEAST_PATIENCE = 0.1, 8
# A probe is sent when the complement is believed to lie below the provable limit by this part of the smallest wanted
# eigenvalue. A narrower margin takes longer probes, and more of them fail.
_MARGIN = 0.02
# The latest vectors of a basis with fewer show little of its complement. A probe is mostly sent in vain then if its
# limit is below the smallest wanted Ritz value.
_SMALL = 32
# A repeated product of the same matrix differs from the stored one by at most so many rounding levels.
_REPEATED = 2
# Probability of overlooking an eigenvalue at which a probe ends that is sent to find one.
_EXPLORING_LEVEL = 0.05
# Directions in the span of the leading Ritz vectors along which the run is compared with products of higher precision:
# first, and if the errors are large.
_FIRST_DIRECTIONS, _MOST_DIRECTIONS = 2, 8
# Errors below this part of the smallest tolerance are not worth further directions.
_NEGLIGIBLE_ERROR = 0.125


@dataclass(frozen=True)
class LanczosProgress:
    """Progress of a running eigenvalue computation, reported after every product.

    Attributes:
        num_matvecs: products spent so far.
        max_matvecs: products it may spend.
        num_converged: eigenvalues that were within tolerance at the last check.
        k: eigenvalues asked for.
        ritz_values: the k largest Ritz values at the last check, descending, float64: estimates from below.
            ``None`` before the first check.
    """

    num_matvecs: int
    max_matvecs: int
    num_converged: int
    k: int
    ritz_values: Tensor | None = None


def top_eigenvalues(
    operator: SymmetricOperator,
    k: int = 50,
    *,
    rtol: float = 1e-2,
    max_matvecs: int | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    probe_level: float = 1e-3,
    positive_only: bool = False,
    criterion: Callable[[Tensor, Tensor], bool] | None = None,
    return_eigenvectors: bool = False,
    progress: Callable[[LanczosProgress], None] | None = None,
    max_basis_size: int | None = None,
    basis_device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = DEFAULT_SECONDS,
) -> Spectrum:
    r"""Compute the k largest eigenvalues (algebraically) of a symmetric operator.

    The run stops when every error bound :math:`b_i` (see `Spectrum`) is at most
    :math:`\max(\text{rtol}\,|\theta_i|,\; 4 \rho)`, where :math:`\rho` is the rounding level. An eigenvalue counts as
    converged if :math:`b_i \le \text{rtol}\,|\theta_i|`, or if it can't be told from zero:
    :math:`|\theta_i| \le b_i \le 4 \rho \le \text{rtol}\,\|A\|`.

    If the operator has a method ``precise_products`` (see `SymmetricOperator`), the run is compared with products of
    higher precision: along two to eight random combinations of the leading Ritz vectors before the first probe is
    sent, and again at the end if the basis has grown. The rounding level is at least a multiple of the differences
    (see the page "Error bounds"). ``num_matvecs`` and ``max_matvecs`` don't include these products, and
    ``num_precise_products`` is their number. If higher precision is not available, the operator's own products are
    repeated instead, which shows the errors that change from vector to vector. They are not included either.

    Args:
        operator: the matrix; a `HessianOperator`, or a `MatvecOperator` around any function.
        k: number of eigenvalues. With fewer than ``k`` dimensions all of them are returned.
        rtol: relative tolerance of each eigenvalue.
        max_matvecs: largest number of products, the probe for missed eigenvalues included; ``None``: 10 k
            (at least 50). When it is reached, the k best values are returned, with bounds that hold.
        seed: seed of the start and probe vectors. They are drawn by coordinate, so the number of ranks and
            the device don't change them, and from a private stream, so no global generator moves.
        start: start vector, shape ``(P,)``, instead of the Gaussian one.
        probe_level: bound on the probability that the probe overlooked an eigenvalue.
        positive_only: stop as soon as no further eigenvalue above the rounding level exists, even when
            fewer than ``k`` are positive; what is returned behind the last positive one may then be unconverged.
        criterion: ``(lower, upper) -> bool``, given proven bounds of the k largest eigenvalues, ``(k,)`` each: stop
            as soon as it accepts them, even when not every eigenvalue has met ``rtol``.
        return_eigenvectors: also form the Ritz vectors, this rank's slice of each.
        progress: called after every product.
        max_basis_size: largest number of basis vectors in memory, those of a probe included, at least k + 12; ``None``:
            one for each product. When the basis is full, the run continues from its leading Ritz vectors (a thick
            restart). The bounds stay proven; the smaller the basis, the more products they take. A matrix with fewer
            than ``max_basis_size + 130`` rows ignores the limit.
        basis_device: where to keep the basis; default: the operator's device. On the
            CPU it costs a transfer of three vectors a product, and leaves the device to the products.
        checkpoint: a folder of this run alone, to save it in. Called again with the same arguments after its process
            was killed, it continues from the last save, to the result, bit for bit, of a run that was not interrupted
            and whose products are the same bit for bit. That the matrix is the same is checked, by one product that
            is not counted, and so are its size and dtype, the number of ranks, ``k``, ``rtol``, ``max_matvecs``,
            ``seed``, ``probe_level`` and ``positive_only``. ``start``, ``criterion``, ``return_eigenvectors`` and
            ``max_basis_size`` are not: the stored run has begun with its own start, and those of this call decide when
            it ends, what comes back, and how many vectors there may be from now on. Each rank saves its own slices. The
            result deletes what was saved. A save that fails, on a full disk, say, is warned of, and the computation
            continues without further ones.
        checkpoint_every: seconds between two saves, and before the first; 0: as often as possible.

    Returns:
        The eigenvalues with their bounds, and how they were computed.

    Raises:
        TypeError: if a number is of the wrong type.
        ValueError: for other arguments of the wrong type, or arguments out of range.
        CheckpointError: a `ValueError`, on all ranks together and before a product is spent that counts, if the
            checkpoint is damaged, or of another matrix or of other arguments, or if its folder can't be used.
        ArithmeticError: if a product holds NaN or infinity, or its squared norm overflows, or the basis lost its
            orthogonality.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> A = torch.diag(torch.arange(1, 101, dtype=torch.float64) ** -1.0)
        >>> spectrum = top_eigenvalues(MatvecOperator(A.mv, 100), k=3)
        >>> spectrum.all_converged, spectrum.stopped
        (True, 'converged')
        >>> truth = torch.tensor([1, 1 / 2, 1 / 3], dtype=torch.float64)
        >>> bool((abs(spectrum.eigenvalues - truth) <= spectrum.error_bounds).all())
        True
    """
    k, seed, max_matvecs = _checked_arguments(operator, k, rtol, max_matvecs, seed, start, probe_level)
    limit = _checked_limit(max_basis_size, k, operator.partition.size, max_matvecs)
    task = _Task(k, rtol, max_matvecs, seed, probe_level, positive_only)
    stored = None if checkpoint is None else SolverCheckpoint(checkpoint, operator, asdict(task), checkpoint_every)
    solver = _Solver(operator, task, criterion, progress, limit, basis_device, stored)
    with full_float32():
        spectrum = solver.solve(start, return_eigenvectors)
    if stored is not None:
        stored.delete()
    return spectrum


def _checked_arguments(
    operator: SymmetricOperator,
    k: int,
    rtol: float,
    max_matvecs: int | None,
    seed: int,
    start: Tensor | None,
    probe_level: float,
) -> tuple[int, int, int]:
    """Return k, the seed and the number of products as integers; raise a `ValueError` if an argument is unusable."""
    if not hasattr(operator, "matvec_slice") or not hasattr(operator, "partition"):
        raise ValueError(
            f"operator must be a SymmetricOperator, got {type(operator).__name__}; "
            "wrap a matrix A as MatvecOperator(A.mv, len(A), dtype=A.dtype)"
        )
    size = operator.partition.size
    k = whole_number("k", k, at_least=1)
    seed = whole_number("seed", seed, at_least=0)
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol}")
    if not 0 < probe_level < 1:
        raise ValueError(f"probe_level must lie between 0 and 1, got {probe_level}")
    max_matvecs = max(10 * k, 50) if max_matvecs is None else whole_number("max_matvecs", max_matvecs, at_least=1)
    if max_matvecs < min(k + 1, size):
        raise ValueError(
            f"max_matvecs={max_matvecs} cannot give k={k} eigenvalues; allow at least {min(k + 1, size)} products"
        )
    if start is not None:
        if not isinstance(start, Tensor) or start.layout != torch.strided or start.is_complex():
            raise ValueError(f"start must be a dense real tensor of shape ({size},), got {_kind_of(start)}")
        if not bool(torch.isfinite(start).all()):
            raise ValueError("the start vector holds NaN or infinity; pass another one, or none for a Gaussian vector")
    return k, seed, max_matvecs


def _checked_limit(max_basis_size: int | None, k: int, size: int, max_matvecs: int) -> int | None:
    """Return the limit of the basis; ``None`` if it has none or does not need it."""
    if max_basis_size is None:
        return None
    limit = whole_number("max_basis_size", max_basis_size, at_least=1)
    # In a small space a probe might exhaust the complement, and all vectors take little memory.
    if size < limit + 2 * (_LONGEST_PROBE + 1) or max_matvecs <= limit:
        return None
    if limit < k + _LEAST_ROOM:
        raise ValueError(f"max_basis_size={limit} is too small for k={k}; allow at least {k + _LEAST_ROOM} vectors")
    return limit


def _kind_of(value: Any) -> str:
    return f"{value.layout} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True)
class _Task:
    """Arguments of `top_eigenvalues` that a checkpoint stores and a continued run must repeat."""

    k: int
    rtol: float
    max_matvecs: int
    seed: int
    probe_level: float
    positive_only: bool


@dataclass(frozen=True, eq=False)
class _Proof:
    """Small matrices and a bound on a complement, from which the bounds of the eigenvalues follow.

    Attributes:
        projection: the small matrices.
        first: number of basis vectors whose complement is bounded; ``None``: all of them.
        border: bound on the eigenvalues of the compression of A to the complement.
        rounding: the rounding level. The border is raised by it before it enters the small matrices, because the
            corner of the Gauss-Radau matrix may depend on it arbitrarily strongly.
        k: number of eigenvalues to bound.
    """

    projection: Projection
    first: int | None
    border: float
    rounding: float
    k: int

    @property
    def ritz(self) -> _Array:
        """Lower bounds, fewer than k where the basis is smaller."""
        return self.projection.ritz_values[: self.k]

    @cached_property
    def upper(self) -> _Array:
        """Upper bounds, ``(k,)``."""
        border = self.border + self.rounding
        if self.first is None:
            return self.projection.upper_bounds(border, self.k)
        return self.projection.radau_bounds(self.first, border, self.k)


class _Solver:
    """Grow the basis until the bounds are tight enough and a probe has excluded missed eigenvalues."""

    def __init__(
        self,
        operator: SymmetricOperator,
        task: _Task,
        criterion: Callable[[Tensor, Tensor], bool] | None,
        progress: Callable[[LanczosProgress], None] | None,
        max_basis_size: int | None,
        basis_device: torch.device | str | None,
        checkpoint: SolverCheckpoint | None,
    ) -> None:
        self._operator = operator
        self._dimensions = operator.partition.size
        self._task = task
        self._k = min(task.k, self._dimensions)
        self._criterion = criterion
        self._progress = progress
        self._num_converged = 0
        self._leading: Tensor | None = None
        self._seen: tuple[int, float] | None = None  # vectors appended at the last vain probe, and what that saw
        # The smallest wanted Ritz value when the last probe found an eigenvalue above its limit.
        self._found: float | None = None
        # Vectors appended and the k largest Ritz values at the latest restarts.
        self._earlier: list[tuple[int, list[float]]] = []
        self._num_runs = 0  # random vectors that probes have started from
        self._rounding_basis: RoundingBasis | None = None  # None until the products were measured
        self._tested_size = 0  # vectors appended when the orthogonality of the basis was tested last,
        self._measured_size = 0  # and when its errors were measured last
        self._num_precise = 0  # products in higher precision
        # Without a limit all vectors of a probe are stored. With one, the probe and the main run share it.
        self._window: int | None = None
        self._capacity: int | None = None
        if max_basis_size is not None:
            self._window = min(max(2, (max_basis_size - task.k) // 4), _WIDEST_WINDOW)
            self._capacity = max_basis_size - self._window
        self._decomposition = Decomposition(operator, task.seed, basis_device, self._capacity)
        self._checkpoint = checkpoint
        # The last products are kept for a probe, so that the bounds of unconverged eigenvalues hold too. The basis must
        # have k vectors by then.
        self._reserve = min(12, max(1, task.max_matvecs // 5), max(0, task.max_matvecs - self._k))

    def solve(self, start: Tensor | None, return_eigenvectors: bool) -> Spectrum:
        decomposition = self._decomposition
        next_check = self._k
        chain: Chain | None = None
        saved = None if self._checkpoint is None else self._checkpoint.load(decomposition.basis)
        if saved is not None:
            next_check, chain = self._restore(saved)
        else:
            self._begin(start)
        while decomposition.size < self._dimensions:
            if self._checkpoint is not None and self._checkpoint.is_due(decomposition.num_appended):
                state = self._state(next_check, chain)
                self._checkpoint.save(decomposition.basis, state, restarts=decomposition.num_restarts)
            if self._check_is_due(next_check):
                proof, ruled_out = self._check()
                if proof is not None and (ruled_out or decomposition.num_matvecs >= self._task.max_matvecs):
                    return self._result(proof, "converged" if ruled_out else "max_matvecs", return_eigenvectors)
                next_check = decomposition.num_appended + max(1, decomposition.size // (50 if proof is None else 20))
                chain = None
                if self._is_full:
                    self._restart()
                if proof is not None:
                    continue  # The probe may have filled the space.
            if decomposition.num_matvecs >= self._task.max_matvecs - self._reserve:
                projection = decomposition.projection()
                proof, _ = self._prove(projection, self._first_of_tail(projection), None)
                if decomposition.size < self._dimensions:
                    return self._result(proof, "max_matvecs", return_eigenvectors)
            else:
                chain = self._grow(chain)
        # The basis spans the whole space: H is A.
        stopped: StopReason = "converged" if self._task.k <= self._dimensions else "exhausted"
        return self._result(self._proof(decomposition.projection(), None, -np.inf), stopped, return_eigenvectors)

    @property
    def _is_full(self) -> bool:
        return self._capacity is not None and self._decomposition.size >= self._capacity

    def _check_is_due(self, next_check: int) -> bool:
        decomposition = self._decomposition
        if self._is_full or not decomposition.chains:
            return True
        # The tail of the recurrence lies behind the vectors that a restart has kept.
        new = decomposition.size - decomposition.num_kept
        return decomposition.num_appended >= next_check and (decomposition.num_kept == 0 or new >= _TAIL)

    def _restart(self) -> None:
        """Keep the leading Ritz vectors, and leave room for new ones."""
        decomposition = self._decomposition
        assert self._capacity is not None
        kept = self._k + int(_KEPT_SHARE * (self._capacity - self._k))
        kept = max(min(kept, self._capacity - _LEAST_NEW), len(decomposition.chains))
        if kept < decomposition.size:
            ritz = decomposition.projection().ritz_values
            before = sum(appended <= self._steady_from for appended, _ in self._earlier)
            latest = (decomposition.num_appended, ritz[: self._k].tolist())
            self._earlier = [*self._earlier[max(0, before - 1) :], latest]
            largest, smallest = kept_at_ends(ritz, min(self._needed(ritz), kept), kept)
            decomposition.restart(largest, smallest)

    def _check(self) -> tuple[_Proof | None, bool]:
        """Send a probe if the bounds are believed to be tight enough.

        Returns the proof, ``None`` if no probe was sent, and whether it suffices.
        """
        decomposition = self._decomposition
        projection = decomposition.projection()
        decomposition.raise_norm(self._agreed(float(np.abs(projection.ritz_values[[0, -1]]).max())))
        tail = self._first_of_tail(projection)
        first, limit = tail, None
        # Without a tail the bounds are wider, but the complement is that of more vectors. The tail comes last: its
        # bounds are those that are reported.
        for candidate in (tail,) if tail is None or self._capacity is not None else (None, tail):
            provable = self._provable_limit(projection, candidate)
            if provable is not None:
                first, limit = candidate, provable
        if limit is not None and self._measure_errors(projection):
            limit = self._provable_limit(projection, first)
        if limit is None:
            return None, False
        proof, ruled_out = self._prove(projection, first, limit)
        if ruled_out:
            self._measure_errors(proof.projection, again=True)
        # The probe or the measurement may have raised the rounding level.
        proof = self._proof(proof.projection, proof.first, proof.border)
        return proof, ruled_out and bool(self._agreed(float(self._sufficient(proof))))

    def _grow(self, chain: Chain | None) -> Chain | None:
        """Spend a product on the basis; return the chain that it was spent on."""
        decomposition = self._decomposition
        if decomposition.chains:
            # Chosen anew at each check only: the choice takes the eigenvectors of H.
            if chain not in decomposition.chains:
                chain = self._most_useful_chain()
            if decomposition.expand(chain):
                self._report(decomposition)
        elif decomposition.begin():
            self._report(decomposition)
        else:
            raise _no_direction_left(decomposition)
        return chain

    def _begin(self, start: Tensor | None) -> None:
        if start is None:
            self._decomposition.begin()
        else:
            start = self._operator.partition.cut(start.to(self._operator.device, self._operator.dtype))
            if not self._decomposition.begin(start):
                raise ValueError("the start vector is zero; pass another one, or none for a Gaussian vector")
        self._report(self._decomposition)

    def _prove(self, projection: Projection, first: int | None, limit: float | None) -> tuple[_Proof, bool]:
        """Send a probe; return the resulting proof, and whether it ruled out eigenvalues above the limit.

        Without a limit it takes all products that are left.
        """
        decomposition = self._decomposition
        apart = self._capacity is not None or self._first_of_tail(projection) is not None
        if apart:
            branch = decomposition.branch(first, self._window)
            probe, ruled_out = self._probe(branch, limit, self._longest_probe)
            decomposition.absorb(branch)
            link = float(np.sqrt(np.trace(projection.gram))) if first is None else projection.link(first)
            self._bound_norm(projection, link, probe)
            # A probe that was given up could not exclude its limit, and the next one could not either.
            reached = -np.inf if limit is None else limit
            seen = probe.largest_seen if ruled_out else max(reached, probe.largest_seen)
            self._seen = (decomposition.num_appended, seen)
            border = self._border(probe, limit if ruled_out else None)
            if first is not None and not ruled_out:  # The basis may show more than the probe did.
                shown = float(projection.tail(first).ritz_values[0])
                border = max(border, shown + 1e-6 * abs(shown) + decomposition.rounding)
            smallest = projection.ritz_values[min(self._needed(projection.ritz_values), projection.size) - 1]
            found = bool(self._agreed(float(probe.largest_seen > max(reached, smallest))))
            # The main run finds most of these eigenvalues later, and several chains have no recurrence whose moments
            # sharpen the bounds.
            steady = self._found is not None and self._steady_since(self._found, projection)
            self._found = float(smallest) if found else None
            joins = found and bool(self._agreed(float(steady)))
            if ruled_out or not joins or decomposition.num_matvecs >= self._task.max_matvecs:
                return self._proof(projection, first, border), ruled_out
            # A second probe saw an eigenvalue that the basis may never show, such as a copy: it must join.
        longest = max(24, decomposition.size // 4)
        if self._capacity is not None:
            self._restart()
            longest = min(longest, self._capacity - decomposition.size)
        probe, ruled_out = self._probe(decomposition, limit, longest, exploring=apart)
        decomposition.end_probe()
        self._bound_norm(projection, float(np.sqrt(np.trace(projection.gram))), probe)
        ruled_out = ruled_out and not apart
        if not ruled_out:
            projection = decomposition.projection()
        return self._proof(projection, None, self._border(probe, limit if ruled_out else None)), ruled_out

    @property
    def _longest_probe(self) -> int:
        """Products after which a probe is given up: as many as the main run has taken, and at least 64."""
        decomposition = self._decomposition
        outside = self._dimensions - decomposition.size
        return max(_LONGEST_PROBE, min(decomposition.num_appended, outside // 2))

    def _proof(self, projection: Projection, first: int | None, border: float) -> _Proof:
        return _Proof(projection, first, border, self._decomposition.rounding, self._k)

    def _bound_norm(self, projection: Projection, link: float, probe: Probe) -> None:
        """Raise the norm of A to a bound: that of a 2 x 2 matrix of the norms of the blocks.

        A probe of very few products bounds the lower end of the complement too loosely to be of use. Then the norm of
        the projection stays the estimate.
        """
        inside = float(np.abs(projection.ritz_values[[0, -1]]).max())
        outside = max(abs(probe.confident_bound()), abs(probe.confident_lower_bound()))
        norm = float((inside + outside) / 2 + np.hypot((inside - outside) / 2, link))
        self._decomposition.raise_norm(self._agreed(norm if norm <= 2 * inside else inside))

    def _border(self, probe: Probe, limit: float | None) -> float:
        border = self._agreed(probe.confident_bound())
        return border if limit is None else min(limit, border)

    # -- bounds --------------------------------------------------------------------------------

    def _tolerance(self, ritz: _Array) -> _Array:
        tolerance: _Array = np.maximum(self._task.rtol * np.abs(ritz), 4 * self._decomposition.rounding)
        return tolerance

    @property
    def _zero(self) -> float:
        """Return the level below which an eigenvalue can't be told from zero."""
        return 2 * self._decomposition.rounding

    def _needed(self, ritz: _Array) -> int:
        """Return how many of the leading eigenvalues have to be known."""
        num_positive = int(np.sum(ritz[: self._k] > self._zero))
        if not self._task.positive_only or num_positive == 0:
            return self._k
        # The positive ones, and one more: its upper bound shows that there are no others.
        return min(num_positive + 1, self._k)

    def _known(self, proof: _Proof) -> NDArray[np.bool_]:
        """Return which bounds are within tolerance, if the complement's eigenvalues are at most ``proof.border``."""
        ritz, upper = proof.ritz, proof.upper
        known = np.zeros(self._k, dtype=bool)
        known[: len(ritz)] = upper[: len(ritz)] - ritz + self._decomposition.rounding <= self._tolerance(ritz)
        if self._task.positive_only and ritz[0] > self._zero:
            known |= upper <= self._zero
        return known

    def _sufficient(self, proof: _Proof) -> bool:
        """Return whether the bounds are tight enough."""
        return bool(self._known(proof)[: self._needed(proof.ritz)].all()) or self._accepted(proof)

    def _note(self, proof: _Proof) -> None:
        """Store the state of convergence for `LanczosProgress`."""
        self._num_converged = int(np.sum(np.cumprod(self._known(proof))))
        self._leading = torch.from_numpy(proof.ritz.copy())

    def _accepted(self, proof: _Proof) -> bool:
        if self._criterion is None or len(proof.ritz) < self._k:
            return False
        rounding = self._decomposition.rounding
        return self._criterion(torch.from_numpy(proof.ritz - rounding), torch.from_numpy(proof.upper + rounding))

    def _first_of_tail(self, projection: Projection) -> int | None:
        """Return the index of the first vector of the tail whose recurrence sharpens the bounds; None without a tail.

        In a small space a probe might exhaust the complement, and several chains have no recurrence. The complement of
        a part of the vectors that a restart has kept holds parts of the leading eigenvectors, and bounds nothing.
        """
        size = projection.size
        latest = min(max(_TAIL, size // 24), _LONGEST_PROBE, size // 4, size - self._decomposition.num_kept)
        if latest == 0 or not projection.is_single_chain or self._dimensions - size <= _LONGEST_PROBE + 1:
            return None
        return size - latest

    def _provable_limit(self, projection: Projection, first: int | None) -> float | None:
        """Return the largest limit on the complement under which the bounds are tight enough.

        None while the complement is believed to reach above it.
        """
        limit = self._believed_limit(projection, first)
        believed = self._proof(projection, first, limit)
        self._note(believed)
        if not self._agreed(float(self._sufficient(believed) and self._is_steady(projection))):
            return None
        ritz = projection.ritz_values
        last = self._needed(ritz) - 1
        tolerated = ritz[last] + self._tolerance(ritz)[last] if last < len(ritz) else self._zero
        high = max(float(tolerated), self._zero if self._task.positive_only else -np.inf)
        if self._criterion is not None:  # It may accept much wider bounds.
            high = max(high, float(ritz[0]))
        for _ in range(12):
            middle = (limit + high) / 2
            if self._sufficient(self._proof(projection, first, middle)):
                limit = middle
            else:
                high = middle
        if self._decomposition.num_appended < _SMALL and last < len(ritz) and self._agreed(float(limit < ritz[last])):
            return None
        return self._agreed(limit)

    def _steady_since(self, earlier: float, projection: Projection) -> bool:
        """Return whether the smallest wanted Ritz value has risen little."""
        ritz = projection.ritz_values
        last = min(self._needed(ritz), len(ritz)) - 1
        tolerance = self._tolerance(ritz)[last]
        if self._criterion is not None:  # It may accept wider bounds.
            tolerance = max(tolerance, _USUAL_RTOL * abs(ritz[last]))
        return bool(ritz[last] - earlier <= _STEADY * tolerance)

    def _is_steady(self, projection: Projection) -> bool:
        """Return whether a limited basis may have converged: a cycle between two restarts sees little."""
        if not self._earlier:
            return True
        last = min(self._needed(projection.ritz_values), self._k) - 1
        earlier = [values[last] for appended, values in self._earlier if appended <= self._steady_from]
        return bool(earlier) and self._steady_since(earlier[-1], projection)

    @property
    def _steady_from(self) -> float:
        """Vectors appended when the latest tenth of all products began."""
        return self._decomposition.num_appended * (1 - _LATEST)

    def _believed_limit(self, projection: Projection, first: int | None) -> float:
        """Estimate the complement's largest eigenvalue from the latest basis vectors.

        They lie in the complement of the basis that preceded them.
        """
        ritz = projection.ritz_values
        if not projection.columns:
            return float(min(ritz[-1], 0.0))
        size = projection.size
        if first is None:
            believed = float(projection.tail(size - min(size, max(8, size // 24))).ritz_values[0])
            if self._capacity is None:
                return believed
        else:
            believed = float(projection.tail(first).ritz_values[0])
        if self._decomposition.num_kept > 0:
            # A few new vectors show little of the complement of hardly more than k, which reaches almost to the k-th.
            believed = max(believed, (1 - 2 * _MARGIN) * float(ritz[min(self._needed(ritz), len(ritz)) - 1]))
        if self._seen is not None:
            appended, largest = self._seen
            if self._decomposition.num_appended <= appended + max(_LEAST_PATIENCE, _PATIENCE * appended):
                believed = max(believed, largest)
        return believed + _MARGIN * float(abs(ritz[min(self._needed(ritz), len(ritz)) - 1]))

    def _most_useful_chain(self) -> Chain:
        """Return the chain whose residual contributes most to the error of the k largest Ritz values."""
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

    def _probe(
        self, decomposition: Decomposition, limit: float | None, longest: int, *, exploring: bool = False
    ) -> tuple[Probe, bool]:
        """Look for eigenvalues above ``limit`` in the complement of a basis.

        Returns the probe, and whether it ruled them out. It ends when it did, when it found one, after ``longest``
        products, or when all are spent. Without a limit it ends only then. A branch of a growing basis ends as well
        when it is expected to take much longer. Its vectors stay in the basis. If it only explores, nothing is
        concluded from the exclusion, and a lax level ends it.
        """
        first = decomposition.size
        probe = Probe()
        while decomposition.begin(probing=True):
            start = decomposition.size - 1
            self._num_runs += 1
            probe.level = level_of_run(self._num_runs, self._task.probe_level)
            while True:
                self._report(decomposition)
                size = decomposition.size
                probe.update(
                    decomposition.projection().tail(start),
                    dimensions=self._dimensions - (start if decomposition.window is None else decomposition.num_shared),
                    smallest_link=decomposition.smallest_link,
                    new=size == start + 1,
                    window=decomposition.window,
                )
                spent = (
                    decomposition.num_matvecs >= self._task.max_matvecs
                    or size == self._dimensions
                    or size - first >= longest
                )
                if limit is not None:
                    unseen = (
                        probe.missed_probability(limit) <= _EXPLORING_LEVEL if exploring else probe.rules_out(limit)
                    )
                    if self._agreed(float(unseen)):
                        return probe, True
                    hopeless = (
                        self._capacity is None
                        and decomposition is not self._decomposition
                        and size - first >= _LEAST_TRIED
                        and probe.expected_products(limit) > _HOPELESS * longest
                    )
                    spent = bool(self._agreed(float(spent or hopeless or probe.largest_seen > limit)))
                if spent:
                    return probe, False
                own = [chain for chain in decomposition.chains if chain.column == size - 1]
                if not own or not decomposition.expand(own[0]):
                    break
        raise _no_direction_left(decomposition)

    # -- measuring -----------------------------------------------------------------------------

    def _measure_errors(self, projection: Projection, *, again: bool = False) -> bool:
        """Measure the orthogonality of the basis, and the errors of the run along its leading Ritz vectors.

        The errors are measured once, and with ``again`` if the basis has grown since.

        Returns whether the rounding level has grown.
        """
        decomposition = self._decomposition
        before = decomposition.rounding
        if self._tested_size != decomposition.num_appended:
            decomposition.check_orthogonality()
            self._tested_size = decomposition.num_appended
        grown = self._measured_size not in (0, decomposition.num_appended)
        if self._rounding_basis is None or (again and grown):
            self._measure_run(projection)
        return decomposition.rounding > before

    def _measure_run(self, projection: Projection) -> None:
        """Compare the run with products of higher precision if the operator has any, otherwise with repeated ones.

        Operators without the method are compared only after a restart: rounding adds up over restarts.
        """
        decomposition, operator = self._decomposition, self._operator
        precise: Callable[[Tensor], Tensor | None] | None = getattr(operator, "precise_products", None)
        self._rounding_basis = "assumed" if operator.dtype != torch.float64 else "a-priori"
        self._measured_size = decomposition.num_appended
        if precise is None and decomposition.num_restarts == 0:
            return
        directions = self._random_combinations(projection)
        errors = None if precise is None else decomposition.defects(directions[:, :_FIRST_DIRECTIONS], precise)
        measured = errors is not None
        if precise is None or errors is None:
            precise = self._own_products
            errors = decomposition.defects(directions[:, :_FIRST_DIRECTIONS], precise)
            assert errors is not None
        decomposition.product_error = self._error_of_run(errors, projection)
        ritz = projection.ritz_values
        tolerance = self._task.rtol * abs(float(ritz[min(self._needed(ritz), len(ritz)) - 1]))
        excess = 2 * decomposition.product_error > max(decomposition.a_priori, _NEGLIGIBLE_ERROR * tolerance)
        if self._agreed(float(excess)):
            # In pairs, for the memory of their products.
            for start in range(_FIRST_DIRECTIONS, directions.shape[1], _FIRST_DIRECTIONS):
                more = decomposition.defects(directions[:, start : start + _FIRST_DIRECTIONS], precise)
                if more is None:  # The memory that is free has changed.
                    break
                errors = np.append(errors, more)
            decomposition.product_error = self._error_of_run(errors, projection)
        if not measured:
            return
        self._rounding_basis = "measured"
        self._num_precise += len(errors)

    def _own_products(self, vectors: Tensor) -> Tensor:
        """Repeat products in the operator's own precision: errors that depend on the vector differ from the run's."""
        return torch.stack([self._operator.matvec_slice(vector.contiguous()) for vector in vectors.T], dim=1)

    def _error_of_run(self, errors: _Array, projection: Projection) -> float:
        """Estimate the norm of the errors along the leading Ritz vectors from those in a few directions."""
        if not np.isfinite(errors).all():
            raise ArithmeticError(
                "a product along a combination of the Ritz vectors, made to measure errors, holds NaN or "
                "infinity; check the loss for overflow or a division by zero on these batches, or use float64"
            )
        count = min(self._k, projection.size)
        if len(errors) == count:
            return self._agreed(float(np.linalg.norm(errors)))
        factor = 1 if len(errors) == _MOST_DIRECTIONS else 4
        return self._agreed(float(factor * np.sqrt(count) * np.max(errors)))

    def _random_combinations(self, projection: Projection) -> _Array:
        """Return the weights of random orthonormal vectors in the span of the leading Ritz vectors, ``(N, m)``.

        The weight of a Ritz vector in the first two is never small, so an error along a single one shows. It is drawn
        from a continuous distribution, so equal errors along several Ritz vectors don't cancel.
        """
        count = min(self._k, projection.size)
        rng = np.random.default_rng(self._task.seed)
        vectors = rng.standard_normal((count, min(count, _MOST_DIRECTIONS)))
        first = (count, min(count, _FIRST_DIRECTIONS))
        vectors[:, :_FIRST_DIRECTIONS] = rng.choice([-1.0, 1.0], first) * rng.uniform(0.2, 1.8, first)
        weights = projection.eigenvectors(count) @ np.linalg.qr(vectors)[0]
        ranks = self._operator.ranks
        agreed: _Array = ranks.broadcast(torch.from_numpy(weights).to(ranks.control_device)).cpu().numpy()
        return agreed

    # -- keeping -------------------------------------------------------------------------------

    def _state(self, next_check: int, chain: Chain | None) -> dict[str, Any]:
        chains = self._decomposition.chains
        return {
            "decomposition": self._decomposition.state(),
            "next_check": next_check,
            "chain": chains.index(chain) if chain in chains else None,
            "seen": self._seen,
            "num_probes": self._num_runs,
            "rounding_basis": self._rounding_basis,
            "tested_size": self._tested_size,
            "measured_size": self._measured_size,
            "num_precise": self._num_precise,
            "num_converged": self._num_converged,
            "leading": self._leading,
            "found": self._found,
            "earlier": [(appended, list(values)) for appended, values in self._earlier],
        }

    def _restore(self, state: Mapping[str, Any]) -> tuple[int, Chain | None]:
        """Restore a state; return the size at which the next check is due, and the chain that is being expanded."""
        decomposition = self._decomposition
        assert self._checkpoint is not None
        # Earlier versions lack these.
        added = {"rounding_basis": None, "tested_size": 0, "measured_size": 0, "num_precise": 0}
        state = {**added, "found": None, "earlier": [], **state}
        with self._checkpoint.restoring():
            check_fields(state, {"decomposition": lambda value: isinstance(value, dict)})
            decomposition.restore(state["decomposition"])
            self._check_state(state)
        defect = self._agreed(decomposition.repeated())
        if not defect <= _REPEATED * decomposition.rounding:
            raise CheckpointError(
                f"the solver's checkpoint in {self._checkpoint.folder} is of another matrix: products differ from "
                f"those stored by {defect:.1e}, and rounding explains {decomposition.rounding:.1e}",
                "restore the weights and the data it was begun with, or delete the folder to start over",
            )
        self._seen, self._num_runs = state["seen"], state["num_probes"]
        self._rounding_basis, self._tested_size = state["rounding_basis"], state["tested_size"]
        self._measured_size, self._num_precise = state["measured_size"], state["num_precise"]
        self._num_converged, self._leading = state["num_converged"], state["leading"]
        self._found, self._earlier = state["found"], list(state["earlier"])
        position = state["chain"]
        return state["next_check"], None if position is None else decomposition.chains[position]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if a state is not one that `_state` returned for the restored decomposition."""
        decomposition = self._decomposition
        sizes = each(is_count, is_finite)
        leading = is_tensor(-1, dtype=torch.float64)
        restarts = each(
            is_count, lambda value: type(value) is list and len(value) == self._k and all(map(is_finite, value))
        )

        def is_size(value: Any) -> bool:
            return is_count(value) and value <= decomposition.num_appended

        check_fields(
            state,
            {
                "next_check": is_count,
                "chain": lambda value: value is None or (is_count(value) and value < len(decomposition.chains)),
                "seen": lambda value: value is None or sizes(value),
                "num_probes": is_count,
                "rounding_basis": lambda value: value in (None, *get_args(RoundingBasis)),
                "tested_size": is_size,
                "measured_size": is_size,
                "num_precise": is_count,
                "num_converged": lambda value: is_count(value) and value <= self._k,
                "leading": lambda value: value is None or (leading(value) and len(value) <= self._k),
                "found": lambda value: value is None or is_finite(value),
                "earlier": lambda value: type(value) is list and all(map(restarts, value)),
            },
        )
        if decomposition.num_matvecs > self._task.max_matvecs:
            raise ValueError(
                f"{decomposition.num_matvecs} products are stored, and {self._task.max_matvecs} are allowed"
            )

    # -- reporting -----------------------------------------------------------------------------

    def _agreed(self, value: float) -> float:
        return self._operator.ranks.agreed(value)

    def _report(self, decomposition: Decomposition) -> None:
        if self._progress is not None:
            num_matvecs = decomposition.num_matvecs
            self._progress(
                LanczosProgress(num_matvecs, self._task.max_matvecs, self._num_converged, self._task.k, self._leading)
            )

    def _result(self, proof: _Proof, stopped: StopReason, return_eigenvectors: bool) -> Spectrum:
        decomposition, projection = self._decomposition, proof.projection
        self._measure_errors(projection, again=True)
        proof = self._proof(projection, proof.first, proof.border)
        count = min(self._k, projection.size)
        ritz, rounding = projection.ritz_values, decomposition.rounding
        values = torch.from_numpy(np.concatenate([ritz, proof.upper[:count] - ritz[:count] + rounding]))
        values = self._operator.ranks.broadcast(values.to(self._operator.ranks.control_device)).cpu()
        ritz_values, bounds = values.split([len(ritz), count])
        eigenvalues = ritz_values[:count].clone()
        negligible = self._task.rtol * decomposition.norm if decomposition.norm > 0 else np.inf
        converged = meets_tolerance(eigenvalues, bounds, self._task.rtol, rounding, negligible)
        if stopped == "converged" and self._needed(ritz) < self._task.k:
            stopped = "no_more_positive"
        elif stopped == "converged" and not bool(converged.all()):
            stopped = "precision" if self._criterion is None else "criterion"
        vectors = None
        if return_eigenvectors:
            vectors = decomposition.basis.combine(torch.from_numpy(projection.eigenvectors(count).copy()))
        spent = sum(level_of_run(number, self._task.probe_level) for number in range(1, self._num_runs + 1))
        assert self._rounding_basis is not None
        return Spectrum(
            eigenvalues=eigenvalues,
            error_bounds=bounds.clone(),
            converged=converged,
            rtol=self._task.rtol,
            missed_probability=0.0 if proof.border == -np.inf else spent,
            num_matvecs=decomposition.num_matvecs,
            stopped=stopped,
            rounding=rounding,
            symmetry_defect=decomposition.asymmetry,
            ritz_values=ritz_values.clone(),
            eigenvectors=vectors,
            rounding_basis=self._rounding_basis,
            num_precise_products=self._num_precise,
            num_restarts=decomposition.num_restarts,
        )


def _no_direction_left(decomposition: Decomposition) -> ArithmeticError:
    return ArithmeticError(
        f"random vectors lie in the span of {decomposition.size} basis vectors, and the space has "
        f"{decomposition.operator.partition.size} dimensions; compute in float64"
    )
