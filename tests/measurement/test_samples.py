"""Which samples are used, how they are dealt, and that loading them is reproducible."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hessian_callback.callbacks.state_guard import preserve_random_state
from hessian_callback.measurement.errors import SampleError
from hessian_callback.measurement.samples import assign_to_ranks, collect

NUMBERS = torch.arange(20.0).reshape(20, 1)


def collected(loader: Any, **options: Any) -> Any:
    with preserve_random_state():
        return collect(loader, **{"num_samples": 10, **options})


def values(held_out: Any) -> list[float]:
    return [float(value) for batch in held_out.batches for value in batch.flatten()]


LOADERS = {
    "in order": DataLoader(NUMBERS, batch_size=4),
    "shuffled": DataLoader(NUMBERS, batch_size=4, shuffle=True),
    "own generator": DataLoader(NUMBERS, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "distributed": DataLoader(NUMBERS, batch_size=4, sampler=DistributedSampler(NUMBERS, num_replicas=3, rank=1)),
    "drop_last": DataLoader(NUMBERS, batch_size=4, drop_last=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_size_of_the_batches_changes_nothing_else(name: str) -> None:
    reference = collected(LOADERS[name], seed=5)
    held_out = collected(LOADERS[name], seed=5, batch_size=7)
    assert [len(batch) for batch in held_out.batches] == [7, 3]
    assert values(held_out) == values(reference)
    assert held_out.weights == [7.0, 3.0]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 4, drop_last=False)),
        DataLoader(NUMBERS, batch_size=None),
        [NUMBERS[:4], NUMBERS[4:8]],
    ],
    ids=["batch sampler", "no batches", "stream"],
)
def test_batches_of_another_making_have_no_other_size(loader: Any) -> None:
    with pytest.raises(SampleError, match="batch_size is given, but"):
        collected(loader, batch_size=7)


@pytest.mark.parametrize("name", LOADERS)
def test_the_choice_depends_on_seed_and_data_alone(name: str) -> None:
    reference = collected(LOADERS["in order"], seed=5)
    held_out = collected(LOADERS[name], seed=5)
    assert held_out.indices == reference.indices
    assert [len(batch) for batch in held_out.batches] == [4, 4, 2]
    assert values(held_out) == [float(i) for i in held_out.indices]
    assert held_out.weights == [4.0, 4.0, 2.0]
    assert len(set(held_out.indices)) == 10
    assert held_out.indices != collected(LOADERS[name], seed=6).indices


def test_a_sorted_data_set_gives_all_classes() -> None:
    labels = torch.arange(1000) // 100
    held_out = collected(DataLoader(TensorDataset(labels), batch_size=32), num_samples=100)
    assert set(torch.cat([batch[0] for batch in held_out.batches]).tolist()) == set(range(10))


def test_all_are_used_where_there_are_fewer() -> None:
    held_out = collected(LOADERS["in order"], num_samples=1000)
    assert sorted(held_out.indices) == list(range(20))
    assert held_out.num_samples == 20


def test_a_sampler_limits_the_population() -> None:
    subset = DataLoader(NUMBERS, batch_size=4, sampler=SubsetRandomSampler(range(5, 12)))
    assert sorted(collected(subset).indices) == list(range(5, 12))
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler(range(5, 12)), num_replicas=2, rank=1)
    assert sorted(collected(DataLoader(NUMBERS, batch_size=4, sampler=wrapped)).indices) == list(range(5, 12))
    weights = [1.0] * 5 + [0.0] * 15
    weighted = DataLoader(NUMBERS, batch_size=4, sampler=WeightedRandomSampler(weights, 50))
    assert sorted(collected(weighted).indices) == list(range(5))


def test_batches_of_the_users_own_making_stay_whole() -> None:
    pairs = BatchSampler(SequentialSampler(NUMBERS), batch_size=3, drop_last=False)
    held_out = collected(DataLoader(NUMBERS, batch_sampler=Own(pairs)))
    assert {len(batch) for batch in held_out.batches} <= {3, 2}
    assert all(batch.flatten().diff().eq(1).all() for batch in held_out.batches)
    assert held_out.num_samples >= 10


class Own(torch.utils.data.Sampler):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


def test_an_endless_sampler_is_not_followed_to_its_end() -> None:
    class Endless(torch.utils.data.Sampler):
        def __iter__(self) -> Any:
            while True:
                yield random.randrange(20)

    held_out = collected(DataLoader(NUMBERS, batch_size=4, sampler=Endless()))
    assert held_out.num_samples == 10


def test_a_data_set_that_forms_its_own_batches() -> None:
    class Batches(Dataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> torch.Tensor:
            return NUMBERS[4 * index : 4 * index + 4]

    held_out = collected(DataLoader(Batches(), batch_size=None))
    assert [len(batch) for batch in held_out.batches] == [4, 4, 4]
    assert held_out.num_samples == 12


class Augmented(Dataset):
    """Random in all three global generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [random.random(), np.random.rand(), float(torch.rand(()))]
        return torch.tensor([index, *noise])


