"""Tests of the choice of samples: that of an epoch, reproducible, assigned to ranks evenly."""

from __future__ import annotations

import csv
import multiprocessing
import queue
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from hessian_callback.measurement.errors import SampleError
from hessian_callback.measurement.loaders import combination_of
from hessian_callback.measurement.samples import assign_to_ranks, collect
from hessian_callback.measurement.state_guard import preserve_random_state
from tests.helpers.installed import installed
from tests.helpers.lightning import CombinedLoader, DistributedSamplerWrapper

NUMBERS = torch.arange(20.0).reshape(20, 1)


def collected(loader: Any, **options: Any) -> Any:
    with preserve_random_state():
        return collect(loader, **{"num_samples": 10, **options})


def values(samples: Any) -> list[float]:
    return [float(value) for batch in samples.batches for value in batch.flatten()]


LOADERS = {
    "in order": DataLoader(NUMBERS, batch_size=4),
    "shuffled": DataLoader(NUMBERS, batch_size=4, shuffle=True),
    "own generator": DataLoader(NUMBERS, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "distributed": DataLoader(NUMBERS, batch_size=4, sampler=DistributedSampler(NUMBERS, num_replicas=3, rank=1)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_size_of_the_batches_changes_nothing_else(name: str) -> None:
    reference = collected(LOADERS[name], seed=5)
    samples = collected(LOADERS[name], seed=5, batch_size=7)
    assert [len(batch) for batch in samples.batches] == [7, 3]
    assert values(samples) == values(reference)
    assert samples.weights == [7.0, 3.0]


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
    samples = collected(LOADERS[name], seed=5)
    assert samples.indices == reference.indices
    assert [len(batch) for batch in samples.batches] == [4, 4, 2]
    assert values(samples) == [float(i) for i in samples.indices]
    assert samples.weights == [4.0, 4.0, 2.0]
    assert len(set(samples.indices)) == 10
    assert samples.indices != collected(LOADERS[name], seed=6).indices


def test_a_sorted_data_set_gives_all_classes() -> None:
    labels = torch.arange(1000) // 100
    samples = collected(DataLoader(TensorDataset(labels), batch_size=32), num_samples=100)
    assert set(torch.cat([batch[0] for batch in samples.batches]).tolist()) == set(range(10))


def test_all_are_used_where_there_are_fewer() -> None:
    samples = collected(LOADERS["in order"], num_samples=1000)
    assert sorted(samples.indices) == list(range(20))
    assert samples.num_samples == 20


def test_a_sampler_limits_the_population() -> None:
    subset = DataLoader(NUMBERS, batch_size=4, sampler=SubsetRandomSampler(range(5, 12)))
    assert sorted(collected(subset).indices) == list(range(5, 12))
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler(range(5, 12)), num_replicas=2, rank=1)
    assert sorted(collected(DataLoader(NUMBERS, batch_size=4, sampler=wrapped)).indices) == list(range(5, 12))
    weights = [1.0] * 5 + [0.0] * 15
    weighted = DataLoader(NUMBERS, batch_size=4, sampler=WeightedRandomSampler(weights, 50))
    assert set(collected(weighted, num_samples=50).indices) == set(range(5))


def test_batches_of_the_users_own_making_stay_whole() -> None:
    pairs = BatchSampler(SequentialSampler(NUMBERS), batch_size=3, drop_last=False)
    samples = collected(DataLoader(NUMBERS, batch_sampler=Own(pairs)))
    assert {len(batch) for batch in samples.batches} <= {3, 2}
    assert all(batch.flatten().diff().eq(1).all() for batch in samples.batches)
    assert samples.num_samples >= 10


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

    samples = collected(DataLoader(NUMBERS, batch_size=4, sampler=Endless()))
    assert samples.num_samples == 10


def test_a_data_set_that_forms_its_own_batches() -> None:
    class Batches(Dataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> torch.Tensor:
            return NUMBERS[4 * index : 4 * index + 4]

    samples = collected(DataLoader(Batches(), batch_size=None))
    assert [len(batch) for batch in samples.batches] == [4, 4, 4]
    assert samples.num_samples == 12


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
    samples = collected(loader)
    assert [len(batch) for batch in samples.batches] == sizes
    assert samples.indices is None
    assert values(samples) == [float(i) for i in range(sum(sizes))]
    assert samples.num_samples == sum(sizes)
    if isinstance(loader, DataLoader):
        assert loader._iterator is None


def test_several_loaders_one_after_the_other() -> None:
    loaders = [LOADERS["in order"], DataLoader(-NUMBERS, batch_size=4)]
    with pytest.warns(UserWarning, match="Pass dataloader=my_loader to choose another"):
        samples = collected(loaders, first_only=True)
    assert min(values(samples)) >= 0
    combined = CombinedLoader({"only": LOADERS["in order"]}, "sequential")
    assert collected(combined).indices == collected(LOADERS["in order"]).indices


def test_several_loaders_side_by_side() -> None:
    structure = {"a": LOADERS["in order"], "b": DataLoader(-NUMBERS, batch_size=4)}
    samples = collected(CombinedLoader(structure, "max_size_cycle"), mode="max_size_cycle")
    assert [{key: len(part) for key, part in batch.items()} for batch in samples.batches] == [
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


# -- what an epoch takes -----------------------------------------------------------------------------


class Fixed(torch.utils.data.Sampler):
    """A sampler of a kind that nobody knows, with its draws written down."""

    def __init__(self, indices: list[Any]) -> None:
        self.indices = indices

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


@pytest.mark.parametrize("option", [None, 3])
def test_drop_last_leaves_full_batches_only(option: int | None) -> None:
    size = option or 4
    loader = DataLoader(NUMBERS[:18], batch_size=4, drop_last=True, shuffle=True)
    for num_samples in (1, 10, 1000):
        samples = collected(loader, num_samples=num_samples, batch_size=option)
        assert {len(batch) for batch in samples.batches} == {size}
        expected = min(-(-num_samples // size), 18 // size) * size
        assert samples.num_samples == len(set(samples.indices)) == expected


def test_drop_last_in_a_fixed_order_never_reaches_the_end() -> None:
    in_order = DataLoader(NUMBERS[:18], batch_size=4, drop_last=True)
    assert sorted(collected(in_order, num_samples=1000).indices) == list(range(16))
    with pytest.raises(SampleError, match="gives no sample"):
        collected(DataLoader(NUMBERS[:3], batch_size=4, drop_last=True))


def test_draws_with_repetition_keep_their_multiplicity() -> None:
    loader = DataLoader(NUMBERS, batch_size=2, sampler=Fixed([3, 3, 7, 3, 3]))
    assert sorted(collected(loader).indices) == [3, 3, 3, 3, 7]
    assert sorted(values(collected(loader))) == [3, 3, 3, 3, 7]


def test_a_weighted_sampler_gives_its_distribution() -> None:
    weights = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64)
    loader = DataLoader(NUMBERS[:3], batch_size=100, sampler=WeightedRandomSampler(weights, 20_000))
    drawn = torch.bincount(torch.tensor(collected(loader, num_samples=4000).indices), minlength=3) / 4000
    assert torch.all((drawn - weights).abs() < 4 * (weights * (1 - weights) / 4000).sqrt())


def test_repeated_draws_of_a_sample_are_augmented_differently() -> None:
    rows = torch.cat(collected(DataLoader(Augmented(), batch_size=4, sampler=Fixed([5, 5, 5]))).batches)
    assert rows[:, 0].tolist() == [5, 5, 5]
    assert len({float(row[1]) for row in rows}) == 3
    again = torch.cat(collected(DataLoader(Augmented(), batch_size=2, sampler=Fixed([5, 5, 5]))).batches)
    assert torch.equal(rows, again)


class NumpyDraws(Fixed):
    def __init__(self) -> None:
        self.generator = np.random.default_rng(1)

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Any:
        return iter(self.generator.integers(0, 20, 40).tolist())


@pytest.mark.parametrize(
    "sampler",
    [WeightedRandomSampler([1.0] * 20, 40, generator=torch.Generator().manual_seed(1)), NumpyDraws()],
    ids=["torch", "numpy"],
)
def test_a_sampler_with_a_generator_of_its_own_draws_by_the_seed(sampler: Any) -> None:
    loader = DataLoader(NUMBERS, batch_size=4, sampler=sampler)
    first = collected(loader).indices
    expected = list(sampler)  # moves the generator
    assert collected(loader).indices == first
    assert collected(loader, seed=1).indices != first
    # Collecting, in turn, does not move it.
    fresh = NumpyDraws() if isinstance(sampler, NumpyDraws) else None
    if fresh is not None:
        collected(DataLoader(NUMBERS, batch_size=4, sampler=fresh))
        assert list(fresh) == expected


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(NUMBERS, batch_size=4), range(8)),
        (DataLoader(NUMBERS, batch_size=4, shuffle=True), None),
        (DataLoader(NUMBERS, batch_size=4, sampler=Fixed(list(range(19, -1, -1)))), range(12, 20)),
        (DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 4, drop_last=False)), range(8)),
        (DataLoader(NUMBERS, batch_size=None), range(2)),
        (
            DataLoader(
                NUMBERS, batch_size=4, sampler=DistributedSampler(NUMBERS, num_replicas=2, rank=1, shuffle=False)
            ),
            range(16),
        ),
        ([NUMBERS[:4], NUMBERS[4:8], NUMBERS[8:]], range(8)),
    ],
    ids=["in order", "shuffled", "own order", "batch sampler", "no batches", "distributed", "stream"],
)
def test_an_epoch_that_is_cut_short(loader: Any, expected: Any) -> None:
    combination = replace(combination_of(loader), limits=(2.0,))
    found = sorted(values(collected(combination, num_samples=1000)))
    assert found == [float(number) for number in (range(20) if expected is None else expected)]


