"""The interface of an optional quantity, and the values that it gets and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.problem import Problem
from hessian_callback.measurement.solvers import Solver
from hessian_callback.power_law.fit import PowerLawFit

__all__ = ["Examination", "Extra", "Finding"]

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of one extra.

    Attributes:
        values: numbers by the key under which they are logged.
        num_hvps: Hessian-vector products spent.
        density: the spectral density, if the extra computed it.
        state: passed to the same extra at the next measurement; ``None`` keeps the previous state.
    """

    values: dict[str, float] = field(default_factory=dict)
    num_hvps: int = 0
    density: SpectralDensity | None = None
    state: Any = None


@dataclass(frozen=True)
class Examination:
    """One measurement as an extra sees it, after the eigenvalues were computed.

    Attributes:
        problem: model, loss and samples.
        operator: the Hessian; ``None`` for extras with ``needs_operator = False``, when its graphs are released.
        spectrum: its largest eigenvalues, with eigenvectors if an extra needs them and the solver has any.
        fit: the power law; ``None`` if there is none.
        solver: the solver of the measurement.
        num_eigenvalues: K.
        seed: seed of random vectors.
        place: where in the run the measurement is made.
        draws_figures: whether figures are wanted.
        solve: ``(problem, name) -> Spectrum``: solve another problem in the same way, for example on other samples.
        state: the state of the extra's last finding; ``None`` at first.
        shared: values that several extras computed together.
    """

    problem: Problem
    operator: SymmetricOperator | None
    spectrum: Spectrum
    fit: PowerLawFit | None
    solver: Solver
    num_eigenvalues: int
    seed: int
    place: Place
    draws_figures: bool
    solve: Callable[[Problem, str], Spectrum]
    state: Any = None
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def open_operator(self) -> SymmetricOperator:
        """The operator, for extras that need it."""
        assert self.operator is not None, "extras with needs_operator = False get no operator"
        return self.operator

    def share(self, key: Hashable, compute: Callable[[], T]) -> tuple[T, bool]:
        """Compute a value once for several extras; return it, and whether this call computed it."""
        first = key not in self.shared
        if first:
            self.shared[key] = compute()
        return self.shared[key], first


class Extra(ABC):
    """A quantity that a measurement computes on request, beside the slope.

    A subclass is the only place that knows the quantity: its name in ``extras=[...]``, the keys under which its
    numbers are logged, its cost and its requirements.

    Attributes:
        name: the name in ``extras=[...]``.
        keys: every key that `compute` can return, without the prefix, and a description of its value.
        needs_eigenvectors: whether the solver has to form eigenvectors, K vectors of length P.
        needs_bounds: whether eigenvalues must be known by index, each with an error bound.
        needs_operator: whether `compute` multiplies with the Hessian. If not, it runs after the graphs are released.
    """

    name: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    needs_eigenvectors: ClassVar[bool] = False
    needs_bounds: ClassVar[bool] = False
    needs_operator: ClassVar[bool] = True

    @property
    def work(self) -> Hashable:
        """Identifies the products; extras with equal work share them."""
        return self.name

    def check(self, num_eigenvalues: int) -> None:  # noqa: B027
        """Check that the options fit K eigenvalues.

        Raises:
            ValueError: if they don't.
        """

    def expected_hvps(self, hvps_per_spectrum: int) -> int:
        """Return at least the number of products that `compute` spends.

        Args:
            hvps_per_spectrum: products that a spectrum is expected to take.
        """
        return 0

    @abstractmethod
    def compute(self, examination: Examination) -> Finding | None:
        """Compute the quantity; a collective that all ranks call in the same order.

        Returns:
            The finding; ``None`` if there is nothing to compute yet.

        Raises:
            ValueError: if the quantity is not defined for this spectrum.
        """
