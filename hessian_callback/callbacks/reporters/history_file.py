"""The history as a file beside the loggers' files."""

from __future__ import annotations

from typing import Any

from hessian_callback.callbacks.lightning_packages import is_a
from hessian_callback.callbacks.reporters.base import Report, Reporter
from hessian_callback.measurement.history import FILE_NAME, HistoryWriter

__all__ = ["HistoryFileReporter"]


class HistoryFileReporter(Reporter):
    """Appends measurements to ``hessian_history.jsonl`` in the folders of TensorBoardLogger and CSVLogger.

    Args:
        prefix: the callback's prefix.
    """

    def __init__(self, prefix: str) -> None:
        self._writer = HistoryWriter(prefix)

    def report(self, report: Report) -> None:
        """Append the measurement."""
        trainer = report.trainer
        loggers: list[Any] = [logger for logger in trainer.loggers if is_a(logger, "TensorBoardLogger", "CSVLogger")]
        if not loggers:
            return

        def write() -> None:
            if trainer.is_global_zero:
                for logger in loggers:
                    _ = logger.experiment  # A CSVLogger warns of a folder that is not empty when it begins.
                folders = [logger.log_dir for logger in loggers if "://" not in logger.log_dir]
                self._writer.write(folders, report.history)

        report.failures.run(
            write, report.ranks, stage="writing the history", consequence=f"{FILE_NAME} lacks a measurement for now"
        )
