"""Halves of the held-out batches: disjoint, even, and the same for any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.halves import assign_halves, sampling_stderr
from hessian_callback.parallel import Ranks
from tests.ranks import run_ranks


@given(st.lists(st.integers(1, 64), min_size=2, max_size=30), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_both_halves_weigh_about_the_same(weights: list[int], seed: int) -> None:
    halves = np.array(assign_halves(range(len(weights)), weights, Ranks(), seed=seed))
    loads = [float(np.array(weights)[halves == half].sum()) for half in (0, 1)]
    assert min(loads) > 0
    assert abs(loads[0] - loads[1]) <= max(weights)


def test_the_seed_chooses() -> None:
    drawn = {tuple(assign_halves(range(10), [1.0] * 10, Ranks(), seed=seed)) for seed in range(20)}
    assert len(drawn) > 15


KEYS, WEIGHTS = list(range(3, 12)), [8.0] * 8 + [3.0]


def _on_ranks(rank: int) -> Any:
    size = dist.get_world_size()
    own = KEYS[rank::size]
    return dict(zip(own, assign_halves(own, WEIGHTS[rank::size], Ranks(dist.group.WORLD), seed=4), strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_ranks_does_not_matter(world_size: int) -> None:
    shared: dict[int, int] = {}
    for outcome in run_ranks(_on_ranks, world_size):
        shared |= outcome.value
    assert shared == dict(zip(KEYS, assign_halves(KEYS, WEIGHTS, Ranks(), seed=4), strict=True))


def test_one_batch_has_no_halves() -> None:
    for keys in ([], [0]):
        with pytest.raises(ValueError, match="smaller batch size"):
            assign_halves(keys, [1.0] * len(keys), Ranks())


def test_the_standard_error_is_that_of_a_mean_of_two() -> None:
    """Slopes of halves that scatter with sd 1 make a mean that scatters with 1 / sqrt 2."""
    first, second = np.random.default_rng(0).standard_normal((2, 4000))
    errors = [sampling_stderr(a, b) for a, b in zip(first, second, strict=True)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std((first + second) / 2), rel=0.05)