def test_augmentation_is_fixed_by_sample_and_seed() -> None:
    one = torch.cat(collected(DataLoader(Augmented(), batch_size=4), num_samples=20).batches)
    other = torch.cat(collected(DataLoader(Augmented(), batch_size=7, shuffle=True), num_samples=20).batches)
    fewer = torch.cat(collected(DataLoader(Augmented(), batch_size=4), num_samples=6).batches)
    table = {int(row[0]): row for row in one}
    for row in [*other, *fewer]:
        assert torch.equal(row, table[int(row[0])])
    assert len({float(row[1]) for row in one}) == len({float(row[2]) for row in one}) == 20
    again = torch.cat(collected(DataLoader(Augmented(), batch_size=4), num_samples=20, seed=1).batches)
    assert not torch.equal(one[one[:, 0].argsort()], again[again[:, 0].argsort()])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(NUMBERS)


@pytest.mark.parametrize(
    ("loader", "sizes"),
    [
        (DataLoader(Stream(), batch_size=4), [4, 4, 4]),
        (DataLoader(Stream(), batch_size=4, num_workers=2, persistent_workers=True), [4, 4, 4]),
        ([NUMBERS[:8], NUMBERS[8:]], [8, 12]),
    ],
    ids=["stream", "workers", "list"],
)
def test_the_beginning_of_a_stream(loader: Any, sizes: list[int]) -> None:
    held_out = collected(loader)
    assert [len(batch) for batch in held_out.batches] == sizes
    assert held_out.indices is None
    assert values(held_out) == [float(i) for i in range(sum(sizes))]
    assert held_out.num_samples == sum(sizes)
    if isinstance(loader, DataLoader):
        assert loader._iterator is None


def test_several_loaders_one_after_the_other() -> None:
    loaders = [LOADERS["in order"], DataLoader(-NUMBERS, batch_size=4)]
    with pytest.warns(UserWarning, match="Pass dataloader=my_loader to choose another"):
        held_out = collected(loaders, first_only=True)
    assert min(values(held_out)) >= 0
    combined = CombinedLoader({"only": LOADERS["in order"]}, "sequential")
    assert collected(combined).indices == collected(LOADERS["in order"]).indices


def test_several_loaders_side_by_side() -> None:
    structure = {"a": LOADERS["in order"], "b": DataLoader(-NUMBERS, batch_size=4)}
    held_out = collected(CombinedLoader(structure, "max_size_cycle"), mode="max_size_cycle")
    assert [{key: len(part) for key, part in batch.items()} for batch in held_out.batches] == [
        {"a": 4, "b": 4},
        {"a": 4, "b": 4},
        {"a": 2, "b": 2},
    ]
    wrapped = collected([LOADERS["in order"]], mode="max_size_cycle")
    assert isinstance(wrapped.batches[0], list)


def test_reading_changes_nothing_of_the_users() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(NUMBERS, batch_size=4, sampler=RandomSampler(NUMBERS, generator=generator))
    before = generator.get_state(), random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    collected(loader)
    assert torch.equal(generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert np.array_equal(np.random.get_state()[1], before[3])


# -- weights and hands ---------------------------------------------------------------------------------------


def test_no_clear_number_of_samples() -> None:
    with pytest.raises(SampleError, match=r"Pass batch_weight=.*counted tokens"):
        collected([["a"], ["b"]])


def test_weights_of_the_users() -> None:
    held_out = collected(LOADERS["in order"], batch_weight=lambda batch: float((batch > 9).sum()))
    assert held_out.weights == [float((batch > 9).sum()) for batch in held_out.batches]
    with pytest.raises(SampleError, match="weights of all sample batches are zero"):
        collected(LOADERS["in order"], batch_weight=lambda batch: 0)


@given(st.lists(st.floats(0, 100), max_size=40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_batch_is_dealt_once_and_evenly(weights: list[float], num_hands: int) -> None:
    hands = assign_to_ranks(weights, num_hands)
    assert sorted(number for hand in hands for number in hand) == list(range(len(weights)))
    loads = [sum(weights[number] for number in hand) for hand in hands]
    if weights:
        # No hand is heavier than the mean by more than one batch.
        assert max(loads) <= sum(weights) / num_hands + max(weights) + 1e-9


def test_an_uneven_deal_is_measured() -> None:
    held_out = collected(LOADERS["in order"])
    assert held_out.imbalance == 0
    assert type(held_out)(**{**vars(held_out), "shares": (3.0, 1.0)}).imbalance == pytest.approx(0.5)
