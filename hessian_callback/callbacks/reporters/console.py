"""A line for each measurement."""

from __future__ import annotations

from hessian_callback.callbacks.progress import announce
from hessian_callback.callbacks.reporters.base import Report, Reporter

__all__ = ["ConsoleReporter"]


class ConsoleReporter(Reporter):
    """Prints the measurement and the expected next loss."""

    def report(self, report: Report) -> None:
        """Print one line."""
        expected = "" if report.prediction is None else report.prediction.expectation()
        announce(report.trainer, f"{report.prefix}: {report.measurement.summary()}{expected}")
