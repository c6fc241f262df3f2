"""Pictures of spectra, densities and eigenspaces, for TensorBoard and for reports.

matplotlib is imported when a picture is drawn, never before, and its global state is left alone: figures
are made without ``pyplot``, so that nothing here changes a user's backend, style or open figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hessian_callback.measurement.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hessian_callback.algorithms.density import SpectralDensity
    from hessian_callback.algorithms.subspace_history import SubspaceHistory
    from hessian_callback.power_law.fit import PowerLawFit

__all__ = ["density_figure", "figure_image", "overlap_figure", "pictures", "spectrum_figure"]

# Okabe and Ito's palette, told apart under every common form of colour blindness.
_BLUE, _VERMILLION, _GREY = "#0072B2", "#D55E00", "#767676"

# TensorBoard shows a card at about half of this size, so the text is large for the figure.
_STYLE = {"figsize": (6.4, 4.8), "dpi": 80}
_TEXT, _SMALL = 15, 12.5

# Share of the range of eigenvalues that a node of the quadrature is spread over.
_SPREAD = 0.01
# A heat map with more numbers on an axis is not legible in a card.
_MOST_LABELS = 8


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
    _check_num_earlier(num_earlier)
    figure, axes = _new_figure()
    *earlier, current = history
    drawn = _draw_earlier(axes, [m for m in earlier if m.spectrum is not None], num_earlier)
    drawn += _draw_current(axes, current)
    _set_scales(axes, drawn)
    _write(axes, "rank k", r"eigenvalue $\lambda_k$", legend="lower left")
    axes.set_title(_title(current), fontsize=_TEXT, loc="left")
    _write_reason(axes, current)
    return figure


def density_figure(history: Sequence[Measurement], *, num_earlier: int = 3) -> Figure:
    r"""Draw the last measurement's density of all eigenvalues, the negative ones included.

    With nodes :math:`\theta_{lj}` and weights :math:`w_{lj}` of n random vectors, what is drawn over x is

    .. math:: N(x) = \frac{P}{n} \sum_{l=1}^n \sum_j w_{lj}\, e^{-(x - \theta_{lj})^2 / 2\sigma^2},

    in which an eigenvalue that stands alone makes a peak of height 1, up to the scatter of the random vectors. The
    width :math:`\sigma` is a hundredth of the range of the nodes. The vertical axis is logarithmic from below one
    eigenvalue on, the band is the smallest and the largest of the n curves, and the grey curves are earlier
    measurements, fading with their age.

    Args:
        history: measurements in order of time, of which the last has a ``density``.
        num_earlier: at most so many earlier measurements are drawn, spaced evenly over the run.

    Returns:
        A figure that no window shows and ``pyplot`` does not know.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if the last measurement has no density, or ``num_earlier`` is negative.

    Source:
        The curve is that of Ghorbani, Krishnan and Xiao (2019), counted in eigenvalues instead of normalised.

    Example:
        >>> import torch
        >>> from hessian_callback.algorithms.density import SpectralDensity
        >>> density = SpectralDensity(nodes=torch.tensor([[3.0, 0.0]] * 2).double(),
        ...                           weights=torch.tensor([[0.25, 0.75]] * 2).double(),
        ...                           size=4, rounding=0.0, num_matvecs=4)
        >>> measured = Measurement(epoch=0, step=0, when="epoch", spectrum=None, fit=None, reason="no fit",
        ...                        seconds=0.1, density=density)
        >>> axes = density_figure([measured]).axes[0]
        >>> round(float(axes.lines[0].get_ydata().max()), 4)
        3.0
    """
    if not history or history[-1].density is None:
        raise ValueError("the last measurement has no density to draw; ask for it with extras=['density']")
    _check_num_earlier(num_earlier)
    figure, axes = _new_figure()
    *earlier, current = history
    density = current.density
    assert density is not None
    before = [m.density for m in earlier if m.density is not None]
    chosen = [before[index] for index in _spaced(len(before), num_earlier)]
    low, high = _reach([density, *chosen])
    width = _SPREAD * (high - low)
    # Ten points on a standard deviation: nodes between two of them would be cut off otherwise.
    along = np.linspace(low - 5 * width, high + 5 * width, 1101)
    tops = []
    for age, old in enumerate(reversed(chosen)):
        counts = _counts(old, along, width).mean(0)
        tops.append(counts.max())
        axes.plot(along, counts, **_faded(age))
    counts = _counts(density, along, width)
    mean = counts.mean(0)
    axes.fill_between(along, counts.min(0), counts.max(0), color=_BLUE, alpha=0.25, linewidth=0, zorder=2)
    positive = along >= 0
    axes.plot(along, mean, color=_BLUE, linewidth=2.2, zorder=3, label="positive")
    # Told apart by the line at zero too, for who does not see colours.
    if not positive.all():
        axes.plot(along[~positive], mean[~positive], color=_VERMILLION, linewidth=2.6, zorder=4, label="negative")
    axes.axvline(0, color="black", linewidth=1.0, zorder=2)
    axes.set_yscale("log")
    axes.set_ylim(0.1, 2 * max(10.0, counts.max(), *tops))
    axes.set_xlim(along[0], along[-1])
    _write(axes, rf"eigenvalue, spread over $\sigma$ = {width:.1g}", "number of eigenvalues", legend="upper right")
    axes.set_title(f"{_place(current)}:  {_negative_mass(density)}", fontsize=_TEXT, loc="left")
    return figure


def overlap_figure(overlaps: Tensor, labels: Sequence[str], *, dimension: int, axis: str = "epoch") -> Figure:
    r"""Draw how much the top eigenspaces of a run's measurements have in common, each with each.

    Args:
        overlaps: :math:`\|U_i^T U_j\|_F^2 / k`, ``(n, n)``, between 0 and 1; see `SubspaceHistory`.
        labels: a name for each measurement, n of them.
        dimension: k.
        axis: what the labels count.

    Returns:
        A figure that no window shows and ``pyplot`` does not know. The colours go from dark (nothing in common) to
        light (the same space), in steps that are even for the colour-blind too.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if ``overlaps`` is not square, or not one label is given for each row.

    Example:
        >>> import torch
        >>> figure = overlap_figure(torch.eye(2), ["start", "0"], dimension=10)
        >>> figure.axes[0].get_title(loc="left")
        'overlap of the top-10 eigenspaces'
    """
    if overlaps.ndim != 2 or overlaps.shape != (len(labels), len(labels)):
        raise ValueError(
            f"expected overlaps of shape ({len(labels)}, {len(labels)}) for as many labels, got {tuple(overlaps.shape)}"
        )
    figure, axes = _new_figure()
    picture = axes.imshow(overlaps.numpy(), cmap="cividis", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.tick_params(labelsize=_SMALL)
    # At even distances, from the newest backwards.
    shown = range(len(labels) - 1, -1, -max(1, -(-len(labels) // _MOST_LABELS)))
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(shown, [labels[index] for index in shown])
    axes.tick_params(labelsize=_SMALL)
    axes.set_xlabel(axis, fontsize=_TEXT)
    axes.set_ylabel(axis, fontsize=_TEXT)
    axes.set_title(f"overlap of the top-{dimension} eigenspaces", fontsize=_TEXT, loc="left")
    return figure


def pictures(history: Sequence[Measurement], spaces: SubspaceHistory | None = None) -> dict[str, Figure]:
    """Draw everything that the last measurement has to show.

    Args:
        history: measurements in order of time.
        spaces: the run's top eigenspaces; drawn if the last measurement's is one of several.

    Returns:
        Figures by the name they are logged under: ``spectrum``, ``density`` and ``subspace_overlaps``.

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
    curves = [_Curve.of(earlier[index]) for index in _spaced(len(earlier), num_earlier)]
    for age, curve in enumerate(reversed(curves)):
        axes.plot(curve.ranks, curve.values, **_faded(age))
    return curves


