"""When to measure: by epochs or by optimizer steps, and no more often than a share of the time allows."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Cadence", "TimeShare"]

# Durations whose median the next one is expected to have: one that was held up must not decide alone.
_RECENT = 5


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
    def checked(
        cls,
        every_n_epochs: int,
        every_n_train_steps: int | None,
        at_steps: Iterable[int] | None,
        *,
        may_be_empty: bool = False,
    ) -> Cadence:
        """Make one of a user's options; with ``may_be_empty``, ``at_steps`` may name none.

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
            if not (at_steps or may_be_empty) or min(at_steps, default=0) < 0:
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
    r"""Keeps a callback's share of the wall time in bounds.

    A measurement is allowed where one of the expected duration :math:`p`, the median of the last five, would leave
    the share within the limit :math:`f`: :math:`s + p \le f (t + p)`, with :math:`s` of :math:`t` seconds spent.

    What is guaranteed: after an allowed measurement of duration d, :math:`s \le f t + (1 - f) \max(0, d - p)`, so
    the share exceeds the limit only by what that one took longer than expected; and where one is refused,
    :math:`s > f t - (1 - f) p`, so less than one measurement is unused. Measurements made without asking (the
    first and the last of a run) count like any other, and those after them wait until they are paid for. So once
    ten or more measurements were wanted more often than allowed, the share is within a tenth of the limit,
    except right after one that took far longer than those before.

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
        self._recent: deque[float] = deque(maxlen=_RECENT)

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
        self._recent.append(seconds)

    @property
    def expected(self) -> float:
        """Seconds that the next measurement is expected to take: the median of the last; 0 before the first."""
        return statistics.median(self._recent) if self._recent else 0.0

    def allows_another(self) -> bool:
        """Whether a measurement of the expected duration would leave the share within the limit."""
        if self.limit is None:
            return True
        return self.spent + self.expected <= self.limit * (self.elapsed + self.expected)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"spent": self.spent, "elapsed": self.elapsed, "recent": list(self._recent)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, also of the release that noted the last duration only; `start` starts the clock."""
        self.spent, self._earlier = state["spent"], state["elapsed"]
        self._recent = deque(state["recent"] if "recent" in state else [state["last"]], maxlen=_RECENT)
        self._started = None
