"""The prediction of a run's loss, and the losses that it is made from."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_utilities.core.rank_zero import rank_zero_warn

from hessian_callback.callbacks.lightning_packages import Trainer
from hessian_callback.callbacks.live_prediction import HELD_OUT, LivePrediction
from hessian_callback.callbacks.run_losses import losses_of
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.failure_policy import FailurePolicy
from hessian_callback.measurement.measurement import Measurement

__all__ = ["RunPrediction"]


class RunPrediction:
    """Follows the history of a run and predicts its next loss; without a loss to predict it does nothing.

    Args:
        predict: ``"held_out"``, the name of a logged metric, or ``None``; see `PowerLawHessianCallback`.
        train_loss: the name of the logged training loss.
        on_training_data: whether the Hessian's samples are training samples.

    Attributes:
        live: the prediction; ``None`` if nothing is predicted.
        predict: the loss that is predicted; ``None`` if none is.
    """

    def __init__(self, predict: str | None, train_loss: str | None, *, on_training_data: bool) -> None:
        # The loss on training samples is no prediction of validation.
        self.predict = None if on_training_data and predict == HELD_OUT else predict
        self.train_loss = train_loss
        self.live = None if self.predict is None else LivePrediction(self.predict, on_training_data=on_training_data)
        self._warned = False

    def losses(
        self, trainer: Trainer, ranks: Ranks, failures: FailurePolicy, *, validated: bool
    ) -> tuple[float | None, float | None]:
        """Read the run's own losses; a collective.

        Args:
            trainer: the trainer, in a hook.
            ranks: its processes.
            failures: what happens if a metric cannot be read.
            validated: whether the last validation was of the present weights.

        Returns:
            Validation loss and training loss, each ``None`` if it is not known.
        """
        if self.live is None:
            return None, None
        fresh = self.predict != HELD_OUT and validated
        read = failures.run(
            lambda: losses_of(trainer, [self.predict if fresh else None, self.train_loss], ranks),
            ranks,
            stage="reading the run's losses",
            consequence="nothing is predicted from this measurement",
        )
        if read.value is None:
            return None, None
        val_loss, train_loss = read.value
        if fresh and val_loss is None and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"predict={self.predict!r}, but no finite metric of that name is logged in validation, so nothing can "
                f"be predicted; log it in validation_step, or use predict={HELD_OUT!r}"
            )
        return val_loss, train_loss

    def follow(self, history: Sequence[Measurement], ranks: Ranks, failures: FailurePolicy) -> None:
        """Add the new measurements of a history; if that fails, nothing is predicted any more. A collective."""
        live = self.live
        if live is None:
            return
        followed = failures.run(
            lambda: live.follow(history),
            ranks,
            stage="predicting the next loss",
            consequence="the next loss is not predicted",
        )
        if followed.reason is not None:
            self.live = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged with the newest measurement, see `LivePrediction.scalars`."""
        return {} if self.live is None else self.live.scalars()
