"""The rule without a trainer: its definition, invariances, and error rates in simulations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.callbacks import stopping_rule
from hessian_callback.callbacks.stopping_rule import Plateau, PlateauRule, Reading, noise_of_change

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


def plateau(readings: list[Reading], **options: Any) -> Plateau:
    """Return the verdict at the last of some readings."""
    rule = PlateauRule(**options)
    return [rule.add(reading) for reading in readings][-1]


def by_definition(readings: list[Reading], *, mode: str, patience: int, min_trend: float, z: float) -> list[Any]:
    """Progress, wait and stop at each reading from the formulas of the module, with all readings at hand."""
    found: list[Any] = []
    best, wait = 0, 0
    for now in range(1, len(readings)):
        r, s = readings[best], readings[now]
        up = (s.value - s.lowest) + (r.highest - r.value)
        down = (s.highest - s.value) + (r.value - r.lowest)
        pooled = sorted({best, *range(max(0, now - max(patience, 5)), now + 1)})
        gaps = [gap for gap in (readings[i].half_gap for i in pooled) if gap is not None]
        pairs = [(a - b) ** 2 / 4 for i, a in enumerate(gaps) for b in gaps[:i]]
        required = (up if mode == "max" else down) + z * (np.sqrt(np.mean(pairs)) if pairs else 0)
        change = s.value - r.value if mode == "max" else r.value - s.value
        wait = 0 if change > required else wait + 1
        found.append((change, required, wait, wait >= patience and wait * min_trend * abs(r.value) >= 2 * required))
        best = best if wait else now
    return found


@given(READINGS, MODES, PATIENCE, st.sampled_from([0.01, 0.02, 0.5]), st.floats(0, 3))
def test_verdicts_follow_from_the_definition(
    readings: list[Reading], mode: Any, patience: int, min_trend: float, z: float
) -> None:
    rule = PlateauRule(mode=mode, patience=patience, min_trend=min_trend, num_sigmas=z)
    verdicts = [rule.add(reading) for reading in readings]
    assert verdicts[0] == Plateau(stop=False, wait=0, best=0)
    assert rule.verdict is verdicts[-1]
    expected = by_definition(readings, mode=mode, patience=patience, min_trend=min_trend, z=z)
    for found, (change, required, wait, stop) in zip(verdicts[1:], expected, strict=True):
        assert found.required == pytest.approx(required, rel=1e-9, abs=1e-12)
        if abs(change - required) < 1e-9:
            return  # Rounding decides, and all later verdicts depend on it.
        assert found.wait == wait
        trend = found.wait * min_trend * abs(readings[found.reference or 0].value)
        assert found.stop == stop or trend == pytest.approx(2 * required, rel=1e-9, abs=1e-12)


def test_a_reading_costs_the_same_after_any_number_of_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping_rule, "_MAX_POOLED", 20)
    sizes: list[int] = []

    def counted(before: Reading, now: Reading, pooled: list[Reading], **options: Any) -> Any:
        sizes.append(len(pooled))
        return noise_of_change(before, now, pooled, **options)

    monkeypatch.setattr(stopping_rule, "noise_of_change", counted)
    rule = PlateauRule(mode="max", patience=10**6)
    for _ in range(100):
        rule.add(Reading(1.0, 0.9, 1.1, half_gap=0.1))
    assert sizes == [*range(2, 21), *[21] * 80]  # The reference is pooled as well.


@given(READINGS, MODES, PATIENCE)
def test_stops_after_patience_and_only_without_progress(readings: list[Reading], mode: Any, patience: int) -> None:
    verdict = plateau(readings, mode=mode, patience=patience)
    assert verdict.wait == len(readings) - 1 - verdict.best
    assert not verdict.stop or verdict.wait >= patience


@given(READINGS, PATIENCE)
def test_modes_are_mirror_images(readings: list[Reading], patience: int) -> None:
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
def test_a_constant_difference_between_halves_is_not_noise(
    values: list[float], mode: Any, patience: int, gap: float
) -> None:
    one = plateau([Reading(v) for v in values], mode=mode, patience=patience)
    other = plateau([Reading(v, half_gap=gap) for v in values], mode=mode, patience=patience)
    assert other.noise is not None
    assert other.noise.sampling == pytest.approx(0, abs=1e-12)
    assert one.best == other.best or abs(values[one.best] - values[other.best]) < 1e-9


@given(READINGS.filter(lambda r: len(r) > 1), MODES)
def test_sampling_noise_is_the_mean_over_all_pairs(readings: list[Reading], mode: Any) -> None:
    noise = noise_of_change(readings[0], readings[-1], readings, mode=mode)
    gaps = [r.half_gap for r in readings if r.half_gap is not None]
    if len(gaps) < 2:
        assert noise.sampling is None
        return
    pairs = [(a - b) ** 2 / 4 for i, a in enumerate(gaps) for b in gaps[:i]]
    assert noise.sampling == pytest.approx(np.sqrt(np.mean(pairs)), abs=1e-9)


@given(READINGS.filter(lambda r: len(r) > 1), MODES, st.data())
def test_numerical_noise_bounds_the_error_of_the_change(readings: list[Reading], mode: Any, data: Any) -> None:
    before, now = readings[0], readings[-1]
    truth = data.draw(st.floats(now.lowest, now.highest)) - data.draw(st.floats(before.lowest, before.highest))
    sign = 1 if mode == "max" else -1
    noise = noise_of_change(before, now, readings, mode=mode)
    assert sign * (now.value - before.value) - noise.numerical <= sign * truth + 1e-12


@given(READINGS, MODES, PATIENCE, st.integers(1, 14))
def test_later_readings_do_not_change_a_verdict(readings: list[Reading], mode: Any, patience: int, cut: int) -> None:
    rule = PlateauRule(mode=mode, patience=patience)
    verdicts = [rule.add(reading) for reading in readings]
    part = readings[:cut]
    assert verdicts[len(part) - 1] == plateau([replace(r) for r in part], mode=mode, patience=patience)


@settings(max_examples=50)
@given(VALUES, MODES, st.integers(1, 6), st.integers(0, 6))
def test_a_flat_line_stops_when_patience_is_out(value: float, mode: Any, patience: int, more: int) -> None:
    verdicts = [plateau([Reading(value)] * n, mode=mode, patience=patience) for n in range(1, patience + more + 2)]
    assert [v.stop for v in verdicts] == [False] * patience + [True] * (more + 1)


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


def test_more_noise_takes_longer_than_patience() -> None:
    rng = np.random.default_rng(3)
    runs = [measured(0.02, 0.03, 20, rng) for _ in range(60)]
    waiting = sum(stopped_after(run) is not None for run in runs)
    patience_alone = sum(stopped_after(run, min_trend=0.0) is not None for run in runs)
    assert patience_alone > 50
    assert waiting < 20


def test_readings_are_checked() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Reading(float("nan"))
    with pytest.raises(ValueError, match="outside its interval"):
        Reading(1.0, 1.1, 1.2)
