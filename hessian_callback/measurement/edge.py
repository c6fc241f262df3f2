"""Measure how far an optimizer's steps are from instability: the largest eigenvalue of the preconditioned Hessian."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hessian_callback._options import MAX_SEED, check_bool, check_int, check_number
from hessian_callback.algorithms.lanczos import LanczosProgress, top_eigenvalues
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.measurement.measurement import When
from hessian_callback.measurement.measurer import seconds_since
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.preconditioners import StabilityLimits
from hessian_callback.measurement.problem import Problem
from hessian_callback.measurement.stored_state import checked_fields
from hessian_callback.operators.engine_selection import TracingStatistics
from hessian_callback.operators.preconditioned import PreconditionedOperator
from hessian_callback.operators.product_check import check_products

__all__ = ["EdgeMeasurement", "EdgeMeasurer", "EdgeState", "edge_history"]

#: The quantities that are logged, in the order of `EdgeMeasurement`.
_LOGGED = (
    "ratio",
    "ratio_error",
    "sharpness",
    "sharpness_error",
    "preconditioned_sharpness",
    "max_lr",
    "loss",
    "num_hvps",
    "seconds",
)


@dataclass(frozen=True)
class EdgeMeasurement:
    r"""How far a run is from instability, between two steps.

    Attributes:
        epoch: epochs completed before the current one.
        step: optimizer steps taken.
        when: ``"fit_start"``, ``"step"`` or ``"fit_end"``.
        ratio: curvature over threshold: the largest eigenvalue of the preconditioned Hessian, weight decay included,
            over the largest at which the optimizer's steps are stable on a quadratic loss. ``None`` if the measurement
            failed.
        ratio_error: bound on the error of ``ratio``: the proven bound of the eigenvalue, see `Spectrum`.
        sharpness: the largest eigenvalue of the Hessian of the loss.
        sharpness_error: bound on the error of ``sharpness``.
        preconditioned_sharpness: the largest eigenvalue of :math:`P^{-1/2} H P^{-1/2}` in the first group's units:
            ``ratio`` times its threshold, such as :math:`(2 + 2 \beta_1) / ((1 - \beta_1) \eta)`.
        max_lr: the learning rate of the first group at which the ratio is 1, if all groups' rates are scaled
            together; ``None`` if the ratio is not positive.
        lr: the learning rate of the first group.
        loss: mean loss over the samples.
        num_hvps: Hessian-vector products.
        seconds: wall time that training stood still.
        reason: why there is no ratio; ``None`` if there is one.

    Example:
        >>> measured = EdgeMeasurement(epoch=0, step=50, when="step", ratio=0.8, ratio_error=0.01, lr=0.1, max_lr=0.125)
        >>> print(measured.summary())
        epoch 0, step 50: 0.800 ± 0.010 of the edge of stability, lr 0.1, at most 0.125; 0 HVPs, 0.0 s
    """

    epoch: int
    step: int
    when: When
    ratio: float | None = None
    ratio_error: float | None = None
    sharpness: float | None = None
    sharpness_error: float | None = None
    preconditioned_sharpness: float | None = None
    max_lr: float | None = None
    lr: float | None = None
    loss: float | None = None
    num_hvps: int = 0
    seconds: float = 0.0
    reason: str | None = None

    @property
    def has_result(self) -> bool:
        """Whether there is something to draw."""
        return self.ratio is not None

    def scalars(self) -> dict[str, float]:
        """Return the quantities to log, by name; those that are not known are left out."""
        if self.ratio is None:
            return {"num_hvps": float(self.num_hvps), "seconds": self.seconds}
        values = {name: getattr(self, name) for name in _LOGGED}
        return {name: float(value) for name, value in values.items() if value is not None}

    def summary(self) -> str:
        """Return the measurement as one line of text."""
        where = f"epoch {self.epoch}, step {self.step}"
        cost = f"{self.num_hvps} HVPs, {self.seconds:.1f} s"
        if self.ratio is None:
            return f"{where}: no ratio ({self.reason}); {cost}"
        most = "" if self.max_lr is None else f", at most {self.max_lr:.3g}"
        found = f"{self.ratio:.3f} ± {self.ratio_error:.3f} of the edge of stability"
        return f"{where}: {found}, lr {self.lr:.3g}{most}; {cost}"

    def to_state(self) -> dict[str, Any]:
        """Return Python scalars, which ``torch.load(weights_only=True)`` accepts."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> EdgeMeasurement:
        """Restore a measurement from the return value of `to_state`.

        Raises:
            ValueError: if a name or a type is not that of a measurement.
        """
        return cls(**checked_fields(cls, state))


def edge_history(entries: Sequence[Mapping[str, Any]]) -> list[EdgeMeasurement]:
    """Restore the measurements of a checkpoint.

    Raises:
        ValueError: if an entry is not the state of a measurement; the message names the remedy.
    """
    try:
        return [EdgeMeasurement.from_state(entry) for entry in entries]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the checkpoint's measurements of the edge of stability cannot be read ({error}); resume with another "
            "prefix, which starts a new history"
        ) from error


@dataclass(frozen=True, eq=False)
class EdgeState:
    """What a measurement hands on to the next one of the same run.

    Attributes:
        vectors: by matrix, the eigenvector of the largest eigenvalue, ``(P,)``, from which the next one starts.
        errors: by matrix, the measured error of a product relative to the largest eigenvalue.
        parameter_names: the names of the chosen parameters. If others are chosen, as when layers are unfrozen, the next
            measurement starts anew; empty if they are not known.
    """

    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    parameter_names: Sequence[str] = ()


