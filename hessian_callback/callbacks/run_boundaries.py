"""Where a run begins and ends, for callbacks that are used in several, and for the states of checkpoints.

Lightning loads the states of callbacks not only when a run resumes. ``trainer.validate(ckpt_path=...)`` and
``trainer.test(ckpt_path="best")`` load them as well, and LearningRateFinder and BatchSizeFinder load, within ``fit``,
what they have just saved. So a callback decides in ``setup``, before any of them, whether its measurements are of
another run. It takes states in ``fit`` only, and none that it already has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning_utilities.core.rank_zero import rank_zero_warn

from hessian_callback.callbacks.lightning_packages import LightningModule, Trainer
from hessian_callback.measurement.place import Placed

__all__ = ["CheckpointStates", "Timed", "UncountedSteps", "are_same", "has_trained"]

# A module that accumulates gradients by itself takes its first step later than after the first batch.
_MOST_BATCHES_BEFORE_A_STEP = 100


class Timed(Placed, Protocol):
    """A measurement of any kind."""

    @property
    def seconds(self) -> float:
        """Wall time that it took."""
        ...


def has_trained(trainer: Trainer) -> bool:
    """Return whether the trainer's run has had a batch; its steps are not always counted, see `UncountedSteps`."""
    return int(trainer.fit_loop.total_batch_idx) >= 0


def are_same(one: Sequence[Timed], other: Sequence[Timed]) -> bool:
    """Return whether two histories are copies of each other: no two measurements take the same time to the last bit."""
    return [_identity(entry) for entry in one] == [_identity(entry) for entry in other]


def _identity(entry: Timed) -> tuple[str, int, int, float]:
    return entry.when, entry.epoch, entry.step, entry.seconds


class CheckpointStates:
    """Tells which states of checkpoints a callback takes, and whether its run was begun earlier.

    Attributes:
        are_taken: whether a state that is loaded now is of the callback's run: in `fit`, and outside all stages, where
            a user loads it.
        resumed: whether the present run has a part that was trained before.

    Example:
        >>> states = CheckpointStates()
        >>> states.enter("validate")
        >>> states.are_taken
        False
    """

    def __init__(self) -> None:
        self.leave()

    def enter(self, stage: str) -> None:
        """Enter a stage of the trainer."""
        self.are_taken = stage == "fit"

    def leave(self) -> None:
        """Leave the stage."""
        self.are_taken, self.resumed = True, False

    def are_missing(self, checkpoint: Mapping[str, Any], state_key: str) -> bool:
        """Return whether a run resumes from a checkpoint without the callback's state, and none was loaded before."""
        return self.are_taken and not self.resumed and state_key not in checkpoint["callbacks"]


class UncountedSteps:
    """Warns once of steps that Lightning does not count: those of ``self.optimizers(use_pl_optimizer=False)``."""

    def __init__(self) -> None:
        self._warned = False

    def forget(self) -> None:
        """Forget the warning, so that another run gets it again."""
        self._warned = False

    def warn(self, trainer: Trainer, pl_module: LightningModule, *, at_end: bool = False) -> None:
        """Warn if no step was counted yet.

        Args:
            trainer: the trainer, after a batch.
            pl_module: its module.
            at_end: whether an epoch or the training ends here, so that there should have been a step.
        """
        batches = int(trainer.fit_loop.total_batch_idx) + 1
        enough = batches > 0 if at_end else batches >= _MOST_BATCHES_BEFORE_A_STEP
        if self._warned or trainer.global_step > 0 or pl_module.automatic_optimization or not enough:
            return
        self._warned = True
        rank_zero_warn(
            f"trainer.global_step is still 0 after {batches} batches, because Lightning does not count the steps of "
            "raw optimizers: no measurement by steps will be due, and all others get step 0. Take the optimizers from "
            "self.optimizers(), without use_pl_optimizer=False"
        )
