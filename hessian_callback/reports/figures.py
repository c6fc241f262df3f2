"""The figures of a report, as SVG whose colours are those of the page's style sheet.

Text is stored as text, so it is sharp at any size and can be searched. Light and dark pages share one drawing.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from hessian_callback.reports.edge import EdgeRun
from hessian_callback.reports.run_tables import RunTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost", "losses_against", "overlay", "spectra", "stability", "timeline"]

# Placeholders, each replaced by a property of the style sheet. The series are Okabe and Ito's palette.
_COLOURS = {
    "#111112": "ink",
    "#777778": "muted",
    "#dddddc": "rule",
    "#fffffe": "paper",
    "#0072b2": "blue",
    "#d55e00": "vermillion",
    "#009e73": "green",
    "#cc79a7": "purple",
    "#e69f00": "orange",
    "#56b4e9": "sky",
}
_NAMED = {name: colour for colour, name in _COLOURS.items()}
_SERIES = ("blue", "vermillion", "green", "purple", "orange", "sky")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P")

_MOST_SPECTRA = 12
_MOST_RANKS = 150
_MOST_POINTS = 300


def spectra(table: RunTable) -> str | None:
    """Draw the eigenvalues over their rank, all measurements of a run in one picture, and the last one's power law."""
    history = [m for m in table.run.history if m.spectrum is not None]
    if not history:
        return None
    chosen = np.unique(np.linspace(0, len(history) - 1, min(_MOST_SPECTRA, len(history))).round().astype(int))
    with _figure(7.2, 4.6) as (figure, draw):
        axes = figure.add_subplot()
        for number, index in enumerate(chosen):
            m, last = history[index], number == len(chosen) - 1
            assert m.spectrum is not None
            values = m.spectrum.eigenvalues.numpy()
            ranks = _thinned(len(values))
            ranks = ranks[values[ranks - 1] > 0]
            if not len(ranks):
                continue
            shade = _shade(number, len(chosen))
            label = m.location if number in (0, len(chosen) - 1) or len(chosen) <= 4 else None
            style: dict[str, Any] = {"marker": "o", "markersize": 3.6} if last else {}
            axes.plot(
                ranks,
                values[ranks - 1],
                color=_NAMED["blue"],
                alpha=shade,
                linewidth=2 if last else 1.2,
                label=label,
                **style,
            )
        fit = history[-1].fit
        if fit is not None:
            k = np.geomspace(1, fit.num_eigenvalues, 60)
            axes.plot(
                k + fit.num_outliers_dropped,
                fit.cutoff * (k / fit.num_eigenvalues) ** -fit.slope,
                color=_NAMED["vermillion"],
                linewidth=2,
                linestyle=(0, (5, 2)),
                label=f"power law, slope {fit.slope:.3f}",
            )
        _logarithmic(axes, "x")
        _logarithmic(axes, "y")
        axes.set_xlabel("rank k")
        axes.set_ylabel("eigenvalue")
        axes.legend(loc="lower left")
        return draw("Eigenvalues of the Hessian over their rank, earlier measurements fading")


