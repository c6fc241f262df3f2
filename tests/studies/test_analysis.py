"""Runs whose truth is known: planted signals, mere drift, a loss that turns up, and holes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hessian_callback.studies.analysis import (
    POOLED,
    RUNS,
    SETTINGS,
    Row,
    Series,
    across_runs,
    across_runs_at_train_loss,
    plain_answer,
    within_runs,
)
from hessian_callback.studies.association import Association

STEPS = [0, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240]
ORACLES = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}


def planted(seed: int, *, noise: float = 0.6) -> Series:
    """All falls with log(step); the loss's own ups and downs are in ``fit_error`` alone."""
    rng = np.random.default_rng(seed)
    time = np.array([0.0, *np.log(STEPS[1:])])
    ups, others, third, fourth = noise * rng.standard_normal((4, len(STEPS)))
    test = 5 - 0.3 * time + ups
    drifting = {"fit_error": 1 - 0.12 * time + 0.4 * ups + fourth / 20, "slope": 0.3 + 0.05 * time + 0.2 * others}
    # The point before the first step is an outlier, as in real runs.
    statistics = {name: [50.0, *values[1:].tolist()] for name, values in drifting.items()}
    train = (5 - 0.32 * time + third).tolist()
    return Series(f"seed {seed}", {"seed": str(seed)}, STEPS, test.tolist(), train, statistics)


def one(rows: Sequence[Row], **wanted: str) -> Row:
    (found,) = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return found


def test_coefficients_are_those_of_the_checkpoints_after_the_first_step() -> None:
    run = planted(0)
    rows = within_runs([run], segments=["all"])
    assert {row.predictor for row in rows} == {"log_step", "train_loss", "fit_error", "slope"}
    for row in rows:
        x = np.log(STEPS[1:]) if row.predictor == "log_step" else run.values(row.predictor)[1:]
        assert row.found is not None
        assert row.found.value == pytest.approx(ORACLES[row.kind](x, run.test_loss[1:]).statistic, abs=1e-6)
        assert row.found.num == len(STEPS) - 1
        assert (row.partial is None) == (row.predictor == "log_step" or row.kind == "kendall")
        assert (row.falling_share is not None) == (row.kind == "pearson")
        assert row.drift_share is not None


def test_a_planted_signal_is_found_given_the_step_and_noise_is_not() -> None:
    rows = within_runs([planted(seed) for seed in range(7)], kinds=["pearson", "spearman"], segments=["all"])
    # Both drift, so both go with the loss, more than chance.
    for predictor in ("fit_error", "slope"):
        found = one(rows, predictor=predictor, kind="pearson", over=POOLED).found
        assert found is not None
        assert found.excludes_zero
    signal, noise = (one(rows, predictor=name, kind="spearman", over=POOLED) for name in ("fit_error", "slope"))
    assert signal.partial is not None
    assert signal.partial.low > 0.8
    assert signal.partial_drift_share == pytest.approx(1 / 2001)
    assert noise.partial is not None
    assert not noise.partial.excludes_zero
    assert plain_answer(rows).startswith("Within runs, fit_error goes with the test loss better than log_step (")
    assert "in 7 of 7 runs, p = 0.0156); it adds to log(step) (" in plain_answer(rows)
    assert "is not shown to add to log(step)" in plain_answer(rows, "slope")
    assert "its interval includes 0" in plain_answer(rows, "slope")


def test_few_runs_are_too_few_to_say_better_but_may_add() -> None:
    answer = plain_answer(within_runs([planted(seed) for seed in range(3)], kinds=["spearman"]))
    assert answer.startswith(
        "Within runs, too few to say whether fit_error goes with the test loss better than log_step ("
    )
    assert "in 3 of 3 runs; 6 runs are the least" in answer
    assert "; it adds to log(step) (partial coefficient " in answer


