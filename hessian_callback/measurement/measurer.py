"""One measurement from a `Problem` to a `Measurement`: eigenvalues, fit, extras and groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hessian_callback._options import MAX_SEED, OptionError, check_int, check_mapping
from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.solver_checkpoint import CheckpointError, delete_files
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.linalg.distributed import RankLostError, Ranks
from hessian_callback.measurement.extras.base import Examination, Extra, Finding
from hessian_callback.measurement.extras.registry import expected_hvps, make_extras
from hessian_callback.measurement.failure_policy import FailurePolicy, SigtermReceived
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.observer import CostEstimate, Observer
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.problem import Problem
from hessian_callback.measurement.problem_checks import (
    changes_warning,
    check_trainable,
    explained_change,
    parameters_warning,
    reduction_warning,
    unchecked_warning,
)
from hessian_callback.measurement.solvers import Lanczos, Solver
from hessian_callback.operators.engine_selection import TracingStatistics
from hessian_callback.operators.fully_shard import is_sharded
from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.loss import NotAFunctionError
from hessian_callback.operators.parameters import ParameterFilter
from hessian_callback.operators.product_check import check_products
from hessian_callback.power_law.fit import PowerLawFit

__all__ = ["Measured", "Measurer", "seconds_since"]


@dataclass(frozen=True)
class Measured:
    """The result of `Measurer.measure`.

    Attributes:
        measurement: the measurement.
        states: the extras' states for the next measurement, by name. Pass them only if this one counts on all ranks.
        parameter_names: the names of the chosen parameters.
    """

    measurement: Measurement
    states: Mapping[str, Any]
    parameter_names: Sequence[str] = ()


class Measurer:
    """Measures problems with the same settings, one after the other.

    Args:
        num_eigenvalues: K, at least 3.
        solver: how eigenvalues are computed; the default is `Lanczos`.
        extras: names or objects, see `EXTRAS`.
        groups: parameters whose diagonal blocks of the Hessian are measured as well, by the group's name.
        seed: starts the solver and draws the extras' random vectors.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        num_eigenvalues: int = 50,
        *,
        solver: Solver | None = None,
        extras: Iterable[str | Extra] = (),
        groups: Mapping[str, ParameterFilter] | None = None,
        seed: int = 0,
    ) -> None:
        self.num_eigenvalues = check_int("num_eigenvalues", num_eigenvalues, at_least=3)
        self.solver = Lanczos() if solver is None else solver
        if not isinstance(self.solver, Solver):
            raise OptionError("solver", "a Solver, such as Lanczos(rtol=0.05)", solver)
        self.solver.check(self.num_eigenvalues)
        self.extras = make_extras(extras, self.num_eigenvalues, self.solver)
        self.groups = check_mapping("groups", groups)
        self.seed = check_int("seed", seed, at_least=0, at_most=MAX_SEED)
        self._tracing_statistics: dict[Hashable, TracingStatistics] = {}
        self._checked: set[Hashable] = set()
        # Whether the folder of the solver's checkpoint could be used so far.
        self.is_saved = True

    @property
    def needs_eigenvectors(self) -> bool:
        """Whether an extra needs eigenvectors."""
        return any(extra.needs_eigenvectors for extra in self.extras)

    def expected_cost(self, num_parameters: int, max_basis_size: int | None = None) -> CostEstimate:
        """Estimate the products of a measurement, and the vectors that it keeps.

        Args:
            num_parameters: P.
            max_basis_size: largest number of basis vectors in memory; ``None``: no limit.
        """
        expected = self.solver.expected_hvps(self.num_eigenvalues, num_parameters)
        return CostEstimate(
            num_hvps=expected,
            max_hvps=self.solver.hvp_limit(self.num_eigenvalues),
            num_extra_hvps=expected_hvps(self.extras, expected) + len(self.groups) * expected,
            extras=(*(extra.name for extra in self.extras), *(f"group {group}" for group in self.groups)),
            num_kept_vectors=self.num_eigenvalues if self.needs_eigenvectors else 0,
            num_basis_vectors=expected if max_basis_size is None else min(expected, max_basis_size),
            basis_is_limited=max_basis_size is not None,
        )

    def measure(
        self,
        problem: Problem,
        place: Place,
        *,
        states: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
        failures: FailurePolicy | None = None,
        checkpoint: Path | None = None,
        draws_figures: bool = False,
    ) -> Measured:
        """Measure a problem; a collective.

        Args:
            problem: model, loss and samples.
            place: where in the run.
            states: of the last measurement's result.
            observer: follows the measurement.
            failures: what happens if an extra or a group fails; the default raises.
            checkpoint: the folder in which the solver saves its state; groups and halves get folders beside it.
            draws_figures: whether extras should keep data for figures.

        Returns:
            The measurement, with the seconds that it took, and the extras' states.

        Raises:
            ArithmeticError: if the loss or a product is NaN or infinite.
            ValueError: if the loss cannot be differentiated, or no parameter is chosen; see `HessianOperator`.
        """
        return _Run(
            measurer=self,
            problem=problem,
            place=place,
            states=states or {},
            observer=observer or Observer(),
            failures=failures or FailurePolicy("raise"),
            checkpoint=checkpoint,
            draws_figures=draws_figures,
        ).measure()

    def check(self, operator: HessianOperator, problem: Problem, observer: Observer) -> None:
        """Check a problem at its first measurement; later ones of the same choice of parameters are not checked.

        One product is compared with a difference of gradients. The observer gets warnings of a loss that is not the
        mean over a batch, and of state that cannot be restored. A collective.

        Raises:
            WrongProductError: if products are not derivatives of the gradient.
        """
        if problem.parameters in self._checked:
            return
        check_products(operator, seed=self.seed)
        if not self._checked:
            # If warnings are errors, they must not be those of one rank alone.
            with problem.ranks.propagate_errors("checking the loss"):
                if problem.ranks.rank == 0:
                    for text in self._warnings(operator, problem):
                        observer.warn(text)
        self._checked.add(problem.parameters)

    @staticmethod
    def _warnings(operator: HessianOperator, problem: Problem) -> list[str]:
        texts = (
            reduction_warning(operator, problem),
            parameters_warning(problem),
            changes_warning(problem),
            unchecked_warning(problem),
        )
        return [text for text in texts if text is not None]

    def forget(self) -> None:
        """Forget the model of earlier measurements, so that the next one is checked as the first."""
        self._checked.clear()
        self._tracing_statistics.clear()
        self.is_saved = True

    def tracing_statistics(self, problem: Problem) -> TracingStatistics:
        """Return the timings of earlier operators with the same parameters."""
        return self._tracing_statistics.setdefault(problem.parameters, TracingStatistics())