def timeline(table: RunTable) -> str | None:
    """Draw slope, fit error and losses over the optimizer steps, one above the other."""
    kept = [index for index, fits in enumerate(table.comparable) if fits]
    if not kept:
        return None
    history = [table.run.history[index] for index in kept]
    steps = np.array([m.step for m in history])
    from matplotlib.transforms import ScaledTranslation

    with _figure(7.2, 6.4) as (figure, draw):
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        slopes = np.array([m.slope for m in history], dtype=float)
        # A band of one standard error would suggest that the changes are noise, which they need not be.
        top.plot(steps, slopes, color=_NAMED["blue"], marker="o")
        low = [m.comparisons.get("slope_numerical_low", math.nan) for m in history]
        high = [m.comparisons.get("slope_numerical_high", math.nan) for m in history]
        if np.isfinite(low).any():
            top.fill_between(steps, low, high, color=_NAMED["blue"], alpha=0.25, linewidth=0)
        top.set_ylabel("slope")
        middle.plot(steps, [m.fit_error for m in history], color=_NAMED["vermillion"], marker="s")
        critical = history[-1].critical_distance
        if critical is not None:
            middle.axhline(critical, color=_NAMED["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
            middle.text(
                1,
                critical,
                "rejected above",
                transform=middle.get_yaxis_transform() + ScaledTranslation(0, 3 / 72, figure.dpi_scale_trans),
                ha="right",
                va="bottom",
                color=_NAMED["muted"],
                fontsize=9,
            )
            middle.set_ylim(0, 1.12 * max(critical, *(m.fit_error or 0 for m in history)))
        middle.set_ylabel("fit error")
        curves: list[tuple[str, Sequence[float | None], str]] = [
            (table.validation_label, table.validation, "green"),
            (table.training_label, table.training, "purple"),
        ]
        for number, (name, values, colour) in enumerate(curves):
            pairs = [(table.run.history[i].step, values[i]) for i in kept if _finite(values[i])]
            if pairs:
                bottom.plot(
                    *zip(*pairs, strict=True), color=_NAMED[colour], marker=_MARKERS[number], label=_label(name)
                )
        if bottom.lines:
            shown = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in bottom.lines])
            if shown.min() > 0 and shown.max() > 5 * shown.min():
                _logarithmic(bottom, "y")
            bottom.legend(loc="upper right")
        bottom.set_ylabel("loss")
        bottom.set_xlabel("optimizer steps")
        figure.align_ylabels()
        return draw("Slope, fit error and losses over the optimizer steps")


def losses_against(table: RunTable) -> str | None:
    """Draw the validation loss against slope, fit error and the number of steps."""
    kept = [
        index
        for index, fits in enumerate(table.comparable)
        if fits and table.run.history[index].when != "fit_start" and _finite(table.validation[index])
    ]
    if len(kept) < 2:
        return None
    kept = [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, min(_MOST_POINTS, len(kept))).round().astype(int))]
    losses = np.array([table.validation[index] for index in kept], dtype=float)
    history = [table.run.history[index] for index in kept]
    panels: dict[str, list[Any]] = {
        "slope": [m.slope for m in history],
        "fit error": [m.fit_error for m in history],
        "optimizer steps": [m.step for m in history],
    }
    with _figure(7.2, 2.9) as (figure, draw):
        row: list[Axes] = list(figure.subplots(1, 3, sharey=True))
        for axes, (name, values) in zip(row, panels.items(), strict=True):
            for number, (x, y) in enumerate(zip(values, losses, strict=True)):
                shade = _shade(number, len(kept))
                axes.plot([x], [y], color=_NAMED["blue"], marker="o", markersize=6, alpha=shade)
            axes.set_xlabel(name)
            if losses.min() > 0 and losses.max() > 5 * losses.min():
                _logarithmic(axes, "y")
            if name == "optimizer steps" and min(m.step for m in history) > 0:
                _logarithmic(axes, "x")
        figure.axes[0].set_ylabel(_label(table.validation_label))
        return draw("Validation loss against slope, fit error and steps; later measurements stronger")


def cost(table: RunTable) -> str | None:
    """Draw the products and the seconds of each measurement."""
    history = table.run.history
    if not history:
        return None
    positions = np.arange(1, len(history) + 1)
    with _figure(7.2, 2.6) as (figure, draw):
        left, right = figure.subplots(1, 2)
        for axes, values, name in (
            (left, [m.num_hvps or 0 for m in history], "products"),
            (right, [m.seconds for m in history], "seconds"),
        ):
            if len(history) <= _MOST_POINTS:
                axes.bar(positions, values, color=_NAMED["sky"], width=0.75)
            else:  # One area instead of thousands of bars.
                axes.fill_between(positions, values, color=_NAMED["sky"], step="mid", linewidth=0)
            axes.set_ylabel(name)
            axes.set_xlabel("measurement")
            axes.grid(visible=False, axis="x")
            axes.xaxis.get_major_locator().set_params(integer=True)
        return draw("Hessian-vector products and seconds of each measurement")


