"""What a measurement reports while it runs, for displays and for interruptions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.measurement.problem import Problem
from hessian_callback.operators.hessian import HessianOperator

__all__ = ["CostEstimate", "Observer"]


@dataclass(frozen=True)
class CostEstimate:
    """The expected cost of a measurement.

    Attributes:
        num_hvps: Hessian-vector products of the spectrum.
        max_hvps: at most.
        num_extra_hvps: products of extras and groups.
        extras: names of the extras and groups.
        num_basis_vectors: vectors of the Lanczos basis.
        num_kept_vectors: vectors of length P that stay in memory beside it.
        basis_is_limited: whether a vector for each product would not fit.
    """

    num_hvps: int
    max_hvps: int
    num_extra_hvps: int
    extras: tuple[str, ...]
    num_kept_vectors: int
    num_basis_vectors: int
    basis_is_limited: bool


class Observer:
    """Follows a measurement; this one does nothing.

    Every method may raise `SigtermReceived`, which ends the measurement, if it does so on all ranks at the same call.
    """

    def operator_made(self, operator: HessianOperator, problem: Problem, cost: CostEstimate) -> None:
        """Follow the creation of the Hessian; a collective."""

    @contextmanager
    def solving(
        self, name: str, expected_hvps: int, checkpoint: str | None
    ) -> Iterator[Callable[[LanczosProgress], None]]:
        """Follow the computation of a spectrum.

        Args:
            name: of the matrix: ``"Hessian"``, or that and a group or a half in brackets.
            expected_hvps: products that it is expected to take.
            checkpoint: the folder of the solver's state, if there is one.

        Yields:
            A function that is called after every product.
        """
        yield lambda progress: None

    def operator_used(self, operator: HessianOperator) -> None:
        """Follow the end of the computation of the Hessian's spectrum."""

    def between_parts(self) -> None:
        """Follow the end of a part of the measurement."""

    def warn(self, text: str) -> None:
        """Follow a warning; called on the first rank only."""
        warnings.warn(text, stacklevel=2)
