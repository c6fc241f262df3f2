"""Measurements of a module in its Trainer's run, from the samples to the measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from hessian_callback.callbacks.batch_structures import BatchStructures
from hessian_callback.callbacks.lightning_packages import LightningModule, Trainer
from hessian_callback.callbacks.sample_source import SampleSource
from hessian_callback.callbacks.trainer_observer import Announcements, TrainerObserver
from hessian_callback.callbacks.trainer_state import callbacks_of
from hessian_callback.callbacks.training_problem import ranks_of, run_guarded, training_problem
from hessian_callback.callbacks.training_weights import TrainingWeights, averaging_callbacks
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.comparability import incomparable
from hessian_callback.measurement.failure_policy import FailurePolicy, Outcome
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.measurer import Measured, Measurer
from hessian_callback.measurement.observer import Observer
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.sample_size import warn_of_few_samples
from hessian_callback.measurement.samples import SampleSet
from hessian_callback.measurement.state_guard import Snapshot
from hessian_callback.operators.parameters import ParameterFilter

__all__ = ["RunMeasurer"]


class RunMeasurer:
    """Measures a module in its Trainer's run, which continues as if it had not been measured.

    Args:
        measurer: computes a measurement from a problem.
        source: the source of the samples.
        prefix: the callback's prefix, with which lines and files begin.
        loss_fn: ``callable(pl_module, batch)`` that replaces the module's own loss.
        parameters: the chosen parameters, see `HessianOperator`.
        failures: what happens if a measurement fails.
        figures: whether extras keep data for figures, if there is a logger.
        verbose: whether lines are printed.

    Attributes:
        measurer: as above.
        source: as above.
        loss_fn: as above.
        parameters: as above.
        states: the extras' states after the last measurement, by name.
        weights: the weights of training, while another callback may have exchanged them.
    """

    def __init__(
        self,
        measurer: Measurer,
        source: SampleSource,
        *,
        prefix: str,
        loss_fn: Callable[..., Any] | None,
        parameters: ParameterFilter | None,
        failures: FailurePolicy,
        figures: bool,
        verbose: bool,
    ) -> None:
        self.measurer = measurer
        self.source = source
        self.states: Mapping[str, Any] = {}
        self.weights = TrainingWeights()
        self._prefix = prefix
        self.loss_fn = loss_fn
        self.parameters = parameters
        self._failures = failures
        self._figures = figures
        self._announcements = Announcements(prefix, verbose)
        self._structures = BatchStructures()
        self._parameter_names: Sequence[str] = ()

    def forget(self) -> None:
        """Forget the checks, announcements and warnings of another run."""
        self.measurer.forget()
        self._failures.forget()
        self._announcements.forget()
        self._parameter_names = ()

    def begin(self) -> None:
        """Begin a run, or a part of one."""
        self._structures.forget()

    def release(self) -> None:
        """Release samples, weights and the extras' states."""
        self.source.clear()
        self.weights.discard()
        self.states = {}

    def follow_training(self, pl_module: LightningModule, batch: Any) -> None:
        """Compare the structure of the first batch of training with that of the samples, if the step gets both."""
        if self._evaluates_training_step(pl_module):
            self._structures.follow_training(batch)

    def measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        place: Place,
        history: Sequence[Measurement],
        ranks: Ranks,
    ) -> Measurement:
        """Measure on all ranks together, and warn if the slope must not be compared with the last one.

        Args:
            trainer: the trainer.
            pl_module: its module.
            place: the place, which is an earlier one for an owed measurement.
            history: earlier measurements.
            ranks: the processes of the run.

        Returns:
            The measurement, with a ``reason`` if it failed. Its ``seconds`` are those of the computation.

        Raises:
            SigtermReceived: if SIGTERM arrived.
        """
        with self.weights.put_back(trainer) as exchanged:
            self._say_which_weights(trainer, exchanged=exchanged)
            outcome = run_guarded(
                trainer,
                pl_module,
                lambda snapshot, arrived: self._examine(trainer, pl_module, snapshot, ranks, place, arrived),
                ranks,
                self._failures,
                stage="measuring the Hessian",
                consequence="the Hessian could not be measured, and training continues without its slope",
                # Nothing is lost if no training is under way.
                raise_permanent=place.when in ("fit_start", "validate"),
            )
        measurement = self._measurement_of(outcome, place, ranks)
        names = () if outcome.value is None else outcome.value.parameter_names
        reason = incomparable(history, measurement, names=names, names_before=self._parameter_names)
        if reason is not None:
            rank_zero_warn(reason)
        self._parameter_names = names or self._parameter_names
        return measurement

    def collect_ahead(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find before training an error that the first measurement, hours later, could only warn of."""
        ranks = ranks_of(trainer)
        run_guarded(
            trainer,
            pl_module,
            lambda snapshot, _: self._collect(trainer, snapshot, ranks),
            ranks,
            # Its warnings are forgotten: the same error is worth another one when it costs the slope.
            self._failures.copy(),
            stage="collecting the samples",
            consequence="the samples could not be collected before training; the measurement tries again",
            raise_permanent=True,
        )

    def _examine(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        snapshot: Snapshot,
        ranks: Ranks,
        place: Place,
        arrived: Sequence[int],
    ) -> Measured:
        """Go from the run's state to a measurement, inside the guard."""
        problem = training_problem(
            trainer,
            pl_module,
            snapshot,
            self._collect(trainer, snapshot, ranks),
            self.source,
            loss_fn=self.loss_fn,
            parameters=self.parameters,
            ranks=ranks,
        )
        if self._evaluates_training_step(pl_module):
            self._structures.follow_samples(problem.batches)
        folder = self.measurer.solver.checkpoint_folder
        return self.measurer.measure(
            problem,
            place,
            states=self.states,
            observer=self.observer(trainer, ranks, arrived),
            failures=self._failures,
            checkpoint=None if folder is None else folder / f"{quote(self._prefix, safe=' ')}-step={place.step}",
            draws_figures=self._figures and bool(trainer.loggers),
        )

    def observer(self, trainer: Trainer, ranks: Ranks, arrived: Sequence[int]) -> Observer:
        """Make the observer of one measurement.

        Args:
            trainer: the trainer.
            ranks: its processes.
            arrived: gets an entry when SIGTERM arrives.
        """
        return TrainerObserver(trainer, ranks, self._announcements, self.measurer.solver.hvp, arrived)

    def _say_which_weights(self, trainer: Trainer, *, exchanged: bool) -> None:
        names = ", ".join(averaging_callbacks(callbacks_of(trainer)))
        if self._announcements.verbose and (names or exchanged) and self._announcements.is_new("weights"):
            self._announcements.say(
                trainer,
                f"the weights that the optimizer trains are measured, and not those that "
                f"{names or 'another callback'} has for validation; trainer.validate() measures the weights that the "
                "module then has",
            )

    def _measurement_of(self, outcome: Outcome[Measured], place: Place, ranks: Ranks) -> Measurement:
        """Return the measurement of an outcome, and keep the extras' states for the next one."""
        if outcome.value is not None:
            # Kept only now: the guard restores everything that the module refers to, which may be its callbacks.
            self.states = outcome.value.states
            measurement = outcome.value.measurement
            return measurement if outcome.reason is None else replace(measurement, reason=outcome.reason)
        return Measurement(
            epoch=place.epoch,
            step=place.step,
            when=place.when,
            spectrum=None,
            fit=None,
            reason=outcome.reason,
            seconds=0.0,
            world_size=ranks.world_size,
            mode=self.measurer.solver.mode,
        )

    def _collect(self, trainer: Trainer, snapshot: Snapshot, ranks: Ranks) -> SampleSet:
        """Collect the samples, and judge their number at the first time."""
        samples = self.source.collect(trainer, snapshot, ranks)
        # If warnings are errors, they must not be those of one rank alone.
        with ranks.propagate_errors("judging the samples"):
            if ranks.rank == 0 and self._announcements.is_new("number of samples", str(samples.num_samples)):
                if samples.num_samples < self.source.num_samples:
                    rank_zero_info(
                        f"num_samples={self.source.num_samples}, but there are only {samples.num_samples} samples; "
                        "all are used"
                    )
                warn_of_few_samples(samples.num_samples, self.measurer.num_eigenvalues)
        return samples

    def _evaluates_training_step(self, pl_module: LightningModule) -> bool:
        own = self.loss_fn is not None or callable(getattr(pl_module, "hessian_loss", None))
        return not own and not self.source.on_training_data
