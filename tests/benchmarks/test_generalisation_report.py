"""Pairs of runs at equal loss, on runs made for it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.generalisation_report import QUESTIONS, STATISTICS, Checkpoint, Pairs, Run, scores, settings

GAP = "equal training loss: smaller gap"
ERROR = "equal training loss: smaller error"


def checkpoint(train_loss: float, gap: float, value: float) -> Checkpoint:
    statistics = np.full(len(STATISTICS), value)
    statistics[1] = -value
    return Checkpoint(train_loss, train_loss + gap, float("nan"), tuple(statistics))


def run(name: str, value: float, noise: str = "0 %", losses: tuple[float, ...] = (1.0,)) -> Run:
    """A run whose gap is its statistic."""
    return Run(name, {"noise": noise, "width": name}, [checkpoint(loss, value, value) for loss in losses])


def test_the_smaller_statistic_is_scored_against_the_smaller_gap() -> None:
    found = scores(run("a", 0.1), run("b", 0.2), *QUESTIONS[GAP])
    assert found is not None
    assert found[0] == 1.0
    assert found[1] == 0.0


@pytest.mark.parametrize(
    ("other", "question"),
    [(run("b", 0.2, losses=(1.2,)), GAP), (run("b", 0.1), GAP), (run("b", 0.2), ERROR)],
    ids=["no equal loss", "equal gaps", "no errors"],
)
def test_pairs_that_cannot_be_ordered_are_left_out(other: Run, question: str) -> None:
    assert scores(run("a", 0.1), other, *QUESTIONS[question]) is None


def test_only_measurements_of_equal_loss_count() -> None:
    one = Run("a", {}, [checkpoint(1.0, 0.1, 0.1), checkpoint(0.5, 0.9, 0.1)])
    other = Run("b", {}, [checkpoint(1.05, 0.2, 0.2), checkpoint(0.52, 0.2, 0.2)])
    found = scores(one, other, *QUESTIONS[GAP])
    # Right at the first loss and wrong at the second one.
    assert found is not None
    assert found[0] == 0.5


def test_bootstrap_draws_runs_and_compares_within_a_level_of_noise() -> None:
    runs = [run(name, 0.1 * index) for index, name in enumerate("abcdefgh", 1)]
    pairs = Pairs.of([*runs, run("z", 9.0, noise="20 %")], GAP)
    assert len(pairs) == 28
    assert pairs.accuracies()[:2] == pytest.approx([1.0, 0.0])
    assert pairs.intervals()[:, 0] == pytest.approx([1.0, 1.0])
    # A run that occurs twice has its pairs twice, and no pair with itself.
    counts = np.zeros(9)
    counts[[0, 1, 2]] = 2, 1, 1
    contradicted = Pairs(9, pairs.first, pairs.second, np.where(pairs.first[:, None] == 0, 0.0, 1.0), pairs.factors)
    assert contradicted.accuracies(counts)[0] == pytest.approx(1 / 5)


def test_settings_take_pairs_that_differ_in_one_factor() -> None:
    text = settings(GAP, [("runs", [run(name, 0.1 * index) for index, name in enumerate("abcdefgh", 1)])])
    assert "| runs | width | 28 | 100 | 0 |" in text
    two = [Run(name, {"width": name, "rate": name}, run(name, float(name)).checkpoints) for name in "12345"]
    assert settings(GAP, [("runs", two)]) == "Too few pairs."