def _faded(age: int) -> dict[str, Any]:
    label = "earlier" if age == 0 else None
    return {"color": _GREY, "linewidth": 1.6, "alpha": 0.8 * 0.72**age, "zorder": 1, "label": label}


def _spaced(total: int, most: int) -> list[int]:
    """Indices of at most so many out of all: the last always, and the first as soon as there are two."""
    if not total or not most:
        return []
    return [int(index) for index in np.unique(np.linspace(total - 1, 0, min(most, total)).round())]


def _check_num_earlier(num_earlier: int) -> None:
    if num_earlier < 0:
        raise ValueError(f"num_earlier is {num_earlier}; give how many earlier measurements to draw, or 0")


def _reach(densities: Sequence[SpectralDensity]) -> tuple[float, float]:
    """Smallest and largest node that counts, zero included; never the same."""
    nodes = np.concatenate([[0.0], *(d.nodes[d.weights > 0].numpy() for d in densities)])
    low, high = float(nodes.min()), float(nodes.max())
    return (low, high) if high > low else (-1.0, 1.0)


def _negative_mass(density: SpectralDensity) -> str:
    if not bool(density.nodes[density.weights > 0].any()):
        return "all eigenvalues are zero"
    if len(density.nodes) == 1:
        return "one random vector"  # Whose scatter is not known.
    mass = density.negative_mass
    return f"negative mass {mass.value:.3f} ± {mass.stderr:.3f}"


def _counts(density: SpectralDensity, along: npt.NDArray[np.float64], width: float) -> npt.NDArray[np.float64]:
    """Smoothed number of eigenvalues, a row for each random vector."""
    distances = (along[:, None] - density.nodes.numpy()[:, None, :]) / width
    weighted = np.exp(-(distances**2) / 2) * density.weights.numpy()[:, None, :]
    counts: npt.NDArray[np.float64] = density.size * weighted.sum(-1)
    return counts


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


def _write(axes: Axes, across: str, upwards: str, *, legend: Literal["lower left", "upper right"]) -> None:
    axes.set_xlabel(across, fontsize=_TEXT)
    axes.set_ylabel(upwards, fontsize=_TEXT)
    axes.tick_params(labelsize=_SMALL)
    axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, fontsize=_SMALL, framealpha=0.85, edgecolor="none")


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
            fontsize=_SMALL,
            zorder=5,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": _VERMILLION, "alpha": 0.9},
        )


def _place(current: Measurement) -> str:
    return {
        "fit_start": "before training" if current.step == 0 else f"resumed at step {current.step}",
        "epoch": f"epoch {current.epoch}",
        "step": f"step {current.step}",
        "fit_end": "end of training",
        "validate": "validation",
    }[current.when]


def _title(current: Measurement) -> str:
    place = _place(current)
    if current.fit is None:
        return place
    fit = current.fit
    return f"{place}:  slope {fit.slope:.2f} ± {fit.slope_stderr:.2f},  fit error {fit.fit_error:.3f}"
