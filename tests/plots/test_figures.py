"""All figures of a measurement, their images, and that the global state of matplotlib is unchanged."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from hessian_callback.algorithms.subspace_history import SubspaceHistory
from hessian_callback.plots.figures import figure_image, pictures
from hessian_callback.plots.overlap import overlap_figure
from hessian_callback.plots.spectrum import spectrum_figure
from tests.helpers.measurements import failure, measure, nodes, power_law, with_density


def test_image_shows_ink_of_every_part() -> None:
    pixels = figure_image(spectrum_figure([measure(power_law(0.5)), measure(power_law(0.8))]))
    assert pixels.shape == (384, 512, 3)
    assert pixels.dtype == np.uint8
    for colour in [(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)]:
        assert (np.abs(pixels.astype(int) - colour).max(axis=-1) < 8).sum() > 60


def test_pictures_are_those_of_which_the_last_measurement_has_numbers() -> None:
    spaces = SubspaceHistory()
    assert list(pictures([measure(power_law(0.8))], spaces)) == ["spectrum"]
    spaces.add(torch.eye(4, 2), [], step=0, label="start")
    spaces.add(torch.eye(4, 2), [1.0], step=30, label="3")
    last = with_density(nodes([(2, 0.5), (1, 0.5)]))
    assert list(pictures([last], spaces)) == ["spectrum", "density", "subspace_overlaps"]
    assert list(pictures([last, measure(power_law(0.8), step=40)], spaces)) == ["spectrum"]


def test_background_is_opaque_and_light_on_every_page() -> None:
    space = overlap_figure(torch.eye(2), ["0", "1"], dimension=2)
    for figure in (*pictures([with_density(nodes([(2, 0.5), (1, 0.5)]))]).values(), space):
        figure_image(figure)
        assert (np.asarray(figure.canvas.buffer_rgba())[[0, -1]][:, [0, -1]] == 255).all()


def test_drawing_leaves_pyplot_alone() -> None:
    code = """
import sys
from hessian_callback.plots.figures import figure_image, pictures
from hessian_callback.measurement.measurement import Measurement
assert "matplotlib" not in sys.modules, "imported before anything was drawn"
figure_image(pictures([Measurement(0, 0, "epoch", None, None, "failed", 0.1)])["spectrum"])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hessian-callback\[demo\]'"):
        spectrum_figure([failure()])
