"""The callback that measures how far a run is from instability."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from hessian_callback._options import check_bool, check_callable, check_int, optional
from hessian_callback.callbacks import compatibility
from hessian_callback.callbacks.callback_options import checked_parameters, checked_prefix
from hessian_callback.callbacks.lightning_packages import (
    CONFIGURATION_ERRORS,
    CallbackBase,
    LightningModule,
    MisconfigurationException,
    Trainer,
)
from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.callbacks.reporters.base import Report, Reporter
from hessian_callback.callbacks.reporters.metrics import MetricReporter, restore_monitored
from hessian_callback.callbacks.reporters.pictures import LayoutReporter, PictureReporter, edge_pictures
from hessian_callback.callbacks.run_boundaries import CheckpointStates, UncountedSteps, are_same, has_trained
from hessian_callback.callbacks.sample_source import SampleSource
from hessian_callback.callbacks.schedule import MeasurementSchedule
from hessian_callback.callbacks.trainer_observer import Announcements, TrainerObserver
from hessian_callback.callbacks.trainer_state import Run, callbacks_of, logged_step, move_to_front
from hessian_callback.callbacks.training_problem import ranks_of, run_guarded, training_problem
from hessian_callback.linalg.distributed import PeerError, Ranks
from hessian_callback.measurement.edge import EdgeMeasurement, EdgeMeasurer, EdgeState, edge_history
from hessian_callback.measurement.errors import NotReadyError, UserCodeError
from hessian_callback.measurement.failure_policy import FailurePolicy, SigtermReceived
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.preconditioners import StabilityLimits, stability_limits
from hessian_callback.measurement.state_guard import Snapshot
from hessian_callback.operators.parameters import select_parameters

__all__ = ["EdgeOfStabilityMonitor"]

# A picture takes as long as several measurements.
_MEASUREMENTS_PER_PICTURE = 20


class EdgeOfStabilityMonitor(CallbackBase):
    r"""Measure how far a run's learning rate is from instability.

    On a quadratic loss with Hessian :math:`H`, gradient descent at rate :math:`\eta` with momentum :math:`\beta`
    diverges if the largest eigenvalue exceeds :math:`(2 + 2\beta)/\eta`, and Adam if that of
    :math:`P^{-1/2} H P^{-1/2}` exceeds :math:`(2 + 2\beta_1)/((1 - \beta_1)\eta)`, with the preconditioner :math:`P`
    of its step. The callback comes before those that exchange weights, whatever their order was. Logged, under
    ``prefix``:

    - ``ratio``: the largest eigenvalue over that threshold; 1 is the edge of stability;
    - ``ratio_error``: a bound on its error, see `Spectrum`;
    - ``sharpness``: the largest eigenvalue of the Hessian, and ``sharpness_error``;
    - ``preconditioned_sharpness``: the largest eigenvalue of :math:`P^{-1/2} H P^{-1/2}`;
    - ``max_lr``: the learning rate of the first parameter group at which the ratio is 1, if the rates of all groups are
      scaled together;
    - ``loss``: the mean loss on the samples, ``num_hvps``, ``seconds``, and ``overhead`` if it is limited.

    The preconditioner is read from the run's own optimizer between two steps, for each parameter group with its rate,
    momentum, epsilon and weight decay: SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad and Adamax with all their
    options; `preconditioners` has the formulas. Training continues bit for bit as without the callback. It advises and
    never changes a learning rate. Mini-batch noise lowers the ratio at which a run becomes unstable, see the
    documentation's page "Edge of stability".

    Sources: Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability" (2021) and
    "Adaptive Gradient Methods at the Edge of Stability" (2022).

    Args:
        every_n_train_steps: measure after every n optimizer steps, before the first one (if the optimizer does not
            adapt to its gradients) and at the end of training.
        max_overhead: largest share of the wall time, between 0 and 1, that measurements may take; others are left
            out. ``None`` for no limit.
        dataloader: ``"train"``, ``"val"``, or a loader; its loss should be the one that the optimizer minimizes.
        num_samples: samples over all ranks.
        batch_size: samples in each of the Hessian's batches; the default is the loader's.
        loss_fn: ``callable(pl_module, batch)`` that returns the mean loss of the batch; see `PowerLawHessianCallback`.
        parameters: which parameters: a regular expression or ``callable(name, parameter) -> bool``; others count as
            fixed.
        optimizer: the number of the optimizer, if the run has several.
        preconditioner: ``callable(group, state, parameter)`` for other optimizers. It returns the diagonal
            preconditioner of the parameter (a number or a tensor of its shape) and the largest stable eigenvalue of
            :math:`P^{-1/2} H P^{-1/2}`, or ``None`` if the optimizer has no state of the parameter yet.
        prefix: the beginning of the logged names; several callbacks of a trainer need different ones.
        batch_weight: see `PowerLawHessianCallback`.
        rtol: relative tolerance of the bounds.
        max_hvps: largest number of products for each of the two eigenvalues.
        sharpness: whether to compute ``sharpness`` if it takes an eigenvalue of its own: not for SGD with equal groups.
        on_error: ``"warn"``: a measurement that fails is noted in ``history`` and training continues; ``"raise"``.
        seed: chooses the samples and starts the eigenvalue solver.
        figures: give a picture to the loggers that show pictures, at the end and after every 20 measurements.
        verbose: print a line if the ratio rises above 1.

    Attributes:
        history: the measurements in order of time.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = EdgeOfStabilityMonitor(every_n_train_steps=100)
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
        >>> monitor.history
        []
    """

    history: list[EdgeMeasurement]

    def __init__(
        self,
        *,
        every_n_train_steps: int = 50,
        max_overhead: float | None = 0.1,
        dataloader: str | Iterable[Any] = "train",
        num_samples: int = 256,
        batch_size: int | None = None,
        # With a precise signature LightningCLI would reject a class_path.
        loss_fn: Callable[..., Any] | None = None,
        parameters: str | Callable[..., Any] | None = None,
        optimizer: int | None = None,
        preconditioner: Callable[..., Any] | None = None,
        prefix: str = "edge",
        batch_weight: Callable[..., Any] | None = None,
        rtol: float = 0.05,
        max_hvps: int = 200,
        sharpness: bool = True,
        on_error: str = "warn",
        seed: int = 0,
        figures: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.prefix = checked_prefix(prefix)
        self.parameters = checked_parameters(parameters)
        self.loss_fn = optional(check_callable, "loss_fn", loss_fn)
        self.optimizer = optional(check_int, "optimizer", optimizer, at_least=0)
        self.preconditioner = optional(check_callable, "preconditioner", preconditioner)
        self.measurer = EdgeMeasurer(rtol=rtol, max_hvps=max_hvps, sharpness=sharpness, seed=seed)
        self.source = SampleSource(
            dataloader, num_samples=num_samples, batch_size=batch_size, batch_weight=batch_weight, seed=seed
        )
        every_n_train_steps = check_int("every_n_train_steps", every_n_train_steps, at_least=1)
        self.schedule = MeasurementSchedule(
            every_n_train_steps=every_n_train_steps, at_end=True, max_overhead=max_overhead
        )
        self.failures = FailurePolicy(
            on_error,
            permanent=(*CONFIGURATION_ERRORS, ValueError, TypeError),
            plain=(*CONFIGURATION_ERRORS, NotReadyError, PeerError, UserCodeError),
        )
        self.verbose = check_bool("verbose", verbose)
        self.reporters: list[Reporter] = [MetricReporter(), *([LayoutReporter()] if figures else [])]
        self._pictures = PictureReporter(edge_pictures) if check_bool("figures", figures) else None
        self.history = []
        self._announcements = Announcements(self.prefix, self.verbose)
        self._state = EdgeState()
        self._active = False
        self._checkpoint_states = CheckpointStates()
        self._run = Run()
        self._uncounted_steps = UncountedSteps()

    # -- hooks -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that trainer, module and options go together."""
        self.source.clear()
        self._checkpoint_states.enter(stage)
        self._active = stage == "fit" and not trainer.barebones
        if trainer.barebones:
            rank_zero_info("EdgeOfStabilityMonitor measures nothing under Trainer(barebones=True), which logs nothing")
        if not self._active:
            return
        self._begin_run(trainer, pl_module)
        compatibility.check_strategy(trainer.strategy)
        compatibility.check_precision(str(trainer.precision))
        if sum(getattr(other, "prefix", None) == self.prefix for other in callbacks_of(trainer)) > 1:
            raise MisconfigurationException(
                f"two callbacks log under prefix={self.prefix!r}; give one of them another prefix"
            )
        # Callbacks that exchange weights at the end of training come after.
        kinds = (PowerLawHessianCallback, EdgeOfStabilityMonitor)
        move_to_front(trainer, [one for one in callbacks_of(trainer) if isinstance(one, kinds)])
        resolve_loss(pl_module, self.loss_fn)
        self.source.check(trainer)

    def _begin_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget another run that this object was used with."""
        if not self._run.changes(trainer, pl_module):
            return
        if not self._checkpoint_states.resumed:
            self._forget_history()
        self.measurer.forget()
        self.failures.forget()
        self._announcements.forget()
        self._uncounted_steps.forget()

    def _forget_history(self) -> None:
        self.history = []
        self._state = EdgeState()
        self.schedule.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer, and measure before the first step if its limits are known then."""
        if not self._active:
            return
        compatibility.check_parameters(pl_module, self.parameters, 1)
        self._checkpoint_states.resumed |= has_trained(trainer)
        if not self._checkpoint_states.resumed:
            # A run from the start: nothing of an earlier one of this trainer may be left.
            self._forget_history()
        limits = self._limits(trainer, pl_module)
        place = self.schedule.at_train_start(**self._here(trainer))
        if place is not None and limits is not None:
            self._measure(trainer, pl_module, place, at_start=True)
        logged = next((entry for entry in reversed(self.history) if entry.ratio is not None), None)
        if logged is not None:
            restore_monitored(trainer, pl_module, self.prefix, logged.scalars())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if this batch took an optimizer step that is due and affordable."""
        place = self.schedule.at_batch_end(**self._here(trainer)) if self._active else None
        # Clocks differ, so one rank decides for all.
        if place is not None and ranks_of(trainer).agreed(self.schedule.is_affordable(self.history)):
            self._measure(trainer, pl_module, place)
        if self._active:
            self._uncounted_steps.warn(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end of training, and draw it."""
        if not self._active:
            return
        place = self.schedule.at_train_end(**self._here(trainer))
        if place is not None and has_trained(trainer):
            self._measure(trainer, pl_module, place)
        self._uncounted_steps.warn(trainer, pl_module, at_end=True)
        if self._pictures is not None and self.history:
            self._pictures.report(self._report(trainer, pl_module, {}, at_start=True))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the samples and the eigenvectors."""
        self.source.clear()
        self._state = EdgeState()
        self._checkpoint_states.leave()
        self.schedule.stop()
        for reporter in self.reporters:
            reporter.forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the samples, because `teardown` is not called then."""
        self.teardown(trainer, pl_module, "fit")

    # -- a measurement ---------------------------------------------------------------------------

    def _here(self, trainer: Trainer) -> dict[str, Any]:
        return {"epoch": trainer.current_epoch, "step": trainer.global_step, "history": self.history}

    def _optimizer(self, trainer: Trainer) -> Optimizer:
        optimizers, number = trainer.optimizers, self.optimizer
        if number is None and len(optimizers) == 1:
            return optimizers[0]
        if number is None or number >= len(optimizers):
            raise MisconfigurationException(
                f"optimizer={number}, and the run has {len(optimizers)} optimizers; choose one with optimizer=0 and so "
                "on, and its loss with loss_fn=, and give each a monitor with a prefix of its own"
            )
        return optimizers[number]

    def _limits(self, trainer: Trainer, pl_module: LightningModule) -> StabilityLimits | None:
        parameters = select_parameters(pl_module, self.parameters)
        return stability_limits(self._optimizer(trainer), parameters, self.preconditioner)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, place: Place, *, at_start: bool = False) -> None:
        """Measure, note and report; on all ranks together, whatever fails."""
        began = time.monotonic()
        ranks = ranks_of(trainer)
        self.schedule.begin(place)
        try:
            outcome = run_guarded(
                trainer,
                pl_module,
                lambda snapshot, arrived: self._examine(trainer, pl_module, snapshot, ranks, place, arrived),
                ranks,
                self.failures,
                stage="measuring the edge of stability",
                consequence="the edge of stability could not be measured, and training continues without its ratio",
                raise_permanent=at_start,
            )
        except SigtermReceived:
            self.schedule.add_overhead(time.monotonic() - began)
            return
        measurement = EdgeMeasurement(place.epoch, place.step, place.when, reason=outcome.reason)
        if outcome.value is not None:
            # Kept only now: the guard restores everything that the module refers to, which may be its callbacks.
            measurement, self._state = outcome.value
        rose = (measurement.ratio or 0) > 1 and not (self.history and (self.history[-1].ratio or 0) > 1)
        self.history.append(measurement)
        self.schedule.finish(measurement.seconds)
        if self.verbose and rose:
            self._announcements.say(trainer, f"above the edge of stability. {measurement.summary()}")
        values = measurement.scalars()
        if self.schedule.time.limit is not None:
            values["overhead"] = ranks.agreed(self.schedule.time.fraction)
        report = self._report(trainer, pl_module, values, at_start=at_start)
        for reporter in self.reporters:
            reporter.report(report)
        if self._pictures is not None and len(self.history) % _MEASUREMENTS_PER_PICTURE == 0:
            self._pictures.report(report)
        self.schedule.add_overhead(time.monotonic() - began - measurement.seconds)

    def _examine(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        snapshot: Snapshot,
        ranks: Ranks,
        place: Place,
        arrived: Sequence[int],
    ) -> tuple[EdgeMeasurement, EdgeState]:
        """Go from the run's state to a measurement, inside the guard."""
        limits = self._limits(trainer, pl_module)
        if limits is None:
            raise NotReadyError("the optimizer has no state of the chosen parameters, so it has not moved them yet")
        problem = training_problem(
            trainer,
            pl_module,
            snapshot,
            self.source.collect(trainer, snapshot, ranks),
            self.source,
            loss_fn=self.loss_fn,
            parameters=self.parameters,
            ranks=ranks,
        )
        observer = TrainerObserver(trainer, ranks, self._announcements, "auto", arrived)
        return self.measurer.measure(
            problem, limits, place, state=self._state, progress=lambda _: observer.between_parts()
        )

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float], *, at_start: bool
    ) -> Report:
        after_batch = not at_start and self.history[-1].when == "step"
        return Report(
            trainer=trainer,
            pl_module=pl_module,
            callback=self,
            prefix=self.prefix,
            history=self.history,
            values=values,
            step=logged_step(trainer, "on_train_batch_end" if after_batch else "on_train_end"),
            can_log=not at_start,
            prediction=None,
            states={},
            ranks=ranks_of(trainer),
            failures=self.failures,
        )

    # -- state -----------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint: one for each prefix."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the time spent, as ``torch.load(weights_only=True)`` accepts them."""
        return {"edge": [entry.to_state() for entry in self.history], "time": self.schedule.state_dict()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget the history if the run resumes from a checkpoint without one."""
        if self._checkpoint_states.are_missing(checkpoint, self.state_key):
            self._forget_history()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint, if `fit` resumes from it.

        Raises:
            ValueError: if the state is damaged.
        """
        if not self._checkpoint_states.are_taken:
            return
        history = edge_history(state_dict["edge"])
        if are_same(history, self.history) and self.schedule.matches(state_dict["time"]):
            return
        self.history = history
        self.schedule.load_state_dict(state_dict["time"])
        self._checkpoint_states.resumed = True
