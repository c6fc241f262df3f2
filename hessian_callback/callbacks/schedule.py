"""When to measure: by epochs or by optimizer steps, and at most for a given share of the wall time."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from hessian_callback._options import (
    OptionError,
    check_bool,
    check_choice,
    check_each,
    check_int,
    check_number,
    optional,
)
from hessian_callback.measurement.measurement import When
from hessian_callback.measurement.place import Place, Placed

__all__ = ["Cadence", "MeasurementSchedule", "TimeShare"]

# Number of durations whose median predicts the next one, so that a single slow measurement does not decide.
_RECENT = 5


@dataclass(frozen=True)
class Cadence:
    """The places of a run at which a measurement is due.

    With one of the step options no ends of epochs are measured. Without ``at_steps`` the place before the first step is
    due as well, with ``at_steps`` only if it contains 0.

    Attributes:
        every_n_epochs: measure the end of the first epoch, and then each that is at least n epochs after the last
            measured one.
        every_n_train_steps: measure after every n optimizer steps.
        at_steps: measure after these numbers of optimizer steps.

    Example:
        >>> cadence = Cadence(at_steps=(0, 50, 100))
        >>> cadence.by_epochs, cadence.at_start, cadence.at_step(before=49, now=50), cadence.at_step(50, 51)
        (False, True, True, False)
    """

    every_n_epochs: int = 1
    every_n_train_steps: int | None = None
    at_steps: tuple[int, ...] | None = None

    @classmethod
    def checked(
        cls,
        every_n_epochs: int,
        every_n_train_steps: int | None,
        at_steps: Iterable[int] | None,
        *,
        may_be_empty: bool = False,
    ) -> Cadence:
        """Make a cadence from a user's options; with ``may_be_empty``, ``at_steps`` may be empty.

        Raises:
            ValueError: if an option has the wrong type or is out of range, or both step options are given.
        """
        every_n_epochs = check_int("every_n_epochs", every_n_epochs, at_least=1)
        every_n_train_steps = optional(check_int, "every_n_train_steps", every_n_train_steps, at_least=1)
        if every_n_train_steps is not None and at_steps is not None:
            raise ValueError("give every_n_train_steps or at_steps, not both")
        if at_steps is None:
            return cls(every_n_epochs, every_n_train_steps, None)
        steps = tuple(sorted(set(check_each(check_int, "at_steps", at_steps, at_least=0))))
        if not (steps or may_be_empty):
            raise ValueError("at_steps must name at least one number of optimizer steps, from 0; got []")
        return cls(every_n_epochs, None, steps)

    @property
    def by_epochs(self) -> bool:
        """Whether ends of epochs are measured, not steps."""
        return self.every_n_train_steps is None and self.at_steps is None

    @property
    def at_start(self) -> bool:
        """Whether the place before the first optimizer step is due."""
        return self.at_steps is None or 0 in self.at_steps

    def at_step(self, before: int, now: int) -> bool:
        """Return whether a due step is in ``before < step <= now``; one batch may take several optimizer steps."""
        if self.every_n_train_steps is not None:
            return now // self.every_n_train_steps > before // self.every_n_train_steps
        return self.at_steps is not None and any(before < step <= now for step in self.at_steps)

    def at_epoch(self, epoch: int, last: int | None) -> bool:
        """Return whether the end of an epoch is due, given the last measured epoch.

        The last measured epoch itself is due again: an epoch with several validations is measured at each of them,
        because callbacks that monitor the slope look after every validation, and would mistake an old value for a lack
        of progress.
        """
        return self.by_epochs and (last is None or epoch == last or epoch - last >= self.every_n_epochs)


class TimeShare:
    r"""Limit the share of the wall time that measurements take.

    A measurement is allowed if one of the expected duration :math:`p`, the median of the last five, would leave the
    share within the limit :math:`f`: :math:`s + p \le f (t + p)`, with :math:`s` of :math:`t` seconds spent.

    After an allowed measurement of duration d, :math:`s \le f t + (1 - f) \max(0, d - p)`, so the share exceeds the
    limit only by the time that this measurement took longer than expected. If a measurement is refused,
    :math:`s > f t - (1 - f) p`, so less than one measurement is unused. Measurements that were made without asking (the
    first and the last of a run) count like any other, and the next ones wait until these are paid for. So after ten or
    more measurements, if more were due than allowed, the share is within a tenth of the limit, except right after a
    measurement that took far longer than those before.

    Args:
        limit: largest share, above 0 and at most 1; ``None`` for no limit.
        clock: seconds that never decrease.

    Example:
        >>> seconds = iter([0.0, 100.0, 100.0, 101.0])
        >>> share = TimeShare(0.1, clock=lambda: next(seconds))
        >>> share.start()
        >>> share.add(8.0)
        >>> share.fraction  # 8 of 100 seconds
        0.08
        >>> share.allows_another(), share.allows_another()  # 16 of 108 seconds would be too much
        (False, False)
    """

    def __init__(self, limit: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = optional(check_number, "max_overhead", limit, above=0, at_most=1)
        self.spent = 0.0
        self._clock = clock
        self._earlier = 0.0
        self._started: float | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def start(self) -> None:
        """Start the clock, or start it again after a resume."""
        self._earlier = self.elapsed
        self._started = self._clock()

    def stop(self) -> None:
        """Stop the clock until the next `start`."""
        self._earlier, self._started = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Seconds of training, measurements included, over all parts of an interrupted run."""
        return self._earlier + (0.0 if self._started is None else self._clock() - self._started)

    @property
    def fraction(self) -> float:
        """Share of the time so far that measurements took."""
        elapsed = self.elapsed
        return self.spent / elapsed if elapsed > 0 else 0.0

    def add(self, seconds: float) -> None:
        """Add the duration of a measurement."""
        self.spent += seconds
        self._recent.append(seconds)

    @property
    def expected(self) -> float:
        """Expected seconds of the next measurement: the median of the last ones; 0 before the first."""
        return statistics.median(self._recent) if self._recent else 0.0

    def allows_another(self) -> bool:
        """Return whether a measurement of the expected duration would leave the share within the limit."""
        if self.limit is None:
            return True
        return self.spent + self.expected <= self.limit * (self.elapsed + self.expected)

    def state(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        return {"spent": self.spent, "elapsed": self.elapsed, "recent": list(self._recent)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state, also of the version that stored the last duration only; a running clock keeps running.

        Raises:
            ValueError: if the state lacks an entry, or one has the wrong type.
        """
        spent = check_number("spent", state.get("spent"), at_least=0)
        elapsed = check_number("elapsed", state.get("elapsed"), at_least=0)
        durations = state["recent"] if "recent" in state else [state.get("last")]
        recent = check_each(check_number, "recent", durations, at_least=0)
        self.spent, self._earlier = spent, elapsed
        # A callback that loads a checkpoint in the middle of a run does not start the run again.
        self._started = None if self._started is None else self._clock()
        self._recent = deque(recent, maxlen=_RECENT)


class MeasurementSchedule:
    """Decide at which places of a run to measure: whether one is due, owed and affordable.

    The schedule has no reference to a trainer. A callback calls one method at each place of a run with the numbers of
    epoch and step and the history so far, and gets the place to measure, or ``None``:

    - `at_train_start` before the first step of a run or of its resumed part;
    - `at_batch_end` after each training batch;
    - `at_validation_end` after each validation;
    - `at_epoch_end` after each training epoch;
    - `at_train_end` at the end.

    If ``max_overhead`` is given, it then asks `is_affordable`, on one rank for all, because clocks differ. It encloses
    the measurement in `begin` and `finish`. A measurement that was begun but not finished, because the process had to
    end, is *owed*: the state contains its place, and `at_train_start` of the resumed run returns it.

    An end of an epoch is measured after its validation if values are read then: if validation does not simply end every
    epoch (``val_check_interval`` other than 1, ``check_val_every_n_epoch`` above 1), if EarlyStopping or
    ModelCheckpoint are told to look then, or if another callback has the hook ``on_validation_end``. An epoch that is
    due but has no validation is measured when its training ends.

    Args:
        every_n_epochs: as in `Cadence`.
        every_n_train_steps: as in `Cadence`.
        at_steps: as in `Cadence`.
        at_end: measure the end of training as well; then ``at_steps`` may be empty.
        max_overhead: largest share of the wall time that measurements may take; see `TimeShare`.
        clock: seconds that never decrease.

    Attributes:
        cadence: the places that are due.
        time: the share of the wall time so far.
        owed: the place of a measurement that was begun and not finished; ``None`` if there is none.

    Raises:
        ValueError: if an option has the wrong type or is out of range.

    Example:
        >>> schedule = MeasurementSchedule(every_n_epochs=2)
        >>> schedule.at_train_start(epoch=0, step=0, history=[])
        Place(epoch=0, step=0, when='fit_start')
        >>> schedule.at_epoch_end(epoch=0, step=100, history=[])
        Place(epoch=0, step=100, when='epoch')
        >>> schedule.begin(Place(epoch=0, step=100, when="epoch"))
        >>> resumed = MeasurementSchedule(every_n_epochs=2)
        >>> resumed.load_state_dict(schedule.state_dict())
        >>> resumed.at_train_start(epoch=1, step=100, history=[])
        Place(epoch=0, step=100, when='epoch')
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        at_steps: Iterable[int] | None = None,
        at_end: bool = False,
        max_overhead: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.at_end = check_bool("at_end", at_end)
        self.cadence = Cadence.checked(every_n_epochs, every_n_train_steps, at_steps, may_be_empty=self.at_end)
        self.time = TimeShare(max_overhead, clock)
        self.owed: Place | None = None
        self._clock = clock
        self._after_validation = False
        self._steps_seen = 0
        self._trained_since = False

    # -- places ----------------------------------------------------------------------------------

    def at_train_start(
        self, *, epoch: int, step: int, history: Sequence[Placed], after_validation: bool = False
    ) -> Place | None:
        """Start the clock, and return the place to measure before the next step.

        Args:
            epoch: number of the current epoch.
            step: optimizer steps taken so far.
            history: the measurements so far.
            after_validation: whether logged values are read after validations, and not after training epochs only.

        Returns:
            The owed place if no step was taken since; else the start of the run if it is due and was not measured.
        """
        self._after_validation = after_validation
        self._steps_seen = step
        self.time.start()
        owed, self.owed = self.owed, None
        # At another step the weights of the owed place no longer exist.
        if owed is not None and owed.step == step and not _is_measured(owed, history):
            return owed
        is_start = step == 0 and not any(entry.when == "fit_start" for entry in history)
        return Place(epoch, step, "fit_start") if is_start and self.cadence.at_start else None

    def at_batch_end(self, *, epoch: int, step: int, history: Sequence[Placed]) -> Place | None:
        """Return the place after a training batch if one of its optimizer steps is due."""
        before, self._steps_seen = self._steps_seen, step
        self._trained_since = True
        return _unmeasured(Place(epoch, step, "step"), history) if self.cadence.at_step(before, step) else None

    def at_validation_end(self, *, epoch: int, step: int, history: Sequence[Placed]) -> Place | None:
        """Return the place after a validation if the epoch is due and values are read then."""
        due = self._after_validation and self.cadence.at_epoch(epoch, _last_epoch(history))
        return _unmeasured(Place(epoch, step, "epoch"), history) if due else None

    def at_epoch_end(self, *, epoch: int, step: int, history: Sequence[Placed], is_last: bool = False) -> Place | None:
        """Return the place after a training epoch if it is due and was not measured after a validation.

        Args:
            epoch: number of the epoch.
            step: optimizer steps taken so far.
            history: the measurements so far.
            is_last: whether training is known to end here. With ``at_end`` the place is then due, so that the
                checkpoint of the epoch contains its measurement.
        """
        last = _last_epoch(history)
        due = self.cadence.at_epoch(epoch, last) and not (self._after_validation and last == epoch)
        ends = self.at_end and is_last and not self._is_measured_at(step, history)
        return _unmeasured(Place(epoch, step, "epoch"), history) if due or ends else None

    def at_train_end(self, *, epoch: int, step: int, history: Sequence[Placed]) -> Place | None:
        """Return the end of training, if it is wanted or measurements were left out, and it was not measured."""
        left_out = self.time.limit is not None and bool(history)
        due = (self.at_end or left_out) and not self._is_measured_at(step, history)
        return Place(epoch, step, "fit_end") if due else None

    def is_affordable(self, history: Sequence[Placed], *, is_last: bool = False) -> bool:
        """Return whether ``max_overhead`` allows to measure a place of `at_batch_end` or at the end of an epoch.

        The first measurement after the start of a run and its last one are always allowed. The places of
        `at_train_start` and `at_train_end` are measured without asking.

        Args:
            history: the measurements so far.
            is_last: whether training is known to end here.
        """
        first = not any(entry.when in ("epoch", "step") for entry in history)
        return first or is_last or self.time.allows_another()

    def _is_measured_at(self, step: int, history: Sequence[Placed]) -> bool:
        # After a batch, step 0 means that steps are not counted.
        uncounted = step == 0 and self._trained_since
        return bool(history) and history[-1].step == step and not uncounted

    # -- a measurement ---------------------------------------------------------------------------

    def begin(self, place: Place) -> None:
        """Note that a measurement begins; until `finish` it is owed."""
        self.owed = place

    def finish(self, seconds: float) -> None:
        """Note that the measurement is in the history, failed or not, and took so many seconds."""
        self.owed = None
        self._trained_since = False
        self.time.add(seconds)

    def add_overhead(self, seconds: float) -> None:
        """Add time that the callback spent beside finished measurements: logging, samples, a given up measurement."""
        self.time.spent += seconds

    def stop(self) -> None:
        """End a run: what passes until the next one is not its time."""
        self.time.stop()

    def reset(self) -> None:
        """Forget an earlier run."""
        self.owed = None
        self._trained_since = False
        self.time.restore({"spent": 0.0, "elapsed": 0.0, "recent": []})

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the time spent and the owed place, as ``torch.load(weights_only=True)`` accepts them."""
        owed = None if self.owed is None else [self.owed.epoch, self.owed.step, str(self.owed.when)]
        return {**self.time.state(), "owed": owed}

    def matches(self, state: object) -> bool:
        """Return whether a state is the present one, apart from the time that has passed since it was saved."""
        own = {**self.state_dict(), "elapsed": None}
        return isinstance(state, Mapping) and {**state, "elapsed": None} == own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, also of earlier versions, which had no owed place.

        Raises:
            ValueError: if the state lacks an entry, or one has the wrong type.
        """
        try:
            if not isinstance(state, Mapping):
                raise OptionError("time", "a dictionary", state)
            owed = _place_from(state.get("owed"))
            self.time.restore(state)
        except OptionError as error:
            raise ValueError(
                f"the checkpoint's state of the measurement schedule cannot be used: {error}; resume from another "
                "checkpoint, or remove the callback's entry from the checkpoint's 'callbacks'"
            ) from error
        self.owed = owed


def _place_from(saved: Any) -> Place | None:
    if saved is None:
        return None
    if not isinstance(saved, (list, tuple)) or len(saved) != 3:
        raise OptionError("owed", "None or a list of epoch, step and kind of place", saved)
    epoch, step, when = saved
    check_choice("owed[2]", when, get_args(When))
    return Place(check_int("owed[0]", epoch, at_least=0), check_int("owed[1]", step, at_least=0), when)


# The places of a history are in order of time, apart from those of trainer.validate(). So the loops below end after the
# measurements at the same step, whatever the length of the history.


def _is_measured(place: Place, history: Sequence[Placed]) -> bool:
    for entry in reversed(history):
        if (entry.when, entry.epoch, entry.step) == (place.when, place.epoch, place.step):
            return True
        if entry.step < place.step and entry.when != "validate":
            return False
    return False


def _unmeasured(place: Place, history: Sequence[Placed]) -> Place | None:
    """Return the place; ``None`` if it was measured, because a resumed run passes the place of its checkpoint again."""
    return None if _is_measured(place, history) else place


def _last_epoch(history: Sequence[Placed]) -> int | None:
    return next((entry.epoch for entry in reversed(history) if entry.when == "epoch"), None)