def test_overfitting_takes_the_first_batches_of_a_shuffled_loader() -> None:
    shuffled = DataLoader(NUMBERS, batch_size=4, shuffle=True)
    combination = replace(combination_of(shuffled), limits=(2.0,), in_order=True)
    assert sorted(values(collected(combination, num_samples=1000))) == list(range(8))


class Rows(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: Any) -> torch.Tensor:
        return NUMBERS[index]


@pytest.mark.parametrize("inner", [SequentialSampler(NUMBERS), RandomSampler(NUMBERS)], ids=["in order", "shuffled"])
def test_a_sampler_of_whole_batches(inner: Any) -> None:
    loader = DataLoader(Rows(), sampler=BatchSampler(inner, 5, drop_last=False), batch_size=None)
    samples = collected(loader, num_samples=1000)
    assert [len(batch) for batch in samples.batches] == [5, 5, 5, 5]
    assert sorted(values(samples)) == list(range(20))
    assert sorted(samples.indices) == list(range(20))
    assert collected(loader).num_samples == 10


def test_a_data_set_that_loads_in_bulk_is_asked_for_a_batch() -> None:
    class Bulk(Rows):
        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            assert all(type(index) is int for index in indices)
            return [-NUMBERS[index] for index in indices]

    for data in (Bulk(), Subset(Subset(Bulk(), range(20)), range(20))):
        assert sorted(values(collected(DataLoader(data, batch_size=4), num_samples=20))) == list(range(-19, 1))
    plain = DataLoader(Subset(Augmented(), range(20)), batch_size=4)
    one, other = collected(plain, num_samples=20), collected(plain, num_samples=20, batch_size=7)
    assert torch.equal(torch.cat(one.batches), torch.cat(other.batches))


