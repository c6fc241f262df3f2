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

**Sharper, along a single chain.** Replacing :math:`C` by :math:`u I` supposes that all of the residual lies where
the complement is largest. Of the compression :math:`C_M` to the complement of the first :math:`M = N - p` vectors
more is known: the last p steps are a Lanczos run of it from the residual :math:`r_M`, so :math:`H` holds moments of
the residual's spectral measure. For :math:`x > u \ge \lambda_{\max}(C_M)`, by the Schur complement,

.. math:: \#\{i : \lambda_i(A) > x\} = \#\{i : \lambda_i(H_M + f(x)\, e_M e_M^T) > x\}, \qquad
          f(x) = r_M^T (x - C_M)^{-1} r_M,

and Gauss-Radau quadrature with a node at u bounds :math:`f(x)` from above. That bound belongs to
:math:`\hat H` with another last entry than u: the one that makes u the largest eigenvalue of its part behind M.

**Nothing missed.** What remains is :math:`u`. A Krylov space can be blind to an eigenvector: always to
further copies of a multiple eigenvalue, and to what an unlucky start is orthogonal to. So a fresh
Gaussian vector :math:`z`, orthogonal to the basis (its first M vectors), starts a short Lanczos run on :math:`C`. Let
:math:`p_0, p_1, \dots, p_m` be the orthonormal polynomials of that run (its three-term recurrence). If
:math:`C w = \mu w` with :math:`\mu > u \ge` all zeros of :math:`p_m`, the Christoffel bound on a point mass
says :math:`(w^T z)^2 \le \chi(u) = 1 / \sum_j p_j(u)^2`. That is deterministic; and for a uniformly random
unit vector in :math:`d = P - M` dimensions, :math:`(w^T z)^2 \sim \mathrm{Beta}(1/2, (d-1)/2)`. So

.. math:: \Pr\bigl[\lambda_{\max}(C) > u \text{ unseen}\bigr] \le I_{\chi(u)}\bigl(\tfrac12, \tfrac{d-1}{2}\bigr),

valid for a run of any length, also one stopped by looking at it. As the basis holds the converged vectors
*and* the half-converged ones, :math:`C` lies far below :math:`\theta_k` and some ten products suffice. When the
probe sees an eigenvalue that is missing among the wanted ones, another one, orthogonal to all of the basis, joins
it, and the run goes on with several chains.

**Rounding** enters each bound as an additive term: the operator's own a-priori error, plus the
asymmetry :math:`|v_i^T A v_j - v_j^T A v_i|` that the reorthogonalisation measures anyway.

References: Parlett, *The Symmetric Eigenvalue Problem* (1998), ch. 10-13, for interlacing and Lanczos;
Akhiezer, *The Classical Moment Problem* (1965), ch. 2, for the bound on a point mass; Golub and Meurant, *Matrices,
Moments and Quadrature with Applications* (2010), ch. 6, for Gauss-Radau bounds of quadratic forms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_callback.algorithms.decomposition import Chain, Decomposition
from hessian_callback.algorithms.missed_eigenvalues import Probe
from hessian_callback.algorithms.ritz import Projection
from hessian_callback.algorithms.solver_checkpoint import DEFAULT_SECONDS, CheckpointError, SolverCheckpoint
from hessian_callback.algorithms.spectrum import Spectrum, StopReason
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.linalg.linear_operator import SymmetricOperator

__all__ = ["LanczosProgress", "top_eigenvalues"]

_Array = NDArray[np.float64]

# Products of a probe after which it is better to go on with the main run.
_LONGEST_PROBE = 64
# By how much of the smallest wanted eigenvalue the complement must be believed to lie below what is provable, before a
# probe is sent: a narrower margin takes longer probes, and more of them are in vain.
_MARGIN = 0.02
# By how many rounding levels a product may differ from a stored one of the same matrix: each is off by one.
_REPEATED = 2


