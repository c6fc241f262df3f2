"""How a measurement gets from an operator to fitted eigenvalues: `Lanczos`, or the `PublishedProtocol`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hessian_callback._options import check_bool, check_choice, check_int, check_number, check_path, optional
from hessian_callback.algorithms.lanczos import LanczosProgress, top_eigenvalues
from hessian_callback.algorithms.pooled_ritz import pooled_ritz_values
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.measurement.measurement import Mode
from hessian_callback.measurement.vector_room import BasisPlan, check_vector_room, vector_room
from hessian_callback.operators.memory import device_with_room
from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.uncertainty import slope_numerical_interval

__all__ = ["EXPECTED_HVPS_PER_EIGENVALUE", "Lanczos", "PublishedProtocol", "Solver"]

# Products per eigenvalue that small networks took; only for estimates of the cost.
EXPECTED_HVPS_PER_EIGENVALUE = 4

# The ten largest eigenvalues of transformers needed up to 320 products.
_SMALLEST_DEFAULT_MAX_HVPS = 300

# Basis vectors beyond K that a Lanczos run needs, and those with which restarts cost few products, as a part of K.
_SPARE_VECTORS, _AMPLE_SHARE = 12, 0.5

# If the asymmetry of products makes up more than this share of the rounding level, it is the cause.
_DOMINANT_SHARE = 0.25

_ENGINES = ("auto", "double_backward", "linearize", "finite_difference")

_Progress = Callable[[LanczosProgress], None]


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Compute the K largest eigenvalues of a Hessian and fit a power law to them.

    Attributes:
        mode: the solver's name in a `Measurement`.
        proves_bounds: whether the eigenvalues of its spectra are known by index, each with a bound.

    Args:
        allow_fewer: accept a fit of fewer than K eigenvalues.
        hvp: how Hessian-vector products are formed, see `HessianOperator`.
        memory_budget: bytes that gradient graphs may take on each rank, those that are kept and the one that is being
            built. Batches are cut to meet it. ``None`` takes a part of the free memory.
    """

    mode: ClassVar[Mode]
    proves_bounds: ClassVar[bool]

    allow_fewer: bool = False
    hvp: str = "auto"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_bool("allow_fewer", self.allow_fewer)
        check_choice("hvp", self.hvp, _ENGINES)
        optional(check_int, "memory_budget", self.memory_budget, at_least=0)

    @property
    def checkpoint_folder(self) -> Path | None:
        """The folder in which long computations save their state; ``None`` if they don't."""
        return None

    @abstractmethod
    def check(self, num_eigenvalues: int) -> None:
        """Check that the options can give K eigenvalues.

        Raises:
            ValueError: if they can't.
        """

    @abstractmethod
    def hvp_limit(self, num_eigenvalues: int) -> int:
        """Return the largest number of Hessian-vector products that K eigenvalues may take."""

    @abstractmethod
    def expected_hvps(self, num_eigenvalues: int, num_parameters: int) -> int:
        """Estimate the products that K eigenvalues of a matrix with P rows take."""

    @abstractmethod
    def plan_basis(
        self, operator: SymmetricOperator, num_eigenvalues: int, *, return_eigenvectors: bool = False
    ) -> BasisPlan:
        """Compare the vectors that K eigenvalues need with the memory. A collective.

        Raises:
            NotEnoughMemoryError: a `MemoryError`, on all ranks together, if they do not fit.
        """

    @abstractmethod
    def solve(
        self,
        operator: SymmetricOperator,
        num_eigenvalues: int,
        *,
        seed: int = 0,
        return_eigenvectors: bool = False,
        progress: _Progress | None = None,
        checkpoint: Path | None = None,
    ) -> Spectrum:
        """Compute the K largest eigenvalues of an operator.

        Args:
            operator: the matrix.
            num_eigenvalues: K.
            seed: seed of the start vector.
            return_eigenvectors: form eigenvectors as well, if the solver has any.
            progress: called after every product.
            checkpoint: a folder in which the state is saved and from which it is restored.

        Raises:
            ArithmeticError: if a product holds NaN or infinity.
            CheckpointError: if the checkpoint cannot be used.
            NotEnoughMemoryError: a `MemoryError`, on all ranks together and before the first product, if the vectors
                do not fit the free memory.
        """

    @abstractmethod
    def trusted_eigenvalues(self, spectrum: Spectrum) -> Tensor:
        """Return the leading eigenvalues that this solver trusts, positive and descending."""

    @abstractmethod
    def _why_untrusted(self, spectrum: Spectrum, num_eigenvalues: int) -> str:
        """Return what the trusted eigenvalues are that the others are not, and the remedy."""

    def fit(self, spectrum: Spectrum, num_eigenvalues: int) -> tuple[PowerLawFit | None, str | None]:
        """Fit a power law to the eigenvalues that this solver trusts.

        Args:
            spectrum: the result of `solve`.
            num_eigenvalues: K.

        Returns:
            The fit, or ``None`` if there is none, and the reason why its slope must not be compared with others, or
            ``None``.
        """
        values = self.trusted_eigenvalues(spectrum)[:num_eigenvalues]
        shortage = None
        if len(values) < num_eigenvalues:
            why = self._why_untrusted(spectrum, num_eigenvalues)
            shortage = f"only {len(values)} of {num_eigenvalues} eigenvalues are {why}"
        try:
            fit = fit_power_law(values)
        except ValueError as error:
            return None, shortage or f"ValueError: {' '.join(str(error).split())}"
        if shortage is None or self.allow_fewer:
            return fit, None
        return fit, f"{shortage}, or pass solver={type(self).__name__}(allow_fewer=True)"