class Halving(DataLoader):
    """A loader that preprocesses in its own iteration."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch / 2


class Around:
    """An iterable around a loader, of no class that torch has."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.epochs = 0

    def __iter__(self) -> Any:
        self.epochs += 1
        return (batch / 2 for batch in self.loader)


class OtherIterator(DataLoader):
    def _get_iterator(self) -> Any:
        return iter([batch / 2 for batch in NUMBERS.split(4)])


@pytest.mark.parametrize(
    "loader",
    [Halving(NUMBERS, batch_size=4), Around(DataLoader(NUMBERS, batch_size=4)), OtherIterator(NUMBERS, batch_size=4)],
    ids=["subclass", "wrapper", "iterator"],
)
def test_a_loader_that_iterates_in_its_own_way_is_iterated(loader: Any) -> None:
    samples = collected(loader)
    assert values(samples) == [number / 2 for number in range(12)]
    with pytest.raises(SampleError, match="batch_size is given, but"):
        collected(loader, batch_size=3)


@pytest.mark.parametrize("make", [Halving, lambda *a, **k: Around(DataLoader(*a, **k))], ids=["subclass", "wrapper"])
def test_iterating_a_loader_leaves_workers_of_another_iteration_alone(make: Any) -> None:
    loader = make(NUMBERS, batch_size=4, num_workers=1, persistent_workers=True)
    iterator = iter(loader)
    seen = [next(iterator)]
    assert values(collected(loader)) == [number / 2 for number in range(12)]
    seen += list(iterator)
    assert torch.equal(torch.cat(seen), NUMBERS / 2)
    if isinstance(loader, Around):
        assert loader.epochs == 1