@dataclass
class _Run:
    """One call of `Measurer.measure`."""

    measurer: Measurer
    problem: Problem
    place: Place
    states: Mapping[str, Any]
    observer: Observer
    failures: FailurePolicy
    checkpoint: Path | None
    draws_figures: bool

    values: dict[str, float] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Measurement] = field(default_factory=dict)
    density: SpectralDensity | None = None
    new_states: dict[str, Any] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        return self.problem.ranks

    def measure(self) -> Measured:
        began = time.monotonic()
        measurer, problem = self.measurer, self.problem
        with self._operator(problem) as operator:
            # A forward pass of a sharded module is a collective, and ranks hold different numbers of batches.
            whole = not is_sharded(problem.model) or operator.exact
            loss = operator.mean_loss if whole else None
            measurer.check(operator, problem, self.observer)
            plan = measurer.solver.plan_basis(
                operator, measurer.num_eigenvalues, return_eigenvectors=measurer.needs_eigenvectors
            )
            cost = measurer.expected_cost(operator.num_parameters, plan.max_size)
            self.observer.operator_made(operator, problem, cost)
            spectrum = self._solve(operator, eigenvectors=measurer.needs_eigenvectors)
            self.observer.operator_used(operator)
            with self.ranks.propagate_errors("fitting the power law"):
                fit, reason = measurer.solver.fit(spectrum, measurer.num_eigenvalues)
            self._compute_extras(operator, spectrum, fit)
            spectrum = replace(spectrum, eigenvectors=None)
        for group, parameters in measurer.groups.items():
            self._measure_group(group, parameters)
        self._compute_extras(None, spectrum, fit)
        measurement = self._measurement(
            operator,
            spectrum,
            fit,
            reason,
            seconds=seconds_since(began, self.ranks),
            num_samples=problem.num_samples,
            loss=loss,
            comparisons=self.values,
            not_compared=self.not_compared,
            density=self.density,
            groups=self.groups,
        )
        return Measured(measurement, {**self.states, **self.new_states}, operator.parameter_names)

    def _operator(self, problem: Problem) -> HessianOperator:
        solver = self.measurer.solver
        check_trainable(problem, self.measurer.num_eigenvalues)
        try:
            return problem.operator(
                hvp=solver.hvp,
                memory_budget=solver.memory_budget,
                tracing_statistics=self.measurer.tracing_statistics(problem),
            )
        except NotAFunctionError as error:
            raise explained_change(problem, error) from error

    def _measurement(
        self, operator: HessianOperator, spectrum: Spectrum, fit: PowerLawFit | None, reason: str | None, **more: Any
    ) -> Measurement:
        return Measurement(
            epoch=self.place.epoch,
            step=self.place.step,
            when=self.place.when,
            spectrum=spectrum,
            fit=fit,
            reason=reason,
            num_parameters=operator.num_parameters,
            engine=operator.engine,
            precision=self.problem.precision,
            world_size=self.ranks.world_size,
            mode=self.measurer.solver.mode,
            **more,
        )

    # -- extras and groups -----------------------------------------------------------------------

    def _compute_extras(self, operator: HessianOperator | None, spectrum: Spectrum, fit: PowerLawFit | None) -> None:
        """Compute the extras that need the operator, or without one, those that don't."""
        for extra in self.measurer.extras:
            if extra.needs_operator != (operator is not None):
                continue
            examination = Examination(
                problem=self.problem,
                operator=operator,
                spectrum=spectrum,
                fit=fit,
                solver=self.measurer.solver,
                num_eigenvalues=self.measurer.num_eigenvalues,
                seed=self.measurer.seed,
                place=self.place,
                draws_figures=self.draws_figures,
                solve=self._solve_other,
                state=self.states.get(extra.name),
                shared=self.shared,
            )
            finding = self._try(extra.name, lambda extra=extra, at=examination: extra.compute(at))  # type: ignore[misc]
            if finding is not None:
                self._add(extra, finding)

    def _add(self, extra: Extra, finding: Finding) -> None:
        self.values |= finding.values
        self.density = finding.density or self.density
        if finding.num_hvps:
            self.values["num_extra_hvps"] = self.values.get("num_extra_hvps", 0.0) + finding.num_hvps
        if finding.state is not None:
            self.new_states[extra.name] = finding.state

    def _measure_group(self, group: str, parameters: ParameterFilter) -> None:
        """Measure the Hessian's diagonal block of one group of parameters."""

        def measure() -> Measurement:
            began = time.monotonic()
            problem = self.problem.on_parameters(parameters)
            with self._operator(problem) as operator:
                self.measurer.check(operator, problem, self.observer)
                spectrum = self._solve(operator, name=f"Hessian ({group})", part=f"group={group}")
            fit, reason = self.measurer.solver.fit(spectrum, self.measurer.num_eigenvalues)
            return self._measurement(operator, spectrum, fit, reason, seconds=seconds_since(began, self.ranks))

        measurement = self._try(f"group {group}", measure)
        if measurement is not None:
            self.groups[group] = measurement

    def _try(self, name: str, task: Callable[[], Any]) -> Any:
        """Run a part of the measurement that may fail alone."""
        self.observer.between_parts()
        outcome = self.failures.run(
            task, self.ranks, stage=f"computing {name}", consequence=f"the measurement has no {name}"
        )
        if outcome.reason is not None:
            self.not_compared[name] = outcome.reason
        return outcome.value

    def _solve_other(self, problem: Problem, part: str) -> Spectrum:
        name, _, number = part.partition("=")
        with self._operator(problem) as operator:
            return self._solve(operator, name=f"Hessian ({name} {number})", part=part)

    # -- solving ---------------------------------------------------------------------------------

    def _solve(
        self, operator: HessianOperator, *, name: str = "Hessian", part: str = "", eigenvectors: bool = False
    ) -> Spectrum:
        """Compute a spectrum, starting from the state that a killed process saved if there is one."""
        # No prefix or group contains "=".
        folder = self.checkpoint
        if folder is not None and part:
            folder = folder.with_name(f"{folder.name}-{part}")

        def solve(folder: Path | None) -> Spectrum:
            return self._solve_from(folder, operator, name, eigenvectors)

        if folder is None:
            return solve(None)
        try:
            try:
                return solve(folder)
            except CheckpointError as error:  # On all ranks.
                if self.ranks.any(isinstance(error.__cause__, OSError)):
                    return self._solve_unsaved(error, solve)
                with suppress(OSError):
                    delete_files(folder, self.ranks.rank)
                self._warn(f"the measurement starts over: {error.reason}")
            try:
                return solve(folder)
            except CheckpointError as error:
                return self._solve_unsaved(error, solve)
        except (RankLostError, SigtermReceived):
            raise
        except Exception:
            if self.failures.on_error == "warn":  # Training continues and does not come to this place again.
                with suppress(OSError):
                    delete_files(folder, self.ranks.rank)
            raise

    def _solve_unsaved(self, error: CheckpointError, solve: Callable[[Path | None], Spectrum]) -> Spectrum:
        """Solve without the folder, which cannot be used, and warn of that once."""
        if self.measurer.is_saved:
            self.measurer.is_saved = False
            self._warn(f"the measurement is not saved: {error.reason}")
        return solve(None)

    def _solve_from(self, folder: Path | None, operator: HessianOperator, name: str, eigenvectors: bool) -> Spectrum:
        measurer = self.measurer
        expected = measurer.solver.expected_hvps(measurer.num_eigenvalues, operator.num_parameters)
        with self.observer.solving(name, expected, None if folder is None else str(folder)) as progress:
            return measurer.solver.solve(
                operator,
                measurer.num_eigenvalues,
                seed=measurer.seed,
                return_eigenvectors=eigenvectors,
                progress=progress,
                checkpoint=folder,
            )

    def _warn(self, text: str) -> None:
        # If warnings are errors, they must not be those of one rank alone.
        with self.ranks.propagate_errors("warning of the solver's checkpoint"):
            if self.ranks.rank == 0:
                self.observer.warn(text)


def seconds_since(began: float, ranks: Ranks) -> float:
    """Return the first rank's seconds since a time of `time.monotonic`; clocks of ranks differ. A collective."""
    return ranks.agreed(time.monotonic() - began)