@dataclass(frozen=True, kw_only=True)
class Lanczos(Solver):
    """Iterate one Lanczos run until every eigenvalue has an error bound that meets the tolerance.

    Args:
        rtol: relative tolerance of each eigenvalue.
        stop_on: ``"eigenvalues"``: iterate until each eigenvalue meets ``rtol``. ``"slope"``: stop as soon as the
            error bounds fix the slope to ``slope_rtol``, which takes fewer products if the spectrum is dense at its
            end. Keep one choice within a run.
        slope_rtol: for ``stop_on="slope"``: half the width of the slope's numerical interval, relative to its middle.
        max_hvps: the largest number of Hessian-vector products of a measurement. The default is ``10 K``, at least 300.
        basis_budget: bytes that the Krylov basis may take on each rank, a vector for each product. If more vectors are
            needed, the run continues from its leading Ritz vectors, which takes some more products (see
            ``max_basis_size`` of `top_eigenvalues`). At least K + 12 vectors must fit. ``None``: the free memory.
        checkpoint: a folder of this run alone, in which a long measurement saves the solver's state every five minutes,
            the Krylov basis included (a vector for each product). A run that is killed and comes to the same step
            again with the same weights and samples continues from there; with other weights it warns and starts over.
            The files are deleted at the end of the measurement. If they cannot be written, the measurement warns and
            continues without them.
        allow_fewer: log a slope even if fewer than K eigenvalues are positive and converged.
        hvp: how products are formed, see `HessianOperator`.
        memory_budget: see `Solver`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 201, dtype=torch.float64) ** -1.0
        >>> operator = MatvecOperator(lambda v: diagonal * v, 200)
        >>> solver = Lanczos(rtol=0.01)
        >>> fit, reason = solver.fit(solver.solve(operator, 10), 10)
        >>> round(fit.slope, 1), reason
        (0.8, None)
    """

    mode: ClassVar[Mode] = "strict"
    proves_bounds: ClassVar[bool] = True

    rtol: float = 1e-2
    stop_on: str = "eigenvalues"
    slope_rtol: float = 2e-2
    max_hvps: int | None = None
    basis_budget: int | None = None
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        check_number("rtol", self.rtol, above=0, below=1)
        check_choice("stop_on", self.stop_on, ("eigenvalues", "slope"))
        check_number("slope_rtol", self.slope_rtol, above=0, below=1)
        optional(check_int, "max_hvps", self.max_hvps, at_least=1)
        optional(check_int, "basis_budget", self.basis_budget, at_least=1)
        optional(check_path, "checkpoint", self.checkpoint)

    @property
    def checkpoint_folder(self) -> Path | None:
        """The folder in which long computations save their state; ``None`` if they don't."""
        return None if self.checkpoint is None else Path(self.checkpoint)

    def check(self, num_eigenvalues: int) -> None:
        """Check that ``max_hvps`` allows K eigenvalues.

        Raises:
            ValueError: if it doesn't.
        """
        if self.max_hvps is not None and self.max_hvps <= num_eigenvalues:
            raise ValueError(
                f"max_hvps={self.max_hvps} cannot give num_eigenvalues={num_eigenvalues} eigenvalues; allow about "
                f"{EXPECTED_HVPS_PER_EIGENVALUE * num_eigenvalues}, or leave it out"
            )

    def hvp_limit(self, num_eigenvalues: int) -> int:
        """Return the largest number of Hessian-vector products that K eigenvalues may take."""
        if self.max_hvps is not None:
            return self.max_hvps
        return max(10 * num_eigenvalues, _SMALLEST_DEFAULT_MAX_HVPS)

    def expected_hvps(self, num_eigenvalues: int, num_parameters: int) -> int:
        """Estimate the products that K eigenvalues of a matrix with P rows take."""
        usual = EXPECTED_HVPS_PER_EIGENVALUE * num_eigenvalues
        return min(usual, self.hvp_limit(num_eigenvalues), num_parameters)

    def plan_basis(
        self, operator: SymmetricOperator, num_eigenvalues: int, *, return_eigenvectors: bool = False
    ) -> BasisPlan:
        """Choose the device and the size of the basis; see `Solver.plan_basis`."""
        size = operator.partition.size
        ample = num_eigenvalues + max(_SPARE_VECTORS, int(_AMPLE_SHARE * num_eigenvalues))
        useful = min(self.expected_hvps(num_eigenvalues, size), ample, size)
        useful_bytes = useful * operator.partition.slice_length * torch.finfo(operator.dtype).bits // 8
        device = device_with_room(operator.device, useful_bytes, self.memory_budget)
        kept = num_eigenvalues if return_eigenvectors else 0
        room = vector_room(operator, device, kept=kept, budget=self.basis_budget)
        check_vector_room(operator, device, min(num_eigenvalues + _SPARE_VECTORS, size), room, self.basis_budget)
        limit = min(self.hvp_limit(num_eigenvalues), size)
        return BasisPlan(device, None if room is None or room >= limit else room)

    def solve(
        self,
        operator: SymmetricOperator,
        num_eigenvalues: int,
        *,
        seed: int = 0,
        return_eigenvectors: bool = False,
        progress: _Progress | None = None,
        checkpoint: Path | None = None,
    ) -> Spectrum:
        """Compute the K largest eigenvalues with `top_eigenvalues`; see `Solver.solve`."""
        _announce_products(operator, self.expected_hvps(num_eigenvalues, operator.partition.size))
        plan = self.plan_basis(operator, num_eigenvalues, return_eigenvectors=return_eigenvectors)
        return top_eigenvalues(
            operator,
            num_eigenvalues,
            rtol=self.rtol,
            max_matvecs=self.hvp_limit(num_eigenvalues),
            seed=seed,
            positive_only=True,
            criterion=self._fixes_the_slope if self.stop_on == "slope" else None,
            return_eigenvectors=return_eigenvectors,
            progress=progress,
            max_basis_size=plan.max_size,
            basis_device=plan.device,
            checkpoint=checkpoint,
        )

    def trusted_eigenvalues(self, spectrum: Spectrum) -> Tensor:
        """Return the leading converged eigenvalues, or all if their bounds fix the slope."""
        return spectrum.eigenvalues if spectrum.stopped == "criterion" else spectrum.positive_converged

    def _fixes_the_slope(self, lower: Tensor, upper: Tensor) -> bool:
        """Return whether all slopes that the eigenvalues' bounds allow are close enough together."""
        if not bool((lower > 0).all()):
            return False
        low, high = slope_numerical_interval(lower, (upper - lower).clamp(min=0), sides="above")
        return high - low <= self.slope_rtol * (high + low)

    def _why_untrusted(self, spectrum: Spectrum, num_eigenvalues: int) -> str:
        if spectrum.stopped == "max_matvecs":
            limit = self.hvp_limit(num_eigenvalues)
            why = f"positive and converged: max_hvps={limit} products were spent; allow more, or a larger rtol"
            return f"{why}, or a larger basis_budget" if spectrum.num_restarts else why
        if spectrum.symmetry_defect > _DOMINANT_SHARE * spectrum.rounding:
            return (
                f"positive and converged: products u.Hv and v.Hu differ by {spectrum.symmetry_defect:.2g}, so no other "
                f"is known to lie above {spectrum.rounding:.2g}. Differences of gradients do so at kinks (ReLU, "
                "max-pooling); use hvp='double_backward', or smooth activations. Exact products do so if an operation "
                "of the loss has a wrong second derivative"
            )
        return (
            f"positive and converged: no other is known to lie above the rounding level of {spectrum.rounding:.2g}; "
            "choose a smaller num_eigenvalues, or more precise products (precision='64-true', an exact hvp)"
        )