# -- several loaders ---------------------------------------------------------------------------------


def parts(batch: Any) -> tuple[Any, ...]:
    """Of which loader each part is (its hundreds), and which are missing."""
    return tuple(None if part is None else int(part.flatten()[0]) // 100 for part in batch)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=2, max_size=3),
    mode=st.sampled_from(["min_size", "max_size", "max_size_cycle", "sequential"]),
)
@settings(max_examples=80, deadline=None)
def test_a_combination_is_sampled_as_its_epoch_runs(sizes: list[tuple[int, int]], mode: str) -> None:
    loaders = [
        DataLoader(100 * number + torch.arange(num).reshape(num, 1), batch_size=batch_size)
        for number, (num, batch_size) in enumerate(sizes)
    ]
    combined = CombinedLoader(loaders, mode)
    epoch = [batch for batch, _, _ in combined]
    if mode == "sequential":
        epoch = [[batch] for batch in epoch]
    samples = collected(combined, num_samples=10_000, batch_weight=lambda batch: 1.0)
    found = [[batch] for batch in samples.batches] if mode == "sequential" else samples.batches
    assert Counter(map(parts, found)) == Counter(map(parts, epoch))
    # The same samples, as often as the epoch has them.
    for number in range(len(sizes) if mode != "sequential" else 1):
        one, other = (
            Counter(int(value) for batch in some if batch[number] is not None for value in batch[number].flatten())
            for some in (found, epoch)
        )
        assert set(one) == set(other)
        if mode != "max_size_cycle":
            assert one == other


def test_a_part_of_a_long_combination_keeps_its_proportions() -> None:
    long, short = DataLoader(torch.zeros(4000, 1), batch_size=4), DataLoader(torch.ones(1000, 1), batch_size=4)
    samples = collected(CombinedLoader([long, short], "max_size"), num_samples=1600, batch_weight=lambda b: 1.0)
    share = sum(batch[1] is not None for batch in samples.batches) / len(samples.batches)
    assert len(samples.batches) == 400
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    ones = torch.cat(collected(CombinedLoader([long, short], "sequential"), num_samples=1600).batches).mean()
    assert abs(float(ones) - 0.2) < 4 * (0.2 * 0.8 / 400) ** 0.5


def test_the_limits_of_a_combination_count() -> None:
    combined = CombinedLoader(
        [DataLoader(NUMBERS, batch_size=4), DataLoader(100 + NUMBERS, batch_size=4)], "sequential"
    )
    combined.limits = [1, 2]
    iter(combined)
    assert sorted(values(collected(combined, num_samples=100))) == [*range(4), *range(100, 108)]