def test_smooth_curves_add_nothing_however_well_they_correlate() -> None:
    """Unrelated decays: the trap in which Pearson's coefficient has its figures, plain and given the step."""
    time = np.arange(len(STEPS))
    runs = [
        Series(
            f"seed {n}", {}, STEPS, (1 / (1 + time)).tolist(), [None] * 12, {"fit_error": np.exp(-time / n).tolist()}
        )
        for n in (2, 3, 4)
    ]
    rows = within_runs(runs, segments=["all"])
    pearson = one(rows, predictor="fit_error", kind="pearson", over=POOLED)
    assert pearson.partial is not None
    assert pearson.partial.low > 0.5
    assert one(rows, predictor="fit_error", kind="spearman", over=POOLED).partial is None
    notes = one(rows, predictor="fit_error", kind="spearman", over="seed 2").notes
    assert notes == (
        "given log(step): fit_error follows the given series in order; nothing of it is left to correlate",
    )
    assert "in 0 of 3 runs; 6 runs are the least); it is not shown to add to log(step) (no" in plain_answer(rows)


def test_two_curves_that_turn_add_over_the_run_but_not_in_its_parts() -> None:
    """The limit that plain_answer names."""
    rng, time, runs = np.random.default_rng(7), np.arange(len(STEPS)), []
    for seed in range(3):
        test, fit_error = (np.abs(time - turn) / turn + 0.02 * rng.standard_normal(12) for turn in (6, 8))
        runs.append(Series(f"seed {seed}", {}, STEPS, test.tolist(), [None] * 12, {"fit_error": fit_error.tolist()}))
    rows = within_runs(runs, kinds=["spearman"])
    assert "it adds to log(step)" in plain_answer(rows)
    assert "it is not shown to add" in plain_answer(rows, segment="before_minimum")


def test_a_drift_that_is_shared_by_chance_is_named() -> None:
    rows = within_runs([planted(seed) for seed in range(3)], kinds=["spearman"], segments=["all"])
    rows = [replace(row, partial_drift_share=0.2) for row in rows]
    assert "20 % of independent drifting pairs: drift alone gives as much too often)" in plain_answer(rows)
    flipped = [
        replace(row, partial=Association("spearman", -0.5, -0.8, -0.1, 11, 1)) if row.over == "seed 0" else row
        for row in rows
    ]
    assert "its sign differs between runs, drift alone" in plain_answer(flipped)


def test_a_loss_that_turns_up_is_split_at_its_minimum() -> None:
    time = np.arange(len(STEPS))
    turning = np.abs(time - 6.0) + 1
    run = Series("a", {}, STEPS, turning.tolist(), (12.0 - time).tolist(), {"fit_error": turning.tolist()})
    rows = within_runs([run], kinds=["spearman"])
    clock = {row.segment: row.found for row in rows if row.predictor == "log_step"}
    assert abs(clock["all"].value) < 0.4
    assert clock["before_minimum"].value == pytest.approx(-1, abs=1e-6)
    assert clock["after_minimum"].value == pytest.approx(1, abs=1e-6)
    # The minimum belongs to both parts, the point before the first step to none.
    assert [clock[name].num for name in ("all", "before_minimum", "after_minimum")] == [11, 6, 6]
    whole = one(rows, predictor="fit_error", segment="all")
    assert whole.leads["log_step"] > 0.6
    assert whole.partial.value > 0.9
    early = replace(run, test_loss=(np.abs(time - 9.0) + 1).tolist())
    short = one(within_runs([early], kinds=["kendall"]), predictor="fit_error", segment="after_minimum")
    assert short.found is None
    assert short.notes == ("n = 3; at least 5 observations are needed",)
    assert "after the minimum of the test loss better than log_step" in plain_answer(rows, segment="after_minimum")


