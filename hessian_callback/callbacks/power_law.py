"""The Lightning callback: when a measurement is made, on what, and where its numbers go."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.algorithms.sharpness import SpectralDensity
from hessian_callback.algorithms.solver_checkpoint import CheckpointError, delete_files
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.algorithms.subspace_history import SubspaceHistory
from hessian_callback.callbacks import compatibility as admission
from hessian_callback.callbacks.full_precision import in_full_precision
from hessian_callback.callbacks.hyperparameters import announce_columns
from hessian_callback.callbacks.live_prediction import HELD_OUT, LivePrediction
from hessian_callback.callbacks.log_names import check_log_name
from hessian_callback.callbacks.loggers import show_layout, show_picture, shows_pictures
from hessian_callback.callbacks.module_loss import as_in_a_step, resolve_loss
from hessian_callback.callbacks.progress import announce, measuring
from hessian_callback.callbacks.run_losses import losses_of
from hessian_callback.callbacks.samples import (
    SampleSet,
    batch_on_device,
    collect,
    find_loader,
    has_loader,
    missing_loader,
    moving_parts,
    warn_of_imbalance,
)
from hessian_callback.callbacks.schedule import Cadence, TimeShare
from hessian_callback.callbacks.state_guard import (
    Snapshot,
    defer_sigterm,
    preserve_random_state,
    preserve_training_state,
)
from hessian_callback.linalg.distributed import PeerError, RankLostError, Ranks
from hessian_callback.measurement.comparisons import Comparisons, Finding
from hessian_callback.measurement.history import FILE_NAME, STATE_VERSION, HistoryWriter, history_from_state
from hessian_callback.measurement.measurement import Measurement, When
from hessian_callback.measurement.solvers import Protocol
from hessian_callback.measurement.split_half import assign_halves, cut_large, sampling_stderr
from hessian_callback.metrics import PowerLawFitError, PowerLawSlope, SpectrumMetric
from hessian_callback.operators.derivatives import DoubleBackwardError
from hessian_callback.operators.engine_selection import TracingStatistics
from hessian_callback.operators.fully_shard import is_sharded
from hessian_callback.operators.gradients import gradient_norm, parameter_norm
from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.memory import readable_size
from hessian_callback.operators.parameters import compile_pattern, select_parameters

__all__ = ["PowerLawHessianCallback"]

# What such an error says stays true for the whole run, so it is worth raising while nothing is lost.
_PERMANENT_ERRORS = (MisconfigurationException, DoubleBackwardError, ValueError, TypeError)

# Below this many samples per eigenvalue the sample's own rank bends the spectrum: a small network's slope was 23 %
# too steep at 3, and 6 % here (benchmarks/STATISTICS.md).
_SAMPLES_PER_EIGENVALUE = 10

# What TensorBoard's table of hyperparameters shows of a run, by the last value.
_COLUMNS = ("slope", "fit_error")


_WITHOUT_SLOPE = "the Hessian could not be measured, and training goes on without its slope"


class SigtermReceived(Exception):
    """SIGTERM came: what is left of the time belongs to the run, to save what it has."""


class PowerLawHessianCallback(Callback):
    r"""Measure the power-law slope of the loss Hessian's spectrum while a model trains.

    At each measurement the ``num_eigenvalues`` largest eigenvalues of the Hessian

    .. math:: H = \frac{1}{N} \sum_{i=1}^{N} \nabla^2_\theta \, \ell_i(\theta)

    of the loss on ``num_samples`` fixed samples are computed with error bounds, a power law
    :math:`\lambda_k = \lambda_1 k^{-s}` is fitted to them, and its slope and fit error are logged, together
    with what they rest on. Training goes on as if nothing had been: weights after training are the same bit
    for bit, with and without the callback.

    Logged, under ``prefix``: ``slope``, ``fit_error``, ``slope_stderr``, ``density_exponent``,
    ``lambda_max``, ``num_fitted``, ``num_hvps``, ``seconds``, ``overhead`` if it is limited, and what ``extras``,
    ``groups`` and ``mode`` add.
    EarlyStopping, ModelCheckpoint and ReduceLROnPlateau can monitor each of them in the epoch of the
    measurement. The measurement before the first step goes to ``history`` and the logger only.

    The loss is ``loss_fn(pl_module, batch)``, else ``pl_module.hessian_loss(batch)``, else what
    ``training_step`` returns, in eval mode, in the parameters' precision without autocast (of half-precision
    parameters in float32, on a copy), and with logging switched off.

    With several ranks (``strategy="ddp"`` and its variants) all of them share the work; the samples are
    the same for any number of ranks, except that of an ``IterableDataset`` each rank takes the first of its
    own stream. When a measurement fails on one rank, all ranks give it up together.

    Args:
        num_eigenvalues: how many of the largest eigenvalues to fit, ``K``. Slopes compare at equal ``K``
            only.
        every_n_epochs: measure the first epoch and then every n-th; within such an epoch at each validation,
            where validation does not simply end it.
        every_n_train_steps: measure after every n optimizer steps instead.
        at_steps: measure after these numbers of optimizer steps instead, 0 being the start.
        at_end: measure the end of training as well, whatever the other options say; with ``at_steps=[0]`` start and
            end alone, with ``at_steps=[]`` the end alone.
        dataloader: ``"val"``, ``"train"`` (the paper's Hessian is that of the training loss), or a loader. Of
            a map-style data set a random subset is used, of a stream the beginning.
        num_samples: samples over all ranks.
        batch_size: samples in each of the Hessian's batches; default: as many as in the loader's. Large ones are
            faster, above all on a GPU, and are cut where memory is short. Of a loss that is not a mean over its samples
            it changes what is measured.
        loss_fn: ``callable(pl_module, batch)`` that returns the mean loss of the batch.
        batch_weight: ``callable(batch)`` that returns what the mean loss averages over, such as the number of
            counted tokens; default: the leading dimension, where the batch has only one.
        parameters: which parameters: a regular expression for ``re.search`` on their names (refused before
            training if it would not end on them), or ``callable(name, parameter) -> bool``; default: all that are
            trained.
        rtol: relative tolerance of each eigenvalue.
        stop_on: ``"eigenvalues"``: every eigenvalue is iterated until it meets ``rtol``. ``"slope"``: a measurement
            ends as soon as the eigenvalues' proven bounds fix the slope to ``slope_rtol``, after fewer products
            where the spectrum is dense at its end. Keep one choice within a run.
        slope_rtol: for ``stop_on="slope"``: half the width of the slope's numerical interval over its middle.
        max_hvps: Hessian-vector products to spend on a measurement at the most; default ``10
            num_eigenvalues``.
        hvp: how products are formed, see `HessianOperator`.
        memory_budget: bytes that gradient graphs may take on each rank, kept ones and the one that is being built,
            for which batches are cut into smaller ones; default: a part of what is free. Should memory run out all
            the same, batches are halved and the measurement goes on.
        max_overhead: largest share of the wall time, between 0 and 1, that measurements may take. The first
            and the last are made in any case, others only while they fit.
        allow_fewer: log a slope even if fewer than ``num_eigenvalues`` eigenvalues could be fitted.
        on_error: ``"warn"``: a measurement that fails is noted in ``history`` and training goes on;
            ``"raise"``: it ends the run. What is certain to fail every time is raised before training, as far as it
            shows there: by the measurement at the start or, without one, by collecting the samples. A training that
            is under way is not ended for it.
        prefix: what the logged names begin with; several callbacks in a trainer need different ones.
        seed: chooses samples, fixes their augmentation, and starts the eigenvalue solver.
        mode: ``"strict"``: only eigenvalues whose error bound meets ``rtol`` are fitted. ``"paper"``: the published
            protocol, see `paper_protocol`, with what is wrong with it; ``rtol`` and ``max_hvps`` don't matter,
            and ``critical_distance`` is logged, :math:`1.36 / \sqrt K`.
        paper_runs: Lanczos runs whose Ritz values are pooled in paper mode.
        paper_steps: steps, and so products, of each; default ``num_eigenvalues``.
        groups: regular expressions by name, such as ``{"head": "^head", "last_block": r"blocks\.11"}``: the
            Hessian's block of the trained parameters whose names match is measured as well, whatever
            ``parameters`` says, and logged as ``slope/head`` and so on. Each costs about as many products as the
            Hessian itself.
        extras: what the slope is compared with, on the same samples. ``"trace"`` and ``"frobenius"``: sum and
            root of the sum of squares of all eigenvalues, with standard errors, for ``trace_hvps`` products
            together. ``"density"``: ``negative_mass``, the negative eigenvalues' part in the sum of absolute values,
            with its standard error, and the density in ``history``, for ``density_hvps`` products.
            ``"subspace"``: by how much the eigenvectors of the largest eigenvalues turned since the last
            measurement (``subspace_angle`` in radians, ``subspace_overlap``), by how much the Hessian changed on
            them (``subspace_change``), and the Davis-Kahan bound on the angle's sine (``subspace_sine_bound``), for
            ``subspace_dimension`` products; not across a resume. With ``figures`` up to 24 eigenspaces of the run are
            kept on the CPU for a picture of their overlaps, in at most 1 GiB for each rank. ``"norms"``:
            ``parameter_norm`` and ``gradient_norm``, for one gradient. ``"numerical_interval"``: the slopes that the
            eigenvalues' error bounds leave open (``slope_numerical_low``, ``slope_numerical_high``), for nothing.
            ``"halves"``: the slopes on two random halves of the samples (``slope_half_1``, ``slope_half_2``) and the
            standard error that follows (``slope_sampling_stderr``), for as much work as the measurement itself. One
            that fails is warned of and noted in ``not_compared``; the slope is logged all the same.
        trace_hvps: products for trace and Frobenius norm.
        density_hvps: products for the density.
        subspace_dimension: how many eigenvectors to compare; default 10, but fewer than ``num_eigenvalues``.
        predict: the validation loss that the next measurement's is predicted of, from slope and fit error and, for
            comparison, from what costs nothing: ``"held_out"``, the mean loss on the Hessian's own samples (with
            ``dataloader="train"`` nothing is predicted then); the name of a metric that ``validation_step`` logs,
            where measurements are made at ends of epochs; or ``None``. From the fifth measurement on
            `LivePrediction.scalars` says what is logged: ``loss``, ``predicted_loss``, ``next_loss``, their
            ``_low`` and ``_high``, ``predicted_loss_baseline/log_step``, ``prediction_error/spectrum``,
            ``rank_correlation/slope`` and so on.
        train_loss: the name of the training loss that the run logs, for the gap between the two; used where present.
        num_classes: log ``outlier_ratio``, the largest eigenvalue over the one after the ``num_classes`` largest.
        figures: give pictures of the spectrum, and of the density and the eigenspaces' overlaps where ``extras`` ask
            for them, to the loggers that show pictures (TensorBoard, Weights & Biases, MLflow), if matplotlib is
            installed.
        layout: group the curves under TensorBoard's "Custom Scalars"; ``False`` where you write a layout of your own.
        solver_checkpoint: a folder of this run alone, in which a long measurement saves the eigenvalue solver's state
            every five minutes, the Krylov basis included (a vector a product). When the run is killed and comes to the
            same step again with the same weights and samples, the measurement goes on from there; with other weights
            it warns and starts over. What a measurement saved is deleted when it is through. One that can't be saved
            is warned of and goes on.
        verbose: print the expected cost once, and a line for each measurement.

    Attributes:
        history: the measurements in order of time, each a `Measurement`, those without a slope included. With
            ``strategy="ddp_spawn"`` it is filled in the processes that train, and the checkpoints they write. Beside
            the files of a TensorBoardLogger or CSVLogger it is kept as ``hessian_history.jsonl``, see `history_file`.
        prediction: a `LivePrediction` of the history; ``None`` if nothing is predicted.

    Raises:
        ValueError: if an option is out of range.

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

    def __init__(
        self,
        *,
        num_eigenvalues: int = 50,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        at_steps: Sequence[int] | None = None,
        at_end: bool = False,
        dataloader: str | Iterable[Any] = "val",
        num_samples: int = 1024,
        batch_size: int | None = None,
        # With a precise signature LightningCLI would reject a class_path.
        loss_fn: Callable[..., Any] | None = None,
        batch_weight: Callable[..., Any] | None = None,
        parameters: str | Callable[..., Any] | None = None,
        rtol: float = 1e-2,
        stop_on: str = "eigenvalues",
        slope_rtol: float = 2e-2,
        max_hvps: int | None = None,
        hvp: str = "auto",
        memory_budget: int | None = None,
        max_overhead: float | None = None,
        allow_fewer: bool = False,
        on_error: str = "warn",
        prefix: str = "hessian",
        seed: int = 0,
        mode: str = "strict",
        paper_runs: int = 3,
        paper_steps: int | None = None,
        groups: Mapping[str, str] | None = None,
        extras: Sequence[str] = (),
        trace_hvps: int = 30,
        density_hvps: int = 160,
        subspace_dimension: int | None = None,
        num_classes: int | None = None,
        predict: str | None = HELD_OUT,
        train_loss: str | None = "train_loss",
        figures: bool = True,
        layout: bool = True,
        solver_checkpoint: str | Path | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.protocol = Protocol(
            num_eigenvalues=num_eigenvalues,
            mode=mode,
            rtol=rtol,
            max_hvps=max_hvps,
            paper_runs=paper_runs,
            paper_steps=paper_steps,
            stop_on=stop_on,
            slope_rtol=slope_rtol,
            allow_fewer=allow_fewer,
            seed=seed,
        )
        self.comparisons = Comparisons(
            extras=tuple(extras),
            trace_hvps=trace_hvps,
            density_hvps=density_hvps,
            subspace_dimension=min(10, num_eigenvalues - 1) if subspace_dimension is None else subspace_dimension,
            num_classes=num_classes,
        )
        self.comparisons.check(self.protocol.num_eigenvalues, mode)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None for the loader's own, got {batch_size}")
        if isinstance(dataloader, str) and dataloader not in ("val", "train"):
            raise ValueError(f"dataloader must be 'val', 'train' or a DataLoader, got {dataloader!r}")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise', got {on_error!r}")
        if not prefix or prefix != prefix.strip("/"):
            raise ValueError(f"prefix must be a name without slashes at its ends, got {prefix!r}")
        check_log_name("prefix", prefix)
        if "" in (predict, train_loss):
            raise ValueError("predict and train_loss must be names of metrics, or None for none")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if isinstance(parameters, str):
            compile_pattern("parameters", parameters)
        self.groups = dict(groups or {})
        for group, expression in self.groups.items():
            if not group or "/" in group:
                raise ValueError(f"the names in groups must be without slashes and not empty, got {group!r}")
            check_log_name("the names in groups", group)
            compile_pattern(f"groups[{group!r}]", expression)
        if solver_checkpoint is not None:
            self.protocol.check_resumable()
        self.num_eigenvalues = num_eigenvalues
        self.cadence = Cadence.checked(every_n_epochs, every_n_train_steps, at_steps, may_be_empty=at_end)
        self.at_end = at_end
        self.dataloader = dataloader
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.loss_fn = loss_fn
        self.batch_weight = batch_weight
        self.parameters = parameters
        self.rtol = rtol
        self.max_hvps = self.protocol.hvp_limit
        self.hvp = hvp
        self.memory_budget = memory_budget
        self.allow_fewer = allow_fewer
        self.on_error = on_error
        self.prefix = prefix
        self.seed = seed
        self.predict = None if self._on_training_data and predict == HELD_OUT else predict
        self.train_loss = train_loss
        self.figures = figures
        self.layout = layout
        self.solver_checkpoint = solver_checkpoint
        self.verbose = verbose

        self.history = []
        self.prediction = (
            None if self.predict is None else LivePrediction(self.predict, on_training_data=self._on_training_data)
        )
        self._validated_at: int | None = None
        self._history_file = HistoryWriter(prefix)
        self._time = TimeShare(max_overhead)
        self._overhead = 0.0
        self._held_out: SampleSet | None = None
        self._previous_top: Spectrum | None = None
        self._spaces = SubspaceHistory()
        self._metrics: dict[str, Metric] = {}
        self._logged_names: set[str] = set()
        self._laid_out: dict[str, frozenset[str]] = {}
        self._active = True
        self._restored = False
        self._at_train_epoch_end = True
        self._steps_seen = 0
        self._epoch_began: tuple[float, float] | None = None
        self._cost_said = False
        self._experience: dict[Any, TracingStatistics] = {}
        self._engine_said: str | None = None
        self._cost_warned = False
        self._reasons_warned: set[str] = set()

    # -- checks ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that trainer, module and options go together; called again by ``lr_find``."""
        admission.check_trainer(trainer)
        self._held_out = None  # Of a run that ended with an exception, which has no teardown.
        self._active = stage in ("fit", "validate") and not trainer.barebones
        if trainer.barebones:
            rank_zero_info("PowerLawHessianCallback measures nothing under Trainer(barebones=True), which logs nothing")
        if not self._active:
            return
        admission.check_strategy(trainer.strategy)
        admission.check_precision(str(trainer.precision))
        alike = [other for other in _callbacks(trainer) if isinstance(other, PowerLawHessianCallback)]
        if sum(other.prefix == self.prefix for other in alike) > 1:
            raise MisconfigurationException(
                f"two PowerLawHessianCallbacks log under prefix={self.prefix!r}, and Lightning would average "
                "their values; give one of them another prefix"
            )
        resolve_loss(pl_module, self.loss_fn)
        if isinstance(self.dataloader, str) and not has_loader(trainer, self.dataloader):
            raise MisconfigurationException(missing_loader(self.dataloader))
        if self.predict not in (None, HELD_OUT) and not self.cadence.by_epochs:
            raise MisconfigurationException(
                f"predict={self.predict!r} is known at ends of validation only, and measurements by steps come before; "
                f"use predict={HELD_OUT!r}, the loss on the Hessian's own samples, or every_n_epochs"
            )
        if stage == "fit" and trainer.is_global_zero and alike[0] is self:
            # The first announcement is the one that counts, so one of the callbacks makes it for all.
            announce_columns(trainer, pl_module, [f"{a.prefix}/{name}" for a in alike for name in _COLUMNS])
        if stage == "fit":
            every_epoch = self.cadence.by_epochs and self.cadence.every_n_epochs == 1 and self._time.limit is None
            admission.warn_of_strict_monitors(trainer, self.prefix, every_epoch=every_epoch)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters, which exist for certain only now."""
        if self._active:
            self._check_parameters(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters for ``trainer.validate()``, which has no start of fit."""
        if self._active and trainer.state.fn == TrainerFn.VALIDATING:
            self._check_parameters(pl_module)

    def _check_parameters(self, pl_module: LightningModule) -> None:
        admission.check_parameters(pl_module, self.parameters, self.num_eigenvalues)
        for group, expression in self.groups.items():
            _check_group(pl_module, group, expression, self.num_eigenvalues)

    # -- when ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step, or collect the samples for later, and take up the thread of a resumed run."""
        if not self._active:
            return
        admission.warn_of_strict_schedulers(trainer, self.prefix)
        self._steps_seen = trainer.global_step
        # Lightning's EarlyStopping and ModelCheckpoint decide alike whether to look here or after validation.
        simple = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
        self._at_train_epoch_end = simple or not trainer.enable_validation
        if trainer.global_step == 0 and not self._restored:
            # A run from the start: of an earlier one with the same callback nothing must be left.
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
        """Measure in ``trainer.validate()``, and where monitoring callbacks look after validation."""
        if not self._active or trainer.sanity_checking:
            return
        self._validated_at = trainer.global_step
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure(trainer, pl_module, "validate")
        elif not self._at_train_epoch_end and self._epoch_is_due(trainer):
            self._measure_if_affordable(trainer, pl_module, "epoch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where monitoring callbacks look after the training epoch."""
        if not self._active:
            return
        epoch_seconds = self._epoch_seconds()
        if self._at_train_epoch_end and (self._epoch_is_due(trainer) or self._end_is_due(trainer)):
            self._measure_if_affordable(trainer, pl_module, "epoch")
        self._warn_of_cost(epoch_seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end of training where it is wanted, and an epoch's end was not known to be that."""
        thinned_out = self._time.limit is not None and bool(self.history)
        if self._active and (self.at_end or thinned_out) and not self._measured_at(trainer.global_step):
            self._measure(trainer, pl_module, "fit_end")
        summary = None if self.prediction is None or not self._active else self.prediction.summary()
        if summary and self.verbose:
            announce(trainer, f"{self.prefix}: {summary}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the held-out samples."""
        self._held_out = None
        self._previous_top = None
        self._spaces.clear()
        self._laid_out = {}
        self._restored = False
        self._epoch_began = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the held-out samples, as `teardown` is not called then."""
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
            return  # A resumed run comes past the place at which its checkpoint was written once more.
        if self._time.limit is not None:
            first = not any(entry.when in ("epoch", "step") for entry in self.history)
            affordable = first or _is_last(trainer) or self._time.allows_another()
            # Clocks differ, so one decides for all.
            ranks = _ranks_of(trainer)
            decision = torch.tensor([float(affordable)], device=ranks.control_device)
            if not bool(ranks.broadcast(decision)):
                return
        self._measure(trainer, pl_module, when)

    # -- a measurement ---------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, pl_module: LightningModule, when: When) -> None:
        """Measure, note, log and draw; on all ranks together, whatever fails."""
        with defer_sigterm() if trainer.world_size > 1 else nullcontext():
            self._measure_and_log(trainer, pl_module, when)

    def _measure_and_log(self, trainer: Trainer, pl_module: LightningModule, when: When) -> None:
        began = time.monotonic()
        ranks = _ranks_of(trainer)
        place: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step, "when": when}
        found: dict[str, Any] = {"spectrum": None, "fit": None}
        losses = self._losses(trainer, ranks, when)
        error: Exception | None = None
        try:
            with preserve_training_state(trainer, pl_module) as snapshot:
                found = self._examine(trainer, pl_module, snapshot, ranks, place)
        except RankLostError:
            raise  # Nobody is left to go on with.
        except SigtermReceived:
            announce(trainer, f"{self.prefix}: gave up the measurement, because the process was told to end")
            return
        except Exception as exception:
            error = exception
        # Where no training is under way, none is lost.
        failure = self._agree_to_go_on(
            error, ranks, "leaving the measurement", raise_permanent=when in ("fit_start", "validate")
        )
        if error is not None:
            found["reason"] = _in_one_line(error)
        elif "reason" not in found:
            found["reason"] = "another rank could not leave the measurement"
        # Kept only now: inside, whatever a module refers to is put back, and it may refer to its callbacks.
        top, overlaps = found.pop("top", None), found.pop("overlaps", None)
        self._previous_top = top or self._previous_top
        # On all ranks or on none, as each kept space is a collective of the next comparison.
        if failure is None and top is not None and overlaps is not None:
            label = {"fit_start": "start", "epoch": str(trainer.current_epoch)}.get(when)
            self._spaces.add(top.eigenvectors, overlaps, step=trainer.global_step, label=label)
        measurement = Measurement(
            **place,
            **found,
            **losses,
            seconds=_seconds_since(began, ranks),
            world_size=ranks.world_size,
            mode="paper" if self.protocol.mode == "paper" else "strict",
        )
        self._warn_of_another_protocol(measurement)
        self.history.append(measurement)
        self._predict(ranks)
        self._time.add(measurement.seconds)
        fraction = torch.tensor([self._time.fraction], dtype=torch.float64, device=ranks.control_device)
        self._overhead = float(ranks.broadcast(fraction))
        self._log(trainer, pl_module, measurement)
        self._store(trainer, ranks)
        if self.verbose:
            expected = "" if self.prediction is None else self.prediction.expectation()
            announce(trainer, f"{self.prefix}: {measurement.summary()}{expected}")
        self._lay_out(trainer, ranks)
        self._draw(trainer, measurement, ranks)
        for listener in _callbacks(trainer):
            if hasattr(listener, "on_hessian_measured"):
                listener.on_hessian_measured(trainer, pl_module, self)
        # What logging and drawing took is the callback's time as well.
        self._time.spent += time.monotonic() - began - measurement.seconds

    def _examine(
        self, trainer: Trainer, pl_module: LightningModule, snapshot: Snapshot, ranks: Ranks, place: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Go from the run's state to a spectrum, a fit and the comparisons, inside the guard."""
        held_out = self._collected(trainer, snapshot, ranks)
        with ranks.propagate_errors("preparing the loss and the held-out samples"):
            loss = as_in_a_step(trainer, pl_module, resolve_loss(pl_module, self.loss_fn))
            stage = RunningStage.TRAINING if self.dataloader == "train" else RunningStage.VALIDATING
            counted = [number for number, weight in enumerate(held_out.weights) if weight > 0]
            weights = [held_out.weights[number] for number in counted]
            keys = [held_out.keys[number] for number in counted]
            batches = [
                batch_on_device(
                    trainer,
                    pl_module,
                    held_out.batches[number],
                    seed=self.seed,
                    key=held_out.keys[number],
                    stage=stage,
                )
                for number in counted
            ]
            pl_module, precision = in_full_precision(trainer, pl_module)

        def operator_of(
            parameters: Any, some: Sequence[Any] = batches, their: Sequence[float] = weights
        ) -> HessianOperator:
            return HessianOperator(
                pl_module,
                loss,
                some,
                weights=their,
                batch_weight=self.batch_weight,
                parameters=parameters,
                process_group=ranks.group,
                hvp=self.hvp,
                memory_budget=self.memory_budget,
                tracing_statistics=self._experience.setdefault(parameters, TracingStatistics()),
            )

        found = _Found()
        with operator_of(self.parameters) as operator:
            # A forward pass of a sharded module is a collective, and ranks hold different numbers of batches.
            whole = not is_sharded(pl_module) or operator.exact
            value = operator.mean_loss if whole else None
            self._say_cost(trainer, operator, held_out)
            spectrum = self._solve(trainer, operator, ranks, eigenvectors=self.comparisons.needs_eigenvectors)
            engine = operator.engine
            self._say_halvings(trainer, operator)
            self._say_engine(trainer, operator)
            with ranks.propagate_errors("fitting the power law"):
                fit, reason = self.protocol.fit(spectrum)

            def norms() -> Finding:
                if not whole:
                    raise ValueError("norms need whole parameters, and hvp='finite_difference' leaves them sharded")
                chosen = list(select_parameters(pl_module, self.parameters).values())
                gradient = gradient_norm(pl_module, loss, operator.batches, operator.weights, chosen, ranks)
                return Finding({"parameter_norm": parameter_norm(chosen), "gradient_norm": gradient})

            tasks = self.comparisons.of_spectrum(spectrum, None if fit is None else fit.num_eigenvalues)
            previous = self._comparable(operator)
            tasks += self.comparisons.of_operator(operator, spectrum, previous, seed=self.seed)
            if "norms" in self.comparisons.extras:
                tasks.append(("norms", norms))
            self._compare(trainer, ranks, tasks, found)
            overlaps = self._overlaps(trainer, spectrum, ranks, found)
            top = self._top_of(spectrum)
            spectrum = replace(spectrum, eigenvectors=None)

        for group, expression in self.groups.items():

            def measure_group(group: str = group, expression: str = expression) -> Finding:
                found.groups[group] = self._measure_group(
                    trainer,
                    lambda: operator_of(expression),
                    ranks,
                    {**place, "precision": precision},
                    group,
                )
                return Finding({})

            self._compare(trainer, ranks, [(f"group {group}", measure_group)], found)
            if f"group {group}" in found.failures:
                found.groups.pop(group, None)  # Where only another rank failed it is there.

        if "halves" in self.comparisons.extras and fit is not None:
            num_fitted = fit.num_eigenvalues

            def halves() -> Finding:
                parts, shares, numbers = cut_large(batches, weights, keys, ranks, batch_weight=self.batch_weight)
                half_of = assign_halves(numbers, shares, ranks, seed=self.seed)

                def operator_of_half(half: int) -> HessianOperator:
                    chosen = [position for position, other in enumerate(half_of) if other == half]
                    return operator_of(self.parameters, [parts[n] for n in chosen], [shares[n] for n in chosen])

                return self._measure_halves(trainer, operator_of_half, ranks, num_fitted)

            self._compare(trainer, ranks, [("halves", halves)], found)

        return {
            "spectrum": spectrum,
            "fit": fit,
            "reason": reason,
            "num_parameters": operator.num_parameters,
            "num_samples": held_out.num_samples,
            "loss": value,
            "engine": engine,
            "precision": precision,
            "comparisons": found.values,
            "not_compared": found.failures,
            "density": found.density,
            "groups": found.groups,
            "top": top,
            "overlaps": overlaps,
        }

    def _solve(
        self,
        trainer: Trainer,
        operator: HessianOperator,
        ranks: Ranks,
        *,
        description: str = "Hessian",
        part: str = "",
        eigenvectors: bool = False,
    ) -> Spectrum:
        """Compute a spectrum, and go on with what a killed process saved of it, if anything is saved."""
        folder = self._solver_folder(trainer, part)

        def solve(folder: Path | None = folder) -> Spectrum:
            return self._solve_from(folder, trainer, operator, ranks, description, eigenvectors)

        def warn(what: str, error: CheckpointError) -> None:
            with ranks.propagate_errors("warning of the solver's checkpoint"):
                rank_zero_warn(f"{self.prefix}: the measurement {what}: {error.reason}")

        if folder is None:
            return solve()
        try:
            try:
                return solve()
            except CheckpointError as error:  # On all ranks.
                with suppress(OSError):
                    delete_files(folder, ranks.rank)
                warn("starts over", error)
            try:
                return solve()
            except CheckpointError as error:  # Of the folder then, as nothing is left in it.
                warn("is not saved", error)
                return solve(None)
        except (RankLostError, SigtermReceived):
            raise
        except Exception:
            if self.on_error == "warn":  # Training goes on, and does not come here again.
                with suppress(OSError):
                    delete_files(folder, ranks.rank)
            raise

    def _solve_from(
        self,
        folder: Path | None,
        trainer: Trainer,
        operator: HessianOperator,
        ranks: Ranks,
        description: str,
        eigenvectors: bool,
    ) -> Spectrum:
        expected = self.protocol.expected_hvps(operator.num_parameters)
        with measuring(trainer, description, expected) as report:
            begun = False

            def progress(now: LanczosProgress) -> None:
                nonlocal begun
                if not begun and now.num_matvecs > 1 and self.verbose:
                    announce(trainer, f"{self.prefix}: goes on with product {now.num_matvecs}, by {folder}")
                begun = True
                report(now)
                self._give_way(trainer, ranks)

            return self.protocol.solve(
                operator,
                return_eigenvectors=eigenvectors,
                progress=progress,
                memory_budget=self.memory_budget,
                checkpoint=folder,
            )

    def _solver_folder(self, trainer: Trainer, part: str) -> Path | None:
        """Where the solver's state is saved; what another callback, step or part of the Hessian has is elsewhere."""
        if self.solver_checkpoint is None:
            return None
        # No prefix or group has "=" in it.
        return Path(self.solver_checkpoint) / f"{quote(self.prefix, safe=' ')}-step={trainer.global_step}{part}"

    def _give_way(self, trainer: Trainer, ranks: Ranks) -> None:
        # Several ranks are not told at the same product, so they go on to the end together.
        if trainer.received_sigterm and ranks.world_size == 1:
            raise SigtermReceived

    # -- prediction ------------------------------------------------------------------------------

    def _losses(self, trainer: Trainer, ranks: Ranks, when: When) -> dict[str, Any]:
        """Read the run's own losses, the validation loss only if it is that of the present weights."""
        if self.prediction is None or when in ("fit_start", "validate"):
            return {}
        fresh = self.predict != HELD_OUT and self._validated_at == trainer.global_step
        losses: list[float | None] = []

        def read() -> None:
            losses.extend(losses_of(trainer, [self.predict if fresh else None, self.train_loss], ranks))

        self._attempt(read, ranks, "reading the run's losses", consequence="nothing is predicted from this measurement")
        if not losses:
            return {}
        val_loss, train_loss = losses
        if fresh and val_loss is None and "predict" not in self._reasons_warned:
            self._reasons_warned.add("predict")
            rank_zero_warn(
                f"predict={self.predict!r}, but no finite metric of that name is logged in validation, so nothing can "
                f"be predicted; log it in validation_step, or use predict={HELD_OUT!r}"
            )
        return {"val_loss": val_loss, "train_loss": train_loss}

    def _predict(self, ranks: Ranks) -> None:
        def follow() -> None:
            if self.prediction is not None:
                self.prediction.follow(self.history)

        if self._attempt(follow, ranks, "predicting the next loss", consequence="the next loss is not predicted"):
            self.prediction = None

    # -- comparisons -----------------------------------------------------------------------------

    def _compare(
        self, trainer: Trainer, ranks: Ranks, tasks: Iterable[tuple[str, Callable[[], Finding]]], found: _Found
    ) -> None:
        """Make comparisons one by one; one that fails, fails on all ranks and leaves the others."""
        for name, task in tasks:
            self._give_way(trainer, ranks)
            findings: list[Finding] = []

            def compare(task: Callable[[], Finding] = task, findings: list[Finding] = findings) -> None:
                findings.append(task())

            consequence = f"the Hessian goes without a comparison ({name})"
            reason = self._attempt(compare, ranks, f"comparing ({name})", consequence=consequence)
            if reason is None:
                found.add(findings[0])
            else:
                found.failures[name] = reason

    def _comparable(self, operator: HessianOperator) -> Spectrum | None:
        """Return the last measurement's top eigenvectors, if they are of the same parameters."""
        previous = self._previous_top
        if previous is None or previous.eigenvectors is None:
            return None
        if previous.eigenvectors.shape[0] != operator.partition.slice_length:
            return None
        return replace(previous, eigenvectors=previous.eigenvectors.to(operator.device, operator.dtype))

    def _top_of(self, spectrum: Spectrum) -> Spectrum | None:
        """Return the eigenvectors that the next measurement is compared with, off the device."""
        if "subspace" not in self.comparisons.extras or spectrum.eigenvectors is None:
            return None
        top = spectrum.eigenvectors[:, : self.comparisons.subspace_dimension]
        return replace(spectrum, eigenvectors=top.cpu().clone())

    def _overlaps(self, trainer: Trainer, spectrum: Spectrum, ranks: Ranks, found: _Found) -> list[float] | None:
        """Compare the top eigenspace with all that are kept, for the picture; ``None`` where there is none."""
        dimension = self.comparisons.subspace_dimension
        drawn = self.figures and trainer.loggers and "subspace" in self.comparisons.extras
        if not drawn or spectrum.eigenvectors is None or not bool(spectrum.converged[: dimension + 1].all()):
            return None
        vectors = spectrum.eigenvectors[:, :dimension]
        overlaps: list[float] = []

        def compare() -> Finding:
            overlaps.extend(self._spaces.overlaps_with(vectors, ranks))
            return Finding({})

        self._compare(trainer, ranks, [("subspace overlaps", compare)], found)
        return None if "subspace overlaps" in found.failures else overlaps

    def _measure_group(
        self,
        trainer: Trainer,
        make_operator: Callable[[], HessianOperator],
        ranks: Ranks,
        place: Mapping[str, Any],
        group: str,
    ) -> Measurement:
        """Measure the Hessian's block of one group of parameters."""
        began = time.monotonic()
        with make_operator() as operator:
            spectrum = self._solve(trainer, operator, ranks, description=f"Hessian ({group})", part=f"-group={group}")
        fit, reason = self.protocol.fit(spectrum)
        return Measurement(
            **place,
            spectrum=spectrum,
            fit=fit,
            reason=reason,
            seconds=_seconds_since(began, ranks),
            num_parameters=operator.num_parameters,
            engine=operator.engine,
            world_size=ranks.world_size,
            mode="paper" if self.protocol.mode == "paper" else "strict",
        )

    def _measure_halves(
        self, trainer: Trainer, make_operator: Callable[[int], HessianOperator], ranks: Ranks, num_fitted: int
    ) -> Finding:
        """Measure the slope on two halves of the batches."""
        slopes, num_hvps = [], 0
        for half in (0, 1):
            with make_operator(half) as operator:
                title = f"Hessian (half {half + 1})"
                spectrum = self._solve(trainer, operator, ranks, description=title, part=f"-half={half + 1}")
            num_hvps += spectrum.num_matvecs
            fit, reason = self.protocol.fit(spectrum)
            if fit is None or fit.num_eigenvalues != num_fitted:
                raise ValueError(f"half {half + 1} has no slope of {num_fitted} eigenvalues: {reason}")
            slopes.append(fit.slope)
        values = {"slope_half_1": slopes[0], "slope_half_2": slopes[1]}
        return Finding({**values, "slope_sampling_stderr": sampling_stderr(*slopes)}, num_hvps)

    def _collect_ahead(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training what a first measurement hours later could only warn of."""
        began = time.monotonic()
        ranks = _ranks_of(trainer)
        error: Exception | None = None
        with defer_sigterm() if ranks.world_size > 1 else nullcontext():
            try:
                with preserve_training_state(trainer, pl_module) as snapshot:
                    self._collected(trainer, snapshot, ranks)
            except RankLostError:
                raise
            except Exception as exception:
                error = exception
            reason = self._agree_to_go_on(
                error,
                ranks,
                "collecting the held-out samples",
                raise_permanent=True,
                consequence="the held-out samples could not be collected before training; the measurement tries again",
            )
        if reason is not None:
            self._reasons_warned.discard(reason)  # Then it is worth saying again, for it costs the slope.
        self._time.spent += time.monotonic() - began

    def _collected(self, trainer: Trainer, snapshot: Snapshot, ranks: Ranks) -> SampleSet:
        if self._held_out is None:
            with ranks.propagate_errors("finding the loader of the held-out samples"):
                loader = find_loader(trainer, self.dataloader)
                for part in moving_parts(loader):
                    snapshot.remember(part, copy_tensors=False)
            self._held_out = collect(
                loader,
                num_samples=self.num_samples,
                seed=self.seed,
                batch_size=self.batch_size,
                batch_weight=self.batch_weight,
                ranks=ranks,
                sequential=not self._on_training_data,
            )
            # Where warnings are errors, they must not be those of one rank alone.
            with ranks.propagate_errors("judging the held-out samples"):
                if ranks.rank == 0:
                    self._judge(self._held_out)
        return self._held_out

    @property
    def _on_training_data(self) -> bool:
        return isinstance(self.dataloader, str) and self.dataloader == "train"

    def _judge(self, held_out: SampleSet) -> None:
        if held_out.num_samples < self.num_samples:
            rank_zero_info(
                f"num_samples={self.num_samples}, but there are only {held_out.num_samples} samples; all are used"
            )
        wanted = _SAMPLES_PER_EIGENVALUE * self.num_eigenvalues
        if held_out.num_samples < wanted:
            rank_zero_warn(
                f"{held_out.num_samples} held-out samples are few for {self.num_eigenvalues} eigenvalues: the "
                "spectrum's tail is then the sample's, not the loss's, and the slope too steep (on a small network by "
                f"23 % at 3 samples an eigenvalue, by 6 % at 10). Choose num_samples of at least {wanted}, or a "
                "smaller num_eigenvalues; extras=['halves'] shows what the number of samples does"
            )
        warn_of_imbalance(held_out)

    def _warn_of_another_protocol(self, measurement: Measurement) -> None:
        """Say so when a slope is logged that the last one must not be compared with."""
        last = next((entry for entry in reversed(self.history) if entry.logged and entry.fit is not None), None)
        if last is None or not measurement.logged or measurement.fit is None:
            return
        now, before = ((entry.num_fitted, entry.mode) for entry in (measurement, last))
        if now != before:
            rank_zero_warn(
                f"this slope is of {now[0]} eigenvalues (mode={now[1]!r}), the one before was of {before[0]} "
                f"(mode={before[1]!r}), and they must not be compared: the slope of one spectrum depends on the number "
                "of eigenvalues. Keep num_eigenvalues and mode within a run, and allow_fewer=False"
            )

    # -- failing ---------------------------------------------------------------------------------

    def _agree_to_go_on(
        self,
        error: Exception | None,
        ranks: Ranks,
        stage: str,
        *,
        raise_permanent: bool = False,
        consequence: str = _WITHOUT_SLOPE,
    ) -> str | None:
        """Let all ranks know of an error, and raise on all of them or on none; return what it was."""
        failed = ranks.failed_ranks(error is not None)
        if not failed:
            return None
        permanent = raise_permanent and bool(ranks.failed_ranks(isinstance(error, _PERMANENT_ERRORS)))
        if self.on_error == "raise" or permanent:
            raise error if error is not None else PeerError(stage, failed)
        reason = _in_one_line(error) if error is not None else str(PeerError(stage, failed))
        # The rank that failed speaks for itself; of the others one is enough.
        if (ranks.rank == 0 or not isinstance(error, PeerError)) and reason not in self._reasons_warned:
            self._reasons_warned.add(reason)
            warnings.warn(f"{consequence}: {reason}", stacklevel=2)
        return reason

    def _attempt(
        self, task: Callable[[], None], ranks: Ranks, stage: str, *, consequence: str = _WITHOUT_SLOPE
    ) -> str | None:
        """Do what may fail on some ranks, and agree on what came of it; return why it failed, if it did."""
        error: Exception | None = None
        try:
            task()
        except (RankLostError, SigtermReceived):
            raise
        except Exception as exception:
            error = exception
        return self._agree_to_go_on(error, ranks, stage, consequence=consequence)

    # -- logging ---------------------------------------------------------------------------------

    def _log(self, trainer: Trainer, pl_module: LightningModule, measurement: Measurement) -> None:
        values = measurement.scalars()
        if self.prediction is not None and measurement.when not in ("fit_start", "validate"):
            values |= self.prediction.scalars()
        if self._time.limit is not None and measurement.when != "validate":
            values["overhead"] = self._overhead
        self._logged_names |= values.keys()
        if measurement.when in ("epoch", "validate"):
            self._log_as_metrics(pl_module, measurement, values)
            return
        if measurement.when == "step":
            # Only for who monitors: on the way to the logger Lightning would thin steps out.
            for name, value in values.items():
                pl_module.log(
                    f"{self.prefix}/{name}",
                    _scalar(value, pl_module.device),
                    on_step=True,
                    on_epoch=False,
                    logger=False,
                    batch_size=1,
                )
        # `log` in on_train_start would reach callback_metrics, and is not to be had in on_train_end.
        named = {f"{self.prefix}/{name}": value for name, value in values.items()}

        def write() -> None:  # Only rank zero writes, so only it can fail.
            for logger in trainer.loggers:
                logger.log_metrics({**named, "epoch": measurement.epoch}, step=measurement.step)
                logger.save()

        self._attempt(write, _ranks_of(trainer), "logging the measurement")

    def _log_as_metrics(self, pl_module: LightningModule, measurement: Measurement, values: dict[str, float]) -> None:
        """Log through torchmetrics: values are equal on all ranks, and must not be reduced again."""
        for name, value in values.items():
            metric = self._metrics.get(name)
            if metric is None:
                metric = self._metrics[name] = _new_metric(name)
            metric.to(pl_module.device)
            metric.reset()
            if isinstance(metric, SpectrumMetric):
                metric.update(measurement.fitted_eigenvalues)
            else:
                metric.update(value)
            pl_module.log(
                f"{self.prefix}/{name}",
                metric,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                add_dataloader_idx=False,
                metric_attribute=f"{self.prefix}/{name}",
            )

    def _restore_monitored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give callbacks that monitor the slope the last one before the interruption.

        Written straight into the dictionary: a value logged here would outlive the first new one.
        """
        last = next((e for e in reversed(self.history) if e.when in ("epoch", "step") and e.logged), None)
        if last is not None:
            values = last.scalars() | (self.prediction.scalars() if self.prediction is not None else {})
            for name, value in values.items():
                trainer.callback_metrics[f"{self.prefix}/{name}"] = _scalar(value, pl_module.device)

    def _store(self, trainer: Trainer, ranks: Ranks) -> None:
        """Append the measurement to the history file beside what the loggers write on this machine."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, CSVLogger))]
        if not loggers:
            return

        def write() -> None:
            if trainer.is_global_zero:
                for logger in loggers:
                    _ = logger.experiment  # A CSVLogger warns of a folder that is not empty when it begins.
                folders = [logger.log_dir for logger in loggers if "://" not in logger.log_dir]
                self._history_file.write(folders, self.history)

        self._attempt(write, ranks, "writing the history", consequence=f"{FILE_NAME} lacks a measurement for now")

    def _lay_out(self, trainer: Trainer, ranks: Ranks) -> None:
        """Group all callbacks' curves in TensorBoard, again when there are new ones."""
        callbacks = [other for other in _callbacks(trainer) if isinstance(other, PowerLawHessianCallback)]
        curves = {other.prefix: frozenset(other._logged_names) for other in callbacks}
        if not self.layout or curves == self._laid_out:
            return
        self._laid_out = curves

        def write() -> None:
            if trainer.is_global_zero:
                show_layout(trainer.loggers, curves)

        self._attempt(write, ranks, "laying out the curves", consequence="the curves go without a layout")

    def _draw(self, trainer: Trainer, measurement: Measurement, ranks: Ranks) -> None:
        boards = [logger for logger in trainer.loggers if shows_pictures(logger)] if trainer.is_global_zero else []
        drawn = self.figures and measurement.spectrum and importlib.util.find_spec("matplotlib")
        if not (drawn and trainer.loggers):
            return

        def draw() -> None:
            if not boards:
                return
            from hessian_callback.plots.figures import figure_image, pictures

            with preserve_random_state():
                images = {name: figure_image(figure) for name, figure in pictures(self.history, self._spaces).items()}
            step = self._logged_step(trainer, measurement)
            for board in boards:
                for name, image in images.items():
                    show_picture(board, f"{self.prefix}/{name}", image, step)

        self._attempt(draw, ranks, "drawing the spectrum")

    def _logged_step(self, trainer: Trainer, measurement: Measurement) -> int:
        """Return the step under which the measurement's scalars are in the logger."""
        if measurement.when not in ("epoch", "validate"):
            return measurement.step
        # Lightning counts one back for what is logged when the epoch's batches are through.
        stepped = int(trainer.fit_loop.epoch_loop._batches_that_stepped)
        return stepped - (measurement.when == "epoch" and self._at_train_epoch_end)

    # -- cost ------------------------------------------------------------------------------------

    def _say_cost(self, trainer: Trainer, operator: HessianOperator, held_out: SampleSet) -> None:
        """Announce what the first measurement will take, its seconds by the time of a product."""
        if self._cost_said or not self.verbose:
            return
        self._cost_said = True
        expected = self.protocol.expected_hvps(operator.num_parameters)
        in_addition = self.comparisons.expected_hvps(expected) + len(self.groups) * expected
        reasons = [*self.comparisons.extras, *(f"group {group}" for group in self.groups)]
        more = f", about {in_addition} more for {', '.join(reasons)}" if in_addition else ""
        kept = self.num_eigenvalues if self.comparisons.needs_eigenvectors else 0
        basis = (expected + kept) * operator.partition.slice_length * torch.finfo(operator.dtype).bits // 8
        graphs = operator.num_cached_graphs * operator.bytes_per_graph
        each = operator.seconds_per_product()
        announce(
            trainer,
            f"{self.prefix}: first measurement: {operator.num_parameters:,} parameters, "
            f"{held_out.num_samples:,} samples in {held_out.num_batches} batch(es), about {expected} "
            f"Hessian-vector products (at most {self.max_hvps}){more}, {1e3 * each:.3g} ms each, so about "
            f"{each * (expected + in_addition):.2g} s, and memory for each rank about "
            f"{readable_size(basis)} of Lanczos vectors and {readable_size(graphs)} of gradient graphs",
        )

    def _say_halvings(self, trainer: Trainer, operator: HessianOperator) -> None:
        if operator.num_halvings:
            announce(
                trainer,
                f"{self.prefix}: out of memory, so batches were halved {operator.num_halvings} time(s) and the "
                "measurement went on; a loader with smaller batches, or a memory_budget, spares it that",
            )

    def _say_engine(self, trainer: Trainer, operator: HessianOperator) -> None:
        """Say how products are formed where ``hvp="auto"`` chose it, once for each choice."""
        if self.verbose and self.hvp == "auto" and operator.engine != self._engine_said:
            self._engine_said = operator.engine
            announce(trainer, f"{self.prefix}: products by {operator.engine}: {operator.engine_reason}")

    def _epoch_seconds(self) -> float | None:
        """Return the seconds of the present epoch without the measurements in it."""
        if self._epoch_began is None:
            return None
        began, spent = self._epoch_began
        return time.monotonic() - began - (self._time.spent - spent)

    def _warn_of_cost(self, epoch_seconds: float | None) -> None:
        if self._cost_warned or epoch_seconds is None or not self.history:
            return
        seconds = self.history[-1].seconds
        if seconds > epoch_seconds:
            self._cost_warned = True
            rank_zero_warn(
                f"a measurement of the Hessian took {seconds:.2g} s, more than a training epoch "
                f"({epoch_seconds:.2g} s); measure less often (every_n_epochs, max_overhead), on fewer "
                "samples (num_samples), or fewer eigenvalues (num_eigenvalues)"
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
        """Go on with the history of a checkpoint."""
        self.history = history_from_state(state_dict)
        if self.prediction is not None:
            self.prediction.follow(self.history)
        self._time.restore(state_dict["time"])
        self._restored = True


@dataclass
class _Found:
    """What the comparisons of one measurement have found so far."""

    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Measurement] = field(default_factory=dict)
    density: SpectralDensity | None = None

    def add(self, finding: Finding) -> None:
        self.values |= finding.values
        self.density = finding.density or self.density
        if finding.num_hvps:
            self.values["num_extra_hvps"] = self.values.get("num_extra_hvps", 0.0) + finding.num_hvps


def _seconds_since(began: float, ranks: Ranks) -> float:
    """Clocks differ between ranks, and what is noted must not."""
    seconds = torch.tensor([time.monotonic() - began], dtype=torch.float64, device=ranks.control_device)
    return float(ranks.broadcast(seconds))


def _check_group(pl_module: LightningModule, group: str, expression: str, num_eigenvalues: int) -> None:
    try:
        admission.check_parameters(pl_module, expression, num_eigenvalues)
    except MisconfigurationException as error:
        raise MisconfigurationException(f"groups[{group!r}]: {error}") from error


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _ranks_of(trainer: Trainer) -> Ranks:
    return Ranks(dist.group.WORLD if trainer.world_size > 1 else None)


def _is_last(trainer: Trainer) -> bool:
    """Whether training is known to end here, at the end of an epoch."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    long_enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0)
    return (
        (trainer.should_stop and long_enough and trainer.global_step >= (trainer.min_steps or 0))
        or (epochs is not None and epochs >= 0 and trainer.current_epoch + 1 >= epochs)
        or 0 <= steps <= trainer.global_step
    )


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _new_metric(name: str) -> Metric:
    if name == "slope":
        return PowerLawSlope()
    if name == "fit_error":
        return PowerLawFitError()
    return MeanMetric(sync_on_compute=False)


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (MisconfigurationException, PeerError)) else f"{type(error).__name__}: {text}"
