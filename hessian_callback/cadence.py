"""When to measure: by epochs or by optimizer steps, and no more often than a share of the time allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Cadence", "TimeShare"]


@dataclass(frozen=True)
class Cadence:
    """The points of a run at which a measurement is due.

    Either step option switches the epochs off. Without ``at_steps`` the point before the first step is
    one of them, with it only if it holds 0.

    Attributes:
        every_n_epochs: measure the first epoch's end, and then each that is so many epochs later.
        every_n_train_steps: measure after each so many optimizer steps.
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
    def checked(cls, every_n_epochs: int, every_n_train_steps: int | None, at_steps: Iterable[int] | None) -> Cadence:
        """Make one of a user's options.

        Raises:
            ValueError: if an option is out of range, or both step options are given.
        """
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        if every_n_train_steps is not None and at_steps is not None:
            raise ValueError("give every_n_train_steps or at_steps, not both")
        if at_steps is not None:
            at_steps = tuple(sorted({int(step) for step in at_steps}))
            if not at_steps or at_steps[0] < 0:
                raise ValueError(
                    f"at_steps must name at least one number of optimizer steps, from 0; got {list(at_steps)}"
                )
        return cls(every_n_epochs, every_n_train_steps, at_steps)

    @property
    def by_epochs(self) -> bool:
        """Whether ends of epochs count, not steps."""
        return self.every_n_train_steps is None and self.at_steps is None

    @property
    def at_start(self) -> bool:
        """Whether to measure before the first optimizer step."""
        return self.at_steps is None or 0 in self.at_steps

    def at_step(self, before: int, now: int) -> bool:
        """Whether a point lies in ``before < step <= now``; one batch may take several optimizer steps."""
        if self.every_n_train_steps is not None:
            return now // self.every_n_train_steps > before // self.every_n_train_steps
        return self.at_steps is not None and any(before < step <= now for step in self.at_steps)

    def at_epoch(self, epoch: int, last: int | None) -> bool:
        """Whether an epoch's end is due, given the epoch of the last measurement of this kind.

        An epoch with several validations is measured at each of them: whoever monitors the slope looks
        after every validation, and would take an old value for a lack of progress.
        """
        return self.by_epochs and (last is None or epoch == last or epoch - last >= self.every_n_epochs)


class TimeShare:
    """Keeps a callback's share of the wall time in bounds.

    Args:
        limit: largest share, between 0 and 1; ``None`` for no limit.
        clock: seconds that never run backwards.

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
        if limit is not None and not 0 < limit <= 1:
            raise ValueError(f"max_overhead must lie between 0 and 1, a share of the wall time; got {limit}")
        self.limit = limit
        self.spent = 0.0
        self._clock = clock
        self._earlier = 0.0
        self._started: float | None = None
        self._last = 0.0

    def start(self) -> None:
        """Start the clock, or start it again after a resume."""
        self._earlier = self.elapsed
        self._started = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds of training, measurements included, over all the parts of an interrupted run."""
        return self._earlier + (0.0 if self._started is None else self._clock() - self._started)

    @property
    def fraction(self) -> float:
        """Share of the time so far that measurements took."""
        elapsed = self.elapsed
        return self.spent / elapsed if elapsed > 0 else 0.0

    def add(self, seconds: float) -> None:
        """Note what a measurement took."""
        self.spent += seconds
        self._last = seconds

    def allows_another(self) -> bool:
        """Whether a measurement as long as the last one would leave the share within the limit."""
        if self.limit is None:
            return True
        return self.spent + self._last <= self.limit * (self.elapsed + self._last)

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"spent": self.spent, "elapsed": self.elapsed, "last": self._last}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a saved state; `start` starts the clock."""
        self.spent, self._earlier, self._last = state["spent"], state["elapsed"], state["last"]
        self._started = None
