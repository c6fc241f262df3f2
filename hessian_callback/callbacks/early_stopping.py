"""Stopping a run on its measurements: by their number, and by their noise."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning_utilities.core.rank_zero import rank_zero_warn

from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.callbacks.progress import announce
from hessian_callback.callbacks.stopping_rule import Crossing, Noise, Plateau, Reading, crossing, plateau
from hessian_callback.measurement.extras.numerical_interval import numerical_interval_of
from hessian_callback.measurement.extras.registry import EXTRAS
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.power_law.critical_values import critical_distance

__all__ = ["PowerLawEarlyStopping"]

_ALWAYS = (
    "slope",
    "fit_error",
    "slope_stderr",
    "density_exponent",
    "lambda_max",
    "num_fitted",
    "num_hvps",
    "seconds",
)
# Lightning's EarlyStoppingReason by number; it is there from 2.6 on.
_PATIENCE_EXHAUSTED, _REACHED, _DIVERGED = 3, 1, 2


class PowerLawEarlyStopping(EarlyStopping):
    r"""Stop training when the slope has stopped moving, or when a power law has formed or been lost.

    Lightning's EarlyStopping looks after every epoch at the last logged value, and takes an epoch that was not measured
    for one without progress. This one decides when `PowerLawHessianCallback` has measured, whatever its cadence and
    the order of the callbacks, and counts ``patience`` in measurements. One that failed, has no slope, or has it
    at another number of eigenvalues, and the one before the first step, count neither way.

    With ``stop_when="plateau"`` a measurement is progress if it is better than the last progress by more than the noise
    of their difference,

    .. math:: \nu + z \, \sigma_D ,

    with what the eigenvalues' error bounds leave open, :math:`\nu`, and ``num_sigmas`` times the standard error
    :math:`\sigma_D` that the choice of the held-out samples gives to the difference, from paired halves.
    The latter needs ``extras=["halves"]`` of the callback; without it only the numerical part is known, which was a
    tenth or less of the whole on a small network, and there is a warning. The run is stopped after ``patience``
    measurements without progress, and not before a trend of ``min_trend`` would have shown. `stopping_rule` has the
    formulas.

    The slope has no universally good direction. In the paper it falls with the epochs and with the test error of a
    LeNet on MNIST (``mode="min"``); on the digits of the examples it rises while the loss falls (``mode="max"``). So
    ``mode`` has no default: look at runs of your own.

    Args:
        monitor: a key that a `PowerLawHessianCallback` of the trainer logs, by which it is found; default:
            ``"hessian/slope"``, and where ``stop_when`` is not ``"plateau"`` ``"hessian/fit_error"``. Of a group
            it is ``"hessian/slope/NAME"``.
        mode: ``"min"`` or ``"max"``: what is progress; needed for ``"plateau"``, and for nothing else.
        min_delta: ``"noise"``, which is known for slopes, or a fixed change that progress must exceed, in the unit of
            what is monitored.
        num_sigmas: z, how many standard errors of the sampling noise count.
        min_trend: relative change a measurement that must not be overlooked, with ``"noise"``; 0: stop on ``patience``
            alone.
        patience: number of measurements in a row.
        stop_when: ``"plateau"``; ``"formed"``: the fit error has been below its critical value for ``patience``
            measurements in a row, so that a power law is not rejected; ``"lost"``: it had formed, and has not
            been below for as many.
        critical_value: with which the fit error is compared, at 5 %: ``"fitted"``, about 1.07 / sqrt(K), which
            knows that the exponent was fitted; ``"paper"``, 1.36 / sqrt(K), which is more lenient.
        verbose: print each verdict; why the run is stopped is printed in any case.

    Attributes:
        verdict: what was decided at the last measurement: `stopping_rule.Plateau` or `stopping_rule.Crossing`, ``None``
            before.
        stopping_reason_message: why the run was stopped, in words; ``None`` if it was not.

    Raises:
        ValueError: if an option is out of range, or they don't go together.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> spectra = PowerLawHessianCallback(extras=["halves"], every_n_epochs=2)
        >>> stop = PowerLawEarlyStopping(mode="max", patience=4)
        >>> trainer = Trainer(callbacks=[spectra, stop], logger=False, enable_checkpointing=False)
        >>> stop.monitor, stop.stopping_reason_message
        ('hessian/slope', None)
    """

    verdict: Plateau | Crossing | None

    def __init__(
        self,
        monitor: str | None = None,
        *,
        mode: str | None = None,
        min_delta: float | str = "noise",
        num_sigmas: float = 2.0,
        min_trend: float = 0.02,
        patience: int = 4,
        stop_when: str = "plateau",
        critical_value: str = "fitted",
        verbose: bool = False,
    ) -> None:
        if stop_when not in ("plateau", "formed", "lost"):
            raise ValueError(f"stop_when must be 'plateau', 'formed' or 'lost', got {stop_when!r}")
        if critical_value not in ("fitted", "paper"):
            raise ValueError(f"critical_value must be 'fitted' or 'paper', got {critical_value!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 measurement, got {patience}")
        if num_sigmas < 0 or min_trend < 0:
            raise ValueError(
                f"num_sigmas and min_trend must not be negative, got num_sigmas={num_sigmas}, min_trend={min_trend}"
            )
        if isinstance(min_delta, str) and min_delta != "noise":
            raise ValueError(f"min_delta must be 'noise' or a number, got {min_delta!r}")
        if not isinstance(min_delta, str) and not 0 <= min_delta < float("inf"):
            raise ValueError(f"min_delta must be 'noise' or a finite number that is not negative, got {min_delta}")
        if stop_when == "plateau" and mode not in ("min", "max"):
            raise ValueError(
                f"mode must be 'min' or 'max', got {mode!r}: whether a falling or a rising slope is progress differs "
                "between tasks and has no default. Look at a run of your own; README.md says what was seen so far"
            )
        if stop_when != "plateau" and mode is not None:
            raise ValueError(f"stop_when={stop_when!r} compares with a critical value and has no mode; leave it out")
        if monitor is None:
            monitor = "hessian/slope" if stop_when == "plateau" else "hessian/fit_error"
        name = _name_of(monitor)
        if stop_when != "plateau" and name != "fit_error":
            raise ValueError(
                f"stop_when={stop_when!r} judges the fit error; monitor 'hessian/fit_error', not {monitor!r}"
            )
        if stop_when == "plateau" and min_delta == "noise" and name != "slope":
            raise ValueError(
                f"the noise of {monitor!r} is not known, only that of slopes; give min_delta as a number, the change "
                "that is to count"
            )
        super().__init__(
            monitor=monitor, mode=mode or "min", patience=patience, verbose=verbose, strict=False, check_finite=False
        )
        self.stop_when = stop_when
        self.critical_value = critical_value
        self.num_sigmas = num_sigmas
        self.min_trend = min_trend
        # Lightning turns min_delta's sign and adds it; this is the one that counts.
        self.required_change: float | str = min_delta
        self.verdict = None
        self.stopping_reason_message: str | None = None
        self._prefix = ""

    # -- checks ----------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: stoppers in a trainer must differ in one of these."""
        return str(self._generate_state_key(monitor=self.monitor, mode=self.mode, stop_when=self.stop_when))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the callback that logs what is monitored.

        Raises:
            MisconfigurationException: if there is none, or it does not log that.
        """
        if stage != "fit" or trainer.barebones:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        sources = [callback for callback in callbacks if isinstance(callback, PowerLawHessianCallback)]
        of_prefix = [source for source in sources if self.monitor.startswith(f"{source.prefix}/")]
        if not of_prefix:
            others = ", ".join(repr(source.prefix) for source in sources)
            there = f"those of the trainer have the prefixes {others}" if sources else "the trainer has none at all"
            raise MisconfigurationException(
                f"PowerLawEarlyStopping monitors {self.monitor!r}, which a PowerLawHessianCallback with that prefix "
                f"would log; {there}. Add one to the trainer's callbacks, or change monitor"
            )
        source = max(of_prefix, key=lambda one: len(one.prefix))
        self._prefix = source.prefix
        self._check_key(source)
        if self.stop_when != "plateau" or self.required_change != "noise":
            return
        if not source.measurer.solver.proves_bounds:
            raise MisconfigurationException(
                "PublishedProtocol computes no error bounds, so the noise of its slopes is not known; give "
                "PowerLawEarlyStopping min_delta as a number, or measure with solver=Lanczos()"
            )
        if "split_half" not in {extra.name for extra in source.measurer.extras} or self._group is not None:
            which = "of a group" if self._group is not None else "without extras=['split_half']"
            rank_zero_warn(
                f"the noise of {self.monitor!r} {which} is only what the eigenvalues' error bounds leave open. What "
                "the choice of the held-out samples adds is usually more; extras=['split_half'] of the callback "
                "measures it for the Hessian as a whole, for as much work again, and min_delta=0.05 would set a fixed "
                "change instead"
            )

    def _check_key(self, source: PowerLawHessianCallback) -> None:
        name, group = self._name, self._group
        known = {*_ALWAYS}
        if group is None:
            known.update(*(extra.keys for extra in source.measurer.extras))
        if name in known and (group is None or group in source.measurer.groups):
            return
        wanting = [f"extras=[{extra!r}]" for extra, kind in EXTRAS.items() if name in kind.keys and group is None]
        remedy = f"it does with {wanting[0]}" if wanting else f"it logs {', '.join(sorted(known))}"
        if group is not None:
            groups = ", ".join(sorted(source.measurer.groups)) or "none"
            remedy = f"its groups are: {groups}; of each it logs {', '.join(_ALWAYS)}"
        raise MisconfigurationException(
            f"PowerLawEarlyStopping monitors {self.monitor!r}, which PowerLawHessianCallback(prefix={source.prefix!r}) "
            f"does not log; {remedy}"
        )

    @property
    def _name(self) -> str:
        return self.monitor[len(self._prefix) + 1 :].partition("/")[0]

    @property
    def _group(self) -> str | None:
        return self.monitor[len(self._prefix) + 1 :].partition("/")[2] or None

    # -- deciding --------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: an epoch's end is no measurement."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing, likewise."""

    def on_hessian_measured(
        self, trainer: Trainer, pl_module: LightningModule, source: PowerLawHessianCallback
    ) -> None:
        """Decide, right after a measurement; called by the `PowerLawHessianCallback` that made it.

        The verdict follows from the history alone, which travels in checkpoints and is the same on all ranks. So a
        measurement cannot be counted twice, and a resumed run decides as an uninterrupted one.
        """
        quick = trainer.fast_dev_run  # type: ignore[attr-defined]
        if source.prefix != self._prefix or quick or not self._counts(source.history[-1], source):
            return
        entries = [entry for entry in source.history if self._counts(entry, source)]
        values = [self._of(entry).scalars()[self._name] for entry in entries]
        if self.stop_when == "plateau":
            message = self._judge_plateau(entries, values)
        else:
            message = self._judge_crossing(entries, values)
        assert self.verdict is not None
        self.wait_count = self.verdict.wait
        # All ranks have the same history; this makes sure that none goes on alone.
        stop = trainer.strategy.reduce_boolean_decision(self.verdict.stop, all=False)
        if self.verbose or stop:
            does = "PowerLawEarlyStopping stops the training" if stop else "PowerLawEarlyStopping"
            announce(trainer, f"{does}: {message}")
        if stop:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = message
            self._note_reason()

    def _judge_plateau(self, entries: list[Measurement], values: list[float]) -> str:
        mode = cast(Literal["min", "max"], self.mode)
        readings = [self._reading(entry, value) for entry, value in zip(entries, values, strict=True)]
        verdict = self.verdict = plateau(
            readings,
            mode=mode,
            patience=self.patience,
            min_delta=cast("float | Literal['noise']", self.required_change),
            num_sigmas=self.num_sigmas,
            min_trend=self.min_trend,
        )
        self.best_score = torch.tensor(values[verdict.best], dtype=torch.float64)
        here = f"{self.monitor} = {values[-1]:.4g} ({_place(entries[-1])})"
        if verdict.reference is None or verdict.required is None:
            return f"{here} is the first measurement"
        better = "above" if mode == "max" else "below"
        required = _in_words(verdict.noise) if verdict.noise else f"min_delta = {verdict.required:.3g}"
        relation = f"{better} {values[verdict.reference]:.4g} ({_place(entries[verdict.reference])}) by more than"
        if verdict.best == len(entries) - 1:
            return f"{here} is {relation} {required}"
        return (
            f"{here} is not {relation} {required}; measurements without progress: {verdict.wait} "
            f"(patience={self.patience}, mode={mode!r})"
        )

    def _reading(self, entry: Measurement, value: float) -> Reading:
        part = self._of(entry)
        if self.required_change != "noise" or part.spectrum is None or part.num_fitted is None:
            return Reading(value)
        low, high = numerical_interval_of(part.spectrum, part.num_fitted)
        one, other = (part.comparisons.get(f"slope_half_{half}") for half in (1, 2))
        gap = None if one is None or other is None else one - other
        # Rounding can put a slope without numerical errors a last digit outside of its interval.
        return Reading(value, min(low, value), max(high, value), gap)

    def _judge_crossing(self, entries: list[Measurement], values: list[float]) -> str:
        stop_when = cast(Literal["formed", "lost"], self.stop_when)
        fitted = self.critical_value == "fitted"
        exponent: Literal["fitted", "known"] = "fitted" if fitted else "known"
        numbers = [self._of(entry).num_fitted or 0 for entry in entries]
        critical = [critical_distance(number, exponent=exponent) for number in numbers]
        verdict = self.verdict = crossing(values, critical, stop_when=stop_when, patience=self.patience)
        self.best_score = torch.tensor(min(values), dtype=torch.float64)
        side = "below" if values[-1] < critical[-1] else "not below"
        name = "fitted exponent" if fitted else "the paper's 1.36 / sqrt(K)"
        formed = "not formed" if verdict.formed is None else f"formed ({_place(entries[verdict.formed])})"
        return (
            f"{self.monitor} = {values[-1]:.4g} ({_place(entries[-1])}) is {side} the critical value {critical[-1]:.4g}"
            f" (critical_value={self.critical_value!r}: {name}, 5 %, K = {numbers[-1]}); the power law has {formed}; "
            f"measurements in a row on the side of stop_when={stop_when!r}: {verdict.wait} (patience={self.patience})"
        )

    def _note_reason(self) -> None:
        try:
            from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
        except ImportError:  # Lightning before 2.6
            return
        number = {"plateau": _PATIENCE_EXHAUSTED, "formed": _REACHED, "lost": _DIVERGED}[self.stop_when]
        self.stopping_reason = EarlyStoppingReason(number)

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

    def _of(self, entry: Measurement) -> Measurement:
        part = self._part(entry)
        assert part is not None
        return part

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the decision stands; what it rests on is the history of the `PowerLawHessianCallback`."""
        return {
            "wait_count": self.wait_count,
            "best_score": self.best_score,
            "stopped_epoch": self.stopped_epoch,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; ``patience`` stays what this stopper was given."""
        self.wait_count = state_dict["wait_count"]
        self.best_score = state_dict["best_score"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.stopping_reason_message = state_dict.get("stopping_reason_message")


def _name_of(monitor: str) -> str:
    """Guess what a key is the name of, before its prefix is known."""
    prefix, *parts = monitor.split("/")
    return next((name for name in ("slope", "fit_error") if name in parts), parts[-1] if parts else prefix)


def _place(entry: Measurement) -> str:
    return f"epoch {entry.epoch}, step {entry.step}"


def _in_words(noise: Noise) -> str:
    if noise.sampling is None:
        return f"the noise of the difference, {noise.total:.3g} (numerical only)"
    return (
        f"the noise of the difference, {noise.total:.3g} (numerical {noise.numerical:.2g}, sample "
        f"{noise.num_sigmas:g} x {noise.sampling:.2g} from the halves of {noise.num_pooled} measurements)"
    )
