"""Predictors of series with known truth: closed forms, coverage, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.prediction_report import decaying, exchangeable, leading, wandering
from hessian_callback.callbacks.prediction import (
    FEATURES,
    LEVEL,
    WINDOW,
    Observation,
    Prediction,
    PredictionTrack,
    compare_errors,
    interval_score,
    predict_next,
)

targets = st.lists(st.floats(-5, 5), min_size=5, max_size=12)


def tracks_of(series: list[Observation], predictors: Mapping[str, Sequence[str]] = FEATURES) -> dict[str, Any]:
    """Replay a whole series with each predictor."""
    tracks = {name: PredictionTrack(features) for name, features in predictors.items()}
    for observation in series:
        for track in tracks.values():
            track.add(observation)
    return tracks


def joint_verdict(series: list[Observation]) -> str:
    tracks = tracks_of(series, {"both": ["log_step", "slope", "fit_error"], "step": ["log_step"]})
    found = compare_errors(tracks["both"].errors, tracks["step"].errors)
    assert found is not None
    return found.verdict


@pytest.mark.parametrize("shift", [0.0, -10.0], ids=["positive: a power law", "of any sign: a line"])
def test_targets_that_the_features_determine_are_predicted_exactly(shift: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 2))
    goals = [1.0, *(1.5 + 0.2 * x[:-1, 0] - 0.1 * x[:-1, 1])]
    if not shift:
        goals = [math.exp(goal) for goal in goals]
    series = [Observation(g + shift, {"slope": a, "fit_error": b}) for g, (a, b) in zip(goals, x, strict=True)]
    track = tracks_of(series)["spectrum"]
    assert len(track.errors) == 12 - 5
    assert list(track.errors.values())[2:] == pytest.approx([0.0] * 5, abs=1e-9)


def test_predictions_begin_at_five_observations_with_enough_pairs() -> None:
    series = decaying(np.random.default_rng(0), 8)
    for num in range(1, 9):
        known = {name for name, track in tracks_of(series[:num]).items() if track.next is not None}
        expected = {"last_value", "log_step", "spectrum"} if num >= 5 else set()
        assert known == expected | ({"log_step_and_spectrum"} if num >= 6 else set())


def test_without_features_the_last_value_is_repeated_with_the_changes_as_interval() -> None:
    found = predict_next([Observation(y) for y in (-1.0, 0.0, 2.0, 1.5, 4.5)], [])
    # Absolute changes are 1, 2, .5 and 3; four of four are needed for 80 %.
    assert found is not None
    assert (found.value, found.low, found.high) == (4.5, 1.5, 7.5)


@given(targets, st.floats(0.1, 10), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_units_of_a_feature_do_not_matter(values: list[float], scale: float, shift: float) -> None:
    features = np.random.default_rng(len(values)).standard_normal(len(values))
    one, other = (
        predict_next(
            [Observation(y, {"slope": a * x + b}) for y, x in zip(values, features, strict=True)],
            ["slope"],
        )
        for a, b in ((1.0, 0.0), (scale, shift))
    )
    assert one is not None
    assert other is not None
    assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), rel=1e-6, abs=1e-6)
    assert one.low <= one.value <= one.high


@given(st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=10), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_positive_losses_have_positive_predictions_in_any_unit(values: list[float], unit: float) -> None:
    features = np.random.default_rng(0).standard_normal(len(values))
    one, other = (
        predict_next([Observation(u * y, {"slope": x}) for y, x in zip(values, features, strict=True)], ["slope"])
        for u in (1.0, unit)
    )
    assert one is not None
    assert other is not None
    assert 0 < one.low <= one.value * (1 + 1e-12)
    assert other.value == pytest.approx(unit * one.value, rel=1e-6)


def test_least_squares_and_leaving_out_are_those_of_numpy() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 9))
    found = predict_next([Observation(b, {"slope": a}) for a, b in zip(x, y, strict=True)], ["slope"])
    pairs_x, pairs_y = x[:-1], y[1:]
    ups, downs = [], []
    for out in range(8):
        kept = np.arange(8) != out
        line = np.polyfit(pairs_x[kept], pairs_y[kept], 1)
        missed = abs(pairs_y[out] - np.polyval(line, pairs_x[out]))
        ups.append(np.polyval(line, x[-1]) + missed)
        downs.append(np.polyval(line, x[-1]) - missed)
    assert found is not None
    assert found.value == pytest.approx(np.polyval(np.polyfit(pairs_x, pairs_y, 1), x[-1]))
    # ceil(.8 * 9) = 8 of 8.
    assert (found.low, found.high) == pytest.approx((min(downs), max(ups)))


def test_only_the_last_pairs_count() -> None:
    series = exchangeable(np.random.default_rng(0), 60)
    whole = predict_next(series, ["log_step"])
    assert whole == predict_next(series[-WINDOW - 1 :], ["log_step"])
    assert tracks_of(series)["log_step"].made_for_last is not None


def test_pairs_without_a_feature_are_left_out() -> None:
    series = exchangeable(np.random.default_rng(0), 12)
    gone = [*series[:-1], Observation(series[-1].target, {})]
    assert predict_next(gone, ["log_step"]) is None
    # A pair that lacks a feature is left out, the others stay.
    holed = [*series[:4], Observation(series[4].target), *series[5:]]
    assert predict_next(holed, ["log_step"]) is not None
    assert predict_next(holed, ["log_step"]) != predict_next(series, ["log_step"])


def test_constant_features_and_targets_are_predicted() -> None:
    found = predict_next([Observation(0.5, {"slope": 1.0, "fit_error": 0.1})] * 9, ["slope", "fit_error"])
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("stretched", "least"), [(False, LEVEL), (True, LEVEL - 0.02)])
def test_intervals_cover_exchangeable_pairs(stretched: bool, least: float) -> None:
    hits = []
    for seed in range(40):
        track = PredictionTrack(["log_step"])
        plain = None
        for observation in exchangeable(np.random.default_rng(seed), 20):
            tried = track.next if stretched else plain
            if tried is not None:
                hits.append(tried.low <= observation.target <= tried.high)
            track.add(observation)
            plain = predict_next(track.observations, track.features)
    assert np.mean(hits) > least - 3 * math.sqrt(LEVEL * (1 - LEVEL) / len(hits))


@pytest.mark.parametrize("make", [exchangeable, decaying, wandering])
def test_the_stretch_determines_the_share_of_misses(make: Any) -> None:
    track = tracks_of(make(np.random.default_rng(3), 60), {"one": ["log_step"]})["one"]
    score = track.score()
    assert score is not None
    assert score.num == 55
    assert (1 - score.coverage) - (1 - LEVEL) == pytest.approx(math.log(track.stretch) / (0.5 * score.num))


def test_long_series_have_the_nominal_coverage() -> None:
    for make in (decaying, wandering):
        score = tracks_of(make(np.random.default_rng(5), 120), {"one": ["log_step"]})["one"].score()
        assert score is not None
        assert abs(score.coverage - LEVEL) < 0.05


def test_the_interval_score_is_proper() -> None:
    draws = np.random.default_rng(0).standard_normal(20_000)
    reach = 1.2816  # the normal quantile of 90 %
    means = {
        width: np.mean([interval_score(Prediction(0.0, -width, width), y) for y in draws])
        for width in (0.5 * reach, reach, 2 * reach)
    }
    assert min(means, key=means.__getitem__) == reach


def test_all_three_verdicts_occur() -> None:
    noise = [joint_verdict(decaying(np.random.default_rng(seed), 26)) for seed in range(12)]
    ahead = [joint_verdict(leading(np.random.default_rng(seed), 26)) for seed in range(12)]
    assert noise.count("adds nothing") >= 10
    assert ahead.count("adds") >= 10
    assert joint_verdict(leading(np.random.default_rng(0), 12)) == "too few to say"


def test_ties_and_losses_are_not_counted_as_gains() -> None:
    same = dict.fromkeys(range(12), 0.1)
    tied = compare_errors(same, same)
    assert tied is not None
    assert (tied.wins, tied.losses, tied.p_better, tied.verdict) == (0, 0, 1.0, "adds nothing")
    worse = compare_errors({n: 0.2 + n for n in range(12)}, same)
    assert worse is not None
    assert worse.p_worse == pytest.approx(2.0**-12)
    assert compare_errors({1: 0.1}, {2: 0.1}) is None


def test_bad_input_raises_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="slope"):
        Observation(0.1, {"slope": math.nan})
    with pytest.raises(ValueError, match="target"):
        Observation(math.inf)
    with pytest.raises(ValueError, match="level"):
        predict_next([Observation(0.1)], [], level=80)
    with pytest.raises(ValueError, match="stretch"):
        predict_next([Observation(0.1)], [], stretch=-1)
