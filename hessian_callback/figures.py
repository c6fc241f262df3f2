"""Pictures of a spectrum, for TensorBoard and for reports.

matplotlib is imported when a picture is drawn, never before, and its global state is left alone: figures
are made without ``pyplot``, so that nothing here changes a user's backend, style or open figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hessian_callback.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hessian_callback.power_law import PowerLawFit

__all__ = ["figure_image", "spectrum_figure"]

# Okabe and Ito's palette, told apart under every common form of colour blindness.
_BLUE, _VERMILLION, _GREY = "#0072B2", "#D55E00", "#767676"

# TensorBoard shows a card at about half of this size, so the text is large for the figure.
_STYLE = {"figsize": (6.4, 4.8), "dpi": 80}
_TEXT, _SMALL = 15, 12.5


def spectrum_figure(history: Sequence[Measurement], *, num_earlier: int = 6) -> Figure:
    r"""Draw the last measurement's eigenvalues over their rank, with the fitted power law.

    Both axes are logarithmic, so that :math:`\lambda_k = \lambda_1 k^{-s}` is a straight line. The line
    drawn is the maximum-likelihood one, :math:`\lambda_K (k/K)^{-\hat s}`, which passes through the cutoff
    by construction. Filled marks are eigenvalues that the fit used, hollow ones were left out, the band
    is the eigenvalues' error bound, and the grey curves are earlier measurements, fading with their age.

    Args:
        history: measurements in order of time, such as ``callback.history``.
        num_earlier: at most so many earlier measurements are drawn, spaced evenly over the run.

    Returns:
        A figure that no window shows and ``pyplot`` does not know. Save it with ``figure.savefig``, or
        turn it into pixels with `figure_image`.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if ``history`` is empty or ``num_earlier`` negative.

    Example:
        >>> failed = Measurement(epoch=0, step=0, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.1)
        >>> figure = spectrum_figure([failed])
        >>> figure.axes[0].get_xlabel()
        'rank k'
    """
    if not history:
        raise ValueError("history is empty, so there is nothing to draw; run trainer.fit or .validate first")
    if num_earlier < 0:
        raise ValueError(f"num_earlier is {num_earlier}; give how many earlier measurements to draw, or 0")
    figure, axes = _new_figure()
    *earlier, current = history
    drawn = _draw_earlier(axes, [m for m in earlier if m.spectrum is not None], num_earlier)
    drawn += _draw_current(axes, current)
    _set_scales(axes, drawn)
    _write(axes, current)
    return figure


def figure_image(figure: Figure) -> npt.NDArray[np.uint8]:
    """Render a figure to pixels.

    Args:
        figure: any matplotlib figure.

    Returns:
        ``(height, width, 3)``, RGB, as ``SummaryWriter.add_image(..., dataformats="HWC")`` takes it.

    Example:
        >>> failed = Measurement(epoch=0, step=0, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.1)
        >>> figure_image(spectrum_figure([failed])).shape
        (384, 512, 3)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Copied, because the buffer belongs to the canvas.
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


@dataclass(frozen=True)
class _Curve:
    """The positive eigenvalues of one measurement, each with its rank among all that were computed."""

    ranks: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    bounds: npt.NDArray[np.float64]
    fitted: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, measurement: Measurement) -> _Curve:
        spectrum, fit = measurement.spectrum, measurement.fit
        assert spectrum is not None
        values = spectrum.eigenvalues.numpy()
        ranks = np.arange(1, len(values) + 1)
        fitted = np.zeros(len(values), dtype=bool)
        if fit is not None:
            fitted[fit.num_outliers_dropped :][: fit.num_eigenvalues] = True
        positive = values > 0
        return cls(ranks[positive], values[positive], spectrum.error_bounds.numpy()[positive], fitted[positive])


