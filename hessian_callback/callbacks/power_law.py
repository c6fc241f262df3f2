"""The callback that measures the power law of the Hessian's spectrum while a model trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from hessian_callback._options import (
    MAX_SEED,
    check_bool,
    check_callable,
    check_choice,
    check_int,
    check_str,
    optional,
)
from hessian_callback.callbacks import compatibility
from hessian_callback.callbacks.hyperparameters import announce_columns
from hessian_callback.callbacks.live_prediction import HELD_OUT, LivePrediction
from hessian_callback.callbacks.log_names import check_log_name
from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.callbacks.moved_options import moved_options
from hessian_callback.callbacks.progress import announce
from hessian_callback.callbacks.reporters.base import Report, Reporter
from hessian_callback.callbacks.reporters.console import ConsoleReporter
from hessian_callback.callbacks.reporters.history_file import HistoryFileReporter
from hessian_callback.callbacks.reporters.listeners import ListenerReporter
from hessian_callback.callbacks.reporters.metrics import MetricReporter, restore_monitored
from hessian_callback.callbacks.reporters.pictures import LayoutReporter, PictureReporter
from hessian_callback.callbacks.run_losses import losses_of
from hessian_callback.callbacks.sample_source import SampleSource
from hessian_callback.callbacks.schedule import Cadence, TimeShare
from hessian_callback.callbacks.state_guard import Snapshot
from hessian_callback.callbacks.trainer_observer import Announcements, TrainerObserver
from hessian_callback.callbacks.training_problem import ranks_of, run_guarded, training_problem
from hessian_callback.linalg.distributed import PeerError, Ranks
from hessian_callback.measurement.extras.base import Extra
from hessian_callback.measurement.failure_policy import FailurePolicy, SigtermReceived
from hessian_callback.measurement.history import STATE_VERSION, history_from_state
from hessian_callback.measurement.measurement import Measurement, When
from hessian_callback.measurement.measurer import Measured, Measurer, seconds_since
from hessian_callback.measurement.observer import Observer
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.sample_size import warn_of_few_samples
from hessian_callback.measurement.samples import SampleSet
from hessian_callback.measurement.solvers import Solver
from hessian_callback.operators.derivatives import DoubleBackwardError
from hessian_callback.operators.parameters import ParameterFilter, compile_pattern

__all__ = ["PowerLawHessianCallback"]

# The message of such an error stays true for the whole run, so it is raised while nothing is lost.
_PERMANENT_ERRORS = (MisconfigurationException, DoubleBackwardError, ValueError, TypeError)

# The last values of these stand in TensorBoard's table of hyperparameters.
_COLUMNS = ("slope", "fit_error")


class PowerLawHessianCallback(Callback):
    r"""Measure the power-law slope of the loss Hessian's spectrum while a model trains.

    At each measurement the ``num_eigenvalues`` largest eigenvalues of the Hessian

    .. math:: H = \frac{1}{N} \sum_{i=1}^{N} \nabla^2_\theta \, \ell_i(\theta)

    of the loss on ``num_samples`` fixed samples are computed with error bounds, a power law
    :math:`\lambda_k = \lambda_1 k^{-s}` is fitted to them, and its slope and fit error are logged. Training goes on
    unchanged: weights after training are the same bit for bit, with and without the callback.

    Logged, under ``prefix``: ``slope``, ``fit_error``, ``slope_stderr``, ``density_exponent``, ``lambda_max``,
    ``num_fitted``, ``num_hvps``, ``seconds``, ``overhead`` if it is limited, and the keys of ``extras``, ``groups`` and
    ``predict``. EarlyStopping, ModelCheckpoint and ReduceLROnPlateau can monitor each of them in the epoch of the
    measurement. The measurement before the first step goes to ``history`` and the logger only.

    The loss is ``loss_fn(pl_module, batch)``, else ``pl_module.hessian_loss(batch)``, else the result of
    ``training_step``, in eval mode, in the parameters' precision without autocast (half-precision parameters are
    copied to float32), and with logging switched off.

    With several ranks (``strategy="ddp"`` and its variants) all of them share the work. The samples are the same for
    any number of ranks; of an ``IterableDataset`` each rank takes the first samples of its own stream. When a
    measurement fails on one rank, all ranks give it up together.

    Args:
        num_eigenvalues: how many of the largest eigenvalues to fit, ``K``, at least 3. Slopes compare at equal ``K``
            only.
        every_n_epochs: measure the first epoch and then every n-th.
        every_n_train_steps: measure after every n optimizer steps instead.
        at_steps: measure after these numbers of optimizer steps instead; 0 is the start.
        at_end: measure the end of training as well, whatever the other options are.
        max_overhead: largest share of the wall time, between 0 and 1, that measurements may take. The first and the
            last are always made, others if they fit.
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
        on_error: ``"warn"``: a measurement that fails is noted in ``history`` and training goes on; ``"raise"``: it
            ends the run. An error that would recur at every measurement is raised before training, if it shows there.
        seed: chooses samples, fixes their augmentation, and starts the eigenvalue solver.
        figures: give pictures of spectrum, density and eigenspaces, and a layout of the curves, to the loggers that
            show them (TensorBoard, Weights & Biases, MLflow), if matplotlib is installed.
        verbose: print the expected cost once, and a line for each measurement.

    Attributes:
        history: the measurements in order of time, each a `Measurement`, those without a slope included. It is filled
            in the callback among ``trainer.callbacks``, which is a copy if a library or ``strategy="ddp_spawn"`` copies
            callbacks. Beside the files of a TensorBoardLogger or CSVLogger it is kept as ``hessian_history.jsonl``.
        prediction: a `LivePrediction` of the history; ``None`` if nothing is predicted.

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
        self.prefix = _checked_prefix(prefix)
        self.parameters = _checked_parameters(parameters)
        self.measurer = Measurer(
            num_eigenvalues,
            solver=solver,
            extras=extras,
            groups=_checked_groups(groups),
            seed=check_int("seed", seed, at_least=0, at_most=MAX_SEED),
        )
        if isinstance(dataloader, str):
            check_choice("dataloader", dataloader, ("val", "train"))
        self.source = SampleSource(
            dataloader,
            num_samples=check_int("num_samples", num_samples, at_least=1),
            batch_size=optional(check_int, "batch_size", batch_size, at_least=1),
            batch_weight=optional(check_callable, "batch_weight", batch_weight),
            seed=self.measurer.seed,
        )
        self.at_end = check_bool("at_end", at_end)
        self.cadence = Cadence.checked(every_n_epochs, every_n_train_steps, at_steps, may_be_empty=at_end)
        self.loss_fn = optional(check_callable, "loss_fn", loss_fn)
        optional(check_str, "predict", predict)
        self.predict = None if self.source.on_training_data and predict == HELD_OUT else predict
        self.train_loss = optional(check_str, "train_loss", train_loss)
        self.figures = check_bool("figures", figures)
        self.verbose = check_bool("verbose", verbose)

        self.history = []
        self.prediction = (
            None
            if self.predict is None
            else LivePrediction(self.predict, on_training_data=self.source.on_training_data)
        )
        self.failures = FailurePolicy(
            on_error, permanent=_PERMANENT_ERRORS, plain=(MisconfigurationException, PeerError)
        )
        self.reporters = self._make_reporters()
        self._announcements = Announcements(self.prefix, self.verbose)
        self._time = TimeShare(max_overhead)
        self._states: Mapping[str, Any] = {}
        self._active = True
        self._restored = False
        self._at_train_epoch_end = True
        self._steps_seen = 0
        self._validated_at: int | None = None
        self._epoch_began: tuple[float, float] | None = None

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
        compatibility.check_trainer(trainer)
        self.source.clear()  # A run that ended with an exception has no teardown.
        self._active = stage in ("fit", "validate") and not trainer.barebones
        if trainer.barebones:
            rank_zero_info("PowerLawHessianCallback measures nothing under Trainer(barebones=True), which logs nothing")
        if not self._active:
            return
        compatibility.check_strategy(trainer.strategy)
        compatibility.check_precision(str(trainer.precision))
        callbacks = [other for other in _callbacks(trainer) if isinstance(other, PowerLawHessianCallback)]
        if sum(other.prefix == self.prefix for other in callbacks) > 1:
            raise MisconfigurationException(
                f"two PowerLawHessianCallbacks log under prefix={self.prefix!r}, and Lightning would average "
                "their values; give one of them another prefix"
            )
        resolve_loss(pl_module, self.loss_fn)
        self.source.check(trainer)
        if self.predict not in (None, HELD_OUT) and not self.cadence.by_epochs:
            raise MisconfigurationException(
                f"predict={self.predict!r} is known at ends of validation only, and measurements by steps come before; "
                f"use predict={HELD_OUT!r}, the loss on the Hessian's own samples, or every_n_epochs"
            )
        if stage == "fit":
            if trainer.is_global_zero and callbacks[0] is self:
                # TensorBoard takes the first announcement of a run, so one callback announces for all.
                columns = [f"{callback.prefix}/{name}" for callback in callbacks for name in _COLUMNS]
                announce_columns(trainer, pl_module, columns)
            every_epoch = self.cadence.by_epochs and self.cadence.every_n_epochs == 1 and self._time.limit is None
            compatibility.warn_of_strict_monitors(trainer, self.prefix, every_epoch=every_epoch)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters, which exist for certain only now."""
        if self._active:
            self._check_parameters(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters for ``trainer.validate()``, which has no start of fit."""
        if self._active and trainer.state.fn == TrainerFn.VALIDATING:
            self._check_parameters(pl_module)

    def _check_parameters(self, pl_module: LightningModule) -> None:
        num_eigenvalues = self.measurer.num_eigenvalues
        compatibility.check_parameters(pl_module, self.parameters, num_eigenvalues)
        for group, expression in self.measurer.groups.items():
            _check_group(pl_module, group, expression, num_eigenvalues)

    # -- places ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step, or collect the samples for later; continue a resumed run."""
        if not self._active:
            return
        compatibility.warn_of_strict_schedulers(trainer, self.prefix)
        self._steps_seen = trainer.global_step
        # Lightning's EarlyStopping and ModelCheckpoint decide in the same way whether to look here or after validation.
        simple = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
        self._at_train_epoch_end = simple or not trainer.enable_validation
        if trainer.global_step == 0 and not self._restored:
            # A run from the start: nothing of an earlier run with the same callback may be left.
            self.history = [entry for entry in self.history if entry.when == "validate"]
            self._time = TimeShare(self._time.limit)
        self._time.start()
        if trainer.global_step > 0 or any(entry.when == "fit_start" for entry in self.history):
            self._restore_monitored(trainer, pl_module)
        elif self.cadence.at_start:
            self._measure(trainer, pl_module, "fit_start")
        else:
            self._collect_ahead(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time, to compare a measurement with an epoch."""
        self._epoch_began = (time.monotonic(), self._time.spent)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if this batch took an optimizer step that is due; never within an accumulation."""
        before, self._steps_seen = self._steps_seen, trainer.global_step
        if self._active and self.cadence.at_step(before, trainer.global_step):
            self._measure_if_affordable(trainer, pl_module, "step")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure in ``trainer.validate()``, and if monitoring callbacks look after validation."""
        if not self._active or trainer.sanity_checking:
            return
        self._validated_at = trainer.global_step
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure(trainer, pl_module, "validate")
        elif not self._at_train_epoch_end and self._epoch_is_due(trainer):
            self._measure_if_affordable(trainer, pl_module, "epoch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if monitoring callbacks look after the training epoch."""
        if not self._active:
            return
        epoch_seconds = self._epoch_seconds()
        if self._at_train_epoch_end and (self._epoch_is_due(trainer) or self._end_is_due(trainer)):
            self._measure_if_affordable(trainer, pl_module, "epoch")
        self._warn_of_cost(epoch_seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end of training if it is wanted and was not measured at the end of an epoch."""
        thinned_out = self._time.limit is not None and bool(self.history)
        if self._active and (self.at_end or thinned_out) and not self._measured_at(trainer.global_step):
            self._measure(trainer, pl_module, "fit_end")
        summary = None if self.prediction is None or not self._active else self.prediction.summary()
        if summary and self.verbose:
            announce(trainer, f"{self.prefix}: {summary}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the samples and the state of the extras."""
        self.source.clear()
        self._states = {}
        for reporter in self.reporters:
            reporter.forget()
        self._restored = False
        self._epoch_began = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the samples, because `teardown` is not called then."""
        self.teardown(trainer, pl_module, "fit")

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        last = next((entry.epoch for entry in reversed(self.history) if entry.when == "epoch"), None)
        return self.cadence.at_epoch(trainer.current_epoch, last)

    def _end_is_due(self, trainer: Trainer) -> bool:
        # Before the checkpoint of that epoch, so that a run that is killed while it measures makes up for it.
        return self.at_end and _is_last(trainer) and not self._measured_at(trainer.global_step)

    def _measured_at(self, step: int) -> bool:
        return bool(self.history) and self.history[-1].step == step

    def _measure_if_affordable(self, trainer: Trainer, pl_module: LightningModule, when: When) -> None:
        here = (when, trainer.current_epoch, trainer.global_step)
        if any((entry.when, entry.epoch, entry.step) == here for entry in self.history):
            return  # A resumed run passes again the place at which its checkpoint was written.
        if self._time.limit is not None:
            first = not any(entry.when in ("epoch", "step") for entry in self.history)
            affordable = first or _is_last(trainer) or self._time.allows_another()
            # Clocks differ, so one rank decides for all.
            ranks = ranks_of(trainer)
            decision = torch.tensor([float(affordable)], device=ranks.control_device)
            if not bool(ranks.broadcast(decision)):
                return
        self._measure(trainer, pl_module, when)

    # -- a measurement ---------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, pl_module: LightningModule, when: When) -> None:
        """Measure, note and report; on all ranks together, whatever fails."""
        began = time.monotonic()
        ranks = ranks_of(trainer)
        place = Place(trainer.current_epoch, trainer.global_step, when)
        losses = self._losses(trainer, ranks, when)
        try:
            outcome = run_guarded(
                trainer,
                pl_module,
                lambda snapshot: self._examine(trainer, pl_module, snapshot, ranks, place),
                ranks,
                self.failures,
                stage="measuring the Hessian",
                consequence="the Hessian could not be measured, and training goes on without its slope",
                # Nothing is lost if no training is under way.
                raise_permanent=when in ("fit_start", "validate"),
            )
        except SigtermReceived:
            announce(trainer, f"{self.prefix}: gave up the measurement, because the process got SIGTERM")
            return
        if outcome.value is None:
            measurement = self._failed(place, outcome.reason, ranks)
        else:
            measurement = outcome.value.measurement
            # Kept only now: the guard restores everything that the module refers to, which may be its callbacks.
            self._states = outcome.value.states
        if outcome.reason is not None:
            measurement = replace(measurement, reason=outcome.reason)
        val_loss, train_loss = losses
        measurement = replace(
            measurement, seconds=seconds_since(began, ranks), val_loss=val_loss, train_loss=train_loss
        )
        self._warn_of_another_protocol(measurement)
        self.history.append(measurement)
        self._predict(ranks)
        self._time.add(measurement.seconds)
        self._report(trainer, pl_module, measurement, ranks)
        # Logging and drawing take the callback's time as well.
        self._time.spent += time.monotonic() - began - measurement.seconds

    def _examine(
        self, trainer: Trainer, pl_module: LightningModule, snapshot: Snapshot, ranks: Ranks, place: Place
    ) -> Measured:
        """Go from the run's state to a measurement, inside the guard."""
        problem = training_problem(
            trainer,
            pl_module,
            self._collect(trainer, snapshot, ranks),
            self.source,
            loss_fn=self.loss_fn,
            parameters=self.parameters,
            ranks=ranks,
        )
        folder = self.measurer.solver.checkpoint_folder
        return self.measurer.measure(
            problem,
            place,
            states=self._states,
            observer=self._observer(trainer, ranks),
            failures=self.failures,
            checkpoint=None if folder is None else folder / f"{quote(self.prefix, safe=' ')}-step={place.step}",
            draws_figures=self.figures and bool(trainer.loggers),
        )

    def _observer(self, trainer: Trainer, ranks: Ranks) -> Observer:
        return TrainerObserver(trainer, ranks, self._announcements, self.measurer.solver.hvp)

    def _failed(self, place: Place, reason: str | None, ranks: Ranks) -> Measurement:
        return Measurement(
            epoch=place.epoch,
            step=place.step,
            when=place.when,
            spectrum=None,
            fit=None,
            reason=reason,
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

    def _collect_ahead(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find before training an error that the first measurement, hours later, could only warn of."""
        began = time.monotonic()
        ranks = ranks_of(trainer)
        run_guarded(
            trainer,
            pl_module,
            lambda snapshot: self._collect(trainer, snapshot, ranks),
            ranks,
            # Its warnings are forgotten: the same error is worth another one when it costs the slope.
            self.failures.copy(),
            stage="collecting the samples",
            consequence="the samples could not be collected before training; the measurement tries again",
            raise_permanent=True,
        )
        self._time.spent += time.monotonic() - began

    def _report(self, trainer: Trainer, pl_module: LightningModule, measurement: Measurement, ranks: Ranks) -> None:
        fraction = torch.tensor([self._time.fraction], dtype=torch.float64, device=ranks.control_device)
        overhead = float(ranks.broadcast(fraction))
        values = measurement.scalars()
        if self.prediction is not None and measurement.when not in ("fit_start", "validate"):
            values |= self.prediction.scalars()
        if self._time.limit is not None and measurement.when != "validate":
            values["overhead"] = overhead
        report = Report(
            trainer=trainer,
            pl_module=pl_module,
            callback=self,
            prefix=self.prefix,
            history=self.history,
            values=values,
            step=self._logged_step(trainer, measurement),
            prediction=self.prediction,
            states=self._states,
            ranks=ranks,
            failures=self.failures,
        )
        for reporter in self.reporters:
            reporter.report(report)

    def _logged_step(self, trainer: Trainer, measurement: Measurement) -> int:
        """Return the step under which the measurement's scalars are in the logger."""
        if measurement.when not in ("epoch", "validate"):
            return measurement.step
        # Lightning subtracts one from the step of values that are logged after the epoch's last batch.
        stepped = int(trainer.fit_loop.epoch_loop._batches_that_stepped)
        return stepped - (measurement.when == "epoch" and self._at_train_epoch_end)

    # -- prediction ------------------------------------------------------------------------------

    def _losses(self, trainer: Trainer, ranks: Ranks, when: When) -> tuple[float | None, float | None]:
        """Read the run's own losses, the validation loss only if it is that of the present weights."""
        if self.prediction is None or when in ("fit_start", "validate"):
            return None, None
        fresh = self.predict != HELD_OUT and self._validated_at == trainer.global_step
        read = self.failures.run(
            lambda: losses_of(trainer, [self.predict if fresh else None, self.train_loss], ranks),
            ranks,
            stage="reading the run's losses",
            consequence="nothing is predicted from this measurement",
        )
        if read.value is None:
            return None, None
        val_loss, train_loss = read.value
        if fresh and val_loss is None and self._announcements.is_new("no loss to predict"):
            rank_zero_warn(
                f"predict={self.predict!r}, but no finite metric of that name is logged in validation, so nothing can "
                f"be predicted; log it in validation_step, or use predict={HELD_OUT!r}"
            )
        return val_loss, train_loss

    def _predict(self, ranks: Ranks) -> None:
        prediction = self.prediction
        if prediction is None:
            return
        followed = self.failures.run(
            lambda: prediction.follow(self.history),
            ranks,
            stage="predicting the next loss",
            consequence="the next loss is not predicted",
        )
        if followed.reason is not None:
            self.prediction = None

    def _restore_monitored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give callbacks that monitor the slope the last one before the interruption."""
        last = next(
            (entry for entry in reversed(self.history) if entry.when in ("epoch", "step") and entry.logged), None
        )
        if last is not None:
            values = last.scalars() | (self.prediction.scalars() if self.prediction is not None else {})
            restore_monitored(trainer, pl_module, self.prefix, values)

    # -- cost ------------------------------------------------------------------------------------

    def _epoch_seconds(self) -> float | None:
        """Return the seconds of the present epoch without the measurements in it."""
        if self._epoch_began is None:
            return None
        began, spent = self._epoch_began
        return time.monotonic() - began - (self._time.spent - spent)

    def _warn_of_cost(self, epoch_seconds: float | None) -> None:
        if epoch_seconds is None or not self.history:
            return
        seconds = self.history[-1].seconds
        if seconds > epoch_seconds and self._announcements.is_new("cost warning"):
            rank_zero_warn(
                f"a measurement of the Hessian took {seconds:.2g} s, more than a training epoch "
                f"({epoch_seconds:.2g} s); measure less often (every_n_epochs, max_overhead), on fewer "
                "samples (num_samples), or fewer eigenvalues (num_eigenvalues)"
            )

    def _warn_of_another_protocol(self, measurement: Measurement) -> None:
        """Warn of a slope that must not be compared with the last one."""
        last = next((entry for entry in reversed(self.history) if entry.logged and entry.fit is not None), None)
        if last is None or not measurement.logged or measurement.fit is None:
            return
        now, before = ((entry.num_fitted, entry.mode) for entry in (measurement, last))
        if now != before:
            rank_zero_warn(
                f"this slope is of {now[0]} eigenvalues (mode={now[1]!r}), the one before was of {before[0]} "
                f"(mode={before[1]!r}), and they must not be compared: the slope of one spectrum depends on the number "
                "of eigenvalues. Keep num_eigenvalues and solver within a run, and allow_fewer=False"
            )

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
            "time": self._time.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint.

        Raises:
            ValueError: if the state is of another version or damaged.
        """
        self.history = history_from_state(state_dict)
        if self.prediction is not None:
            self.prediction.follow(self.history)
        self._time.restore(state_dict["time"])
        self._restored = True


def _checked_prefix(prefix: str) -> str:
    check_str("prefix", prefix)
    if prefix != prefix.strip("/"):
        raise ValueError(f"prefix must be a name without slashes at its ends, got {prefix!r}")
    check_log_name("prefix", prefix)
    return prefix


def _checked_parameters(parameters: str | Callable[..., Any] | None) -> str | Callable[..., Any] | None:
    if isinstance(parameters, str):
        compile_pattern("parameters", parameters)
        return parameters
    return optional(check_callable, "parameters", parameters)


def _checked_groups(groups: Mapping[str, str] | None) -> dict[str, str]:
    checked = dict(groups or {})
    for group, expression in checked.items():
        if not group or "/" in group:
            raise ValueError(f"the names in groups must not be empty or contain slashes, got {group!r}")
        check_log_name("the names in groups", group)
        compile_pattern(f"groups[{group!r}]", expression)
    return checked


def _check_group(pl_module: LightningModule, group: str, parameters: ParameterFilter, num_eigenvalues: int) -> None:
    try:
        compatibility.check_parameters(pl_module, parameters, num_eigenvalues)
    except MisconfigurationException as error:
        raise MisconfigurationException(f"groups[{group!r}]: {error}") from error


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _is_last(trainer: Trainer) -> bool:
    """Return whether training is known to end here, at the end of an epoch."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    long_enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0)
    return (
        (trainer.should_stop and long_enough and trainer.global_step >= (trainer.min_steps or 0))
        or (epochs is not None and epochs >= 0 and trainer.current_epoch + 1 >= epochs)
        or 0 <= steps <= trainer.global_step
    )
