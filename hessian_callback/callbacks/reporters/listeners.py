"""The other callbacks of a run that listen to measurements."""

from __future__ import annotations

from hessian_callback.callbacks.reporters.base import Report, Reporter

__all__ = ["ListenerReporter"]


class ListenerReporter(Reporter):
    """Calls ``on_hessian_measured(trainer, pl_module, callback)`` of every callback that defines it."""

    def report(self, report: Report) -> None:
        """Call the listeners."""
        callbacks = report.trainer.callbacks  # type: ignore[attr-defined]
        for listener in callbacks:
            if hasattr(listener, "on_hessian_measured"):
                listener.on_hessian_measured(report.trainer, report.pl_module, report.callback)
