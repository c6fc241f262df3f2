"""Where a run begins and ends, for callbacks that are used in several, and for the states of checkpoints.

Lightning loads the states of callbacks not only when a run resumes. ``trainer.validate(ckpt_path=...)`` and
``trainer.test(ckpt_path="best")`` load them as well, and LearningRateFinder and BatchSizeFinder load, within ``fit``,
what they have just saved. So a callback decides in ``setup``, before any of them, whether its measurements are of
another run. It takes states in ``fit`` only, and none that it already has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hessian_callback.callbacks.lightning_packages import Trainer
from hessian_callback.measurement.place import Placed

__all__ = ["Timed", "are_same", "has_trained"]


class Timed(Placed, Protocol):
    """A measurement of any kind."""

    @property
    def seconds(self) -> float:
        """Wall time that it took."""
        ...


def has_trained(trainer: Trainer) -> bool:
    """Return whether the trainer's run has had a batch; the steps of raw optimizers are not counted."""
    return int(trainer.fit_loop.total_batch_idx) >= 0


def are_same(one: Sequence[Timed], other: Sequence[Timed]) -> bool:
    """Return whether two histories are copies of each other: no two measurements take the same time to the last bit."""
    return [_identity(entry) for entry in one] == [_identity(entry) for entry in other]


def _identity(entry: Timed) -> tuple[str, int, int, float]:
    return entry.when, entry.epoch, entry.step, entry.seconds