def stability(run: EdgeRun) -> str | None:
    """Draw ratio, learning rate and loss of a monitored run over the optimizer steps, and a line at the ratio of 1."""
    kept = [ratio for ratio in run.ratios if math.isfinite(ratio.value)]
    if not kept:
        return None
    with _figure(7.2, 5.6) as (figure, draw):
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
        steps, ratios = np.array([r.step for r in kept]), np.array([r.value for r in kept])
        errors = np.array([run.errors.get(r.step, 0.0) for r in kept])
        top.plot(steps, ratios, color=_NAMED["blue"], marker="o" if len(kept) <= _MOST_POINTS else None)
        top.fill_between(steps, ratios - errors, ratios + errors, color=_NAMED["blue"], alpha=0.25, linewidth=0)
        top.axhline(1.0, color=_NAMED["vermillion"], linewidth=1.4, linestyle=(0, (5, 2)))
        if ratios.min() > 0 and ratios.max() > 20 * ratios.min():
            _logarithmic(top, "y")
        top.set_ylabel("ratio")
        for axes, values, name, colour in ((middle, run.lrs, "lr", "purple"), (bottom, run.losses, "loss", "green")):
            points = [(step, value) for step, value in values.items() if math.isfinite(value)]
            if points:
                axes.plot(*zip(*points, strict=True), color=_NAMED[colour])
            axes.set_ylabel(name)
        bottom.set_xlabel("optimizer steps")
        figure.align_ylabels()
        return draw("Ratio to the edge of stability, learning rate and loss over the optimizer steps")


def overlay(tables: Sequence[RunTable], quantity: str) -> str | None:
    """Draw one quantity of several runs over the optimizer steps.

    Args:
        tables: the runs, in the order of their colours.
        quantity: ``"slope"``, ``"fit_error"`` or ``"validation"``.
    """
    with _figure(7.2, 3.4) as (figure, draw):
        axes = figure.add_subplot()
        for number, table in enumerate(tables):
            points = []
            for index, fits in enumerate(table.comparable):
                m = table.run.history[index]
                value = table.validation[index] if quantity == "validation" else getattr(m, quantity)
                if fits and _finite(value):
                    points.append((m.step, value))
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=_label(table.run.name),
                    color=_NAMED[_SERIES[number % len(_SERIES)]],
                    linestyle=_DASHES[number // len(_SERIES) % len(_DASHES)],
                    marker=_MARKERS[number % len(_MARKERS)],
                )
        if not axes.lines:
            return None
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
        if quantity == "validation" and values.min() > 0 and values.max() > 5 * values.min():
            _logarithmic(axes, "y")
        axes.set_xlabel("optimizer steps")
        name = {"fit_error": "fit error", "validation": tables[0].validation_label}.get(quantity, quantity)
        axes.set_ylabel(_label(name))
        if len(axes.lines) <= 2 * len(_SERIES):
            axes.legend(loc="best", ncols=2 if len(axes.lines) > 4 else 1)
        return draw(f"{name} of several runs over the optimizer steps")


# -- drawing -------------------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Callable[[str], str]]]:
    """An empty figure in the report's style, and the function that turns it into markup."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, muted = _NAMED["ink"], _NAMED["muted"]
    style: dict[str, Any] = {
        "svg.fonttype": "none",
        # Names of runs and curves are shown as they are, dollar signs included.
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": muted,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "grid.color": _NAMED["rule"],
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "legend.frameon": True,
        "legend.facecolor": _NAMED["paper"],
        "legend.edgecolor": "none",
        "legend.framealpha": 0.8,
        "legend.fontsize": 10,
    }
    with mpl.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")

        def draw(title: str) -> str:
            with mpl.rc_context({"svg.hashsalt": title}):
                return _markup(figure, title)

        yield figure, draw


def _markup(figure: Figure, title: str) -> str:
    text = StringIO()
    none: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=none)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    # The page sets the fonts and a width of 100 %.
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[\d.]+pt"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[\d.]+pt"', r"<svg \1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def _label(name: str) -> str:
    """A name from a file as a legend can show it: one line, not too long, and not hidden by a leading underscore."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in name[:60])
    line += "…" if len(name) > 60 else ""
    return f"\u200b{line}" if line.startswith("_") else line


def _logarithmic(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    subs = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _thinned(length: int) -> Any:
    """Ranks from 1 to ``length``; if there are many, a selection that is even on a logarithmic axis."""
    if length <= _MOST_RANKS:
        return np.arange(1, length + 1)
    return np.unique(np.geomspace(1, length, _MOST_RANKS).round().astype(int))


def _shade(number: int, of: int) -> float:
    """An opacity that grows with time."""
    return min(1.0, 0.2 + 0.8 * (number + 1) / of)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
