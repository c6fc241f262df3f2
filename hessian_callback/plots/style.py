"""Style and parts that the figures share.

matplotlib is imported when a figure is drawn, not before. Figures are made without ``pyplot``, so a user's backend,
style and open figures do not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hessian_callback.measurement.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREY",
    "SMALL",
    "TEXT",
    "VERMILLION",
    "check_num_earlier",
    "faded",
    "label_axes",
    "location",
    "new_figure",
    "spaced_indices",
]

# The palette of Okabe and Ito, whose colours differ under every common form of colour blindness.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#767676"

# TensorBoard shows a card at about half of this size, so the text is large for the figure.
_STYLE = {"figsize": (6.4, 4.8), "dpi": 80}
TEXT, SMALL = 15, 12.5


def new_figure() -> tuple[Figure, Axes]:
    """Return an empty figure with axes, which no window shows and ``pyplot`` does not manage.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed: pip install 'hessian-callback[demo]'"
        ) from error
    figure = Figure(layout="constrained", **_STYLE)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def faded(age: int) -> dict[str, Any]:
    """Return line options of an earlier measurement; ``age`` is 0 for the latest of them.

    Example:
        >>> faded(0)["alpha"], faded(1)["label"]
        (0.8, None)
    """
    label = "earlier" if age == 0 else None
    return {"color": GREY, "linewidth": 1.6, "alpha": 0.8 * 0.72**age, "zorder": 1, "label": label}


def spaced_indices(total: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced indices below ``total``, the last included.

    Example:
        >>> spaced_indices(10, 4)
        [0, 3, 6, 9]
    """
    if not total or not most:
        return []
    return [int(index) for index in np.unique(np.linspace(total - 1, 0, min(most, total)).round())]


def check_num_earlier(num_earlier: int) -> None:
    """Raise a ValueError if ``num_earlier`` is negative."""
    if num_earlier < 0:
        raise ValueError(f"num_earlier is {num_earlier}; give how many earlier measurements to draw, or 0")


def label_axes(axes: Axes, across: str, upwards: str, *, legend: Literal["lower left", "upper right"]) -> None:
    """Write the labels of both axes, the grid and the legend, if there is one."""
    axes.set_xlabel(across, fontsize=TEXT)
    axes.set_ylabel(upwards, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, fontsize=SMALL, framealpha=0.85, edgecolor="none")


def location(current: Measurement) -> str:
    """Return where in the run a measurement was made, for titles."""
    return {
        "fit_start": "before training" if current.step == 0 else f"resumed at step {current.step}",
        "epoch": f"epoch {current.epoch}",
        "step": f"step {current.step}",
        "fit_end": "end of training",
        "validate": "validation",
    }[current.when]
