"""Draw how far a run is from instability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hessian_callback.measurement.edge import EdgeMeasurement
from hessian_callback.plots.style import BLUE, GREY, SMALL, TEXT, VERMILLION, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["edge_figure"]


def edge_figure(history: Sequence[EdgeMeasurement]) -> Figure:
    """Draw ratio, learning rate and loss over the steps, one above the other, with a line at the ratio of 1.

    Args:
        history: measurements in order of time; failed ones are left out.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if no measurement has a ratio.

    Example:
        >>> measured = [EdgeMeasurement(epoch=0, step=step, when="step", ratio=0.5, ratio_error=0.01, lr=0.1, loss=1.0)
        ...             for step in (50, 100)]
        >>> [axes.get_ylabel() for axes in edge_figure(measured).axes]
        ['ratio', 'lr', 'loss']
    """
    shown = [entry for entry in history if entry.ratio is not None]
    if not shown:
        raise ValueError("no measurement has a ratio to draw; wait for one that succeeds")
    figure, single = new_figure()
    single.remove()
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    steps = [entry.step for entry in shown]
    ratios = [entry.ratio or 0.0 for entry in shown]
    errors = [entry.ratio_error or 0.0 for entry in shown]
    low, high = zip(*((r - e, r + e) for r, e in zip(ratios, errors, strict=True)), strict=True)
    top.plot(steps, ratios, color=BLUE, marker="o", markersize=4)
    top.fill_between(steps, low, high, color=BLUE, alpha=0.25, linewidth=0)
    top.axhline(1.0, color=VERMILLION, linewidth=1.6, linestyle=(0, (4, 3)))
    if min(ratios) > 0 and max(ratios) > 20 * min(ratios):
        top.set_yscale("log")
    last = shown[-1]
    top.set_title(f"step {last.step}: {last.ratio:.3g} of the edge of stability", fontsize=TEXT)
    _line(middle, steps, [entry.lr for entry in shown], GREY, step=True)
    _line(bottom, steps, [entry.loss for entry in shown], GREY)
    for axes, name in ((top, "ratio"), (middle, "lr"), (bottom, "loss")):
        axes.set_ylabel(name, fontsize=TEXT)
        axes.tick_params(labelsize=SMALL)
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    bottom.set_xlabel("optimizer steps", fontsize=TEXT)
    figure.align_ylabels()
    return figure


def _line(axes: Any, steps: Sequence[int], values: Sequence[float | None], colour: str, *, step: bool = False) -> None:
    points = [(at, value) for at, value in zip(steps, values, strict=True) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker=".", drawstyle="steps-post" if step else "default")
