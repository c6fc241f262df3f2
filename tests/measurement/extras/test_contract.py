"""The contract of every extra: declared keys, announced costs, equal results on any number of ranks, no traces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.extras.base import Extra
from hessian_callback.measurement.extras.outlier_ratio import OutlierRatio
from hessian_callback.measurement.extras.registry import EXTRAS, expected_hvps, make_extras
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.measurer import Measured, Measurer
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.solvers import Lanczos, PublishedProtocol
from tests.helpers.problems import problem
from tests.helpers.ranks import run_ranks

NUM_EIGENVALUES = 8
PLACES = [Place(0, 10, "epoch"), Place(1, 20, "epoch")]


def make(name: str) -> Extra:
    """The extra with its default options."""
    return OutlierRatio(num_classes=3) if name == "outlier_ratio" else EXTRAS[name]()


def measured(name: str, ranks: Ranks | None = None) -> list[Measured]:
    """Two measurements, the second after a small step of the parameters."""
    measurer = Measurer(NUM_EIGENVALUES, extras=[make(name)], solver=Lanczos(rtol=1e-6))
    results: list[Measured] = []
    one = problem(ranks)
    for place in PLACES:
        states = results[-1].states if results else None
        results.append(measurer.measure(one, place, states=states, draws_figures=True))
        with torch.no_grad():
            for number, parameter in enumerate(one.model.parameters()):
                parameter.mul_(1 + 0.01 * number)
    return results


@pytest.fixture(scope="module")
def alone() -> Callable[[str], list[Measurement]]:
    """Both measurements of a single process, which are made once."""
    return cache(lambda name: [one.measurement for one in measured(name)])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTRAS)
def test_returned_keys_are_declared(name: str, alone: Any) -> None:
    first, last = alone(name)
    assert not first.not_compared
    assert not last.not_compared
    # The second measurement has everything, except for a bound that needs a positive gap.
    assert last.comparisons.keys() - {"num_extra_hvps"} <= set(make(name).keys)
    assert set(make(name).keys) - {"subspace_sine_bound"} <= last.comparisons.keys()
    assert last.comparisons.keys() <= last.scalars().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTRAS)
def test_spent_products_do_not_exceed_the_announced_ones(name: str, alone: Any) -> None:
    for one in alone(name):
        announced = make(name).expected_hvps(one.num_hvps)
        spent = one.comparisons.get("num_extra_hvps", 0)
        # Two halves are two spectra, each on half of the samples: in samples they cost as much as one.
        assert spent <= (2.2 * announced if name == "split_half" else announced)


@pytest.mark.parametrize("name", EXTRAS)
def test_model_gradients_and_generators_are_untouched(name: str) -> None:
    one = problem()
    before, random = copy.deepcopy(one.model.state_dict()), torch.get_rng_state()
    Measurer(NUM_EIGENVALUES, extras=[make(name)]).measure(one, PLACES[0])
    assert all(torch.equal(value, before[key]) for key, value in one.model.state_dict().items())
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def all_on_ranks(rank: int) -> Any:
    ranks = Ranks(dist.group.WORLD)
    return {name: [one.measurement.comparisons for one in measured(name, ranks)] for name in EXTRAS}


def test_two_ranks_measure_the_same_as_one(alone: Any) -> None:
    for outcome in run_ranks(all_on_ranks, 2):
        for name in EXTRAS:
            for ours, theirs in zip(outcome.value[name], [one.comparisons for one in alone(name)], strict=True):
                assert ours.keys() == theirs.keys()
                for key, value in theirs.items():
                    # An angle near zero is the square root of rounding.
                    assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_that_needs_bounds_is_refused_without_them(name: str) -> None:
    if make(name).needs_bounds:
        with pytest.raises(ValueError, match="needs eigenvalues with error bounds"):
            make_extras([make(name)], NUM_EIGENVALUES, PublishedProtocol())
    else:
        assert make_extras([make(name)], NUM_EIGENVALUES, PublishedProtocol())


def test_names_and_keys_are_unique() -> None:
    keys = [key for kind in EXTRAS.values() for key in kind.keys]
    assert len(set(keys)) == len(keys)
    assert all(name == kind.name for name, kind in EXTRAS.items())


def test_extras_with_the_same_products_are_counted_once() -> None:
    both = make_extras(["trace", "frobenius"], 50, Lanczos())
    assert expected_hvps(both, 200) == 30
    measurement = Measurer(NUM_EIGENVALUES, extras=["trace", "frobenius"]).measure(problem(), PLACES[0]).measurement
    assert measurement.comparisons["num_extra_hvps"] <= 30