@dataclass(frozen=True, kw_only=True)
class PublishedProtocol(Solver):
    r"""Pool the Ritz values of several short Lanczos runs and fit the K largest, converged or not.

    The protocol of Tang et al. (ICML 2025), to compare with; `pooled_ritz` describes its defects. The measurement's
    ``critical_distance`` is then the paper's, :math:`1.36 / \sqrt K`.

    Args:
        runs: number of Lanczos runs.
        steps: steps, and so products, of each run; the default is K, as in the paper.
        allow_fewer: log a slope even if fewer than K pooled values are positive.
        hvp: how products are formed, see `HessianOperator`.
        memory_budget: see `Solver`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 201, dtype=torch.float64) ** -1.0
        >>> operator = MatvecOperator(lambda v: diagonal * v, 200)
        >>> solver = PublishedProtocol()
        >>> fit, reason = solver.fit(solver.solve(operator, 10), 10)
        >>> round(fit.slope, 1), reason
        (0.7, None)
    """

    mode: ClassVar[Mode] = "paper"
    proves_bounds: ClassVar[bool] = False

    runs: int = 3
    steps: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        check_int("runs", self.runs, at_least=1)
        optional(check_int, "steps", self.steps, at_least=1)

    def check(self, num_eigenvalues: int) -> None:
        """Check that the runs give K Ritz values.

        Raises:
            ValueError: if they don't.
        """
        if self.runs * self._steps(num_eigenvalues) < num_eigenvalues:
            raise ValueError(
                f"runs={self.runs} of steps={self.steps} have fewer than num_eigenvalues={num_eigenvalues} Ritz "
                "values; the paper takes num_eigenvalues steps in each"
            )

    def hvp_limit(self, num_eigenvalues: int) -> int:
        """Return the number of Hessian-vector products that K eigenvalues take."""
        return self.runs * self._steps(num_eigenvalues)

    def expected_hvps(self, num_eigenvalues: int, num_parameters: int) -> int:
        """Return the products that K eigenvalues of a matrix with P rows take."""
        return self.runs * min(self._steps(num_eigenvalues), num_parameters)

    def plan_basis(
        self, operator: SymmetricOperator, num_eigenvalues: int, *, return_eigenvectors: bool = False
    ) -> BasisPlan:
        """Check that the vectors of one run fit; see `Solver.plan_basis`."""
        steps = min(self._steps(num_eigenvalues), operator.partition.size)
        check_vector_room(operator, operator.device, steps, vector_room(operator, operator.device))
        return BasisPlan(operator.device, steps)

    def solve(
        self,
        operator: SymmetricOperator,
        num_eigenvalues: int,
        *,
        seed: int = 0,
        return_eigenvectors: bool = False,
        progress: _Progress | None = None,
        checkpoint: Path | None = None,
    ) -> Spectrum:
        """Pool Ritz values with `pooled_ritz_values`; see `Solver.solve`. There are no eigenvectors or checkpoints."""
        if checkpoint is not None:
            raise ValueError("the runs of PublishedProtocol have no checkpoint; use solver=Lanczos(checkpoint=...)")
        _announce_products(operator, self.expected_hvps(num_eigenvalues, operator.partition.size))
        self.plan_basis(operator, num_eigenvalues)
        steps = self._steps(num_eigenvalues)
        pool = pooled_ritz_values(operator, num_runs=self.runs, num_steps=steps, seed=seed, progress=progress)
        return pool.top(num_eigenvalues)

    def trusted_eigenvalues(self, spectrum: Spectrum) -> Tensor:
        """Return the positive values of the pool."""
        return spectrum.eigenvalues[spectrum.eigenvalues > 0]

    def _steps(self, num_eigenvalues: int) -> int:
        return num_eigenvalues if self.steps is None else self.steps

    def _why_untrusted(self, spectrum: Spectrum, num_eigenvalues: int) -> str:
        return "positive in the pool: choose a smaller num_eigenvalues, or more steps"


def _announce_products(operator: SymmetricOperator, count: int) -> None:
    # A matrix other than a network's has no engine to choose.
    expect_products = getattr(operator, "expect_products", None)
    if expect_products is not None:
        expect_products(count)
