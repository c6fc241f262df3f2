"""The rule by itself: what it must do to any sequence, and how often it is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.callbacks.stopping_rule import Reading, crossing, noise_of_change, plateau

VALUES = st.floats(0.1, 3.0)
READINGS = st.lists(
    st.builds(
        lambda value, below, above, gap: Reading(value, value - below, value + above, gap),
        VALUES,
        st.floats(0, 0.05),
        st.floats(0, 0.05),
        st.none() | st.floats(-0.3, 0.3),
    ),
    min_size=1,
    max_size=14,
)
MODES = st.sampled_from(["min", "max"])
PATIENCE = st.integers(1, 5)


@given(READINGS, MODES, PATIENCE)
def test_never_before_patience_and_only_without_progress(readings: list[Reading], mode: Any, patience: int) -> None:
    verdict = plateau(readings, mode=mode, patience=patience)
    assert verdict.wait == len(readings) - 1 - verdict.best
    assert not verdict.stop or verdict.wait >= patience


@given(READINGS, PATIENCE)
def test_down_is_up_in_a_mirror(readings: list[Reading], patience: int) -> None:
    mirrored = [Reading(-r.value, -r.highest, -r.lowest, None if r.half_gap is None else -r.half_gap) for r in readings]
    one, other = plateau(readings, mode="max", patience=patience), plateau(mirrored, mode="min", patience=patience)
    assert (one.stop, one.wait, one.best) == (other.stop, other.wait, other.best)


@given(READINGS, MODES, PATIENCE, st.integers(-8, 8))
def test_units_do_not_matter(readings: list[Reading], mode: Any, patience: int, power: int) -> None:
    c = 2.0**power  # Exact, so that nothing turns on rounding.
    scaled = [
        Reading(c * r.value, c * r.lowest, c * r.highest, None if r.half_gap is None else c * r.half_gap)
        for r in readings
    ]
    one, other = plateau(readings, mode=mode, patience=patience), plateau(scaled, mode=mode, patience=patience)
    assert (one.stop, one.wait, one.best) == (other.stop, other.wait, other.best)


@given(st.lists(VALUES, min_size=2, max_size=14), MODES, PATIENCE, st.floats(-1, 1))
def test_halves_that_always_differ_alike_are_no_noise(
    values: list[float], mode: Any, patience: int, gap: float
) -> None:
    one = plateau([Reading(v) for v in values], mode=mode, patience=patience)
    other = plateau([Reading(v, half_gap=gap) for v in values], mode=mode, patience=patience)
    assert other.noise is not None
    assert other.noise.sampling == pytest.approx(0, abs=1e-12)
    assert one.best == other.best or abs(values[one.best] - values[other.best]) < 1e-9


@given(READINGS.filter(lambda r: len(r) > 1), MODES)
def test_sampling_noise_is_the_mean_over_all_pairs(readings: list[Reading], mode: Any) -> None:
    noise = noise_of_change(readings, 0, len(readings) - 1, mode=mode, num_pooled=len(readings))
    gaps = [r.half_gap for r in readings if r.half_gap is not None]
    if len(gaps) < 2:
        assert noise.sampling is None
        return
    pairs = [(a - b) ** 2 / 4 for i, a in enumerate(gaps) for b in gaps[:i]]
    assert noise.sampling == pytest.approx(np.sqrt(np.mean(pairs)), abs=1e-9)


@given(READINGS.filter(lambda r: len(r) > 1), MODES, st.data())
def test_numerical_noise_is_the_worst_that_the_intervals_allow(readings: list[Reading], mode: Any, data: Any) -> None:
    before, now = readings[0], readings[-1]
    truth = data.draw(st.floats(now.lowest, now.highest)) - data.draw(st.floats(before.lowest, before.highest))
    sign = 1 if mode == "max" else -1
    noise = noise_of_change(readings, 0, len(readings) - 1, mode=mode)
    assert sign * (now.value - before.value) - noise.numerical <= sign * truth + 1e-12


@given(READINGS, MODES, PATIENCE, st.integers(1, 14))
def test_what_comes_after_changes_nothing(readings: list[Reading], mode: Any, patience: int, cut: int) -> None:
    part = readings[:cut]
    rest = [replace(r) for r in part]
    assert plateau(part, mode=mode, patience=patience) == plateau(rest, mode=mode, patience=patience)
    whole = plateau(readings, mode=mode, patience=patience)
    assert whole.best >= plateau(part, mode=mode, patience=patience).best


@settings(max_examples=50)
@given(VALUES, MODES, st.integers(1, 6), st.integers(0, 6))
def test_a_flat_line_stops_when_patience_is_out(value: float, mode: Any, patience: int, more: int) -> None:
    verdicts = [plateau([Reading(value)] * n, mode=mode, patience=patience) for n in range(1, patience + more + 2)]
    assert [v.stop for v in verdicts] == [False] * patience + [True] * (more + 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), PATIENCE)
def test_crossing_counts_in_a_row(errors: list[float], patience: int) -> None:
    critical = [0.5] * len(errors)
    inside = [error < 0.5 for error in errors]
    runs = [all(inside[i - patience + 1 : i + 1]) for i in range(patience - 1, len(inside))]
    formed = runs.index(True) + patience - 1 if True in runs else None
    assert crossing(errors, critical, stop_when="formed", patience=patience).stop == (bool(runs) and runs[-1])
    lost = crossing(errors, critical, stop_when="lost", patience=patience)
    assert lost.formed == formed
    outside = formed is not None and len(inside) - 1 - formed >= patience and not any(inside[-patience:])
    assert lost.stop == outside


def measured(trend: float, sigma: float, num: int, rng: np.random.Generator) -> list[Reading]:
    """Slopes near 1, each half with an error of its own; sigma is the standard error on all samples."""
    errors = np.sqrt(2) * sigma * rng.standard_normal((num, 2))
    values = 1 + trend * np.arange(num) + errors.mean(1)
    return [Reading(v, v - 0.005, v, 0.1 + one - other) for v, (one, other) in zip(values, errors, strict=True)]


def stopped_after(readings: list[Reading], **options: Any) -> int | None:
    return next(
        (n for n in range(1, len(readings)) if plateau(readings[:n], mode="max", patience=4, **options).stop), None
    )


@pytest.mark.parametrize("sigma", [0.0, 0.005, 0.01])
def test_stops_on_a_noisy_plateau_and_goes_on_under_two_percent(sigma: float) -> None:
    rng = np.random.default_rng(3)
    wrong = [stopped_after(measured(0.02, sigma, 20, rng)) for _ in range(100)]
    assert sum(n is not None for n in wrong) <= 5
    flat = [stopped_after(measured(0.0, sigma, 20, rng)) for _ in range(100)]
    assert sum(n is not None for n in flat) >= 98
    assert np.mean([n for n in flat if n is not None]) < 7


def test_much_noise_takes_longer_and_patience_alone_would_be_wrong() -> None:
    rng = np.random.default_rng(3)
    runs = [measured(0.02, 0.03, 20, rng) for _ in range(60)]
    waiting = sum(stopped_after(run) is not None for run in runs)
    patience_alone = sum(stopped_after(run, min_trend=0.0) is not None for run in runs)
    assert patience_alone > 50
    assert waiting < 20


def test_reading_checks_itself() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Reading(float("nan"))
    with pytest.raises(ValueError, match="outside its interval"):
        Reading(1.0, 1.1, 1.2)
    with pytest.raises(ValueError, match="no reading"):
        plateau([], mode="max", patience=1)
    with pytest.raises(ValueError, match="pass one for each"):
        crossing([0.1], [], stop_when="lost", patience=1)
