"""Tests of split halves: disjoint, even, the same for any number of ranks, and of the same loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.split_half import assign_halves, check_parts, cut_large, sampling_stderr
from tests.helpers.ranks import run_ranks


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


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_large_batches_are_cut_and_nothing_is_lost(sizes: list[int]) -> None:
    samples = torch.arange(sum(sizes))
    parts, weights, keys = cut_large(samples.split(sizes), sizes, range(5, 5 + len(sizes)), Ranks())
    assert torch.equal(torch.cat(parts), samples)
    assert weights == pytest.approx([len(part) for part in parts])
    assert len(set(keys)) == len(parts)
    # Of an odd number one half is larger by one, twice.
    assert max(weights) <= max(1, sum(sizes) / 4 + 1)


def test_parts_share_what_their_batch_weighs() -> None:
    tokens = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    parts, weights, _ = cut_large([tokens], [12.0], [0], Ranks(), batch_weight=lambda part: float(part.sum()))
    assert [part.shape[0] for part in parts] == [1, 1, 1]  # the sample without a token is left out
    assert weights == pytest.approx([6.0, 2.0, 4.0])
    odd = (torch.zeros(4), torch.zeros(3))
    assert cut_large([odd], [1.0], [7], Ranks()) == ([odd], [1.0], [28])


def test_one_batch_has_no_halves() -> None:
    for keys in ([], [0]):
        with pytest.raises(ValueError, match="smaller batch size"):
            assign_halves(keys, [1.0] * len(keys), Ranks())


def test_the_standard_error_is_that_of_a_mean_of_two() -> None:
    """Slopes of halves that scatter with sd 1 make a mean that scatters with 1 / sqrt 2."""
    first, second = np.random.default_rng(0).standard_normal((2, 4000))
    errors = [sampling_stderr(a, b) for a, b in zip(first, second, strict=True)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std((first + second) / 2), rel=0.05)


# -- losses that couple their samples ----------------------------------------------------------------


def contrast(_: Any, batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(batch @ batch.T, torch.arange(len(batch)))


def squares(_: Any, batch: torch.Tensor) -> torch.Tensor:
    return batch.square().mean()


X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(st.integers(2, 12))
@settings(max_examples=20, deadline=None)
def test_a_mean_survives_the_cut(size: int) -> None:
    batch = X[:size]
    parts, weights, _ = cut_large([batch], [float(size)], [0], Ranks())
    check_parts(squares, None, ([batch], [float(size)]), (parts, weights), Ranks(), rtol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [contrast, lambda _, batch: batch.square().sum(), lambda _, batch: batch.var(), lambda _, batch: batch.max()],
)
def test_a_loss_that_couples_its_samples_is_refused(loss: Any) -> None:
    parts, weights, _ = cut_large([X], [12.0], [0], Ranks())
    with pytest.raises(ValueError, match=r"not the mean of its parts'.*another loss.*Pass batch_weight=.*more batches"):
        check_parts(loss, None, ([X], [12.0]), (parts, weights), Ranks())


def test_whole_batches_may_couple_their_samples() -> None:
    batches, sizes = [X[:2], X[2:4], X[4:6], X[6:8]], [2.0] * 4
    parts, weights, _ = cut_large(batches, sizes, range(4), Ranks())
    check_parts(contrast, None, (batches, sizes), (parts, weights), Ranks())


def test_parts_of_the_right_weight_are_a_mean() -> None:
    """A mean over counted tokens is that of its parts by tokens, and not by samples."""
    tokens = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [5.0, 6.0, 0.0], [0.0, 7.0, 0.0]])

    def counted(_: Any, batch: torch.Tensor) -> torch.Tensor:
        return batch.sum() / (batch > 0).sum()

    for weigh, right in ((None, False), (lambda batch: float((batch > 0).sum()), True)):
        whole = ([tokens], [7.0])
        parts = cut_large(*whole, [0], Ranks(), batch_weight=weigh)[:2]
        if right:
            check_parts(counted, None, whole, parts, Ranks(), rtol=1e-6)
        else:
            with pytest.raises(ValueError, match="not the mean"):
                check_parts(counted, None, whole, parts, Ranks())


def _coupled(rank: int) -> Any:
    """One rank's batches are cut, the other's are not."""
    ranks = Ranks(dist.group.WORLD)
    batches = [X[:8]] if rank == 0 else [X[8:10], X[10:]]
    sizes = [float(len(batch)) for batch in batches]
    parts = cut_large(batches, sizes, range(2 * rank, 2 * rank + len(batches)), ranks)[:2]
    check_parts(squares, None, (batches, sizes), parts, ranks)
    try:
        check_parts(contrast, None, (batches, sizes), parts, ranks)
    except ValueError as error:
        return str(error)
    return None


def test_all_ranks_refuse_together() -> None:
    one, other = (outcome.value for outcome in run_ranks(_coupled, 2))
    assert one == other
    assert "not the mean of its parts'" in one
