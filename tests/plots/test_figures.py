"""Spectrum figures: what is drawn, what is said, and that matplotlib's global state is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import Tensor

from hessian_callback.algorithms.density import SpectralDensity, spectral_density
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.algorithms.subspace_history import SubspaceHistory
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.measurement.measurement import Measurement, When
from hessian_callback.plots.figures import density_figure, figure_image, overlap_figure, pictures, spectrum_figure
from hessian_callback.power_law.fit import fit_power_law


def power_law(slope: float, k: int = 50) -> Tensor:
    return 4.0 * torch.arange(1, k + 1, dtype=torch.float64) ** -slope


def measure(
    eigenvalues: Tensor,
    *,
    bounds: Tensor | None = None,
    epoch: int = 3,
    step: int = 30,
    when: When = "epoch",
    reason: str | None = None,
    drop_first: int = 0,
) -> Measurement:
    bounds = 1e-3 * eigenvalues.abs() if bounds is None else bounds
    spectrum = Spectrum(
        eigenvalues=eigenvalues,
        error_bounds=bounds,
        converged=bounds <= 1e-2 * eigenvalues.abs(),
        rtol=1e-2,
        missed_probability=1e-6,
        num_matvecs=180,
        stopped="converged",
        rounding=1e-9,
        symmetry_defect=0.0,
        ritz_values=eigenvalues,
    )
    leading = spectrum.positive_converged
    fit = fit_power_law(leading, drop_first=drop_first) if len(leading) - drop_first >= 3 else None
    return Measurement(epoch=epoch, step=step, when=when, spectrum=spectrum, fit=fit, reason=reason, seconds=1.5)


def with_density(density: SpectralDensity | None, measurement: Measurement | None = None) -> Measurement:
    return replace(measurement or measure(power_law(0.8)), density=density)


def nodes(*rows: list[tuple[float, float]], size: int = 100) -> SpectralDensity:
    both = torch.tensor(rows, dtype=torch.float64)
    return SpectralDensity(
        nodes=both[..., 0], weights=both[..., 1], size=size, rounding=0.0, num_matvecs=both[..., 0].numel()
    )


def failure(reason: str = "the loss is NaN") -> Measurement:
    return Measurement(epoch=4, step=40, when="epoch", spectrum=None, fit=None, reason=reason, seconds=0.1)


def lines(history: list[Measurement], **options: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    axes = spectrum_figure(history, **options).axes[0]
    return {str(line.get_label()): (line.get_xdata(), line.get_ydata()) for line in axes.lines}


def words(history: list[Measurement]) -> str:
    axes = spectrum_figure(history).axes[0]
    return " ".join([axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]).replace("\n", " ")


def test_marks_are_the_eigenvalues_over_their_ranks() -> None:
    ranks, values = lines([measure(power_law(0.8))])["fitted"]
    np.testing.assert_array_equal(ranks, np.arange(1, 51))
    np.testing.assert_allclose(values, power_law(0.8).numpy())


def test_line_has_the_fitted_slope_and_ends_in_the_cutoff() -> None:
    measurement = measure(power_law(0.8))
    assert measurement.fit is not None
    (label,) = [name for name in lines([measurement]) if "propto" in name]
    ranks, law = lines([measurement])[label]
    np.testing.assert_allclose(np.diff(np.log(law)) / np.diff(np.log(ranks)), -measurement.fit.slope)
    np.testing.assert_allclose((ranks[-1], law[-1]), (50, measurement.fit.cutoff))


def test_line_begins_behind_dropped_outliers() -> None:
    measurement = measure(power_law(0.8), drop_first=5)
    drawn = lines([measurement])
    (label,) = [name for name in drawn if "propto" in name]
    np.testing.assert_allclose(drawn[label][0][[0, -1]], [6, 50])
    np.testing.assert_array_equal(drawn["not fitted"][0], [1, 2, 3, 4, 5])


def test_unresolved_and_negative_eigenvalues_are_not_passed_off_as_fitted() -> None:
    eigenvalues = torch.cat([power_law(0.8, 40), torch.tensor([-0.1, -0.2], dtype=torch.float64)])
    bounds = 1e-3 * eigenvalues.abs()
    bounds[30:40] = 0.5 * eigenvalues[30:40]
    drawn = lines([measure(eigenvalues, bounds=bounds)])
    np.testing.assert_array_equal(drawn["fitted"][0], np.arange(1, 31))
    np.testing.assert_array_equal(drawn["not fitted"][0], np.arange(31, 41))


def test_title_names_place_slope_and_fit_error() -> None:
    measurement = measure(power_law(0.8))
    assert measurement.fit is not None
    title = words([measurement])
    assert f"epoch 3:  slope {measurement.fit.slope:.2f} ± {measurement.fit.slope_stderr:.2f}" in title
    assert f"fit error {measurement.fit.fit_error:.3f}" in title
    assert "K = 50" in title


@pytest.mark.parametrize(
    ("when", "step", "place"),
    [
        ("fit_start", 0, "before training"),
        ("fit_start", 12, "resumed at step 12"),
        ("epoch", 30, "epoch 3"),
        ("step", 30, "step 30"),
        ("fit_end", 30, "end of training"),
        ("validate", 30, "validation"),
    ],
)
def test_title_says_when(when: When, step: int, place: str) -> None:
    assert words([measure(power_law(0.8), when=when, step=step)]).startswith(f"{place}:")


def test_failed_measurement_shows_its_reason_over_the_earlier_ones() -> None:
    history = [measure(power_law(0.8)), failure()]
    assert "no slope: the loss is NaN" in words(history)
    assert list(lines(history)) == ["earlier"]


def test_measurement_that_was_not_logged_shows_both_fit_and_reason() -> None:
    text = words([measure(power_law(0.8, 20), reason="only 20 of 50 eigenvalues converged")])
    assert "not logged: only 20 of 50" in text
    assert "K = 20" in text


def test_long_reason_stays_inside_the_figure() -> None:
    figure = spectrum_figure([failure("a very long reason " * 60)])
    figure_image(figure)
    (box,) = [text.get_window_extent() for text in figure.axes[0].texts]
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)


@pytest.mark.parametrize(("num_earlier", "drawn"), [(0, 0), (1, 1), (3, 3), (9, 6)])
def test_earlier_measurements_fade_with_age(num_earlier: int, drawn: int) -> None:
    history = [measure(power_law(0.5 + 0.05 * e), epoch=e) for e in range(6)]
    axes = spectrum_figure([*history, failure()], num_earlier=num_earlier).axes[0]
    opacity = [line.get_alpha() for line in axes.lines]
    assert len(opacity) == drawn
    assert opacity == sorted(opacity, reverse=True)
    if drawn:  # The newest is the most opaque.
        np.testing.assert_allclose(axes.lines[0].get_ydata(), power_law(0.75).numpy())


def test_band_of_a_value_near_zero_does_not_stretch_the_axis() -> None:
    eigenvalues = power_law(0.8)
    bounds = 1e-3 * eigenvalues
    bounds[-1] = 2 * eigenvalues[-1]
    low, _ = spectrum_figure([measure(eigenvalues, bounds=bounds)]).axes[0].get_ylim()
    assert low > 0.5 * float(eigenvalues[-1])


@pytest.mark.parametrize("slope", [0.1, 1.0, 6.0])
def test_axis_has_at_least_two_numbers(slope: float) -> None:
    figure = spectrum_figure([measure(power_law(slope))])
    figure_image(figure)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    numbered = [t for t in axes.yaxis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
    assert len(numbered) >= 2


def test_image_shows_ink_of_every_part() -> None:
    pixels = figure_image(spectrum_figure([measure(power_law(0.5)), measure(power_law(0.8))]))
    assert pixels.shape == (384, 512, 3)
    assert pixels.dtype == np.uint8
    for colour in [(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)]:
        assert (np.abs(pixels.astype(int) - colour).max(axis=-1) < 8).sum() > 60


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


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: density_figure([failure()]), r"extras=\['density'\]"),
        (lambda: density_figure([]), r"extras=\['density'\]"),
        (lambda: density_figure([with_density(nodes([(2, 0.5), (1, 0.5)]))], num_earlier=-1), "or 0"),
        (lambda: overlap_figure(torch.eye(2), ["0"], dimension=1), r"shape \(1, 1\)"),
        (lambda: spectrum_figure([]), "run trainer.fit or .validate first"),
        (lambda: spectrum_figure([failure()], num_earlier=-1), "or 0"),
    ],
)
def test_bad_input_says_the_remedy(call: Callable[[], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        call()


def test_drawing_leaves_pyplot_alone() -> None:
    code = """
import sys
from hessian_callback.plots.figures import figure_image, spectrum_figure
from hessian_callback.measurement.measurement import Measurement
assert "matplotlib" not in sys.modules, "imported before anything was drawn"
figure_image(spectrum_figure([Measurement(0, 0, "epoch", None, None, "failed", 0.1)]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hessian-callback\[demo\]'"):
        spectrum_figure([failure()])