class EdgeMeasurer:
    """Measures the ratio of a run, one measurement after the other.

    Args:
        rtol: relative tolerance of the eigenvalues' proven bounds.
        max_hvps: largest number of products for each of the two matrices.
        sharpness: compute the largest eigenvalue of the Hessian as well if the first one does not give it.
        seed: seed of start and probe vectors.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(self, *, rtol: float = 0.05, max_hvps: int = 200, sharpness: bool = True, seed: int = 0) -> None:
        self.rtol = check_number("rtol", rtol, above=0, below=1)
        self.max_hvps = check_int("max_hvps", max_hvps, at_least=2)
        self.sharpness = check_bool("sharpness", sharpness)
        self.seed = check_int("seed", seed, at_least=0, at_most=MAX_SEED)
        self._statistics = TracingStatistics()
        self._checked = False

    def forget(self) -> None:
        """Forget the model of earlier measurements, so that the next one is checked as the first."""
        self._statistics, self._checked = TracingStatistics(), False

    def measure(
        self,
        problem: Problem,
        limits: StabilityLimits,
        place: Place,
        *,
        state: EdgeState | None = None,
        progress: Callable[[LanczosProgress], None] | None = None,
    ) -> tuple[EdgeMeasurement, EdgeState]:
        """Measure; a collective.

        The first measurement compares one product with a difference of gradients, and measures the error of
        products in float64. Later ones use that error, relative to the largest eigenvalue.

        Args:
            problem: the loss that the optimizer minimizes, over fixed samples.
            limits: of the optimizer, in the same parameters.
            place: where in the run.
            state: of the last measurement.
            progress: called after every product.

        Returns:
            The measurement, and the state for the next one.

        Raises:
            ArithmeticError: if the loss or a product is NaN or infinite.
            ValueError: if the loss cannot be differentiated twice; see `HessianOperator`.
        """
        began = time.monotonic()
        here = EdgeMeasurement(place.epoch, place.step, place.when, lr=limits.lr)
        if not bool(limits.scale.any()):
            return replace(here, reason="all learning rates are 0, so every curvature is stable"), state or EdgeState()
        with problem.operator(hvp="auto", memory_budget=None, tracing_statistics=self._statistics) as hessian:
            loss = hessian.mean_loss
            if state is not None and state.parameter_names and state.parameter_names != hessian.parameter_names:
                state = None
                self._checked = False
            if not self._checked:
                check_products(hessian, seed=self.seed)
                self._checked = True
            solve = _Solves(self, state or EdgeState(), progress)
            scale, shift = limits.scale, limits.shift if bool(limits.shift.any()) else None
            scaled = solve.largest("scaled", hessian, scale, shift, negative=limits.negative)
            plain, (factor, added) = scaled, limits.uniform or (1.0, 0.0)
            known = limits.uniform is not None and not limits.negative
            if not known and self.sharpness:
                plain, known = solve.largest("plain", hessian, torch.ones_like(scale), None), True
                factor, added = 1.0, 0.0
            names = hessian.parameter_names
        ratio = float(scaled.eigenvalues[0])
        measured = replace(
            here,
            ratio=ratio,
            ratio_error=float(scaled.error_bounds[0]),
            sharpness=(float(plain.eigenvalues[0]) - added) / factor if known else None,
            sharpness_error=float(plain.error_bounds[0]) / factor if known else None,
            preconditioned_sharpness=ratio * limits.threshold if math.isfinite(limits.threshold) else None,
            max_lr=limits.lr / ratio if ratio > 0 else None,
            loss=loss,
            num_hvps=solve.num_hvps,
            seconds=seconds_since(began, problem.ranks),
        )
        return measured, EdgeState(solve.vectors, solve.errors, names)


class _Solves:
    """The eigenvalue computations of one measurement."""

    def __init__(
        self, measurer: EdgeMeasurer, state: EdgeState, progress: Callable[[LanczosProgress], None] | None
    ) -> None:
        self._measurer, self._state, self._progress = measurer, state, progress
        self.vectors, self.errors = dict(state.vectors), dict(state.errors)
        self.num_hvps = 0

    def largest(
        self, name: str, hessian: SymmetricOperator, scale: Tensor, shift: Tensor | None, *, negative: bool = False
    ) -> Spectrum:
        """Compute the largest eigenvalue with its bound."""
        operator = PreconditionedOperator(
            hessian, scale, shift, negative=negative, relative_error=self._state.errors.get(name)
        )
        spectrum = top_eigenvalues(
            operator,
            1,
            rtol=self._measurer.rtol,
            max_matvecs=max(2, self._measurer.max_hvps),
            seed=self._measurer.seed,
            start=self._state.vectors.get(name),
            return_eigenvectors=True,
            progress=self._progress,
        )
        self.num_hvps += spectrum.num_matvecs
        assert spectrum.eigenvectors is not None
        vector = operator.ranks.all_gather(spectrum.eigenvectors[:, 0].contiguous(), operator.partition)
        self.vectors[name] = vector.clone()
        largest = float(spectrum.eigenvalues.abs().max())
        if name not in self.errors and spectrum.rounding_basis == "measured" and largest > 0:
            self.errors[name] = spectrum.rounding / largest
        return spectrum
