"""The heat map of overlaps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from hessian_callback.plots.figures import figure_image
from hessian_callback.plots.overlap import overlap_figure


def test_heat_map_shows_the_overlaps_with_legible_labels() -> None:
    overlaps = torch.rand(24, 24, dtype=torch.float64)
    figure = overlap_figure(overlaps, ["start", *map(str, range(23))], dimension=10, axis="step")
    figure_image(figure)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), overlaps.numpy())
    assert axes.images[0].get_clim() == (0, 1)
    boxes = [label.get_window_extent() for label in sorted(axes.get_xticklabels(), key=lambda t: t.get_position()[0])]
    assert len(boxes) == 8
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "step")


def test_each_row_needs_a_label() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        overlap_figure(torch.eye(2), ["0"], dimension=1)
