r"""Krylov decompositions :math:`A V = V H + R` with an orthonormal basis, of one or several Krylov sequences."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_callback.algorithms.ritz import Projection
from hessian_callback.linalg.krylov_basis import KrylovBasis, row_products
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.linalg.random_vectors import gaussian_slice

__all__ = ["Chain", "Decomposition"]

_Array = NDArray[np.float64]


@dataclass(eq=False)
class Chain:
    """One Krylov sequence: the residual that its next vector comes from."""

    residual: Tensor
    column: int  # the basis vector whose image the residual is what is left of
    detached: bool = False  # whether so much was subtracted from it that it must be orthogonalised once more


class Decomposition:
    """``A V = V H + R`` and the operations that keep it true: begin a chain, expand one."""

    def __init__(self, operator: SymmetricOperator, seed: int, basis_device: torch.device | str | None = None) -> None:
        self.operator = operator
        self.basis = KrylovBasis(operator, basis_device)
        self.chains: list[Chain] = []
        self.norm = 0.0  # a lower bound of ||A||
        self.asymmetry = 0.0
        self.eps = float(torch.finfo(operator.dtype).eps)
        self.num_matvecs = 0
        self._gram: _Array = np.zeros((0, 0))
        self._diagonal: list[float] = []
        self._couplings: list[tuple[int, int, float]] = []
        self._seed = seed
        self._draws = 0

    @property
    def size(self) -> int:
        """Basis vectors; a product was spent on each."""
        return self.basis.size

    def projection(self) -> Projection:
        """Return the small matrices as they stand."""
        columns = [chain.column for chain in self.chains]
        return Projection(np.array(self._diagonal), list(self._couplings), columns, self._gram)

    def branch(self, first: int) -> Decomposition:
        """Return the decomposition as it stood with its ``first`` vectors, to grow apart; of a single chain."""
        other = copy.copy(self)
        other.basis = self.basis.branch(first)
        other._diagonal = self._diagonal[:first]
        # The link that leads out is that to the next vector.
        *other._couplings, (_, column, link) = self._couplings[:first]
        other.chains = [Chain(link * self.basis.vector(first), column)]
        other._gram = np.array([[link**2]])
        return other

    def absorb(self, branch: Decomposition) -> None:
        """Take over what a branch has spent, and what it has learnt of the operator, without its vectors."""
        self.num_matvecs, self._draws = branch.num_matvecs, branch._draws
        self.norm, self.asymmetry = max(self.norm, branch.norm), max(self.asymmetry, branch.asymmetry)

    # -- keeping -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all but the basis, as ``torch.load(weights_only=True)`` accepts it."""
        return {
            "norm": self.norm,
            "asymmetry": self.asymmetry,
            "num_matvecs": self.num_matvecs,
            "draws": self._draws,
            "diagonal": list(self._diagonal),
            "couplings": list(self._couplings),
            "gram": torch.from_numpy(self._gram),
            "chains": [(chain.residual.cpu(), chain.column, chain.detached) for chain in self.chains],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the basis that it was returned with."""
        self.norm, self.asymmetry = state["norm"], state["asymmetry"]
        self.num_matvecs, self._draws = state["num_matvecs"], state["draws"]
        self._diagonal, self._couplings = list(state["diagonal"]), list(state["couplings"])
        self._gram = state["gram"].numpy()
        device = self.operator.device
        self.chains = [Chain(residual.to(device), column, detached) for residual, column, detached in state["chains"]]

    def defect(self) -> float:
        """Return ``||A x - (V H + R) s||`` for a unit ``x = V s``: rounding, if it is of this operator.

        Half of s is random, so that each vector has a part in it, and half is what H makes of that, where the largest
        eigenvalues, the first to change with a network's weights, have theirs. The product is not counted.
        """
        weights = np.random.default_rng(self._seed).standard_normal(self.size)
        weights /= np.linalg.norm(weights)
        image = self._times(weights)
        if image.any():
            weights += image / np.linalg.norm(image)
        vector = self.basis.combine(torch.from_numpy(weights)[:, None])[:, 0].contiguous()
        length = self._norm_of(vector)
        difference = self.operator.matvec_slice(vector / length) * length
        difference -= self.basis.combine(torch.from_numpy(self._times(weights))[:, None])[:, 0]
        for chain in self.chains:
            difference -= chain.residual * float(weights[chain.column])
        return self._norm_of(difference) / length

    def _times(self, vector: _Array) -> _Array:
        """``H s``."""
        image: _Array = np.array(self._diagonal) * vector
        for row, column, value in self._couplings:
            image[row] += value * vector[column]
            image[column] += value * vector[row]
        return image

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
            overlaps = self._reduced(row_products(self._residuals(), vector)).tolist()
            self._detach(vector, self.chains, overlaps)
        self._multiply(vector, None)
        return True

    def expand(self, chain: Chain) -> bool:
        """Take a chain's residual into the basis and multiply.

        Returns whether it could: a small residual may turn out to be rounding, and the chain to have ended.
        """
        position = self.chains.index(chain)
        beta = float(np.sqrt(self._gram[position, position]))
        vector = chain.residual / beta
        if chain.detached or beta < 1e4 * self.eps * self.norm:
            # Cancellation, or the division, has enlarged what the pass left of the basis.
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

    def _detach(self, vector: Tensor, chains: list[Chain], overlaps: list[float]) -> None:
        for chain, overlap in zip(chains, overlaps, strict=True):
            self._couplings.append((self.size, chain.column, overlap))
            chain.residual.add_(vector, alpha=-overlap)
            chain.detached = True

    def _multiply(self, vector: Tensor, chain: Chain | None) -> None:
        """Append a unit vector that is orthogonal to the basis, and split its image.

        What the image has along the vector itself and along those that symmetry couples it to is taken out first,
        vector by vector. What is left has rounding errors alone in common with the basis, so one pass over it
        suffices where two would be needed if it had to remove something large ("twice is enough", Parlett 1998, ch. 6).
        """
        index = self.size
        self.basis.append(vector)
        image = self.operator.matvec_slice(vector)
        self.num_matvecs += 1
        # A product may hand out its argument or memory of its own; the residual is changed in place.
        image = image.clone(memory_format=torch.contiguous_format)
        known = self._known_couplings(index)
        for column, value in known.items():
            image.sub_(self.basis.vector(column), alpha=value)
        own = self._reduced(row_products(vector[None], image))
        image.sub_(vector * own.to(vector))
        rest = self._orthogonalise(image)
        if chain is None:
            chain = Chain(image, index)
            self.chains.append(chain)
        else:
            chain.residual, chain.column, chain.detached = image, index, False
        residuals = self._residuals()
        gram = self._reduced(torch.cat([row_products(residuals, residual) for residual in residuals]))
        # One transfer to the host a step.
        own, rest, gram = torch.cat([own, rest, gram]).cpu().split([1, index + 1, len(gram)])
        unexpected: _Array = rest.numpy()
        coefficients = unexpected.copy()
        coefficients[index] += float(own)
        coefficients[list(known)] += list(known.values())
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
        # Of symmetric products only the newest column may be new. Twice the largest stands for the norm of a skew
        # matrix with random entries.
        self.asymmetry = max(self.asymmetry, 2 * float(np.linalg.norm(unexpected[:index])))
        removed = float(unexpected @ unexpected)
        chain.detached = removed > 0.01 * squared
        noisy = removed > 100 * squared
        for position in reversed(range(len(self.chains))):
            # Where only rounding is left, the chain has ended in an invariant subspace.
            small = self._gram[position, position] <= max((8 * self.eps * self.norm) ** 2, self._underflow)
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
        return float(self._reduced(row_products(vector[None], vector)).sqrt())

    def _known_couplings(self, index: int) -> dict[int, float]:
        """What earlier steps say about the newest column of ``H``, by symmetry."""
        known: dict[int, float] = {}
        for row, column, value in reversed(self._couplings):
            if row != index:
                break
            known[column] = value
        return known

    # -- arithmetic ----------------------------------------------------------------------------

    @property
    def rounding(self) -> float:
        """The additive error of every Ritz value and bound, from inexact products and arithmetic."""
        a_priori = (self.operator.relative_error + 24 * self.eps) * self.norm
        return max(a_priori + self.asymmetry, 8 * float(np.sqrt(self._underflow)))

    @property
    def _underflow(self) -> float:
        """A squared norm below which its terms may have underflowed: that of a vector which can't be told from zero."""
        return self.operator.partition.size * float(torch.finfo(self.operator.dtype).tiny)

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