def test_a_stream_among_several_loaders_is_refused() -> None:
    with pytest.raises(SampleError, match=r"one is a stream or iterates in its own way; pass dataloader=my_loader"):
        collected({"a": LOADERS["in order"], "b": DataLoader(Stream(), batch_size=4)}, mode="min_size")
    only = collected({"a": DataLoader(Stream(), batch_size=4)}, mode="max_size_cycle")
    assert list(only.batches[0]) == ["a"]


# -- streams that continue where they were --------------------------------------------------------------


class Holds(IterableDataset):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Any:
        return iter(NUMBERS)


class Inside:
    def __init__(self, value: Any) -> None:
        self.value = {"reader": [value]}


SOURCES = {
    "generator": lambda path: (number for number in range(3)),
    "file": lambda path: Path.open(path),
    "binary file": lambda path: Path.open(path, "rb"),
    "csv": lambda path: csv.reader(["1,2"]),
    "queue": lambda path: queue.Queue(),
    "simple queue": lambda path: multiprocessing.SimpleQueue(),
    "pipe": lambda path: multiprocessing.Pipe()[0],
    "map": lambda path: map(int, "123"),
    "iterator of a loader": lambda path: iter(DataLoader(NUMBERS)),
    "nested": lambda path: Inside(iter([1, 2])),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_stream_with_a_position_is_not_read_if_the_run_reads_it_too(name: str, tmp_path: Any) -> None:
    path = tmp_path / "rows"
    path.write_text("1\n2\n")
    loader = DataLoader(Holds(SOURCES[name](path)), batch_size=4)
    with pytest.raises(SampleError, match=r"reads on from its dataset.source.*pass dataloader=my_loader, a separate"):
        collected(loader, shared=True)
    wrapped = Around(loader)
    with pytest.raises(SampleError, match=r"its loader.dataset.source"):
        collected(wrapped, shared=True)
    assert collected(loader).num_samples == 12


def test_streams_that_start_anew_are_read(tmp_path: Any) -> None:
    path = tmp_path / "rows"
    path.write_text("1\n")
    with open(path) as closed:
        pass
    for source in (3, path, closed, Path.open(path, "a"), {"cache": {}}, torch.Generator(), Inside("text"), {1: int}):
        assert collected(DataLoader(Holds(source), batch_size=4), shared=True).num_samples == 12
    with open(path) as file:
        rows = Rows()
        rows.file = file  # type: ignore[attr-defined]  # random access, by position
        assert collected(DataLoader(rows, batch_size=4), shared=True).num_samples == 10


def test_a_loader_that_keeps_an_iterator_running_is_refused() -> None:
    class Endless(DataLoader):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.running = super().__iter__()

        def __iter__(self) -> Any:
            return self.running

    with pytest.raises(SampleError, match="reads on from its running"):
        collected(Endless(NUMBERS, batch_size=4), shared=True)
    with pytest.raises(SampleError, match="is an iterator"):
        collected(iter([NUMBERS]))


LIBRARY = """
import itertools
class Slice:
    def __init__(self, iterable, length):
        self.iterable, self.length = iterable, length
    def __iter__(self):
        return itertools.islice(self.iterable, self.length)
class Steady:
    def __init__(self, rows):
        self.inner, self.batch_size = [Slice(rows, 4)], 4
    def __iter__(self):
        return iter(self.inner[0])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with installed(tmp_path_factory.mktemp("lib"), "loaders_of_a_test", LIBRARY) as module:
        yield module


def test_a_loader_of_a_library_that_reads_on_is_refused(library: Any) -> None:
    batches = [NUMBERS[:4], NUMBERS[4:8], NUMBERS[8:12]]
    for source in (iter(batches), map(list, batches), (batch for batch in batches)):
        for loader, place in ((library.Slice(source, 2), "its iterable"), (library.Steady(source), "its inner")):
            with pytest.raises(SampleError, match=f"reads on from {place}.*separate DataLoader"):
                collected(loader, shared=True)
    assert collected(library.Slice(batches, 2), shared=True).num_samples == 8
    assert collected(library.Steady(batches), shared=True).num_samples == 12


# -- workers -----------------------------------------------------------------------------------------


class NeedsWorker(IterableDataset):
    def __iter__(self) -> Any:
        info = get_worker_info()
        return iter(NUMBERS[info.id :: info.num_workers])


class NeedsWorkerToo(Rows):
    def __getitem__(self, index: Any) -> torch.Tensor:
        info = get_worker_info()
        assert info.dataset is self
        return NUMBERS[index] + info.id


def test_a_stream_that_needs_a_worker_gets_the_information_of_one() -> None:
    for data in (NeedsWorker(), NeedsWorkerToo()):
        samples = collected(DataLoader(data, batch_size=4, num_workers=2), num_samples=1000)
        assert sorted(values(samples)) == list(range(20))
        assert get_worker_info() is None
        # A loader without workers has no such information in training either.
        with pytest.raises(SampleError, match="AttributeError"):
            collected(DataLoader(data, batch_size=4), num_samples=1000)
        assert get_worker_info() is None


# -- errors of the user's data -----------------------------------------------------------------------


def failing(error: BaseException) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [KeyError("labels"), RuntimeError("size"), AssertionError(), NotImplementedError("x")]
)
def test_errors_of_the_users_code_become_sample_errors(error: Exception) -> None:
    class Data(Rows):
        __getitem__ = failing(error)

    class Broken(IterableDataset):
        __iter__ = failing(error)

    class BrokenSampler(Fixed):
        __iter__ = failing(error)

    for loader, options in (
        (DataLoader(Data()), {}),
        (DataLoader(NUMBERS, collate_fn=failing(error)), {}),
        (DataLoader(Broken()), {}),
        (DataLoader(NUMBERS, sampler=BrokenSampler([1])), {}),
        (LOADERS["in order"], {"batch_weight": failing(error)}),
        (DataLoader(Stream()), {"batch_weight": failing(error)}),
    ):
        with pytest.raises(SampleError, match=type(error).__name__) as caught:
            collected(loader, **options)
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_errors_that_may_pass_keep_their_type(error: Exception) -> None:
    class Data(Rows):
        __getitem__ = failing(error)

    with pytest.raises(type(error)):
        collected(DataLoader(Data()))


def test_batches_of_any_class_are_detached_and_on_the_cpu() -> None:
    @dataclass
    class Own:
        x: torch.Tensor

    def collate(rows: list[torch.Tensor]) -> Own:
        return Own(torch.stack(rows).requires_grad_())

    samples = collected(DataLoader(NUMBERS, batch_size=5, collate_fn=collate))
    assert [type(batch) for batch in samples.batches] == [Own, Own]
    assert not any(batch.x.requires_grad for batch in samples.batches)


# -- weights and ranks -------------------------------------------------------------------------------


def test_no_clear_number_of_samples() -> None:
    with pytest.raises(SampleError, match=r"Pass batch_weight=.*counted tokens"):
        collected([["a"], ["b"]])


def test_weights_of_the_users() -> None:
    samples = collected(LOADERS["in order"], batch_weight=lambda batch: float((batch > 9).sum()))
    assert samples.weights == [float((batch > 9).sum()) for batch in samples.batches]
    with pytest.raises(SampleError, match="weights of all sample batches are zero"):
        collected(LOADERS["in order"], batch_weight=lambda batch: 0)


@given(st.lists(st.floats(0, 100), max_size=40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_batch_is_assigned_once_and_evenly(weights: list[float], num_ranks: int) -> None:
    assigned = assign_to_ranks(weights, num_ranks)
    assert sorted(number for numbers in assigned for number in numbers) == list(range(len(weights)))
    loads = [sum(weights[number] for number in numbers) for numbers in assigned]
    if weights:
        # No rank's total exceeds the mean by more than one batch.
        assert max(loads) <= sum(weights) / num_ranks + max(weights) + 1e-9


def test_imbalance_is_the_excess_of_the_largest_share() -> None:
    samples = collected(LOADERS["in order"])
    assert samples.imbalance == 0
    assert type(samples)(**{**vars(samples), "shares": (3.0, 1.0)}).imbalance == pytest.approx(0.5)
