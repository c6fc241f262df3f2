"""Stopping a run on its measurements: by their number, and by their noise."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from hessian_callback._options import (
    OptionError,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_str,
    optional,
)
from hessian_callback.callbacks.history_cursor import HistoryCursor
from hessian_callback.callbacks.lightning_packages import (
    EarlyStoppingBase,
    LightningModule,
    MisconfigurationException,
    Trainer,
    sibling,
)
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.callbacks.progress import announce
from hessian_callback.callbacks.run_boundaries import CheckpointStates
from hessian_callback.callbacks.stopping_rule import Noise, Plateau, PlateauRule, Reading
from hessian_callback.callbacks.trainer_state import callbacks_of
from hessian_callback.measurement.extras.numerical_interval import numerical_interval_of
from hessian_callback.measurement.extras.registry import EXTRAS
from hessian_callback.measurement.measurement import Measurement, logged_keys

__all__ = ["PowerLawEarlyStopping"]

# The numbers of Lightning's EarlyStoppingReason, which exists from 2.6 on.
_NOT_STOPPED, _PATIENCE_EXHAUSTED = 0, 3


class PowerLawEarlyStopping(EarlyStoppingBase):
    r"""Stop training when the slope has stopped improving.

    Lightning's EarlyStopping looks at the last logged value after every epoch, and counts an epoch without a
    measurement as one without progress. This class decides after each measurement of `PowerLawHessianCallback`, for any
    schedule and order of the callbacks, and counts ``patience`` in measurements. A measurement is not counted if it
    failed, has no slope, has it at another number of eigenvalues, or was made before the first step.

    A measurement is progress if it is better than the last progress by more than the noise of their difference,

    .. math:: \nu + z \, \sigma_D ,

    with the numerical uncertainty :math:`\nu` from the eigenvalues' error bounds, and ``num_sigmas`` times the standard
    error :math:`\sigma_D` of the difference due to the choice of the samples, from paired halves. The standard error
    needs ``extras=["split_half"]`` of the callback. Without it only the numerical part is known, which was a tenth or
    less of the whole on a small network, and a warning is given. The run is stopped after ``patience`` measurements
    without progress, and not before a trend of ``min_trend`` would have shown. `stopping_rule` has the formulas.

    The slope has no universally good direction. In the paper it falls with the epochs and with the test error of a
    LeNet on MNIST (``mode="min"``); on the digits of the examples it rises while the loss falls (``mode="max"``). So
    ``mode`` has no default: look at runs of your own.

    Args:
        monitor: a key that each measurement of a `PowerLawHessianCallback` of the trainer logs, those of its extras
            included, and not predictions and ``overhead``. The key of a group is ``"hessian/slope/NAME"``.
        mode: ``"min"`` or ``"max"``, the direction of progress; required.
        min_delta: ``"noise"``, which is known for slopes, or a fixed change that progress must exceed, in the unit of
            the monitored quantity.
        num_sigmas: z, the number of standard errors of the sampling noise.
        min_trend: relative change a measurement that must not be overlooked, with ``"noise"``; 0: only patience
            decides.
        patience: number of measurements in a row.
        verbose: print each verdict. The reason for stopping is always printed.
        stop_when: removed; any value but ``"plateau"`` raises an error.
        critical_value: removed; any value raises an error.

    Attributes:
        verdict: the `stopping_rule.Plateau` of the last measurement; ``None`` before the first.
        stopping_reason_message: why the run was stopped, in words; ``None`` if it was not.

    Raises:
        ValueError: if an option has the wrong type, is out of range, or does not fit another option.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> spectra = PowerLawHessianCallback(extras=["split_half"], every_n_epochs=2)
        >>> stop = PowerLawEarlyStopping(mode="max", patience=4)
        >>> trainer = Trainer(callbacks=[spectra, stop], logger=False, enable_checkpointing=False)
        >>> stop.monitor, stop.stopping_reason_message
        ('hessian/slope', None)
    """

    verdict: Plateau | None

    def __init__(
        self,
        monitor: str = "hessian/slope",
        *,
        mode: str | None = None,
        min_delta: float | str = "noise",
        num_sigmas: float = 2.0,
        min_trend: float = 0.02,
        patience: int = 4,
        verbose: bool = False,
        stop_when: str | None = None,
        critical_value: str | None = None,
    ) -> None:
        _refuse_removed(stop_when, critical_value)
        monitor = check_str("monitor", monitor)
        if mode is None:
            raise ValueError(
                "mode must be 'min' or 'max', got None: whether a falling or a rising slope is progress differs "
                "between tasks and has no default; look at a run of your own first"
            )
        if min_delta != "noise":
            min_delta = _check_min_delta(min_delta)
        elif _name_in(monitor) != "slope":
            raise ValueError(
                f"the noise of {monitor!r} is unknown, because only that of slopes is measured; give min_delta as a "
                "number, the smallest change that counts as progress"
            )
        super().__init__(
            monitor=monitor,
            mode=check_choice("mode", mode, ["min", "max"]),
            patience=check_int("patience", patience, at_least=1),
            verbose=check_bool("verbose", verbose),
            strict=False,
            check_finite=False,
        )
        self.num_sigmas = check_number("num_sigmas", num_sigmas, at_least=0)
        self.min_trend = check_number("min_trend", min_trend, at_least=0)
        # Lightning negates its own min_delta for mode="min".
        self.required_change = min_delta
        self._checkpoint_states = CheckpointStates()
        self._prefix = ""
        self._cursor = HistoryCursor()
        self._clear()
        self._clear_verdict()

    def _clear_verdict(self) -> None:
        self.verdict = None
        self.wait_count, self.stopped_epoch = 0, 0
        self.best_score = torch.tensor(-math.inf if self.mode == "max" else math.inf, dtype=torch.float64)
        self.stopping_reason_message: str | None = None

    def _clear(self) -> None:
        self._rule = PlateauRule(
            mode=cast(Literal["min", "max"], self.mode),
            patience=self.patience,
            min_delta=cast("float | Literal['noise']", self.required_change),
            num_sigmas=self.num_sigmas,
            min_trend=self.min_trend,
        )
        # The last counted measurement, the last progress, and the one that the last was compared with.
        self._last: Measurement | None = None
        self._best: Measurement | None = None
        self._reference: Measurement | None = None

    # -- checks ----------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint; the stoppers of a trainer must differ in monitor or mode."""
        # "stop_when" was an option; checkpoints keep it in their keys.
        return str(self._generate_state_key(monitor=self.monitor, mode=self.mode, stop_when="plateau"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the callback that logs the monitored key.

        Raises:
            MisconfigurationException: if there is none, or its measurements do not have the key.
        """
        self._checkpoint_states.enter(stage)
        if stage != "fit" or trainer.barebones:
            return
        source = self._find_source(trainer)
        self._prefix = source.prefix
        self._check_key(source)
        # Another run may count other measurements.
        self._cursor.reset()
        self._clear()
        # Before Lightning restores the verdict of a resumed run.
        self._clear_verdict()
        self._set_reason(trainer, _NOT_STOPPED)
        if self.required_change != "noise":
            return
        if not source.measurer.solver.proves_bounds:
            raise MisconfigurationException(
                "PublishedProtocol computes no error bounds, so the noise of its slopes is unknown; give "
                "PowerLawEarlyStopping min_delta as a number, or measure with solver=Lanczos()"
            )
        if "split_half" not in {extra.name for extra in source.measurer.extras} or self._group is not None:
            which = "of a group" if self._group is not None else "without extras=['split_half']"
            rank_zero_warn(
                f"the noise of {self.monitor!r} {which} contains only the eigenvalues' error bounds. The choice of the "
                "samples usually adds more; extras=['split_half'] of the callback measures that for the Hessian as a "
                "whole and doubles the cost, and min_delta=0.05 would set a fixed change instead"
            )

    def _find_source(self, trainer: Trainer) -> PowerLawHessianCallback:
        sources = [callback for callback in callbacks_of(trainer) if isinstance(callback, PowerLawHessianCallback)]
        of_prefix = [source for source in sources if self.monitor.startswith(f"{source.prefix}/")]
        if of_prefix:
            return max(of_prefix, key=lambda one: len(one.prefix))
        others = ", ".join(repr(source.prefix) for source in sources)
        found = f"those of the trainer have the prefixes {others}" if sources else "the trainer has none at all"
        raise MisconfigurationException(
            f"PowerLawEarlyStopping monitors {self.monitor!r}, which a PowerLawHessianCallback with that prefix would "
            f"log; {found}. Add one to the trainer's callbacks, or change monitor"
        )

    def _check_key(self, source: PowerLawHessianCallback) -> None:
        name, group = self._name, self._group
        known = set(logged_keys(source.measurer.solver.mode, of_group=group is not None))
        if group is None:
            known.update(*(extra.keys for extra in source.measurer.extras))
        if name in known and (group is None or group in source.measurer.groups):
            return
        missing = [f"extras=[{extra!r}]" for extra, kind in EXTRAS.items() if name in kind.keys and group is None]
        remedy = f"they do with {missing[0]}" if missing else f"they have {', '.join(sorted(known))}"
        if group is not None:
            groups = ", ".join(sorted(source.measurer.groups)) or "none"
            remedy = f"its groups are: {groups}; each has {', '.join(sorted(known))}"
        raise MisconfigurationException(
            f"PowerLawEarlyStopping monitors {self.monitor!r}, which the measurements of "
            f"PowerLawHessianCallback(prefix={source.prefix!r}) do not have; {remedy}"
        )

    @property
    def _name(self) -> str:
        return self.monitor[len(self._prefix) + 1 :].partition("/")[0]

    @property
    def _group(self) -> str | None:
        return self.monitor[len(self._prefix) + 1 :].partition("/")[2] or None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the states of checkpoints again, whatever they are loaded for."""
        self._checkpoint_states.leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the stage, because `teardown` is not called then."""
        self.teardown(trainer, pl_module, "fit")

    # -- deciding --------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing, because not every epoch is measured."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing, because not every validation is measured."""

    def on_hessian_measured(
        self, trainer: Trainer, pl_module: LightningModule, source: PowerLawHessianCallback
    ) -> None:
        """Decide after a measurement; called by the `PowerLawHessianCallback` that made it.

        The verdict is a function of the history, which checkpoints contain and which is equal on all ranks. So no
        measurement is counted twice, and a resumed run decides as an uninterrupted one. Only new measurements are
        processed, so the cost does not depend on the length of the history.
        """
        if source.prefix != self._prefix or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        restarted, new = self._cursor.advance(source.history)
        if restarted:
            self._clear()
        for entry in new:
            if self._counts(entry, source):
                self._add(entry)
        if self._last is None or self._last is not source.history[-1] or self._rule.verdict is None:
            return
        self.verdict = self._rule.verdict
        self.wait_count = self.verdict.wait
        self.best_score = torch.tensor(self._value(self._best), dtype=torch.float64, device="cpu")
        # The history is equal on all ranks; this makes sure that no rank continues alone.
        stop = trainer.strategy.reduce_boolean_decision(self.verdict.stop, all=False)
        message = self._message(self.verdict) if self.verbose or stop else ""
        if message:
            action = "PowerLawEarlyStopping stops the training" if stop else "PowerLawEarlyStopping"
            announce(trainer, f"{action}: {message}")
        if stop:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = message
            self._set_reason(trainer, _PATIENCE_EXHAUSTED)

    def _add(self, entry: Measurement) -> None:
        verdict = self._rule.add(self._reading(entry))
        self._last, self._reference = entry, self._best
        if verdict.wait == 0:
            self._best = entry

    def _reading(self, entry: Measurement) -> Reading:
        part, value = self._part(entry), self._value(entry)
        if self.required_change != "noise" or part is None or part.spectrum is None or part.num_fitted is None:
            return Reading(value)
        low, high = numerical_interval_of(part.spectrum, part.num_fitted)
        one, other = (part.comparisons.get(f"slope_half_{half}") for half in (1, 2))
        gap = None if one is None or other is None else one - other
        # Rounding can put a slope without numerical errors a last digit outside its interval.
        return Reading(value, min(low, value), max(high, value), gap)

    def _message(self, verdict: Plateau) -> str:
        last = self._value(self._last)
        here = f"{self.monitor} = {last:.4g} ({_location(self._last)})"
        if verdict.reference is None or verdict.required is None:
            return f"{here} is the first measurement"
        better = "above" if self.mode == "max" else "below"
        required = _in_words(verdict.noise) if verdict.noise else f"min_delta = {verdict.required:.3g}"
        reference = f"{self._value(self._reference):.4g} ({_location(self._reference)})"
        relation = f"{better} {reference} by more than {required}"
        if verdict.wait == 0:
            return f"{here} is {relation}"
        return (
            f"{here} is not {relation}; measurements without progress: {verdict.wait} "
            f"(patience={self.patience}, mode={self.mode!r})"
        )

    def _set_reason(self, trainer: Trainer, number: int) -> None:
        try:
            reasons = sibling(trainer, "callbacks.early_stopping", "EarlyStoppingReason")
        except AttributeError:  # Lightning before 2.6
            return
        self.stopping_reason = reasons(number)

    def _counts(self, entry: Measurement, source: PowerLawHessianCallback) -> bool:
        part = self._part(entry)
        return (
            entry.when in ("epoch", "step")
            and part is not None
            and self._name in part.scalars()
            and part.num_fitted == source.measurer.num_eigenvalues
            and part.mode == source.measurer.solver.mode
        )

    def _part(self, entry: Measurement) -> Measurement | None:
        return entry if self._group is None else entry.groups.get(self._group)

    def _value(self, entry: Measurement | None) -> float:
        part = None if entry is None else self._part(entry)
        assert part is not None
        return part.scalars()[self._name]

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counters and message; the decision itself follows from the `PowerLawHessianCallback`'s history."""
        return {
            "wait_count": self.wait_count,
            "best_score": self.best_score,
            "stopped_epoch": self.stopped_epoch,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, if `fit` resumes from it; ``patience`` stays the option of this object.

        Raises:
            ValueError: if the state lacks an entry, or one has the wrong type.
        """
        if not self._checkpoint_states.are_taken:
            return
        try:
            wait_count = check_int("wait_count", state_dict.get("wait_count"), at_least=0)
            best_score = check_number("best_score", state_dict.get("best_score"), finite=False)
            stopped_epoch = check_int("stopped_epoch", state_dict.get("stopped_epoch"), at_least=0)
            message = optional(check_str, "stopping_reason_message", state_dict.get("stopping_reason_message"))
        except OptionError as error:
            raise ValueError(
                f"the checkpoint's state of PowerLawEarlyStopping cannot be used: {error}; remove its entry from the "
                "checkpoint's 'callbacks', the decision follows from the history of PowerLawHessianCallback"
            ) from error
        self.wait_count, self.stopped_epoch, self.stopping_reason_message = wait_count, stopped_epoch, message
        self.best_score = torch.tensor(best_score, dtype=torch.float64, device="cpu")


def _refuse_removed(stop_when: object, critical_value: object) -> None:
    """Raise an error for the options of a removed feature."""
    if stop_when == "formed":
        raise ValueError(
            "stop_when='formed' was removed; use EarlyStopping(monitor='hessian/fit_error', mode='min', strict=False, "
            "patience=10**9, stopping_threshold=critical_distance(num_eigenvalues)) of Lightning with "
            "hessian_callback.power_law.fit.critical_distance instead"
        )
    if stop_when not in (None, "plateau"):
        raise ValueError(
            f"stop_when={stop_when!r} was removed; compare source.history[-1].fit_error with critical_distance in a "
            "callback of your own with the hook on_hessian_measured(trainer, pl_module, source) instead"
        )
    if critical_value is not None:
        raise ValueError(f"critical_value={critical_value!r} was removed with stop_when; leave it out")


def _check_min_delta(value: object) -> float:
    try:
        return check_number("min_delta", value, at_least=0)
    except OptionError as error:
        raise OptionError("min_delta", f"'noise' or {error.wanted}", value) from None


def _name_in(monitor: str) -> str:
    """Return the name in a key whose prefix is not known yet: "slope" if it is a part of it, else the last part."""
    _, *parts = monitor.split("/")
    return "slope" if "slope" in parts else parts[-1] if parts else monitor


def _location(entry: Measurement | None) -> str:
    assert entry is not None
    return f"epoch {entry.epoch}, step {entry.step}"


def _in_words(noise: Noise) -> str:
    if noise.sampling is None:
        return f"the noise of the difference, {noise.total:.3g} (numerical only)"
    return (
        f"the noise of the difference, {noise.total:.3g} (numerical {noise.numerical:.2g}, sample "
        f"{noise.num_sigmas:g} x {noise.sampling:.2g} from the halves of {noise.num_pooled} measurements)"
    )
