"""The probability that random Lanczos runs overlook an eigenvalue, against simulations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hessian_callback.algorithms.decomposition import Decomposition
from hessian_callback.algorithms.missed_eigenvalues import Probe, level_of_run
from hessian_callback.algorithms.ritz import Projection
from tests.helpers.spectra import operator_of, ranks


@pytest.mark.slow
def test_the_probe_misses_no_more_often_than_it_says() -> None:
    """A run of m steps from a random vector, against an eigenvalue that is hard to see."""
    eigenvalues = torch.cat([torch.tensor([1.02]).double(), torch.linspace(-1, 1, 60).double()])
    operator = operator_of(torch.diag(eigenvalues))
    bound, level, runs = 1.01, 0.2, 400
    passed = 0
    for seed in range(runs):
        run = Decomposition(operator, seed)
        run.begin()
        probe = Probe()
        for step in range(14):
            probe.update(run.projection(), dimensions=61, smallest_link=1e-16, new=step == 0)
            if probe.missed_probability(bound) <= level:
                passed += 1
                break
            run.expand(run.chains[0])
    # Three standard deviations above the level that was promised.
    assert passed / runs <= level + 3 * math.sqrt(level * (1 - level) / runs)
    assert passed > 0, "the probe must be able to be wrong, or this shows nothing"


@pytest.mark.slow
def test_the_confident_bound_covers_the_truth() -> None:
    operator = operator_of(torch.diag(ranks(200) ** -1.0))
    level, runs, misses = 0.05, 400, 0
    for seed in range(runs):
        run = Decomposition(operator, seed)
        run.begin()
        for _ in range(3):
            run.expand(run.chains[0])
        probe = Probe(level)
        probe.update(run.projection(), dimensions=200, smallest_link=1e-16, new=True)
        bound = probe.confident_bound()
        excess = bound - probe.largest_seen
        assert probe.missed_probability(bound) <= level
        if excess > 1e-5:  # not tightened further
            assert probe.missed_probability(probe.largest_seen + 0.99 * excess) > 0.9 * level
        misses += bound < 1
    assert misses / runs <= level + 3 * math.sqrt(level * (1 - level) / runs)


@pytest.mark.slow
def test_the_lower_bound_covers_the_truth() -> None:
    operator = operator_of(torch.diag(-(ranks(200) ** -1.0)))
    level, runs, misses = 0.5, 400, 0
    for seed in range(runs):
        run = Decomposition(operator, seed)
        run.begin()
        run.expand(run.chains[0])
        probe = Probe(level)
        probe.update(run.projection(), dimensions=200, smallest_link=1e-16, new=True)
        assert probe.confident_lower_bound() < probe.smallest_seen
        misses += probe.confident_lower_bound() > -1
    share = 0.1 * level  # the part of the level that the lower end may spend
    assert misses / runs <= share + 3 * math.sqrt(share * (1 - share) / runs)


def exhausted_run(dimensions: int) -> Projection:
    """A run of one vector whose residual is rounding."""
    return Projection(np.zeros(1), [], [], np.zeros((0, 0)))


def test_runs_that_are_combined_have_the_tail_of_a_product_of_uniform_variables() -> None:
    probe = Probe()
    probe.update(exhausted_run(100), dimensions=100, smallest_link=0.1, new=True)
    single = probe.missed_probability(1.0)
    probe.update(exhausted_run(100), dimensions=100, smallest_link=0.1, new=True)
    product = single**2
    assert probe.missed_probability(1.0) == pytest.approx(product * (1 - math.log(product)))
    uniform = np.random.default_rng(0).random((200_000, 2)).prod(1)
    assert probe.missed_probability(1.0) == pytest.approx((uniform <= product).mean(), rel=0.05)


def test_the_levels_of_all_runs_sum_to_the_level() -> None:
    spent = np.cumsum([level_of_run(number, 1e-3) for number in range(1, 20_000)])
    assert (spent < 1e-3).all()
    assert spent[-1] == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize(("bound", "least", "most"), [(1.05, 28, 36), (1.01, 60, 75), (1.003, 95, 125)])
def test_a_run_is_expected_to_end_where_it_does(bound: float, least: int, most: int) -> None:
    """Beside the edge of a uniform spectrum."""
    operator = operator_of(torch.diag(torch.linspace(-1, 1, 2000).double()))
    run, probe = Decomposition(operator, 0), Probe(1e-3)
    expected = []
    run.begin()
    while not expected or not probe.rules_out(bound):
        probe.update(run.projection(), dimensions=2000, smallest_link=1e-16, new=not expected)
        expected.append(probe.expected_products(bound))
        run.expand(run.chains[0])
    assert least < len(expected) < most
    assert np.array(expected[16:]) == pytest.approx(len(expected), rel=0.4)
    assert np.array(expected[3 * len(expected) // 4 :]) == pytest.approx(len(expected), rel=0.15)


def test_a_run_that_has_seen_a_larger_eigenvalue_never_excludes_it() -> None:
    run, probe = Decomposition(operator_of(torch.diag(torch.linspace(-1, 1, 100).double())), 0), Probe(1e-3)
    run.begin()
    probe.update(run.projection(), dimensions=100, smallest_link=1e-16, new=True)
    assert probe.expected_products(probe.largest_seen) == math.inf
