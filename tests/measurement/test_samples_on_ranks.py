"""Tests of samples that two processes share, in a module that is quick to import there."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.samples import collect
from tests.helpers.ranks import run_ranks

NUMBERS = torch.arange(20.0).reshape(20, 1)


def values(samples: Any) -> list[float]:
    return [float(value) for batch in samples.batches for value in batch.flatten()]


class Around:
    """An iterable around a loader, which nobody shards."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return (batch / 2 for batch in self.loader)


def _share_of_a_wrapper(rank: int) -> Any:
    samples = collect(Around(DataLoader(NUMBERS, batch_size=4)), num_samples=16, ranks=Ranks(dist.group.WORLD))
    return values(samples), samples.num_samples, samples.keys


def _share_of_an_own_stream(rank: int) -> Any:
    own = DataLoader(NUMBERS[10 * rank : 10 * rank + 10], batch_size=5)
    return values(collect(Around(own), num_samples=20, ranks=Ranks(dist.group.WORLD)))


def _draws_of_a_subclass(rank: int) -> Any:
    class Weighted(DistributedSampler):
        def __iter__(self) -> Any:
            return iter([self.rank] * len(self))

    loader = DataLoader(NUMBERS, batch_size=4, sampler=Weighted(NUMBERS, num_replicas=2, rank=rank))
    return collect(loader, num_samples=8, ranks=Ranks(dist.group.WORLD))


def test_a_stream_that_is_the_same_on_all_ranks_is_not_counted_twice() -> None:
    one, other = (outcome.value for outcome in run_ranks(_share_of_a_wrapper, 2))
    assert sorted(one[0] + other[0]) == [number / 2 for number in range(16)]
    assert one[1] == other[1] == 16
    assert not set(one[2]) & set(other[2])
    one, other = (outcome.value for outcome in run_ranks(_share_of_an_own_stream, 2))
    assert sorted(one + other) == [number / 2 for number in range(20)]


def test_a_distributed_sampler_that_draws_in_its_own_way_is_refused() -> None:
    for outcome in run_ranks(_draws_of_a_subclass, 2, expect_errors=True):
        assert outcome.error == "SampleError"
        assert "the ranks would choose different samples" in outcome.message
