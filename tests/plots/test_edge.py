"""The picture of a run's distance from instability."""

from __future__ import annotations

import pytest

from hessian_callback.measurement.edge import EdgeMeasurement
from hessian_callback.plots.edge import edge_figure


def entry(step: int, ratio: float | None, lr: float = 0.1) -> EdgeMeasurement:
    error = None if ratio is None else 0.01
    return EdgeMeasurement(0, step, "step", ratio=ratio, ratio_error=error, lr=lr, loss=1.0 / step)


def test_the_figure_shows_ratio_rate_and_loss_with_the_edge() -> None:
    figure = edge_figure([entry(50, 0.5), entry(100, None), entry(150, 1.5, lr=0.3)])
    top, middle, bottom = figure.axes
    curve, edge = top.lines
    assert [list(curve.get_xdata()), list(curve.get_ydata())] == [[50, 150], [0.5, 1.5]]
    assert list(edge.get_ydata()) == [1.0, 1.0]
    assert list(middle.lines[0].get_ydata()) == [0.1, 0.3]
    assert list(bottom.lines[0].get_ydata()) == [1 / 50, 1 / 150]
    assert top.get_title() == "step 150: 1.5 of the edge of stability"
    assert top.get_yscale() == "linear"


def test_a_wide_range_is_logarithmic() -> None:
    assert edge_figure([entry(50, 0.01), entry(100, 1.0)]).axes[0].get_yscale() == "log"


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="no measurement has a ratio"):
        edge_figure([entry(50, None)])
