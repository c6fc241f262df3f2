"""Figure of the eigenvalues over their rank, with the fitted power law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hessian_callback.measurement.measurement import Measurement
from hessian_callback.plots.style import (
    BLUE,
    SMALL,
    TEXT,
    VERMILLION,
    check_num_earlier,
    faded,
    label_axes,
    location,
    new_figure,
    spaced_indices,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hessian_callback.power_law.fit import PowerLawFit

__all__ = ["spectrum_figure"]


def spectrum_figure(history: Sequence[Measurement], *, num_earlier: int = 6) -> Figure:
    r"""Draw the last measurement's eigenvalues over their rank, with the fitted power law.

    Both axes are logarithmic, so :math:`\lambda_k = \lambda_1 k^{-s}` is a straight line. The line is that of the
    maximum-likelihood fit, :math:`\lambda_K (k/K)^{-\hat s}`, which passes through the cutoff by construction.
    Filled marks are fitted eigenvalues, hollow ones were left out. The band is the error bound of the eigenvalues.
    Grey curves are earlier measurements, which fade with age.

    Args:
        history: measurements in order of time, such as ``callback.history``.
        num_earlier: the largest number of earlier measurements to draw, spaced evenly over the run.

    Returns:
        A figure that no window shows and ``pyplot`` does not manage. Save it with ``figure.savefig``, or render it
        with `figure_image`.

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
        raise ValueError("history is empty; run trainer.fit or .validate first")
    check_num_earlier(num_earlier)
    figure, axes = new_figure()
    *earlier, current = history
    drawn = _draw_earlier(axes, [m for m in earlier if m.spectrum is not None], num_earlier)
    drawn += _draw_current(axes, current)
    _set_scales(axes, drawn)
    label_axes(axes, "rank k", r"eigenvalue $\lambda_k$", legend="lower left")
    axes.set_title(_title(current), fontsize=TEXT, loc="left")
    _write_reason(axes, current)
    return figure


@dataclass(frozen=True)
class _Curve:
    """Positive eigenvalues of one measurement, with their ranks among all computed ones; all are ``(n,)``."""

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


def _draw_earlier(axes: Axes, earlier: Sequence[Measurement], num_earlier: int) -> list[_Curve]:
    curves = [_Curve.of(earlier[index]) for index in spaced_indices(len(earlier), num_earlier)]
    for age, curve in enumerate(reversed(curves)):
        axes.plot(curve.ranks, curve.values, **faded(age))
    return curves


def _draw_current(axes: Axes, current: Measurement) -> list[_Curve]:
    if current.spectrum is None:
        return []
    curve = _Curve.of(current)
    ranks, values, bounds, fitted = curve.ranks, curve.values, curve.bounds, curve.fitted
    # A logarithmic axis has no zero, so a lower edge at or below zero is drawn below the frame.
    lower = np.where(values > bounds, values - bounds, np.finfo(np.float64).tiny)
    axes.fill_between(ranks, lower, values + bounds, color=BLUE, alpha=0.25, linewidth=0, zorder=2)
    marks: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5.5, "color": BLUE}
    if fitted.any():
        axes.plot(ranks[fitted], values[fitted], label="fitted", zorder=3, **marks)
    if not fitted.all():
        axes.plot(ranks[~fitted], values[~fitted], markerfacecolor="white", label="not fitted", zorder=3, **marks)
    if current.fit is not None:
        _draw_law(axes, current.fit)
    return [curve]


def _draw_law(axes: Axes, fit: PowerLawFit) -> None:
    # The ranks of the fit begin after the dropped outliers.
    first, last = fit.num_outliers_dropped, fit.num_eigenvalues
    along = np.geomspace(1, last, 200)
    law = fit.cutoff * (along / last) ** -fit.slope
    label = rf"$\lambda_k \propto k^{{-{fit.slope:.2f}}}$"
    axes.plot(along + first, law, color=VERMILLION, linewidth=2.8, zorder=4, label=label)
    axes.axvline(last + first, color=VERMILLION, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(
        f"K = {last}",
        (last + first, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-5, -6),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=SMALL,
        color=VERMILLION,
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
    # Set explicitly, so that the error band of an eigenvalue near zero does not stretch the axis.
    axes.set_ylim(values.min() / 1.6, values.max() * 1.6)
    if values.max() < 100 * values.min():
        # With decades only, the axis could have one number or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _write_reason(axes: Axes, current: Measurement) -> None:
    if current.reason is not None:
        axes.text(
            0.97,
            0.88,
            fill(shorten(f"{'not logged' if current.fit else 'no slope'}: {current.reason}", 170), 44),
            transform=axes.transAxes,
            ha="right",
            va="top",
            multialignment="left",
            fontsize=SMALL,
            zorder=5,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": VERMILLION, "alpha": 0.9},
        )


def _title(current: Measurement) -> str:
    place = location(current)
    if current.fit is None:
        return place
    fit = current.fit
    return f"{place}:  slope {fit.slope:.2f} ± {fit.slope_stderr:.2f},  fit error {fit.fit_error:.3f}"
