"""The callback that measures the power law of the Hessian's spectrum while a model trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from hessian_callback._options import check_bool, check_callable, check_str, optional
from hessian_callback.callbacks import compatibility
from hessian_callback.callbacks.callback_options import checked_groups, checked_parameters, checked_prefix
from hessian_callback.callbacks.hyperparameters import announce_columns
from hessian_callback.callbacks.lightning_packages import (
    CONFIGURATION_ERRORS,
    CallbackBase,
    LightningModule,
    MisconfigurationException,
    Trainer,
    TrainerFn,
)
from hessian_callback.callbacks.live_prediction import HELD_OUT, LivePrediction
from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.callbacks.moved_options import moved_options
from hessian_callback.callbacks.progress import announce
from hessian_callback.callbacks.reporters.base import Report, Reporter
from hessian_callback.callbacks.reporters.console import ConsoleReporter
from hessian_callback.callbacks.reporters.history_file import HistoryFileReporter
from hessian_callback.callbacks.reporters.listeners import ListenerReporter
from hessian_callback.callbacks.reporters.metrics import MetricReporter, restore_monitored
from hessian_callback.callbacks.reporters.pictures import LayoutReporter, PictureReporter
from hessian_callback.callbacks.run_boundaries import CheckpointStates, UncountedSteps, are_same, has_trained
from hessian_callback.callbacks.run_measurer import RunMeasurer
from hessian_callback.callbacks.run_prediction import RunPrediction
from hessian_callback.callbacks.sample_source import SampleSource
from hessian_callback.callbacks.schedule import MeasurementSchedule
from hessian_callback.callbacks.trainer_state import (
    EpochClock,
    Hook,
    Run,
    callbacks_of,
    is_last,
    logged_step,
    move_to_front,
    values_are_read_after_validation,
)
from hessian_callback.callbacks.training_problem import ranks_of
from hessian_callback.callbacks.training_weights import may_exchange_before_validation, may_exchange_weights
from hessian_callback.linalg.distributed import PeerError, Ranks
from hessian_callback.measurement.errors import NotReadyError, UserCodeError
from hessian_callback.measurement.extras.base import Extra
from hessian_callback.measurement.failure_policy import FailurePolicy, SigtermReceived
from hessian_callback.measurement.history import STATE_VERSION, history_from_state
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.measurer import Measurer, seconds_since
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.solvers import Solver
from hessian_callback.operators.derivatives import DoubleBackwardError
from hessian_callback.operators.parameters import ParameterFilter

__all__ = ["PowerLawHessianCallback"]

# The message of such an error stays true for the whole run, so it is raised while nothing is lost.
_PERMANENT_ERRORS = (*CONFIGURATION_ERRORS, DoubleBackwardError, ValueError, TypeError)
# The message of such an error is a whole sentence, which the name of its type does not improve.
_PLAIN_ERRORS = (*CONFIGURATION_ERRORS, NotReadyError, PeerError, UserCodeError)

# The last values of these stand in TensorBoard's table of hyperparameters.
_COLUMNS = ("slope", "fit_error")


class PowerLawHessianCallback(CallbackBase):
    r"""Measure the power-law slope of the loss Hessian's spectrum while a model trains.

    At each measurement the ``num_eigenvalues`` largest eigenvalues of the Hessian

    .. math:: H = \frac{1}{N} \sum_{i=1}^{N} \nabla^2_\theta \, \ell_i(\theta)

    of the loss on ``num_samples`` fixed samples are computed with error bounds, a power law
    :math:`\lambda_k = \lambda_1 k^{-s}` is fitted to them, and its slope and fit error are logged. Training continues
    unchanged: weights after training are the same bit for bit, with and without the callback.

    Logged, under ``prefix``: ``slope``, ``slope_stderr``, ``slope_low``, ``slope_high``, ``fit_error``,
    ``critical_distance``, ``critical_distance_paper``, ``density_exponent``, ``lambda_max``, ``num_fitted``,
    ``num_hvps``, ``seconds``, ``overhead`` if it is limited, and the keys of ``extras``, ``groups`` and ``predict``.
    EarlyStopping, ModelCheckpoint and ReduceLROnPlateau can monitor each of them in the epoch of the measurement. The
    measurement before the first step goes to ``history`` and the logger only.

    The loss is ``loss_fn(pl_module, batch)``, else ``pl_module.hessian_loss(batch)``, else the result of
    ``training_step``, in eval mode, in the parameters' precision without autocast (half-precision parameters are
    copied to float32), and with logging switched off.

    The weights are those that the optimizer trains, also if another callback averages them or exchanges them for
    validation; ``trainer.validate()`` measures those that the module then has. The callback comes before all others in
    ``trainer.callbacks``, whatever their order was.

    With several ranks (``strategy="ddp"`` and its variants) all of them share the work. The samples are the same for
    any number of ranks; of an ``IterableDataset`` each rank takes the first samples of its own stream. When a
    measurement fails on one rank, all ranks give it up together.

    Args:
        num_eigenvalues: how many of the largest eigenvalues to fit, ``K``, at least 3. Slopes compare at equal ``K``
            only.
        every_n_epochs: measure the first epoch and then every n-th.
        every_n_train_steps: measure after every n optimizer steps instead, and before the first one.
        at_steps: measure after these numbers of optimizer steps instead; 0 is the start.
        at_end: measure the end of training as well, whatever the other options are.
        max_overhead: largest share of the wall time, between 0 and 1, that measurements may take. The one before
            the first step, the first one after it and the last one are always made, others if they fit.
        dataloader: ``"val"``, ``"train"`` (the paper's Hessian is that of the training loss), or a loader.
        num_samples: samples over all ranks: a random subset of a map-style data set, the beginning of a stream.
        batch_size: samples in each of the Hessian's batches; the default is the loader's. Large ones are faster, and
            are cut if memory is short. It changes the measured loss if that is not a mean over samples.
        loss_fn: ``callable(pl_module, batch)`` that returns the mean loss of the batch.
        parameters: which parameters: a regular expression for ``re.search`` on their names, or
            ``callable(name, parameter) -> bool``; the default is all that are trained.
        groups: regular expressions by name, such as ``{"head": "^head", "last_block": r"blocks\.11"}``: the Hessian's
            block of the matching parameters is measured as well and logged as ``slope/head`` and so on. Each costs
            about as much as the Hessian itself.
        extras: further quantities of the same Hessian, by name or as objects, see `EXTRAS`: ``"trace"``,
            ``"frobenius"``, ``"density"``, ``"subspace"``, ``"norms"``, ``"numerical_interval"``, ``"split_half"``,
            ``OutlierRatio(num_classes=10)``.
        solver: how eigenvalues are computed and which are fitted: `Lanczos` with its tolerance, cost limit, engine,
            memory budget and checkpoint, or `PublishedProtocol`; the default is ``Lanczos()``.
        predict: the validation loss whose next value is predicted from slope and fit error and, for comparison, from
            baselines without cost: ``"held_out"``, the mean loss on the Hessian's own samples (nothing is predicted
            with ``dataloader="train"``); the name of a metric that ``validation_step`` logs, if measurements are made
            at ends of epochs; or ``None``. `LivePrediction.scalars` lists the keys.
        prefix: the beginning of the logged names; several callbacks of a trainer need different ones.
        batch_weight: ``callable(batch)`` that returns the number of terms of the batch's mean loss, such as counted
            tokens; the default is the leading dimension, if the batch has only one.
        train_loss: the name of the training loss that the run logs, for the gap between the two losses.
        on_error: ``"warn"``: a measurement that fails is noted in ``history`` and training continues; ``"raise"``: it
            ends the run. An error that would recur at every measurement is raised before training, if it shows there.
        seed: chooses samples, fixes their augmentation, and starts the eigenvalue solver.
        figures: give pictures of spectrum, density and eigenspaces, and a layout of the curves, to the loggers that
            show them (TensorBoard, Weights & Biases, MLflow), if matplotlib is installed.
        verbose: print the expected cost once, and a line for each measurement.

    Attributes:
        history: the measurements in order of time, each a `Measurement`, those without a slope included. It is filled
            in the callback among ``trainer.callbacks``, which is a copy if a library or ``strategy="ddp_spawn"`` copies
            callbacks. Beside the files of a TensorBoardLogger or CSVLogger it is kept as ``hessian_history.jsonl``.

    Raises:
        ValueError: if an option is out of range.
        TypeError: if an option of an earlier version is given; the message names its new place.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> callback = PowerLawHessianCallback(num_eigenvalues=20, every_n_epochs=2)
        >>> stop = EarlyStopping(monitor="hessian/slope", mode="min", strict=False)
        >>> trainer = Trainer(callbacks=[callback, stop], logger=False, enable_checkpointing=False)
        >>> callback.history
        []
    """

    history: list[Measurement]

    @moved_options
    def __init__(
        self,
        *,
        num_eigenvalues: int = 50,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        at_steps: Sequence[int] | None = None,
        at_end: bool = False,
        max_overhead: float | None = None,
        dataloader: str | Iterable[Any] = "val",
        num_samples: int = 1024,
        batch_size: int | None = None,
        # With a precise signature LightningCLI would reject a class_path.
        loss_fn: Callable[..., Any] | None = None,
        parameters: str | Callable[..., Any] | None = None,
        groups: Mapping[str, str] | None = None,
        extras: Sequence[str | Extra] = (),
        solver: Solver | None = None,
        predict: str | None = HELD_OUT,
        prefix: str = "hessian",
        batch_weight: Callable[..., Any] | None = None,
        train_loss: str | None = "train_loss",
        on_error: str = "warn",
        seed: int = 0,
        figures: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.prefix = checked_prefix(prefix)
        self.measurer = Measurer(
            num_eigenvalues, solver=solver, extras=extras, groups=checked_groups(groups), seed=seed
        )
        self.source = SampleSource(
            dataloader,
            num_samples=num_samples,
            batch_size=batch_size,
            batch_weight=batch_weight,
            seed=self.measurer.seed,
        )
        self.schedule = MeasurementSchedule(
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            at_steps=at_steps,
            at_end=at_end,
            max_overhead=max_overhead,
        )
        self.figures = check_bool("figures", figures)
        self.verbose = check_bool("verbose", verbose)
        self.failures = FailurePolicy(on_error, permanent=_PERMANENT_ERRORS, plain=_PLAIN_ERRORS)
        self.run_measurer = RunMeasurer(
            self.measurer,
            self.source,
            prefix=self.prefix,
            loss_fn=optional(check_callable, "loss_fn", loss_fn),
            parameters=checked_parameters(parameters),
            failures=self.failures,
            figures=self.figures,
            verbose=self.verbose,
        )
        self.reporters = self._make_reporters()

        self.history = []
        self._prediction = RunPrediction(
            optional(check_str, "predict", predict),
            optional(check_str, "train_loss", train_loss),
            on_training_data=self.source.on_training_data,
        )
        self._active = True
        self._checkpoint_states = CheckpointStates()
        self._validated_at: int | None = None
        self._epoch = EpochClock()
        self._run, self._module = Run(), Run()
        self._uncounted_steps = UncountedSteps()

    @property
    def prediction(self) -> LivePrediction | None:
        """The prediction of the run's loss; ``None`` if nothing is predicted."""
        return self._prediction.live

    @property
    def loss_fn(self) -> Callable[..., Any] | None:
        """The function that replaces the module's own loss."""
        return self.run_measurer.loss_fn

    @property
    def parameters(self) -> ParameterFilter | None:
        """Which parameters were chosen."""
        return self.run_measurer.parameters

    def _make_reporters(self) -> list[Reporter]:
        reporters: list[Reporter] = [MetricReporter(), HistoryFileReporter(self.prefix)]
        if self.verbose:
            reporters.append(ConsoleReporter())
        if self.figures:
            reporters += [LayoutReporter(), PictureReporter()]
        return [*reporters, ListenerReporter()]

    # -- checks ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that trainer, module and options go together; called again by ``lr_find``."""
        self.source.clear()  # A run that ended with an exception has no teardown.
        self._checkpoint_states.enter(stage)
        self._active = stage in ("fit", "validate") and not trainer.barebones
        if trainer.barebones:
            rank_zero_info("PowerLawHessianCallback measures nothing under Trainer(barebones=True), which logs nothing")
        if not self._active:
            return
        self._begin_run(trainer, pl_module, stage)
        compatibility.check_strategy(trainer.strategy)
        compatibility.check_precision(str(trainer.precision))
        callbacks = [other for other in callbacks_of(trainer) if isinstance(other, PowerLawHessianCallback)]
        if sum(other.prefix == self.prefix for other in callbacks) > 1:
            raise MisconfigurationException(
                f"two PowerLawHessianCallbacks log under prefix={self.prefix!r}, and Lightning would average "
                "their values; give one of them another prefix"
            )
        # The hooks of callbacks that exchange weights come after, whatever their order.
        move_to_front(trainer, callbacks)
        resolve_loss(pl_module, self.loss_fn)
        cadence = self.schedule.cadence
        self.source.check(trainer)
        if self._prediction.predict not in (None, HELD_OUT) and not cadence.by_epochs:
            raise MisconfigurationException(
                f"predict={self._prediction.predict!r} is known at ends of validation only, and measurements by steps "
                f"come before; use predict={HELD_OUT!r}, the loss on the Hessian's own samples, or every_n_epochs"
            )
        if stage == "fit":
            if trainer.is_global_zero and callbacks[0] is self:
                # TensorBoard takes the first announcement of a run, so one callback announces for all.
                columns = [f"{callback.prefix}/{name}" for callback in callbacks for name in _COLUMNS]
                announce_columns(trainer, pl_module, columns)
            every_epoch = cadence.by_epochs and cadence.every_n_epochs == 1 and self.schedule.time.limit is None
            compatibility.warn_of_strict_monitors(trainer, self.prefix, every_epoch=every_epoch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters for ``trainer.validate()``; keep the weights of training."""
        if not self._active or trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check_parameters(pl_module)
        elif self.schedule.at_validation_end(**self._here(trainer)) is not None:
            others = [other for other in callbacks_of(trainer) if other is not self]
            # Those of a module that exchanges them before were kept before.
            if not may_exchange_before_validation(pl_module) and may_exchange_weights([*others, pl_module]):
                self.run_measurer.weights.keep(pl_module)

    def _begin_run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget another run, or module, that this object was used with."""
        another = self._module.changes(pl_module)
        if stage == "fit":
            # To validate another module does not end a run, and such validations are no part of one.
            another &= all(entry.when == "validate" for entry in self.history)
            another |= self._run.changes(trainer, pl_module)
            if another and not self._checkpoint_states.resumed:
                self._forget_history()
        if another:
            self.run_measurer.forget()
            self._uncounted_steps.forget()
            self._validated_at = None
        self.run_measurer.begin()

    def _forget_history(self) -> None:
        self.history = []
        self.schedule.reset()
        if self.prediction is not None:
            self.prediction.follow(self.history)

    def _check_parameters(self, pl_module: LightningModule) -> None:
        num_eigenvalues = self.measurer.num_eigenvalues
        compatibility.check_parameters(pl_module, self.parameters, num_eigenvalues)
        for group, expression in self.measurer.groups.items():
            _check_group(pl_module, group, expression, num_eigenvalues)

    # -- places ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters; measure before the first step, or collect the samples; continue a resumed run."""
        if not self._active:
            return
        self._checkpoint_states.resumed |= has_trained(trainer)
        # Other callbacks may add parameters before.
        self._check_parameters(pl_module)
        compatibility.warn_of_strict_schedulers(trainer, self.prefix)
        if trainer.global_step == 0 and not self._checkpoint_states.resumed:
            # A run from the start: nothing of an earlier one of this trainer may be left.
            self.history = [entry for entry in self.history if entry.when == "validate"]
            self.schedule.reset()
        # Ranks may differ in their callbacks, and must measure together.
        after_validation = ranks_of(trainer).any(values_are_read_after_validation(trainer, pl_module))
        place = self.schedule.at_train_start(
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            history=self.history,
            after_validation=after_validation,
        )
        if place is not None:
            self._measure(trainer, pl_module, place, "on_train_start")
        elif trainer.global_step == 0 and not self._checkpoint_states.resumed:
            began = time.monotonic()
            self.run_measurer.collect_ahead(trainer, pl_module)
            self.schedule.add_overhead(time.monotonic() - began)
        self._restore_monitored(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time, to compare a measurement with an epoch."""
        self._epoch.start(self.schedule.time.spent)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the structure of the first batch with that of the samples."""
        if self._active:
            self.run_measurer.weights.discard()
            self.run_measurer.follow_training(pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if this batch took an optimizer step that is due; never within an accumulation."""
        if self._active:
            place = self.schedule.at_batch_end(**self._here(trainer))
            self._measure_if_affordable(trainer, pl_module, place, "on_train_batch_end")
            self._uncounted_steps.warn(trainer, pl_module)
            due = self.schedule.at_validation_end(**self._here(trainer))
            if due is not None and may_exchange_before_validation(pl_module):
                self.run_measurer.weights.keep_before_validation(trainer, pl_module)
            if trainer.global_step == 0:  # Steps that are not counted do not tell an old validation from a new one.
                self._validated_at = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure in ``trainer.validate()``, and if values are read after validation."""
        if not self._active or trainer.sanity_checking:
            return
        self._validated_at = trainer.global_step
        if trainer.state.fn == TrainerFn.VALIDATING:
            place = Place(trainer.current_epoch, trainer.global_step, "validate")
            self._measure(trainer, pl_module, place, "on_validation_epoch_end")
        else:
            due = self.schedule.at_validation_end(**self._here(trainer))
            self._measure_if_affordable(trainer, pl_module, due, "on_validation_epoch_end")
            self.run_measurer.weights.discard()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if values are read after the training epoch only, or the epoch had no validation."""
        if not self._active:
            return
        epoch_seconds = self._epoch.seconds(self.schedule.time.spent)
        place = self.schedule.at_epoch_end(**self._here(trainer), is_last=is_last(trainer))
        self._measure_if_affordable(trainer, pl_module, place, "on_train_epoch_end")
        self._uncounted_steps.warn(trainer, pl_module, at_end=True)
        if self.history:
            self._epoch.warn_of(self.history[-1], epoch_seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end of training if it is wanted and was not measured at the end of an epoch."""
        if not self._active:
            return
        place = self.schedule.at_train_end(**self._here(trainer))
        if place is not None:
            self._measure(trainer, pl_module, place, "on_train_end")
        summary = None if self.prediction is None else self.prediction.summary()
        if summary and self.verbose:
            announce(trainer, f"{self.prefix}: {summary}")

    def _here(self, trainer: Trainer) -> dict[str, Any]:
        return {"epoch": trainer.current_epoch, "step": trainer.global_step, "history": self.history}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the samples and the state of the extras."""
        self.run_measurer.release()
        for reporter in self.reporters:
            reporter.forget()
        self._checkpoint_states.leave()
        self.schedule.stop()
        self._epoch.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the samples, because `teardown` is not called then."""
        self.teardown(trainer, pl_module, "fit")

    def _measure_if_affordable(
        self, trainer: Trainer, pl_module: LightningModule, place: Place | None, hook: Hook
    ) -> None:
        if place is None:
            return
        # Clocks differ, so one rank decides for all.
        affordable = self.schedule.is_affordable(self.history, is_last=is_last(trainer))
        if self.schedule.time.limit is None or ranks_of(trainer).agreed(affordable):
            self._measure(trainer, pl_module, place, hook)

    # -- a measurement ---------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, pl_module: LightningModule, place: Place, hook: Hook) -> None:
        """Measure, note and report; on all ranks together, whatever fails.

        Args:
            trainer: the trainer.
            pl_module: its module.
            place: the place, which is an earlier one for an owed measurement.
            hook: the present hook.
        """
        began = time.monotonic()
        ranks = ranks_of(trainer)
        self.schedule.begin(place)
        val_loss, train_loss = None, None
        if place.when not in ("fit_start", "validate"):
            validated = self._validated_at == place.step
            val_loss, train_loss = self._prediction.losses(trainer, ranks, self.failures, validated=validated)
        try:
            measurement = self.run_measurer.measure(trainer, pl_module, place, self.history, ranks)
        except SigtermReceived:
            self.schedule.add_overhead(time.monotonic() - began)
            announce(
                trainer, f"{self.prefix}: gave up the measurement because of SIGTERM; a resumed run makes it first"
            )
            return
        measurement = replace(
            measurement, seconds=seconds_since(began, ranks), val_loss=val_loss, train_loss=train_loss
        )
        self.history.append(measurement)
        self._prediction.follow(self.history, ranks, self.failures)
        self.schedule.finish(measurement.seconds)
        self._report(trainer, pl_module, measurement, ranks, hook)
        # Logging and drawing take the callback's time as well.
        self.schedule.add_overhead(time.monotonic() - began - measurement.seconds)

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, measurement: Measurement, ranks: Ranks, hook: Hook
    ) -> None:
        overhead = ranks.agreed(self.schedule.time.fraction)
        values = measurement.scalars()
        if measurement.when not in ("fit_start", "validate"):
            values |= self._prediction.scalars()
        if self.schedule.time.limit is not None and measurement.when != "validate":
            values["overhead"] = overhead
        report = Report(
            trainer=trainer,
            pl_module=pl_module,
            callback=self,
            prefix=self.prefix,
            history=self.history,
            values=values,
            step=logged_step(trainer, hook),
            can_log=hook != "on_train_start",
            prediction=self.prediction,
            states=self.run_measurer.states,
            ranks=ranks,
            failures=self.failures,
        )
        for reporter in self.reporters:
            reporter.report(report)

    def _restore_monitored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give callbacks that monitor the slope the last one before an interruption."""
        last = next(
            (entry for entry in reversed(self.history) if entry.when in ("epoch", "step") and entry.logged), None
        )
        if last is not None:
            restore_monitored(trainer, pl_module, self.prefix, last.scalars() | self._prediction.scalars())

    # -- state -----------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint: one for each prefix."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the time spent, as ``torch.load(weights_only=True)`` accepts them."""
        return {
            "version": STATE_VERSION,
            "history": [measurement.to_state() for measurement in self.history],
            "time": self.schedule.state_dict(),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget the history if the run resumes from a checkpoint without one."""
        if self._checkpoint_states.are_missing(checkpoint, self.state_key):
            self._forget_history()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint, if `fit` resumes from it.

        Raises:
            ValueError: if the state is of another version or damaged.
        """
        if not self._checkpoint_states.are_taken:
            return
        history = history_from_state(state_dict)
        if are_same(history, self.history) and self.schedule.matches(state_dict["time"]):
            return
        self.history = history
        if self.prediction is not None:
            self.prediction.follow(self.history)
        self.schedule.load_state_dict(state_dict["time"])
        self._checkpoint_states.resumed = True


def _check_group(pl_module: LightningModule, group: str, parameters: ParameterFilter, num_eigenvalues: int) -> None:
    try:
        compatibility.check_parameters(pl_module, parameters, num_eigenvalues)
    except MisconfigurationException as error:
        raise MisconfigurationException(f"groups[{group!r}]: {error}") from error