def test_holes_are_left_out_of_both_sides_of_a_comparison() -> None:
    run = planted(1)
    holes = {2, 5, 9}
    fit_error = [None if index in holes else value for index, value in enumerate(run.statistics["fit_error"])]
    test_loss = [None if index == 3 else value for index, value in enumerate(run.test_loss)]
    rows = within_runs(
        [replace(run, test_loss=test_loss, statistics={**run.statistics, "fit_error": fit_error})],
        kinds=["spearman"],
        segments=["all"],
    )
    kept = [index for index in range(1, len(STEPS)) if index not in {*holes, 3}]
    row = one(rows, predictor="fit_error")
    values = {name: [run.values(name)[index] for index in kept] for name in ("fit_error", "log_step", "test_loss")}
    rho, clock = (stats.spearmanr(values[name], values["test_loss"]).statistic for name in ("fit_error", "log_step"))
    assert row.found.num == len(kept)
    assert row.found.value == pytest.approx(rho, abs=1e-6)
    assert row.leads["log_step"] == pytest.approx(abs(rho) - abs(clock), abs=1e-6)
    assert one(rows, predictor="log_step").found.num == len(STEPS) - 2


def test_runs_without_a_coefficient_are_named_where_the_others_are_pooled() -> None:
    empty = Series("empty", {}, [0, 10], [1.0, None], [None, None])
    rows = within_runs([planted(0), planted(1), empty], kinds=["spearman"], segments=["all", "before_minimum"])
    pooled = one(rows, predictor="fit_error", segment="all", over=POOLED)
    assert pooled.found.num == 2 * (len(STEPS) - 1)
    assert pooled.notes == ("not in empty",)
    assert one(rows, predictor="fit_error", segment="before_minimum", over="empty").notes == (
        "n = 0; at least 5 observations are needed",
    )
    none = one(
        within_runs([empty, replace(empty, name="b")], kinds=["kendall"], segments=["all"]),
        over=POOLED,
        predictor="log_step",
    )
    assert (none.found, none.drift_share, none.notes) == (None, None, ("no run has a coefficient",))


def test_the_gap_is_a_target_too() -> None:
    run = planted(2)
    gap = [test - train for test, train in zip(run.test_loss, run.train_loss, strict=True)]
    row = one(within_runs([run], "gap", kinds=["kendall"], segments=["all"]), predictor="slope")
    expected = stats.kendalltau(run.statistics["slope"][1:], gap[1:]).statistic
    assert row.found.value == pytest.approx(expected, abs=1e-6)


def grid(num_settings: int = 6, seeds: int = 3) -> list[Series]:
    """Settings that differ in loss and fit error, seeds that differ in noise alone."""
    rng, runs = np.random.default_rng(3), []
    for setting in range(num_settings):
        for seed in range(seeds):
            noise = rng.standard_normal(3) / 20
            test = [4.0, 3 - setting / 4 + noise[0], 2 - setting / 4 + noise[1]]
            fit_error = [0.9, *(0.1 * loss for loss in test[1:])]
            labels = {"width": str(setting), "seed": str(seed)}
            trace = [1.0, *rng.standard_normal(2).tolist()]
            train = [4.0, 2.5 + noise[2], 1.5]
            runs.append(
                Series(f"{setting}-{seed}", labels, [0, 10, 100], test, train, {"fit_error": fit_error, "trace": trace})
            )
    return runs


def test_across_runs_at_a_step_and_over_settings() -> None:
    runs = grid()
    rows = across_runs(runs, kinds=["spearman"])
    assert {row.question for row in rows} == {"across runs at step 10", "across runs at step 100"}
    at_ten = [row for row in rows if row.question.endswith("10")]
    over_runs, over_settings = (one(at_ten, predictor="trace", over=over) for over in (RUNS, SETTINGS))
    trace, test = ([run.values(name)[1] for run in runs] for name in ("trace", "test_loss"))
    assert over_runs.found.value == pytest.approx(stats.spearmanr(trace, test).statistic, abs=1e-6)
    means = [np.reshape(values, (6, 3)).mean(axis=1) for values in (trace, test)]
    assert over_settings.found.value == pytest.approx(stats.spearmanr(*means).statistic, abs=1e-6)
    assert (over_runs.found.num, over_settings.found.num) == (18, 6)
    clock = one(at_ten, predictor="log_step", over=RUNS)
    assert (clock.found, clock.notes) == (
        None,
        ("log_step is constant and has no correlation; wait until its values differ",),
    )
    assert over_runs.notes == ("given log(step): all are at the same step",)
    assert over_runs.drift_share is None
    assert "train_loss" in over_runs.leads
    assert "log_step" not in over_runs.leads


