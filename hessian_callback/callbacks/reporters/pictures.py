"""Pictures of a measurement in the loggers that show pictures, and TensorBoard's layout of its curves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hessian_callback.callbacks.loggers import show_layout, show_picture, shows_pictures
from hessian_callback.callbacks.reporters.base import Report, Reporter
from hessian_callback.measurement.extras.subspace import Subspace, SubspaceState
from hessian_callback.measurement.state_guard import preserve_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayoutReporter", "PictureReporter", "edge_pictures", "spectrum_pictures"]


def spectrum_pictures(report: Report) -> Mapping[str, Figure]:
    """Draw the spectrum, and the density and the eigenspaces' overlaps if extras computed them."""
    from hessian_callback.plots.figures import pictures

    state: SubspaceState | None = report.states.get(Subspace.name)
    return pictures(report.history, None if state is None else state.spaces)


def edge_pictures(report: Report) -> Mapping[str, Figure]:
    """Draw how far the run is from instability."""
    from hessian_callback.plots.edge import edge_figure

    return {"stability": edge_figure(report.history)}


class PictureReporter(Reporter):
    """Draws pictures of measurements that have a result, with matplotlib.

    Args:
        draw: returns figures by the name under which they are logged.
    """

    def __init__(self, draw: Callable[[Report], Mapping[str, Figure]] = spectrum_pictures) -> None:
        self._draw = draw

    def report(self, report: Report) -> None:
        """Draw the pictures and pass them to the loggers."""
        trainer = report.trainer
        if not (report.measurement.has_result and trainer.loggers and importlib.util.find_spec("matplotlib")):
            return
        loggers = [logger for logger in trainer.loggers if shows_pictures(logger)] if trainer.is_global_zero else []

        def draw() -> None:
            if not loggers:
                return
            from hessian_callback.plots.figures import figure_image

            with preserve_random_state():
                images = {name: figure_image(figure) for name, figure in self._draw(report).items()}
            for logger in loggers:
                for name, image in images.items():
                    show_picture(logger, f"{report.prefix}/{name}", image, report.step)

        report.failures.run(
            draw, report.ranks, stage="drawing the pictures", consequence="a logger lacks this measurement's pictures"
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
