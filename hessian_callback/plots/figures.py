"""Figures of a measurement, and figures as images, for TensorBoard and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hessian_callback.measurement.measurement import Measurement
from hessian_callback.plots.density import density_figure
from hessian_callback.plots.overlap import overlap_figure
from hessian_callback.plots.spectrum import spectrum_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hessian_callback.algorithms.subspace_history import SubspaceHistory

__all__ = ["figure_image", "pictures"]


def pictures(history: Sequence[Measurement], spaces: SubspaceHistory | None = None) -> dict[str, Figure]:
    """Draw all figures for which the last measurement has data.

    Args:
        history: measurements in order of time.
        spaces: top eigenspaces of the run; drawn if they are several and the last is of the last measurement.

    Returns:
        Figures by the name under which they are logged: ``spectrum``, ``density`` and ``subspace_overlaps``.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if ``history`` is empty.

    Example:
        >>> failed = Measurement(epoch=0, step=0, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.1)
        >>> list(pictures([failed]))
        ['spectrum']
    """
    figures = {"spectrum": spectrum_figure(history)}
    if history[-1].density is not None:
        figures["density"] = density_figure(history)
    if spaces is not None and len(spaces) > 1 and spaces.last_step == history[-1].step:
        labels, axis = spaces.labels
        figures["subspace_overlaps"] = overlap_figure(spaces.overlaps, labels, dimension=spaces.dimension, axis=axis)
    return figures


def figure_image(figure: Figure) -> npt.NDArray[np.uint8]:
    """Render a figure to pixels.

    Args:
        figure: any matplotlib figure.

    Returns:
        ``(height, width, 3)``, RGB, for ``SummaryWriter.add_image(..., dataformats="HWC")``.

    Example:
        >>> failed = Measurement(epoch=0, step=0, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.1)
        >>> figure_image(spectrum_figure([failed])).shape
        (384, 512, 3)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A copy, because the canvas owns the buffer.
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