@dataclass(frozen=True)
class LanczosProgress:
    """Where a running eigenvalue computation stands, reported after every product.

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
    basis_device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = DEFAULT_SECONDS,
) -> Spectrum:
    r"""Compute the k largest eigenvalues (algebraically) of a symmetric operator.

    An eigenvalue counts as converged when its error bound :math:`b_i` (see `Spectrum`) is at most
    :math:`\max(\text{rtol}\,|\theta_i|,\; 4 \rho)`, :math:`\rho` being the rounding level.

    Args:
        operator: the matrix; a `HessianOperator`, or a `MatvecOperator` around any function.
        k: eigenvalues wanted. With fewer than ``k`` dimensions all of them are returned.
        rtol: relative tolerance of each eigenvalue.
        max_matvecs: products to spend at the most, the probe for missed eigenvalues included; ``None``: 10 k
            (at least 50). The best values found, with their true bounds, are returned when it is reached.
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
        basis_device: where to keep the basis, one vector for each product; default: the operator's device. On the
            CPU it costs a transfer of three vectors a product, and leaves the device to the products.
        checkpoint: a folder of this run alone, to save it in. Called again with the same arguments after its process
            was killed, it goes on from the last save, to the result, bit for bit, of a run that was not interrupted
            and whose products are the same bit for bit. That the matrix is the same is checked, by one product that
            is not counted, and so are its size and dtype, the number of ranks, ``k``, ``rtol``, ``max_matvecs``,
            ``seed``, ``probe_level`` and ``positive_only``. ``start``, ``criterion`` and ``return_eigenvectors`` are
            not: the stored run has begun with its own start, and those of this call decide when it ends, and on what
            comes back. Each rank saves its own slices. The result deletes what was saved. A save that fails, on a full
            disk, say, is warned of, and the computation goes on without further ones.
        checkpoint_every: seconds between two saves, and before the first; 0: as often as possible.

    Returns:
        The eigenvalues with their bounds, and how they were come by.

    Raises:
        ValueError: for arguments out of range. As `CheckpointError`, on all ranks together and before a product is
            spent that counts, when the checkpoint is damaged, or of another matrix or of other arguments, or its
            folder can't be used.
        ArithmeticError: when the operator returns NaN or infinity, or when the basis lost its orthogonality.

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
    size = operator.partition.size
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol}")
    if not 0 < probe_level < 1:
        raise ValueError(f"probe_level must lie between 0 and 1, got {probe_level}")
    if max_matvecs is None:
        max_matvecs = max(10 * k, 50)
    if max_matvecs < min(k + 1, size):
        raise ValueError(
            f"max_matvecs={max_matvecs} cannot give k={k} eigenvalues; allow at least {min(k + 1, size)} products"
        )
    stored: SolverCheckpoint | None = None
    if checkpoint is not None:
        run = {
            "k": k,
            "rtol": rtol,
            "max_matvecs": max_matvecs,
            "seed": seed,
            "probe_level": probe_level,
            "positive_only": positive_only,
        }
        stored = SolverCheckpoint(checkpoint, operator, run, checkpoint_every)
    solver = _Solver(
        operator, k, rtol, max_matvecs, seed, probe_level, positive_only, criterion, progress, basis_device, stored
    )
    with full_float32():
        spectrum = solver.solve(start, return_eigenvectors)
    if stored is not None:
        stored.delete()
    return spectrum


@dataclass(frozen=True, eq=False)
class _Proof:
    """Small matrices and a bound on a complement, from which the bounds of the eigenvalues follow.

    Attributes:
        projection: the small matrices.
        first: the complement is that of so many vectors; ``None``: of all of them.
        border: the largest eigenvalue that the compression to it may have.
        k: how many eigenvalues are bounded.
    """

    projection: Projection
    first: int | None
    border: float
    k: int

    @property
    def ritz(self) -> _Array:
        """Lower bounds, fewer than k where the basis is smaller."""
        return self.projection.ritz_values[: self.k]

    @cached_property
    def upper(self) -> _Array:
        """Upper bounds, ``(k,)``."""
        if self.first is None:
            return self.projection.upper_bounds(self.border, self.k)
        return self.projection.radau_bounds(self.first, self.border, self.k)