def _new_figure() -> tuple[Figure, Axes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "spectrum figures need matplotlib, which is not installed: pip install 'hessian-callback[demo]'"
        ) from error
    figure = Figure(layout="constrained", **_STYLE)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _draw_earlier(axes: Axes, earlier: Sequence[Measurement], num_earlier: int) -> list[_Curve]:
    if not earlier or not num_earlier:
        return []
    # The newest is always among them, and the first as soon as two are.
    chosen = np.unique(np.linspace(len(earlier) - 1, 0, min(num_earlier, len(earlier))).round().astype(int))
    curves = [_Curve.of(earlier[index]) for index in chosen]
    for age, curve in enumerate(reversed(curves)):
        axes.plot(
            curve.ranks,
            curve.values,
            color=_GREY,
            linewidth=1.6,
            alpha=0.8 * 0.72**age,
            zorder=1,
            label="earlier" if age == 0 else None,
        )
    return curves


def _draw_current(axes: Axes, current: Measurement) -> list[_Curve]:
    if current.spectrum is None:
        return []
    curve = _Curve.of(current)
    ranks, values, bounds, fitted = curve.ranks, curve.values, curve.bounds, curve.fitted
    # A lower edge at or below zero has no place on a logarithmic axis, so it leaves through the frame.
    lower = np.where(values > bounds, values - bounds, np.finfo(np.float64).tiny)
    axes.fill_between(ranks, lower, values + bounds, color=_BLUE, alpha=0.25, linewidth=0, zorder=2)
    marks: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5.5, "color": _BLUE}
    if fitted.any():
        axes.plot(ranks[fitted], values[fitted], label="fitted", zorder=3, **marks)
    if not fitted.all():
        axes.plot(ranks[~fitted], values[~fitted], markerfacecolor="white", label="not fitted", zorder=3, **marks)
    if current.fit is not None:
        _draw_law(axes, current.fit)
    return [curve]


def _draw_law(axes: Axes, fit: PowerLawFit) -> None:
    # With outliers dropped, the ranks of the fit begin behind them.
    first, last = fit.num_outliers_dropped, fit.num_eigenvalues
    along = np.geomspace(1, last, 200)
    law = fit.cutoff * (along / last) ** -fit.slope
    label = rf"$\lambda_k \propto k^{{-{fit.slope:.2f}}}$"
    axes.plot(along + first, law, color=_VERMILLION, linewidth=2.8, zorder=4, label=label)
    axes.axvline(last + first, color=_VERMILLION, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(
        f"K = {last}",
        (last + first, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-5, -6),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=_SMALL,
        color=_VERMILLION,
    )


def _set_scales(axes: Axes, curves: Sequence[_Curve]) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    last = max([10.0, *(float(c.ranks[-1]) for c in curves if c.ranks.size)])
    axes.set_xlim(0.9, last * 1.12)
    ticks = [step * 10**decade for decade in range(7) for step in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    values = np.concatenate([np.empty(0), *(c.values for c in curves)])
    if not values.size:
        return
    # Set by hand: the error band of an eigenvalue near zero must not stretch the axis.
    axes.set_ylim(values.min() / 1.6, values.max() * 1.6)
    if values.max() < 100 * values.min():
        # Decades alone would leave an axis with one number on it, or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _write(axes: Axes, current: Measurement) -> None:
    axes.set_xlabel("rank k", fontsize=_TEXT)
    axes.set_ylabel(r"eigenvalue $\lambda_k$", fontsize=_TEXT)
    axes.tick_params(labelsize=_SMALL)
    axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(_title(current), fontsize=_TEXT, loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", fontsize=_SMALL, framealpha=0.85, edgecolor="none")
    if current.reason is not None:
        axes.text(
            0.97,
            0.88,
            fill(shorten(f"{'not logged' if current.fit else 'no slope'}: {current.reason}", 170), 44),
            transform=axes.transAxes,
            ha="right",
            va="top",
            multialignment="left",
            fontsize=_SMALL,
            zorder=5,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": _VERMILLION, "alpha": 0.9},
        )


def _title(current: Measurement) -> str:
    place = {
        "fit_start": "before training" if current.step == 0 else f"resumed at step {current.step}",
        "epoch": f"epoch {current.epoch}",
        "step": f"step {current.step}",
        "fit_end": "end of training",
        "validate": "validation",
    }[current.when]
    if current.fit is None:
        return place
    fit = current.fit
    return f"{place}:  slope {fit.slope:.2f} ± {fit.slope_stderr:.2f},  fit error {fit.fit_error:.3f}"
