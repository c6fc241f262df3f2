"""The interface of a reporter, and the values that it gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessian_callback.callbacks.lightning_packages import CallbackBase, LightningModule, Trainer
from hessian_callback.callbacks.live_prediction import LivePrediction
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.failure_policy import FailurePolicy

__all__ = ["Report", "Reporter"]


@dataclass(frozen=True)
class Report:
    """A new measurement of a run.

    Attributes:
        trainer: the trainer.
        pl_module: its module.
        callback: the callback that measured.
        prefix: its prefix.
        history: its measurements, the new one last: each a `Measurement`, or an `EdgeMeasurement`.
        values: the numbers to log, by name without the prefix.
        step: the step under which loggers show the values.
        can_log: whether the hook is one in which ``self.log`` stands for this measurement.
        prediction: the prediction of the run's loss, if there is one.
        states: the extras' states after the measurement, by name.
        ranks: the processes of the run.
        failures: what happens if a report fails.
    """

    trainer: Trainer
    pl_module: LightningModule
    callback: CallbackBase
    prefix: str
    history: Sequence[Any]
    values: Mapping[str, float]
    step: int
    can_log: bool
    prediction: LivePrediction | None
    states: Mapping[str, Any]
    ranks: Ranks
    failures: FailurePolicy

    @property
    def measurement(self) -> Any:
        """The new measurement."""
        return self.history[-1]


class Reporter(ABC):
    """Passes measurements on. All ranks call it, in the same order."""

    @abstractmethod
    def report(self, report: Report) -> None:
        """Pass a measurement on."""

    def forget(self) -> None:  # noqa: B027
        """Release everything that belongs to a run that has ended."""