def test_last_checkpoints_are_compared_where_runs_end_at_different_steps() -> None:
    runs = grid(seeds=1)
    runs[0] = replace(runs[0], steps=[0, 10, 90])
    rows = across_runs(runs, kinds=["spearman"])
    assert {row.question for row in rows} == {"across runs at step 10", "across runs at the last step"}
    assert {row.over for row in rows} == {RUNS}
    last = one(rows, predictor="fit_error", question="across runs at the last step")
    assert last.found.num == 6
    assert "log_step" in last.leads


def falling(name: str, train: Sequence[float | None], **statistics: Sequence[float | None]) -> Series:
    """Checkpoints at 0, 1, 2, 4, ..., with a test loss of twice the training loss and a bit of its own."""
    steps = [0, *(2**n for n in range(len(train)))]
    test = [None if loss is None else 2 * loss + len(name) for loss in train]
    return Series(
        name,
        {"run": name},
        steps,
        [9.0, *test],
        [9.0, *train],
        {key: [9.0, *values] for key, values in statistics.items()},
    )


def test_values_at_a_training_loss_are_interpolated() -> None:
    # Crossing 2.0 a half, a quarter, ... of the way between steps 1 and 2, where the test loss is 4 and a bit.
    ways = [0.5, 0.25, 0.75, 0.1, 0.9, 0.3]
    runs = [
        falling("x" * (n + 1), [2 + way, 1 + way, 0.5], slope=[10.0 * n, 10.0 * n + 1, 7.0])
        for n, way in enumerate(ways)
    ]
    rows = across_runs_at_train_loss(runs, kinds=["pearson"], train_loss=2.0)
    tests = [4.0 + n + 1 for n in range(6)]
    slopes = [10.0 * n + way for n, way in enumerate(ways)]
    clocks = [way * math.log(2) for way in ways]
    found = {row.predictor: row for row in rows}
    assert found["slope"].found.value == pytest.approx(stats.pearsonr(slopes, tests).statistic, abs=1e-12)
    assert found["log_step"].found.value == pytest.approx(stats.pearsonr(clocks, tests).statistic, abs=1e-12)
    xy, xz, yz = (stats.pearsonr(a, b).statistic for a, b in ((slopes, tests), (slopes, clocks), (tests, clocks)))
    partial = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert found["slope"].partial.value == pytest.approx(partial, abs=1e-9)
    assert found["slope"].question == "across runs at train loss 2"
    # What is matched has no association of its own.
    assert found["train_loss"].notes == ("train_loss is constant and has no correlation; wait until its values differ",)


def test_the_first_crossing_counts_and_the_middle_of_the_shared_range_is_the_default() -> None:
    # Shared: from 3 (the third starts) down to 1 (the first ends). The others fall through 2 more than once.
    trains = [[5, 3, 1], [4, 1.5, 2.5, 0.5], [3, None, 1, 3, 0.5], [1.5, 4, 0, 3], [4, 2, 2, 1], [3.5, 2.5, 0.5]]
    # Linear in the training loss up to the first crossing, and elsewhere after it.
    firsts = [(1, 2), (0, 1), (0, 2), (1, 2), (0, 1), (1, 2)]
    runs = [
        falling(
            "x" * (n + 1),
            train,
            slope=[(n + 2.0) ** 2 * loss if i in first and loss else 1e6 for i, loss in enumerate(train)],
        )
        for n, (train, first) in enumerate(zip(trains, firsts, strict=True))
    ]
    slope = one(across_runs_at_train_loss(runs, kinds=["pearson"]), predictor="slope")
    assert slope.question == "across runs at train loss 2"
    # The fourth falls through 2 from 4 to 0, where its slope is 1e6 (a loss of 0).
    expected = [2 * (n + 2.0) ** 2 for n in range(6)]
    expected[3] = (25.0 * 4 + 1e6) / 2
    assert slope.found.value == pytest.approx(stats.pearsonr(expected, range(6)).statistic, abs=1e-9)


