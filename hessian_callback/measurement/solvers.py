"""How a measurement gets from an operator to fitted eigenvalues: strictly, or as the paper did."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_callback.algorithms.lanczos import LanczosProgress, top_eigenvalues
from hessian_callback.algorithms.pooled_ritz import pooled_ritz_values
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.operators.memory import device_with_room
from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.uncertainty import slope_numerical_interval

__all__ = ["EXPECTED_HVPS_PER_EIGENVALUE", "Protocol"]

# Products per eigenvalue that small networks took; only for estimates of the cost.
EXPECTED_HVPS_PER_EIGENVALUE = 4


@dataclass(frozen=True)
class Protocol:
    """A checked choice of how eigenvalues are computed and which of them are fitted.

    Attributes:
        num_eigenvalues: K, at least 3.
        mode: ``"strict"``: one run, until every eigenvalue has a bound that meets ``rtol``; what has none is
            not fitted. ``"paper"``: the K largest of the pooled Ritz values of several runs, converged or not.
        rtol: relative tolerance of each eigenvalue; in paper mode it decides only what is called converged.
        max_hvps: products to spend at the most in strict mode; ``None``: 10 K.
        paper_runs: runs of the paper's protocol.
        paper_steps: steps of each run; ``None``: K, as in the paper.
        stop_on: ``"eigenvalues"``: iterate until each eigenvalue meets ``rtol``. ``"slope"``: in strict mode stop as
            soon as the proven bounds of the eigenvalues fix the slope to ``slope_rtol``; the tail may then be
            known less well than the slope.
        slope_rtol: half the width of the slope's numerical interval, relative to its middle, that is good enough.
        allow_fewer: whether fewer than K eigenvalues may be fitted without a reason against it.
        seed: seed of the start vectors.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> import torch
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 201, dtype=torch.float64) ** -1.0
        >>> operator = MatvecOperator(lambda v: diagonal * v, 200)
        >>> for mode in ("strict", "paper"):
        ...     protocol = Protocol(num_eigenvalues=10, mode=mode)
        ...     fit, reason = protocol.fit(protocol.solve(operator))
        ...     print(mode, round(fit.slope, 1), reason)
        strict 0.8 None
        paper 0.7 None
    """

    num_eigenvalues: int
    mode: str = "strict"
    rtol: float = 1e-2
    max_hvps: int | None = None
    paper_runs: int = 3
    paper_steps: int | None = None
    stop_on: str = "eigenvalues"
    slope_rtol: float = 2e-2
    allow_fewer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choice."""
        wanted = self.num_eigenvalues
        if wanted < 3:
            raise ValueError(f"num_eigenvalues must be at least 3 to fit a power law, got {wanted}")
        if self.mode not in ("strict", "paper"):
            raise ValueError(f"mode must be 'strict' or 'paper', got {self.mode!r}")
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol must lie between 0 and 1, got {self.rtol}")
        if self.max_hvps is not None and self.max_hvps <= wanted:
            raise ValueError(
                f"max_hvps={self.max_hvps} cannot give num_eigenvalues={wanted} eigenvalues; allow about "
                f"{EXPECTED_HVPS_PER_EIGENVALUE * wanted}, or leave it out"
            )
        if self.stop_on not in ("eigenvalues", "slope"):
            raise ValueError(f"stop_on must be 'eigenvalues' or 'slope', got {self.stop_on!r}")
        if not 0 < self.slope_rtol < 1:
            raise ValueError(f"slope_rtol must lie between 0 and 1, got {self.slope_rtol}")
        if self.stop_on == "slope" and self.mode == "paper":
            raise ValueError("stop_on='slope' needs proven bounds, which mode='paper' does not have; use mode='strict'")
        if self.paper_runs < 1:
            raise ValueError(f"paper_runs must be at least 1, got {self.paper_runs}")
        if self.paper_steps is not None and self.paper_steps * self.paper_runs < wanted:
            raise ValueError(
                f"paper_runs={self.paper_runs} runs of paper_steps={self.paper_steps} steps have fewer than "
                f"num_eigenvalues={wanted} Ritz values; the paper takes num_eigenvalues steps in each"
            )

    def check_resumable(self) -> None:
        """Check that a spectrum by this protocol can be gone on with from a checkpoint.

        Raises:
            ValueError: in paper mode.
        """
        if self.mode == "paper":
            raise ValueError("the short runs of mode='paper' have no checkpoint of the solver; use mode='strict'")

    @property
    def steps(self) -> int:
        """Steps of each run of the paper's protocol."""
        return self.num_eigenvalues if self.paper_steps is None else self.paper_steps

    @property
    def hvp_limit(self) -> int:
        """Products that a spectrum takes at the most."""
        if self.mode == "paper":
            return self.paper_runs * self.steps
        return 10 * self.num_eigenvalues if self.max_hvps is None else self.max_hvps

    def expected_hvps(self, num_parameters: int) -> int:
        """Estimate the products that a spectrum of a matrix with ``num_parameters`` rows takes."""
        if self.mode == "paper":
            return self.paper_runs * min(self.steps, num_parameters)
        return min(EXPECTED_HVPS_PER_EIGENVALUE * self.num_eigenvalues, self.hvp_limit, num_parameters)

    def solve(
        self,
        operator: SymmetricOperator,
        *,
        return_eigenvectors: bool = False,
        progress: Callable[[LanczosProgress], None] | None = None,
        memory_budget: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Spectrum:
        """Compute the K largest eigenvalues, or in paper mode Ritz values, of an operator.

        Args:
            operator: the matrix.
            return_eigenvectors: also form eigenvectors; the paper's protocol has none.
            progress: called after every product.
            memory_budget: bytes that Lanczos vectors may take on the operator's device, and go to the CPU beyond;
                default: a quarter of what is free there.
            checkpoint: a folder to go on from after the process was killed, see `top_eigenvalues`.

        Raises:
            ValueError: when the checkpoint can't be gone on with, or for one in paper mode.
            ArithmeticError: when a product holds NaN or infinity.
        """
        if checkpoint is not None:
            self.check_resumable()
        # A matrix other than a network's has no engine to choose.
        expect = getattr(operator, "expect_products", None)
        if expect is not None:
            expect(self.expected_hvps(operator.partition.size))
        if self.mode == "paper":
            pool = pooled_ritz_values(
                operator, num_runs=self.paper_runs, num_steps=self.steps, seed=self.seed, progress=progress
            )
            return pool.top(self.num_eigenvalues, rtol=self.rtol)
        length = operator.partition.slice_length
        vectors = self.expected_hvps(operator.partition.size) * length * torch.finfo(operator.dtype).bits // 8
        return top_eigenvalues(
            operator,
            self.num_eigenvalues,
            rtol=self.rtol,
            max_matvecs=self.hvp_limit,
            seed=self.seed,
            positive_only=True,
            criterion=self._fixes_the_slope if self.stop_on == "slope" else None,
            return_eigenvectors=return_eigenvectors,
            progress=progress,
            basis_device=device_with_room(operator.device, vectors, memory_budget),
            checkpoint=checkpoint,
        )

    def _fixes_the_slope(self, lower: Tensor, upper: Tensor) -> bool:
        """Whether all slopes that the eigenvalues' bounds leave open are close enough together."""
        if not bool((lower > 0).all()):
            return False
        low, high = slope_numerical_interval(lower, (upper - lower).clamp(min=0), sides="above")
        return high - low <= self.slope_rtol * (high + low)

    def fit(self, spectrum: Spectrum) -> tuple[PowerLawFit | None, str | None]:
        """Fit the eigenvalues of a spectrum that this protocol trusts.

        Args:
            spectrum: what `solve` returned.

        Returns:
            The fit, ``None`` if there is none; and why its slope must not be compared with others, if so.
        """
        wanted = self.num_eigenvalues
        values = spectrum.positive_converged
        if spectrum.stopped == "criterion":  # The bounds fix the slope, if not each eigenvalue.
            values = spectrum.eigenvalues
        if self.mode == "paper":
            values = spectrum.eigenvalues[spectrum.eigenvalues > 0]
        shortage = None
        if len(values) < wanted:
            shortage = f"only {len(values)} of {wanted} eigenvalues are {self._why_not(spectrum)}"
        try:
            fit = fit_power_law(values)
        except ValueError as error:
            return None, shortage or f"ValueError: {' '.join(str(error).split())}"
        if shortage is None or self.allow_fewer:
            return fit, None
        return fit, f"{shortage}, or pass allow_fewer=True"

    def _why_not(self, spectrum: Spectrum) -> str:
        if self.mode == "paper":
            return "positive in the pool: choose a smaller num_eigenvalues, or more paper_steps"
        if spectrum.stopped == "max_matvecs":
            return (
                f"positive and converged: max_hvps={self.hvp_limit} products were spent; allow more, or a larger rtol"
            )
        return (
            f"positive and converged: no other is known to lie above the rounding level of {spectrum.rounding:.2g}; "
            "choose a smaller num_eigenvalues, or more precise products (precision='64-true', an exact hvp)"
        )
