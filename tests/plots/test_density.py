"""The density figure against the eigenvalues of known operators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from hessian_callback.algorithms.density import SpectralDensity, spectral_density
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.plots.density import density_figure
from hessian_callback.plots.figures import figure_image
from tests.helpers.measurements import failure, nodes, with_density


def test_density_counts_the_eigenvalues_of_a_known_operator() -> None:
    diagonal = torch.cat([torch.tensor([10.0, 8.0, -2.0]), torch.zeros(197)]).double()
    density = spectral_density(MatvecOperator(lambda v: diagonal * v, 200), num_vectors=40, num_steps=6)
    figure = density_figure([with_density(density)])
    positive, negative = figure.axes[0].lines[:2]
    x, count = positive.get_xdata(), positive.get_ydata()
    for eigenvalue in (10, 8):  # A vector weighs one with the square of a Gaussian, of which 40 are averaged.
        assert count[np.abs(x - eigenvalue).argmin()] == pytest.approx(1, abs=4 * (2 / 40) ** 0.5)
    assert count[np.abs(x).argmin()] == pytest.approx(197, rel=0.1)
    assert count[np.abs(x - 5).argmin()] < 1e-6
    np.testing.assert_array_equal(negative.get_xdata(), x[x < 0])
    assert negative.get_ydata()[np.abs(negative.get_xdata() + 2).argmin()] == pytest.approx(1, abs=4 * (2 / 40) ** 0.5)
    # The area is the number of eigenvalues: a peak of height one has the area of a Gaussian.
    width = 12 / 100
    assert trapezoid(count, x) / (width * (2 * np.pi) ** 0.5) == pytest.approx(200, rel=1e-6)


def test_density_band_holds_every_random_vector() -> None:
    axes = density_figure([with_density(nodes([(3, 0.1), (0, 0.9)], [(3, 0.3), (0, 0.7)]))]).axes[0]
    (path,) = axes.collections[0].get_paths()
    heights = path.vertices[np.abs(path.vertices[:, 0] - 3) < 0.01][:, 1]
    assert heights.min() == pytest.approx(10, rel=0.1)
    assert heights.max() == pytest.approx(30, rel=0.1)


def test_density_title_and_earlier_ones() -> None:
    history = [with_density(nodes([(3, 0.25), (-1, 0.75)], [(3, 0.35), (-1, 0.65)])) for _ in range(5)]
    history[2] = with_density(None)
    assert history[-1].density is not None
    mass = history[-1].density.negative_mass
    axes = density_figure(history, num_earlier=3).axes[0]
    assert axes.get_title(loc="left") == f"epoch 3:  negative mass 0.438 ± {mass.stderr:.3f}"
    grey = [line.get_alpha() for line in axes.lines if line.get_alpha()]
    assert grey == sorted(grey, reverse=True)
    assert len(grey) == 3
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"earlier", "positive", "negative"}


@pytest.mark.parametrize(
    ("density", "title"),
    [
        (nodes([(0, 1.0)], [(0, 1.0)]), "all eigenvalues are zero"),
        (nodes([(2, 0.5), (-2, 0.5)]), "one random vector"),
    ],
)
def test_odd_densities_are_drawn(density: SpectralDensity, title: str) -> None:
    figure = density_figure([with_density(density)])
    figure_image(figure)
    assert figure.axes[0].get_title(loc="left") == f"epoch 3:  {title}"


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: density_figure([failure()]), r"extras=\['density'\]"),
        (lambda: density_figure([]), r"extras=\['density'\]"),
        (lambda: density_figure([with_density(nodes([(2, 0.5), (1, 0.5)]))], num_earlier=-1), "or 0"),
    ],
)
def test_bad_input_says_the_remedy(call: Callable[[], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        call()