def test_runs_that_never_cross_are_named() -> None:
    runs = [falling("x" * (n + 1), [3.0 + n, 1.0 - n / 9], slope=[1.0 + n, 2.0 - n * n]) for n in range(6)]
    low, high = falling("starts low", [0.3, 0.2], slope=[1.0, 2.0]), falling("stays high", [9.0, 8.0], slope=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"stays high falls to 8, starts low from 0\.3; give train_loss"):
        across_runs_at_train_loss([*runs, low, high])
    row = one(across_runs_at_train_loss([*runs, low, high], train_loss=1.5, kinds=["kendall"]), predictor="slope")
    assert row.found.num == 6
    assert row.notes == ("never cross this training loss: starts low, stays high",)
    with pytest.raises(ValueError, match="unknown has no training loss"):
        across_runs_at_train_loss([*runs, falling("unknown", [None, None])])


def test_answers_across_runs_keep_to_the_intervals() -> None:
    rows = [row for row in across_runs(grid(12, 2), kinds=["spearman"]) if row.question.endswith("100")]
    assert plain_answer(rows, baseline="trace").startswith(
        "Across runs at step 100, over settings: fit_error goes with the test loss better than trace (1.00 ("
    )
    assert "over settings: trace goes with the test loss worse than fit_error" in plain_answer(
        rows, "trace", "fit_error"
    )
    alone = plain_answer(rows)
    assert "and its interval excludes 0; log_step has none (log_step is constant" in alone
    assert "lambda_max has none (not measured)" in plain_answer(rows, baseline="lambda_max")
    few = [row for row in across_runs(grid(5, 1), kinds=["spearman"]) if row.question.endswith("10")]
    assert "over runs: trace and train_loss cannot be distinguished" in plain_answer(few, "trace", "train_loss")
    fewer = [row for row in across_runs(grid(4, 2), kinds=["spearman"]) if row.question.endswith("10")]
    assert "fit_error has no Spearman coefficient with the test loss (n = 4; at least 5" in plain_answer(fewer)


@pytest.mark.parametrize(
    ("series", "words"),
    [
        (lambda: Series("a", {}, [1, 2], [1.0], [1.0, 2.0]), "a: 1 values of test_loss at 2 steps"),
        (lambda: Series("a", {}, [2, 1], [1.0, 1.0], [1.0, 2.0]), "ascend"),
        (lambda: Series("a", {}, [1], [math.nan], [1.0]), "finite, or None"),
        (lambda: Series("a", {}, [1], [1.0], [1.0], {"gap": [1.0]}), "gap is not a statistic"),
        (lambda: within_runs([]), "no runs"),
        (lambda: across_runs([planted(0), planted(0)]), "share a name"),
        (lambda: across_runs([planted(0)], step=0), "step 0 is the measurement before the first step; .* 10, 20"),
        (lambda: across_runs([*grid(), planted(0)], step=100), "step 100 is not one of seed 0; the runs share 10$"),
        (lambda: plain_answer([]), "rows of 0 questions"),
        (lambda: plain_answer(across_runs(grid())), "rows of 2 questions"),
        (lambda: plain_answer(within_runs([planted(0)], kinds=["pearson"])), "no rows of fit_error by Spearman"),
    ],
)
def test_bad_input_is_named(series: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        series()
