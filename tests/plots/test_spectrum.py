"""The spectrum figure: what it draws and what its texts say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hessian_callback.measurement.measurement import Measurement, When
from hessian_callback.plots.figures import figure_image
from hessian_callback.plots.spectrum import spectrum_figure
from tests.helpers.measurements import failure, measure, power_law


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


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: spectrum_figure([]), "run trainer.fit or .validate first"),
        (lambda: spectrum_figure([failure()], num_earlier=-1), "or 0"),
    ],
)
def test_bad_input_says_the_remedy(call: Callable[[], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        call()