class _Solver:
    """Grow the basis until the bounds hold, and prove that nothing was missed."""

    def __init__(
        self,
        operator: SymmetricOperator,
        k: int,
        rtol: float,
        max_matvecs: int,
        seed: int,
        level: float,
        positive_only: bool,
        criterion: Callable[[Tensor, Tensor], bool] | None,
        progress: Callable[[LanczosProgress], None] | None,
        basis_device: torch.device | str | None,
        checkpoint: SolverCheckpoint | None,
    ) -> None:
        self._operator = operator
        self._dimensions = operator.partition.size
        self._wanted = k
        self._k = min(k, self._dimensions)
        self._rtol = rtol
        self._max_matvecs = max_matvecs
        self._level = level
        self._positive_only = positive_only
        self._criterion = criterion
        self._progress = progress
        self._num_converged = 0
        self._leading: Tensor | None = None
        self._seen: tuple[int, float] | None = None  # the basis' size at the last vain probe, and what that saw
        self._num_probes = 0
        self._decomposition = Decomposition(operator, seed, basis_device)
        self._checkpoint = checkpoint
        # The last products are kept for a probe, so that what is returned unconverged has true bounds too.
        self._reserve = min(12, max(1, max_matvecs // 5))

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
            if self._checkpoint is not None and self._checkpoint.is_due(decomposition.size):
                self._checkpoint.save(decomposition.basis, self._state(next_check, chain))
            if decomposition.size >= next_check or not decomposition.chains:
                projection = decomposition.projection()
                first = self._first_of_tail(projection)
                limit = self._provable_limit(projection, first)
                if limit is not None:
                    proof, ruled_out = self._prove(projection, first, limit)
                    if ruled_out:
                        return self._result(proof, "converged", return_eigenvectors)
                    if decomposition.num_matvecs >= self._max_matvecs:
                        return self._result(proof, "max_matvecs", return_eigenvectors)
                between = 50 if limit is None else 20
                next_check = decomposition.size + max(1, decomposition.size // between)
                chain = None
                if limit is not None:
                    continue  # The probe may have filled the space.
            if decomposition.num_matvecs >= self._max_matvecs - self._reserve:
                projection = decomposition.projection()
                proof, _ = self._prove(projection, self._first_of_tail(projection), None)
                if decomposition.size < self._dimensions:
                    return self._result(proof, "max_matvecs", return_eigenvectors)
            elif decomposition.chains:
                # Chosen anew at each check only: it takes the eigenvectors of H.
                if chain not in decomposition.chains:
                    chain = self._most_useful_chain()
                if decomposition.expand(chain):
                    self._report(decomposition)
            elif decomposition.begin():
                self._report(decomposition)
            else:
                break
        # The basis spans the whole space: H is A.
        stopped: StopReason = "converged" if self._wanted <= self._dimensions else "exhausted"
        return self._result(_Proof(decomposition.projection(), None, -np.inf, self._k), stopped, return_eigenvectors)

    def _begin(self, start: Tensor | None) -> None:
        if start is None:
            self._decomposition.begin()
        else:
            start = self._operator.partition.cut(start.to(self._operator.device, self._operator.dtype))
            if not self._decomposition.begin(start):
                raise ValueError("the start vector is zero; pass another one, or none for a Gaussian vector")
        self._report(self._decomposition)

    def _prove(self, projection: Projection, first: int | None, limit: float | None) -> tuple[_Proof, bool]:
        """Send a probe; return what it proves, and whether it ruled out eigenvalues above the limit.

        Without a limit it takes all products that are left.
        """
        decomposition = self._decomposition
        if first is not None:
            branch = decomposition.branch(first)
            probe, ruled_out = self._probe(branch, limit, _LONGEST_PROBE)
            decomposition.absorb(branch)
            self._seen = (projection.size, probe.largest_seen)
            border = self._border(probe, limit if ruled_out else None)
            if not ruled_out:  # The basis may show more than the probe did.
                shown = float(projection.tail(first).ritz_values[0])
                border = max(border, shown + 1e-6 * abs(shown) + decomposition.rounding)
            smallest = projection.ritz_values[min(self._needed(projection.ritz_values), projection.size) - 1]
            found = bool(self._agreed(float(probe.largest_seen > smallest)))
            if ruled_out or not found or decomposition.num_matvecs >= self._max_matvecs:
                return _Proof(projection, first, border, self._k), ruled_out
            # It saw an eigenvalue that the basis may never show, such as a copy: a direction that must join.
        probe, ruled_out = self._probe(decomposition, limit, max(24, decomposition.size // 4))
        ruled_out = ruled_out and first is None
        if not ruled_out:
            projection = decomposition.projection()
        return _Proof(projection, None, self._border(probe, limit if ruled_out else None), self._k), ruled_out

    def _border(self, probe: Probe, limit: float | None) -> float:
        border = self._agreed(probe.confident_bound(self._level))
        return border if limit is None else min(limit, border)

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

    def _known(self, proof: _Proof) -> NDArray[np.bool_]:
        """Which bounds are within tolerance, if the complement's eigenvalues are at most ``proof.border``."""
        ritz, upper = proof.ritz, proof.upper
        known = np.zeros(self._k, dtype=bool)
        known[: len(ritz)] = upper[: len(ritz)] - ritz + self._decomposition.rounding <= self._tolerance(ritz)
        if self._positive_only and ritz[0] > self._zero:
            known |= upper <= self._zero
        return known

    def _sufficient(self, proof: _Proof) -> bool:
        """Whether the bounds are tight enough."""
        return bool(self._known(proof)[: self._needed(proof.ritz)].all()) or self._accepted(proof)

    def _note(self, proof: _Proof) -> None:
        """Keep for `LanczosProgress` how far the run has come."""
        self._num_converged = int(np.sum(np.cumprod(self._known(proof))))
        self._leading = torch.from_numpy(proof.ritz.copy())

    def _accepted(self, proof: _Proof) -> bool:
        if self._criterion is None or len(proof.ritz) < self._k:
            return False
        rounding = self._decomposition.rounding
        return self._criterion(torch.from_numpy(proof.ritz - rounding), torch.from_numpy(proof.upper + rounding))

    def _first_of_tail(self, projection: Projection) -> int | None:
        """Where the latest vectors begin, whose recurrence sharpens the bounds; None if there is no such tail.

        In a small space a probe might come to its end, and of several chains no recurrence is known.
        """
        size = projection.size
        latest = min(max(12, size // 24), _LONGEST_PROBE, size // 4)
        if latest == 0 or not projection.is_single_chain or self._dimensions - size <= _LONGEST_PROBE + 1:
            return None
        return size - latest

    def _provable_limit(self, projection: Projection, first: int | None) -> float | None:
        """The largest limit on the complement under which the bounds are tight enough.

        None while the complement is believed to reach above it.
        """
        limit = self._believed_limit(projection, first)
        believed = _Proof(projection, first, limit, self._k)
        self._note(believed)
        if not self._agreed(float(self._sufficient(believed))):
            return None
        ritz = projection.ritz_values
        last = self._needed(ritz) - 1
        tolerated = ritz[last] + self._tolerance(ritz)[last] if last < len(ritz) else self._zero
        high = max(float(tolerated), self._zero if self._positive_only else -np.inf)
        if self._criterion is not None:  # It may bear bounds that are wider by far.
            high = max(high, float(ritz[0]))
        for _ in range(12):
            middle = (limit + high) / 2
            if self._sufficient(_Proof(projection, first, middle, self._k)):
                limit = middle
            else:
                high = middle
        return self._agreed(limit)

    def _believed_limit(self, projection: Projection, first: int | None) -> float:
        """An estimate of the complement's largest eigenvalue, from the latest basis vectors.

        They lie in the complement of the basis as it was before them.
        """
        ritz = projection.ritz_values
        if not projection.columns:
            return float(min(ritz[-1], 0.0))
        size = projection.size
        if first is None:
            return float(projection.tail(size - min(size, max(8, size // 24))).ritz_values[0])
        believed = float(projection.tail(first).ritz_values[0])
        if self._seen is not None and size <= 1.25 * self._seen[0]:
            believed = max(believed, self._seen[1])
        return believed + _MARGIN * float(abs(ritz[min(self._needed(ritz), len(ritz)) - 1]))

    def _most_useful_chain(self) -> Chain:
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

    def _probe(self, decomposition: Decomposition, limit: float | None, longest: int) -> tuple[Probe, bool]:
        """Look for eigenvalues above ``limit`` in the complement of a basis.

        Returns the probe, and whether it ruled them out. It ends when it did, when it found one, after ``longest``
        products, or when all are spent: without a limit, only then. Its vectors stay in the basis.
        """
        first = decomposition.size
        self._num_probes += 1
        probe = Probe()
        while decomposition.begin():
            start = decomposition.size - 1
            while True:
                self._report(decomposition)
                size = decomposition.size
                run = decomposition.projection().tail(start)
                rounding = max(decomposition.eps * decomposition.norm, np.finfo(float).tiny)
                probe.update(run, dimensions=self._dimensions - start, rounding=rounding, new=size == start + 1)
                if limit is not None:
                    if self._agreed(probe.missed_probability(limit)) <= self._level:
                        return probe, True
                    if self._agreed(probe.largest_seen) > limit or size - first >= longest:
                        return probe, False
                if decomposition.num_matvecs >= self._max_matvecs or size == self._dimensions:
                    return probe, False
                own = [chain for chain in decomposition.chains if chain.column == size - 1]
                if not own or not decomposition.expand(own[0]):
                    break
        raise ArithmeticError("a random vector lies in the span of fewer vectors than there are dimensions")

    # -- keeping -------------------------------------------------------------------------------

    def _state(self, next_check: int, chain: Chain | None) -> dict[str, Any]:
        chains = self._decomposition.chains
        return {
            "decomposition": self._decomposition.state(),
            "next_check": next_check,
            "chain": chains.index(chain) if chain in chains else None,
            "seen": self._seen,
            "num_probes": self._num_probes,
            "num_converged": self._num_converged,
            "leading": self._leading,
        }

    def _restore(self, state: Mapping[str, Any]) -> tuple[int, Chain | None]:
        """Go on from a state; return when the next check is due, and the chain that is being expanded."""
        decomposition = self._decomposition
        decomposition.restore(state["decomposition"])
        defect = self._agreed(decomposition.defect())
        if not defect <= _REPEATED * decomposition.rounding:
            assert self._checkpoint is not None
            raise CheckpointError(
                f"the solver's checkpoint in {self._checkpoint.folder} is of another matrix: products differ from "
                f"those stored by {defect:.1e}, and rounding explains {decomposition.rounding:.1e}",
                "restore the weights and the data it was begun with, or delete the folder to start over",
            )
        self._seen, self._num_probes = state["seen"], state["num_probes"]
        self._num_converged, self._leading = state["num_converged"], state["leading"]
        position = state["chain"]
        return state["next_check"], None if position is None else decomposition.chains[position]

    # -- reporting -----------------------------------------------------------------------------

    def _agreed(self, value: float) -> float:
        """Rank 0's value on all ranks: libraries may round differently on different machines."""
        ranks = self._operator.ranks
        if ranks.world_size == 1:
            return value
        return float(ranks.broadcast(torch.tensor([value], dtype=torch.float64, device=ranks.control_device)))

    def _report(self, decomposition: Decomposition) -> None:
        if self._progress is not None:
            num_matvecs = decomposition.num_matvecs
            self._progress(
                LanczosProgress(num_matvecs, self._max_matvecs, self._num_converged, self._wanted, self._leading)
            )

    def _result(self, proof: _Proof, stopped: StopReason, return_eigenvectors: bool) -> Spectrum:
        projection = proof.projection
        decomposition = self._decomposition
        decomposition.check_orthogonality()
        count = min(self._k, projection.size)
        ritz = projection.ritz_values
        rounding = decomposition.rounding
        values = torch.from_numpy(np.concatenate([ritz, proof.upper[:count] - ritz[:count] + rounding]))
        values = self._operator.ranks.broadcast(values.to(self._operator.ranks.control_device)).cpu()
        ritz_values, bounds = values.split([len(ritz), count])
        eigenvalues = ritz_values[:count].clone()
        converged = bounds <= torch.clamp(self._rtol * eigenvalues.abs(), min=4 * rounding)
        if stopped == "converged" and self._needed(ritz) < self._wanted:
            stopped = "no_more_positive"
        elif stopped == "converged" and self._criterion is not None and not bool(converged.all()):
            stopped = "criterion"
        vectors = None
        if return_eigenvectors:
            vectors = decomposition.basis.combine(torch.from_numpy(projection.eigenvectors(count).copy()))
        return Spectrum(
            eigenvalues=eigenvalues,
            error_bounds=bounds.clone(),
            converged=converged,
            rtol=self._rtol,
            missed_probability=0.0 if proof.border == -np.inf else min(1.0, self._num_probes * self._level),
            num_matvecs=decomposition.num_matvecs,
            stopped=stopped,
            rounding=rounding,
            symmetry_defect=decomposition.asymmetry,
            ritz_values=ritz_values.clone(),
            eigenvectors=vectors,
        )
