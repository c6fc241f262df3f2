r"""Krylov decompositions :math:`A V = V H + R` with an orthonormal basis, of one or several Krylov sequences."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_callback.algorithms.ritz import Projection
from hessian_callback.algorithms.stored_fields import check_fields, each, is_count, is_finite, is_level, is_tensor
from hessian_callback.algorithms.thick_restart import ThickRestart, thick_restart
from hessian_callback.linalg.krylov_basis import KrylovBasis, row_products
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.random_vectors import gaussian_slice

__all__ = ["Chain", "Decomposition"]

_Array = NDArray[np.float64]

# Largest residual, in units of eps ||A||, that counts as zero: its chain has ended in an invariant subspace.
_NEGLIGIBLE = 8
# Squared part of a unit vector whose removal takes a second pass: the errors of the first have grown by 5 % then.
_MUCH = 0.1
# Size of the first basis whose orthogonality is tested; each later test follows a doubling.
_FIRST_TEST = 32
# Gaussian vectors to draw before the complement of the basis counts as empty.
_MOST_DRAWS = 8
# Error of a change of basis in units of eps ||A||. Rounding changes each vector by at most eps / 2, and enters A V and
# V H. Those of several restarts are independent.
_RESTART = 2
# Largest root mean square of the entries of the discrepancy D, in units of eps ||A||, that the rounding errors of inner
# products explain.
_DISCREPANCY = 4


@dataclass(eq=False)
class Chain:
    """One Krylov sequence.

    Attributes:
        residual: the part of the last product that is orthogonal to the basis, ``(slice_length,)``.
        column: index of the basis vector whose product with A left this residual.
        detached: whether cancellation has made the residual lose its orthogonality to the basis.
        probing: whether the chain belongs to a probe that is running, so that it survives at the rounding level.
    """

    residual: Tensor
    column: int
    detached: bool = False
    probing: bool = False


class Decomposition:
    r"""A Krylov decomposition ``A V = V (H + D) + R``, and the operations that begin and expand its chains.

    In exact arithmetic and for a symmetric A the discrepancy D is zero. It is strictly upper triangular: its column j
    holds the overlaps of ``A v_j`` with earlier basis vectors that symmetry did not predict.

    Attributes:
        norm: the largest :math:`\|A v\|` seen, or the value that `raise_norm` was called with.
        product_error: estimate of :math:`\|V D + F\|` from products in higher precision; 0 if there is none.
        orthogonality: the largest :math:`\|(V^T V - I) x\|` seen, for random unit vectors x.
        num_matvecs: products spent.
        num_restarts: number of times that `restart` was called.
        num_kept: number of vectors that the last one kept. Later ones are Lanczos vectors of the complement of these.
        num_shared: of a branch: number of vectors that it shares.
        window: of a branch: largest number of own vectors that it stores; ``None``: all.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        seed: int,
        basis_device: torch.device | str | None = None,
        most_vectors: int | None = None,
    ) -> None:
        self.operator = operator
        self.basis = KrylovBasis(operator, basis_device, most_vectors)
        self.chains: list[Chain] = []
        self.norm = 0.0
        self.product_error = 0.0
        self.orthogonality = 0.0
        self.eps = float(torch.finfo(operator.dtype).eps)
        self.num_matvecs = 0
        self.num_restarts = 0
        self.num_kept = 0
        self._removed = 0  # vectors that restarts removed
        self.window: int | None = None
        self.num_shared = 0
        self._forgotten = 0  # of a branch with a window: own vectors that are not stored any more
        self._gram: _Array = np.zeros((0, 0))
        self._diagonal: list[float] = []
        self._couplings: list[tuple[int, int, float]] = []
        self._discrepancy = 0.0  # ||D||_F^2,
        self._discrepancies = 0  # and the number of entries in it
        self._neglected = 0.0  # sum of the squared norms of the residuals that were dropped
        self._next_test = _FIRST_TEST
        self._seed = seed
        self._draws = 0

    @property
    def size(self) -> int:
        """Number of basis vectors, those that a branch has forgotten included."""
        return self.basis.size + self._forgotten

    @property
    def num_appended(self) -> int:
        """Number of vectors that were ever appended to the basis."""
        return self.size + self._removed

    def projection(self) -> Projection:
        """Return the small matrices as they stand."""
        columns = [chain.column for chain in self.chains]
        return Projection(np.array(self._diagonal), list(self._couplings), columns, self._gram)

    def branch(self, first: int | None = None, window: int | None = None) -> Decomposition:
        """Return a copy of the decomposition that shares its vectors and grows independently.

        Args:
            first: number of vectors to share, as the decomposition was with these; for a single chain only. ``None``:
                all of them.
            window: largest number of own vectors to store, at least 2. Older ones are forgotten, so later ones are not
                made orthogonal to them, and the shared chains keep their residuals. ``None``: all.
        """
        other = copy.copy(self)
        other.num_shared = self.size if first is None else first
        other.window = window
        other.basis = self.basis.branch(other.num_shared, window)
        if first is None:
            other._diagonal, other._couplings = list(self._diagonal), list(self._couplings)
            other.chains = [dataclasses.replace(chain, residual=chain.residual.clone()) for chain in self.chains]
            other._gram = self._gram.copy()
            return other
        other._diagonal = self._diagonal[:first]
        # The link that leads out is that to the next vector.
        *other._couplings, (_, column, link) = self._couplings[:first]
        other.chains = [Chain(link * self.basis.vector(first), column)]
        other._gram = np.array([[link**2]])
        return other

    def absorb(self, branch: Decomposition) -> None:
        """Add the products that a branch has spent, and the error levels that it has measured."""
        self.num_matvecs, self._draws = branch.num_matvecs, branch._draws
        self.norm, self.orthogonality = max(self.norm, branch.norm), max(self.orthogonality, branch.orthogonality)
        if branch.asymmetry > self.asymmetry:
            self._discrepancy, self._discrepancies = branch._discrepancy, branch._discrepancies
        self._neglected = max(self._neglected, branch._neglected)

    def restart(self, largest: int, smallest: int = 0) -> None:
        """Replace the basis by an orthonormal basis of the span of Ritz vectors of both ends, see `thick_restart`.

        The number of chains may fall: residuals can turn out to depend on each other.
        """
        small = self._agreed(thick_restart(self.projection(), largest, smallest))
        count = largest + smallest
        self.basis.transform(torch.from_numpy(small.weights @ self._orthonormalising(small.weights)))
        self._removed += len(small.weights) - count
        self._diagonal = small.diagonal.tolist()
        self._couplings = list(zip(small.rows.tolist(), small.columns.tolist(), small.values.tolist(), strict=True))
        self._gram = small.mixing.T @ self._gram @ small.mixing
        if self.chains:
            residuals = self._residuals()
            mixed = torch.from_numpy(small.mixing.T).to(residuals) @ residuals
            for column, chain in enumerate(self.chains, count - len(self.chains)):
                # Division by a small norm enlarges what is left of the basis.
                chain.residual, chain.column, chain.detached = mixed[column - count], column, True
        self.num_restarts += 1
        self.num_kept = count
        self._drop_negligible()

    def _orthonormalising(self, weights: _Array) -> _Array:
        r"""Return :math:`(W^T V^T V W)^{-1/2}`, to first order.

        Deviations from orthogonality would add up over restarts.
        """
        gram = self._reduced(self.basis.gram().flatten()).cpu().numpy().reshape(self.basis.size, -1)
        deviation = weights.T @ gram @ weights - np.eye(weights.shape[1])
        self.orthogonality = max(self.orthogonality, float(np.linalg.norm(deviation, 2)))
        correction: _Array = np.eye(weights.shape[1]) - deviation / 2
        return correction

    def _agreed(self, small: ThickRestart) -> ThickRestart:
        """Return the small matrices of the first rank: the eigenvectors of equal matrices may differ in their signs."""
        ranks = self.operator.ranks
        if ranks.world_size == 1:
            return small
        parts = [small.weights, small.diagonal, small.values, small.mixing]
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(ranks.control_device)
        split = ranks.broadcast(flat).cpu().split([part.size for part in parts])
        arrays = [piece.numpy().reshape(part.shape) for piece, part in zip(split, parts, strict=True)]
        return ThickRestart(arrays[0], arrays[1], small.rows, small.columns, arrays[2], arrays[3])

    # -- keeping -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything except the basis, in types that ``torch.load(weights_only=True)`` accepts.

        Not while a probe is running.
        """
        assert not any(chain.probing for chain in self.chains), "end_probe comes first"
        return {
            "norm": self.norm,
            "product_error": self.product_error,
            "orthogonality": self.orthogonality,
            "discrepancy": (self._discrepancy, self._discrepancies),
            "neglected": self._neglected,
            "next_test": self._next_test,
            "num_matvecs": self.num_matvecs,
            "restarts": (self.num_restarts, self.num_kept, self._removed),
            "draws": self._draws,
            "diagonal": list(self._diagonal),
            "couplings": list(self._couplings),
            "gram": torch.from_numpy(self._gram),
            "chains": [(chain.residual.cpu(), chain.column, chain.detached) for chain in self.chains],
        }

    def restore(self, state: Any) -> None:
        """Restore a state; the basis must hold the vectors that belong to it.

        Raises:
            ValueError: if the state is not one that `state` returned for a basis of this size.
        """
        if isinstance(state, dict) and "discrepancy" not in state:
            # Earlier versions stored twice the norm of the largest column of D.
            check_fields(state, {"asymmetry": is_level, "diagonal": lambda value: type(value) is list})
            earlier = (state["asymmetry"] ** 2, len(state["diagonal"]))
            added = {"product_error": 0.0, "orthogonality": 0.0, "neglected": 0.0, "next_test": _FIRST_TEST}
            state = {**state, **added, "discrepancy": earlier}
        if isinstance(state, dict):
            state = {"restarts": (0, 0, 0), **state}  # Earlier versions had none.
        self._check(state)
        self.norm, self.product_error, self.orthogonality = (
            state[name] for name in ("norm", "product_error", "orthogonality")
        )
        self._discrepancy, self._discrepancies = state["discrepancy"]
        self._neglected, self._next_test = state["neglected"], state["next_test"]
        self.num_matvecs, self._draws = state["num_matvecs"], state["draws"]
        self.num_restarts, self.num_kept, self._removed = state["restarts"]
        self._diagonal, self._couplings = list(state["diagonal"]), list(state["couplings"])
        self._gram = state["gram"].numpy()
        device = self.operator.device
        self.chains = [Chain(residual.to(device), column, detached) for residual, column, detached in state["chains"]]

    def _check(self, state: Any) -> None:
        """Raise a `ValueError` if a state does not fit a basis of this size."""

        def is_index(value: Any) -> bool:
            return is_count(value) and value < self.size

        def are_couplings(value: Any) -> bool:
            entry = each(is_index, is_index, is_finite)
            if type(value) is not list or not all(entry(one) for one in value):
                return False
            rows = [row for row, _, _ in value]
            return rows == sorted(rows) and all(row > column for row, column, _ in value)

        def are_chains(value: Any) -> bool:
            residual = is_tensor(self.operator.partition.slice_length, dtype=self.operator.dtype)
            entry = each(residual, is_index, lambda flag: type(flag) is bool)
            return type(value) is list and all(entry(one) for one in value)

        levels = ("norm", "product_error", "orthogonality", "neglected")
        check_fields(
            state,
            {
                **dict.fromkeys(levels, is_level),
                "discrepancy": each(is_level, is_count),
                "next_test": is_count,
                "num_matvecs": lambda value: is_count(value) and value >= self.size,
                "restarts": each(is_count, lambda value: is_count(value) and value <= self.size, is_count),
                "draws": is_count,
                "diagonal": lambda value: (
                    type(value) is list and len(value) == self.size and all(map(is_finite, value))
                ),
                "couplings": are_couplings,
                "chains": are_chains,
            },
        )
        number = len(state["chains"])
        check_fields(state, {"gram": is_tensor(number, number, dtype=torch.float64)})

    def repeated(self) -> float:
        """Return the difference between a product along a combination of all basis vectors and the stored ones.

        It is at the rounding level if the decomposition belongs to this operator. Half of the weights are random, so
        that every basis vector takes part. The other half is H times the random half, which emphasises the largest
        eigenvalues: these change first if a network's weights change. The product is not counted.
        """
        weights = np.random.default_rng(self._seed).standard_normal(self.size)
        weights /= np.linalg.norm(weights)
        image = self._times(weights)
        if image.any():
            weights += image / np.linalg.norm(image)
        defects = self.defects(weights[:, None], lambda v: self.operator.matvec_slice(v[:, 0].contiguous())[:, None])
        assert defects is not None
        return float(defects[0])

    def defects(self, weights: _Array, products: Callable[[Tensor], Tensor | None]) -> _Array | None:
        r"""Return :math:`\|A x - (V H + R) s\|` for unit vectors :math:`x = V s`.

        With products of higher precision these are norms of :math:`(V D + F) s`, which holds all errors of the run: of
        its products, of the recurrence, and of residuals that were dropped.

        Args:
            weights: the vectors s, up to their norms, ``(m, n)``; entries beyond the m-th are zero.
            products: multiplies vectors, ``(slice_length, n)``, with A.

        Returns:
            ``(n,)``; ``None`` if ``products`` returns ``None``.
        """
        padded = np.zeros((self.size, weights.shape[1]))
        padded[: len(weights)] = weights
        vectors = self.basis.combine(torch.from_numpy(padded))
        lengths = [self._norm_of(vector.contiguous()) for vector in vectors.T]
        images = products(vectors / vectors.new_tensor(lengths))
        if images is None:
            return None
        stored = self.basis.combine(torch.from_numpy(np.stack([self._times(s) for s in padded.T], axis=1)))
        result = np.zeros(len(lengths))
        for index, length in enumerate(lengths):
            difference = images[:, index] * length
            difference -= stored[:, index]
            for chain in self.chains:
                difference -= chain.residual * float(padded[chain.column, index])
            result[index] = self._norm_of(difference) / length
        return result

    def _times(self, vector: _Array) -> _Array:
        """Compute ``H s``."""
        image: _Array = np.array(self._diagonal) * vector
        for row, column, value in self._couplings:
            image[row] += value * vector[column]
            image[column] += value * vector[row]
        return image

    # -- growing -------------------------------------------------------------------------------

    def begin(self, start: Tensor | None = None, *, probing: bool = False) -> bool:
        """Start a chain from a vector, or a fresh Gaussian one, made orthogonal to the basis.

        Returns whether there was a direction left to start from.
        """
        vector = None
        if start is not None:
            start = self._scaled(start.detach())
        if self.window is not None:
            # A run of its own: its vector is drawn in the complement of the shared vectors.
            self._forgotten += self.basis.size - self.num_shared
            self.basis.size = self.num_shared
        for _ in range(1 if start is not None else _MOST_DRAWS if self.size < self.operator.partition.size else 0):
            # A Gaussian vector may happen to lie in the span of a basis that fills the space almost.
            vector = self._outside(self._gaussian() if start is None else start)
            if vector is not None:
                break
        if vector is None:
            return False
        if self.chains:
            # The residuals must stay orthogonal to the basis, which is about to grow.
            overlaps = self._reduced(row_products(self._residuals(), vector)).tolist()
            self._detach(vector, self.chains, overlaps)
        self._multiply(vector, None, probing)
        return True

    def _gaussian(self) -> Tensor:
        operator = self.operator
        self._draws += 1
        return gaussian_slice(
            operator.partition, seed=self._seed, draw=self._draws - 1, dtype=operator.dtype, device=operator.device
        )

    def _scaled(self, start: Tensor) -> Tensor:
        """Divide a vector by a power of two near its largest entry, so that squares neither vanish nor overflow."""
        ranks = self.operator.ranks
        own = torch.linalg.vector_norm(start, ord=torch.inf)[None].double()
        largest = float(ranks.all_reduce(own.to(ranks.control_device)))
        return start / math.ldexp(1.0, math.frexp(largest)[1]) if largest > 0 else start

    def _outside(self, start: Tensor) -> Tensor | None:
        """Return the unit vector along the part of a vector outside the basis; ``None`` if that is rounding."""
        before = self._norm_of(start)
        for _ in range(2 if self.size else 0):
            self._orthogonalise(start)
        after = self._norm_of(start)
        if not after > 100 * self.eps * before:
            return None
        vector = start / after
        # Cancellation has enlarged the overlaps with the basis that rounding left.
        for _ in range(2 if self.size and after < 0.1 * before else 0):
            self._orthogonalise(vector)
            vector /= self._norm_of(vector)
        return vector

    def expand(self, chain: Chain) -> bool:
        """Append a chain's residual to the basis and multiply.

        Returns False if the residual turned out to be rounding, so that the chain has ended.
        """
        position = self.chains.index(chain)
        beta = float(np.sqrt(self._gram[position, position]))
        vector = chain.residual / beta
        if chain.detached:
            # Cancellation has enlarged what the pass left of the basis.
            removed = self._orthogonalise(vector)
            if float(removed @ removed) > _MUCH:
                self._orthogonalise(vector)
            length = self._norm_of(vector)
            if length < (0.05 if chain.probing else 0.5):
                self._drop(position)
                return False
            vector /= length
            if length < 0.5:
                for _ in range(2):
                    self._orthogonalise(vector)
                vector /= self._norm_of(vector)
        self._couplings.append((self.size, chain.column, beta))
        others = [other for other in self.chains if other is not chain]
        overlaps = np.delete(self._gram[position], position) / beta
        self._detach(vector, others, overlaps.tolist())
        self._multiply(vector, chain)
        return True

    def end_probe(self) -> None:
        """Treat the chains of a probe like any other: drop those that have only rounding left."""
        for chain in self.chains:
            chain.probing = False
        self._drop_negligible()

    def _drop(self, position: int) -> None:
        self._neglected += float(self._gram[position, position])
        del self.chains[position]
        self._gram = np.delete(np.delete(self._gram, position, axis=0), position, axis=1)

    def _detach(self, vector: Tensor, chains: list[Chain], overlaps: list[float]) -> None:
        for chain, overlap in zip(chains, overlaps, strict=True):
            self._couplings.append((self.size, chain.column, overlap))
            if self.window is None:
                chain.residual.add_(vector, alpha=-overlap)
                chain.detached = True

    def _multiply(self, vector: Tensor, chain: Chain | None, probing: bool = False) -> None:
        """Append a unit vector that is orthogonal to the basis, and split its image.

        The components of the image along the vector itself and along those that symmetry couples it to are removed
        first, vector by vector. The rest overlaps with the basis by rounding errors only, so one pass over the basis
        suffices; removing large components would take two ("twice is enough", Parlett 1998, ch. 6).
        """
        if self.window is not None and self.basis.size == self.num_shared + self.window:
            self.basis.remove(self.num_shared)
            self._forgotten += 1
        index = self.size
        self.basis.append(vector)
        image = self.operator.matvec_slice(vector).detach()
        self.num_matvecs += 1
        # The operator may return its argument or a buffer that it reuses, and the residual is changed in place.
        image = image.clone(memory_format=torch.contiguous_format)
        known = {self._position(column): value for column, value in self._known_couplings(index).items()}
        for position, value in known.items():
            image.sub_(self.basis.vector(position), alpha=value)
        own = self._reduced(row_products(vector[None], image))
        image.sub_(vector * own.to(vector))
        rest = self._orthogonalise(image)
        if chain is None:
            chain = Chain(image, index, probing=probing)
            self.chains.append(chain)
        else:
            chain.residual, chain.column, chain.detached = image, index, False
        residuals = self._residuals()
        gram = self._reduced(torch.cat([row_products(residuals, residual) for residual in residuals]))
        # One transfer to the host a step.
        own, rest, gram = torch.cat([own, rest, gram]).cpu().split([1, self.basis.size, len(gram)])
        unexpected: _Array = rest.numpy()
        coefficients = unexpected.copy()
        coefficients[-1] += float(own)
        coefficients[list(known)] += list(known.values())
        self._gram = gram.numpy().reshape(len(self.chains), len(self.chains))
        self._diagonal.append(float(coefficients[-1]))
        squared = float(self._gram[self.chains.index(chain), self.chains.index(chain)])
        if not np.isfinite(squared):
            raise self._not_finite(index, image)
        self.norm = max(self.norm, float(np.sqrt(squared + coefficients @ coefficients)))
        removed = float(unexpected @ unexpected)
        self._discrepancy += float(unexpected[:-1] @ unexpected[:-1])
        self._discrepancies += len(unexpected) - 1
        chain.detached = removed > 0.01 * squared
        if removed > 100 * squared and not chain.probing:
            self._drop(self.chains.index(chain))
        self._drop_negligible()
        if self.size >= self._next_test:
            self._next_test = 2 * self.size
            self.check_orthogonality()

    def _position(self, column: int) -> int:
        """Return where the basis stores a vector."""
        return column if column < self.num_shared else column - self._forgotten

    def _drop_negligible(self) -> None:
        """Drop the chains whose residual is rounding: they have ended in an invariant subspace.

        A probe continues through the rounding level, because the error bounds rely on the size of its residuals.
        """
        full = self.size == self.operator.partition.size
        level = (self.eps * self.norm) ** 2
        for position in reversed(range(len(self.chains))):
            part = 1 / (64 * self.operator.partition.size) if self.chains[position].probing else _NEGLIGIBLE**2
            if full or self._gram[position, position] <= max(part * level, self._underflow):
                self._drop(position)

    def _not_finite(self, index: int, image: Tensor) -> ArithmeticError:
        finite = float(self._reduced(torch.isfinite(image).all().logical_not().double()[None])) == 0
        if finite:
            return ArithmeticError(
                f"the product of the operator with basis vector {index} is finite, but its squared norm overflows "
                f"{self.operator.dtype}; scale the loss down, or use float64"
            )
        return ArithmeticError(
            f"the product of the operator with basis vector {index} holds NaN or infinity; "
            "check the loss for overflow or a division by zero on these batches, or use float64"
        )

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
        return float(self._reduced(row_products(vector[None], vector)).sqrt())

    def _known_couplings(self, index: int) -> dict[int, float]:
        """Return the entries of the newest column of ``H`` that follow from earlier ones by symmetry."""
        known: dict[int, float] = {}
        for row, column, value in reversed(self._couplings):
            if row != index:
                break
            known[column] = value
        return known

    # -- arithmetic ----------------------------------------------------------------------------

    @property
    def asymmetry(self) -> float:
        r"""Bound or estimate of the operator's deviation from symmetry, as seen in the discrepancy D.

        :math:`\|D\|_F \ge \|D\|_2` is the perturbation of A within the span of the basis. If the entries of D are too
        large for rounding errors of inner products, the products differ from those of one symmetric matrix, in all
        directions alike: their error then has a norm of about :math:`\sqrt P` times the size of an entry.
        """
        inside = float(np.sqrt(self._discrepancy))
        typical = inside / np.sqrt(max(1, self._discrepancies))
        if typical <= _DISCREPANCY * self.eps * self.norm:
            return inside
        return max(inside, float(typical * np.sqrt(self.operator.partition.size)))

    @property
    def a_priori(self) -> float:
        """Error of a product and of the recurrence that is assumed before anything is measured."""
        return float((self.operator.relative_error + 24 * self.eps) * self.norm)

    @property
    def rounding(self) -> float:
        """Additive error of every Ritz value and bound, from inexact products and arithmetic."""
        error = max(self.a_priori, 2 * self.product_error)
        error += _RESTART * float(np.sqrt(self.num_restarts)) * self.eps * self.norm
        total = error + self.asymmetry + 2 * self.orthogonality * self.norm + float(np.sqrt(self._neglected))
        return max(total, 8 * float(np.sqrt(self._underflow)))

    @property
    def smallest_link(self) -> float:
        r"""The smallest link of a probe that counts as seen.

        An error of norm ``e`` without a preferred direction has a part of about :math:`e / \sqrt P` along a given
        eigenvector.
        """
        error = max(self.eps * self.norm, self.product_error, float(np.sqrt(self._underflow)))
        return error / float(np.sqrt(self.operator.partition.size))

    @property
    def _underflow(self) -> float:
        """The smallest squared norm that can be told from zero: below it, the squares of the entries underflow."""
        return self.operator.partition.size * float(torch.finfo(self.operator.dtype).tiny)

    def raise_norm(self, bound: float) -> None:
        """Take a larger value for the norm of A."""
        self.norm = max(self.norm, bound)

    def check_orthogonality(self) -> None:
        """Measure ``||(V^T V - I) x||`` for a random unit ``x``, and raise if it exceeds ``10 sqrt(N) eps``."""
        size = self.basis.size
        x = np.random.default_rng(self._seed).standard_normal(size)
        x /= np.linalg.norm(x)
        vector = self.basis.combine(torch.from_numpy(x)[:, None])[:, 0].contiguous()
        error = float(np.linalg.norm(self._reduced(self.basis.coefficients(vector)).cpu().numpy() - x))
        if not error <= 10 * np.sqrt(size) * self.eps:
            raise ArithmeticError(
                f"the Krylov basis lost its orthogonality ({error:.1e} after {size} vectors); "
                "compute in float64, or report the operator: its products are not those of one symmetric matrix"
            )
        self.orthogonality = max(self.orthogonality, error)
