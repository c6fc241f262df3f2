"""Pictures of a measurement in the loggers that show pictures, and TensorBoard's layout of its curves."""

from __future__ import annotations

import importlib.util

from hessian_callback.callbacks.loggers import show_layout, show_picture, shows_pictures
from hessian_callback.callbacks.reporters.base import Report, Reporter
from hessian_callback.measurement.extras.subspace import Subspace, SubspaceState
from hessian_callback.measurement.state_guard import preserve_random_state

__all__ = ["LayoutReporter", "PictureReporter"]


class PictureReporter(Reporter):
    """Draws the spectrum, and the density and the eigenspaces' overlaps if extras computed them, with matplotlib."""

    def report(self, report: Report) -> None:
        """Draw the pictures and pass them to the loggers."""
        trainer = report.trainer
        if not (report.measurement.spectrum and trainer.loggers and importlib.util.find_spec("matplotlib")):
            return
        loggers = [logger for logger in trainer.loggers if shows_pictures(logger)] if trainer.is_global_zero else []

        def draw() -> None:
            if not loggers:
                return
            from hessian_callback.plots.figures import figure_image, pictures

            state: SubspaceState | None = report.states.get(Subspace.name)
            spaces = None if state is None else state.spaces
            with preserve_random_state():
                images = {name: figure_image(figure) for name, figure in pictures(report.history, spaces).items()}
            for logger in loggers:
                for name, image in images.items():
                    show_picture(logger, f"{report.prefix}/{name}", image, report.step)

        report.failures.run(
            draw, report.ranks, stage="drawing the spectrum", consequence="a logger lacks this measurement's pictures"
        )


class LayoutReporter(Reporter):
    """Groups the curves of all measuring callbacks under TensorBoard's "Custom Scalars", again when there are new ones.

    Attributes:
        names: the names that this callback has logged.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._shown: dict[str, frozenset[str]] = {}

    def report(self, report: Report) -> None:
        """Write the layout if it changed."""
        self.names |= report.values.keys()
        callbacks = report.trainer.callbacks  # type: ignore[attr-defined]
        curves = {
            callback.prefix: frozenset(reporter.names)
            for callback in callbacks
            for reporter in getattr(callback, "reporters", ())
            if isinstance(reporter, LayoutReporter)
        }
        if curves == self._shown:
            return
        self._shown = curves

        def write() -> None:
            if report.trainer.is_global_zero:
                show_layout(report.trainer.loggers, curves)

        report.failures.run(
            write, report.ranks, stage="laying out the curves", consequence="TensorBoard shows the curves ungrouped"
        )

    def forget(self) -> None:
        """Write the layout again in the next run."""
        self._shown = {}
