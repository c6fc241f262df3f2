"""The samples that a Hessian is taken on: the same ones at every measurement, for any number of ranks.

The samples are chosen from the seed and the data alone, and assigned to the ranks afterwards. They have the
distribution that an epoch of the loader has: its sampler, its order, its batches and its own preprocessing count.
Padding added by distributed samplers is removed. Random augmentation is seeded per sample.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.batch_copies import map_tensors
from hessian_callback.measurement.errors import SampleError, sample_errors
from hessian_callback.measurement.loaders import (
    Combination,
    check_starts_anew,
    closing_after,
    combination_of,
    fresh_iterator,
    iterates_as_torch,
    single_worker,
)
from hessian_callback.operators.batches import leading_dimension

__all__ = ["SampleSet", "assign_to_ranks", "collect", "seed_global_generators"]

BatchWeight = Callable[[Any], float]

_OWN_BATCHES = (
    "batch_size is given, but the batches come from a stream, or from a batch sampler or a data set that makes them in "
    "its own way; set their size there, or pass dataloader=my_loader with a batch_size of its own"
)


@dataclass(frozen=True)
class SampleSet:
    """One rank's share of the samples, on the CPU.

    Attributes:
        batches: this rank's batches.
        weights: the weight of each batch in the mean over the batches of all ranks.
        keys: a number for each batch that no other batch on any rank has.
        num_samples: samples over all ranks.
        num_batches: batches over all ranks.
        shares: the total weight that each rank holds.
        indices: the indices of the samples in the data set, over all ranks; ``None`` for a stream or several loaders.
    """

    batches: list[Any]
    weights: list[float]
    keys: list[int]
    num_samples: int
    num_batches: int
    shares: tuple[float, ...]
    indices: tuple[Any, ...] | None

    @property
    def imbalance(self) -> float:
        """Excess of the busiest rank's share over the mean, relative to the mean; 0.0 if all shares are equal."""
        return max(self.shares) * len(self.shares) / sum(self.shares) - 1

    @property
    def counted(self) -> SampleSet:
        """The same samples without the batches of weight zero, which no mean contains."""
        kept = [number for number, weight in enumerate(self.weights) if weight > 0]
        return replace(
            self,
            batches=[self.batches[number] for number in kept],
            weights=[self.weights[number] for number in kept],
            keys=[self.keys[number] for number in kept],
        )


@dataclass(frozen=True)
class _Group:
    """A batch that is not loaded yet."""

    key: int
    size: int
    load: Callable[[], Any]
    indices: tuple[Any, ...] | None


@dataclass(frozen=True)
class _Plan:
    """Batches chosen from one loader, in random order, and how many an epoch has over all ranks."""

    groups: list[_Group]
    num_batches: int


# -- collecting --------------------------------------------------------------------------------------


def collect(
    loader: Any,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int | None = None,
    batch_weight: BatchWeight | None = None,
    ranks: Ranks | None = None,
    mode: str = "sequential",
    first_only: bool = False,
    shared: bool = False,
) -> SampleSet:
    """Choose samples of a loader, assign them to the ranks, and load this rank's share.

    From a map-style data set a random subset is drawn with the seed, of the samples that the sampler draws, as often
    as it draws them. Its batches have the loader's size and are collated by the loader's function; with ``drop_last``
    all of them are full. Batches of a batch sampler, or of a data set that makes its own, are used whole. If the
    loader takes its samples in a fixed order and an epoch has a limited number of batches, only these are used.

    From an ``IterableDataset``, any other iterable, and a ``DataLoader`` whose class iterates in its own way, the
    first batches of an epoch are used: each rank takes those of its own stream.

    All samples are loaded in this process, one after the other, with the global random generators seeded for
    each. If the loader has worker processes, `torch.utils.data.get_worker_info` describes a single worker meanwhile.

    Call it on all ranks, and restore the global random generators, which it seeds, afterwards.

    Args:
        loader: a ``DataLoader``, an iterable of batches, a list, tuple or dictionary of those, a ``CombinedLoader``,
            or a `Combination`.
        num_samples: how many samples to use, over all ranks. If there are fewer, all are used; whole batches may
            give more.
        seed: chooses the samples and fixes their augmentation.
        batch_size: samples in a batch, instead of the loader's own number.
        batch_weight: the weight of a batch in the mean; default: its leading dimension.
        ranks: the processes that share the samples; default: this process alone.
        mode: how several loaders are combined; see `Combination`.
        first_only: whether only the first of several sequential loaders is used.
        shared: whether the loader is also read by someone else, so that a stream that can't start anew, such as an
            open file, must not be read.

    Returns:
        This rank's share.

    Raises:
        SampleError: if there are no samples, a batch's weight is not clear, ``batch_size`` is given for batches that
            the loader or the data set makes in its own way, or samples can't be taken without using them up.
        PeerError: if collecting failed on another rank.

    Example:
        >>> data = torch.arange(10.0).reshape(10, 1)
        >>> samples = collect(DataLoader(data, batch_size=4), num_samples=6)
        >>> [len(batch) for batch in samples.batches], samples.weights, samples.num_samples
        ([4, 2], [4.0, 2.0], 6)
        >>> samples.indices == collect(DataLoader(data, batch_size=4), num_samples=6).indices
        True
    """
    ranks = ranks or Ranks()
    weigh = batch_weight or _num_samples
    with ranks.propagate_errors("choosing the samples"):
        combination = combination_of(loader, mode)
        if first_only and combination.mode == "sequential" and len(combination.loaders) > 1:
            combination = _first_of(combination, ranks)
        groups = _groups(combination, num_samples, seed, batch_size)
        if groups is None and batch_size is not None:
            raise SampleError(_OWN_BATCHES)
    if groups is None:
        return _collect_stream(combination, num_samples, seed, weigh, ranks, shared=shared)

    _check_equal_choices(groups, combination, ranks)
    alone = len(combination.loaders) == 1
    return _checked(_loaded(groups, weigh, ranks, indexed=alone), combination)


def _check_equal_choices(groups: Sequence[_Group], combination: Combination, ranks: Ranks) -> None:
    """Check that all ranks chose the same samples, of which each then takes its share."""
    # Were the choices different, the ranks would hold other batches than they were assigned.
    choice = zlib.crc32(repr([group.indices for group in groups]).encode())
    choices = _agreed(ranks, torch.tensor([float(len(groups)), float(choice)], dtype=torch.float64, device="cpu"))
    if bool((choices != choices[0]).any()):
        raise SampleError(
            "the ranks would choose different samples, because their data sets differ or a sampler "
            "of the run's own shards them; pass dataloader=my_loader, one over the whole data set on every "
            "rank, or over an IterableDataset, of which each rank takes its own part"
        )
    if not groups:
        raise SampleError(_empty(combination))


def _loaded(groups: Sequence[_Group], weigh: BatchWeight, ranks: Ranks, *, indexed: bool) -> SampleSet:
    """Load this rank's share of the chosen batches."""
    loaded: dict[int, tuple[Any, float]] = {}

    def load(numbers: Iterable[int]) -> None:
        with ranks.propagate_errors("loading the samples"):
            for number in numbers:
                if number not in loaded:
                    batch = groups[number].load()
                    loaded[number] = batch, _checked_weight(weigh, batch)

    assigned = assign_to_ranks([float(group.size) for group in groups], ranks.world_size)
    load(assigned[ranks.rank])
    weights = torch.zeros(len(groups), dtype=torch.float64, device=ranks.control_device)
    for number in assigned[ranks.rank]:
        weights[number] = loaded[number][1]
    all_weights = ranks.all_reduce(weights).tolist()
    # Sizes only estimate the work. Weights, such as numbers of tokens, are a better measure of it.
    assigned = assign_to_ranks(all_weights, ranks.world_size)
    load(assigned[ranks.rank])

    mine = assigned[ranks.rank]
    chosen = [group.indices for group in groups]
    return SampleSet(
        batches=[loaded[number][0] for number in mine],
        weights=[loaded[number][1] for number in mine],
        keys=[groups[number].key for number in mine],
        num_samples=sum(group.size for group in groups),
        num_batches=len(groups),
        shares=tuple(sum(all_weights[number] for number in numbers) for numbers in assigned),
        indices=tuple(i for part in chosen for i in part or ()) if indexed and None not in chosen else None,
    )


def assign_to_ranks(weights: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Assign weighted batches to ranks so that the largest total is small: largest first, to the lightest rank.

    Args:
        weights: weight of each batch.
        num_ranks: how many ranks.

    Returns:
        For each rank the numbers of its batches, ascending. A rank may have none.

    Example:
        >>> assign_to_ranks([3.0, 3.0, 2.0, 2.0, 2.0], 2)
        [[0, 2, 4], [1, 3]]
    """
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for number in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        assigned[lightest].append(number)
        loads[lightest] += weights[number]
    return [sorted(numbers) for numbers in assigned]


# -- several loaders ---------------------------------------------------------------------------------


def _first_of(combination: Combination, ranks: Ranks) -> Combination:
    if ranks.rank == 0:
        warnings.warn(
            f"there are {len(combination.loaders)} validation loaders; the Hessian is measured on samples of the "
            "first. Pass dataloader=my_loader to choose another",
            stacklevel=3,
        )
    limits = None if combination.limits is None else combination.limits[:1]
    return replace(combination, loaders=combination.loaders[:1], limits=limits)


def _groups(combination: Combination, num_samples: int, seed: int, batch_size: int | None) -> list[_Group] | None:
    """Return the chosen batches over all ranks, not loaded; ``None`` if they come from a stream."""
    loaders = combination.loaders
    if not loaders:
        raise SampleError(_empty(combination))
    plans = [
        _plan(leaf, num_samples, seed, batch_size, combination.limit(number), in_order=combination.in_order)
        for number, leaf in enumerate(loaders)
    ]
    if len(plans) == 1:
        plan = plans[0]
        return None if plan is None else [_combined(combination, [group], group.key) for group in plan.groups]
    known = [plan for plan in plans if plan is not None]
    if len(known) < len(plans):
        raise SampleError(
            "the batches combine several loaders, of which one is a stream or iterates in its own way; pass "
            "dataloader=my_loader, one loader that yields what the loss takes"
        )
    shuffled = random.Random(f"combined samples {seed}")
    counts = [plan.num_batches if plan.groups else 0 for plan in known]
    if combination.mode == "min_size":
        # The end of a longer loader is never reached.
        replicas = [_num_replicas(getattr(leaf, "sampler", None)) for leaf in loaders]
        limits = tuple(min(combination.limit(n), math.ceil(min(counts) / replicas[n])) for n in range(len(loaders)))
        if limits != combination.limits:
            return _groups(replace(combination, limits=limits), num_samples, seed, batch_size)
    if combination.mode == "sequential":
        return _one_after_the_other(combination, known, counts, num_samples, shuffled)
    return _side_by_side(combination, known, counts, num_samples, shuffled)


def _one_after_the_other(
    combination: Combination, plans: list[_Plan], counts: list[int], num_samples: int, shuffled: random.Random
) -> list[_Group]:
    """Draw batches of an epoch that runs through all loaders: from each in proportion to its batches."""
    owners = [number for number, count in enumerate(counts) for _ in range(count)]
    shuffled.shuffle(owners)
    taken: Counter[int] = Counter()
    chosen: list[_Group] = []
    total = 0
    for owner in owners:
        if total >= num_samples:
            break
        if taken[owner] < len(plans[owner].groups):
            group = plans[owner].groups[taken[owner]]
            taken[owner] += 1
            chosen.append(_combined(combination, [group], len(chosen)))
            total += group.size
    return chosen


def _side_by_side(
    combination: Combination, plans: list[_Plan], counts: list[int], num_samples: int, shuffled: random.Random
) -> list[_Group]:
    """Draw rows of an epoch that takes a batch of each loader at a time."""
    length = min(counts) if combination.mode == "min_size" else max(counts)
    if not length or (combination.mode == "max_size_cycle" and not min(counts)):
        return []
    largest = max(plan.groups[0].size for plan in plans if plan.groups)
    rows = sorted(shuffled.sample(range(length), min(length, math.ceil(num_samples / max(largest, 1)))))
    taken: Counter[int] = Counter()
    chosen: list[_Group] = []
    for row in rows:
        parts: list[_Group | None] = []
        for number, plan in enumerate(plans):
            if combination.mode == "max_size" and row >= counts[number]:
                parts.append(None)
                continue
            parts.append(plan.groups[taken[number] % len(plan.groups)])
            taken[number] += 1
        chosen.append(_combined(combination, parts, len(chosen)))
    return chosen


def _combined(combination: Combination, parts: list[_Group | None] | list[_Group], key: int) -> _Group:
    present = [part for part in parts if part is not None]
    indices = [part.indices for part in present]
    return _Group(
        key=key,
        size=max(part.size for part in present),
        load=lambda: combination.combine([None if part is None else part.load() for part in parts]),
        indices=None if None in indices else tuple(index for part in indices for index in part or ()),
    )


# -- one map-style loader ----------------------------------------------------------------------------


def _plan(
    loader: Any, num_samples: int, seed: int, batch_size: int | None, limit: float, *, in_order: bool
) -> _Plan | None:
    """Choose batches of a map-style loader; ``None`` for any other loader."""
    if not _is_map_style(loader):
        return None
    if loader.batch_size is None and batch_size is not None:
        raise SampleError(_OWN_BATCHES)
    shuffled = random.Random(f"held-out samples {seed}")
    fetch = _Fetch(loader, seed)
    if loader.batch_sampler is not None and loader.batch_size is None:
        # Batches of the user's own making are used whole.
        drawn = [list(indices) for indices in _drawn(loader.batch_sampler, seed, num_samples)]
        batches = drawn if limit == math.inf else drawn[: int(limit)]
        count = len(batches)
        shuffled.shuffle(batches)
        sizes = itertools.accumulate(len(indices) for indices in batches)
        enough = 1 + sum(1 for size in sizes if size < num_samples)
        return _Plan([fetch.group(number, indices) for number, indices in enumerate(batches[:enough])], count)

    size = 1 if loader.batch_size is None else batch_size or loader.batch_size
    population = _population(loader, num_samples, seed, limit, in_order=in_order)
    if loader.batch_size is None:
        # The data set makes the batches, and loading them shows their sizes.
        order = shuffled.sample(population, min(num_samples, len(population)))
        wholes = (fetch.whole(number, index) for number, index in enumerate(order))
        return _Plan(_until_enough(wholes, num_samples), _at_most(len(population), limit, loader))

    whole = len(population) // size * size if loader.drop_last else len(population)
    wanted = math.ceil(num_samples / size) * size if loader.drop_last else num_samples
    chosen = fetch.numbered(shuffled.sample(population, min(wanted, whole)))
    groups = [
        fetch.group(number, chosen[first : first + size]) for number, first in enumerate(range(0, len(chosen), size))
    ]
    if type(loader.sampler) is RandomSampler and not in_order:
        whole = min(whole, len(loader.sampler))
    return _Plan(groups, _at_most(math.ceil(whole / size), limit, loader))


def _is_map_style(loader: Any) -> bool:
    """Whether a loader iterates over a map-style data set as torch's own ``DataLoader`` does."""
    return iterates_as_torch(loader) and not isinstance(loader.dataset, IterableDataset)


def _at_most(count: int, limit: float, loader: DataLoader[Any]) -> int:
    return count if limit == math.inf else min(count, int(limit) * _num_replicas(loader.sampler))


@dataclass(frozen=True)
class _Repeated:
    """The index of a sample that is drawn again, so that its augmentation is another one."""

    index: Any
    occurrence: int


class _Fetch:
    """Loads samples and batches of a map-style loader as its workers would, with seeded random generators."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._dataset: Any = loader.dataset
        self._collate = loader.collate_fn
        self._seed = seed
        self._workers = loader.num_workers
        self._bulk = _loads_in_bulk(loader.dataset)

    def numbered(self, indices: Sequence[Any]) -> list[Any]:
        """Tell apart the occurrences of indices that are drawn several times."""
        seen: Counter[str] = Counter()
        numbered: list[Any] = []
        for index in indices:
            name = repr(index)
            numbered.append(_Repeated(index, seen[name]) if seen[name] else index)
            seen[name] += 1
        return numbered

    def group(self, number: int, indices: Sequence[Any]) -> _Group:
        """Return a batch of the samples of some indices."""
        plain = [index.index if isinstance(index, _Repeated) else index for index in indices]

        def load() -> Any:
            with (
                single_worker(self._dataset, self._seed, self._workers),
                sample_errors("loading the samples of a batch"),
            ):
                if self._bulk:
                    seed_global_generators(self._seed, 0, number)
                    samples = self._dataset.__getitems__(plain)
                else:
                    samples = []
                    for index, bare in zip(indices, plain, strict=True):
                        seed_global_generators(self._seed, 0, index)
                        samples.append(self._dataset[bare])
                seed_global_generators(self._seed, 2, number)
                return _on_cpu(self._collate(samples))

        return _Group(number, len(indices), load, tuple(plain))

    def whole(self, number: int, index: Any) -> _Group:
        """Return a batch that the data set makes for one index, which may be a list."""

        def load() -> Any:
            with single_worker(self._dataset, self._seed, self._workers), sample_errors("loading a batch"):
                seed_global_generators(self._seed, 0, index)
                return _on_cpu(self._collate(self._dataset[index]))

        indices = tuple(index) if isinstance(index, (list, tuple)) else (index,)
        return _Group(number, len(indices), load, indices)


def _loads_in_bulk(dataset: Any) -> bool:
    """Whether a data set loads the samples of a batch together. A ``Subset`` does if the set below does."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return bool(getattr(dataset, "__getitems__", None))


def _until_enough(groups: Iterable[_Group], num_samples: int) -> list[_Group]:
    """Load batches of unknown size until there are enough samples, and keep them loaded."""
    taken: list[_Group] = []
    total = 0
    for group in groups:
        if total >= num_samples:
            break
        batch = group.load()
        size = _sample_count(batch, group.size)
        total += size
        taken.append(_Group(group.key, size, lambda batch=batch: batch, group.indices))  # type: ignore[misc]
    return taken


def _population(loader: DataLoader[Any], num_samples: int, seed: int, limit: float, *, in_order: bool) -> Sequence[Any]:
    """Return the indices of an epoch, over all ranks and without padding, as often as it takes each."""
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    per_step = (loader.batch_size or 1) * _num_replicas(sampler)
    if isinstance(sampler, DistributedSampler) and hasattr(sampler.dataset, "_sampler"):
        sampler = sampler.dataset._sampler  # Lightning's wrapper of a sampler that it shards.
    iterates = getattr(type(sampler), "__iter__", None)
    if in_order:
        population: Sequence[Any] = range(len(dataset))
        fixed = True
    elif iterates is SequentialSampler.__iter__:
        population, fixed = range(len(sampler.data_source)), True
    elif iterates is RandomSampler.__iter__:
        population, fixed = range(len(sampler.data_source)), False
    elif iterates is DistributedSampler.__iter__:
        population, fixed = range(len(dataset)), not sampler.shuffle
    elif iterates is SubsetRandomSampler.__iter__:
        population, fixed = list(sampler.indices), False
    else:
        population, fixed = _drawn(sampler, seed, num_samples), True
    if not fixed:
        return population
    # The end of the order is never reached.
    if loader.batch_size is not None and loader.drop_last:
        population = population[: len(population) // per_step * per_step]
    return population if limit == math.inf else population[: int(limit) * per_step]


def _num_replicas(sampler: Any) -> int:
    return int(sampler.num_replicas) if isinstance(sampler, DistributedSampler) else 1


def _drawn(sampler: Iterable[Any], seed: int, num_samples: int) -> list[Any]:
    """Return what a sampler of unknown kind draws in an epoch with the seed; of an endless one, enough."""
    length = getattr(sampler, "__len__", None)
    try:
        limit = length() if length is not None else 10 * num_samples
    except (TypeError, NotImplementedError):
        limit = 10 * num_samples
    with _own_generators_seeded(sampler, seed), sample_errors("drawing from the sampler"):
        seed_global_generators(seed, 3, 0)
        return list(itertools.islice(iter(sampler), limit))


@contextmanager
def _own_generators_seeded(sampler: Any, seed: int) -> Iterator[None]:
    """Seed the random generators that a sampler, or the one inside it, holds, and restore them afterwards."""
    with ExitStack() as stack:
        for owner in (sampler, getattr(sampler, "sampler", None), getattr(sampler, "data_source", None)):
            for value in list(getattr(owner, "__dict__", {}).values()):
                if isinstance(value, torch.Generator):
                    stack.callback(value.set_state, value.get_state())
                    value.manual_seed(seed)
                elif isinstance(value, random.Random):
                    stack.callback(value.setstate, value.getstate())
                    value.seed(seed)
                elif isinstance(value, np.random.Generator):
                    bits = value.bit_generator
                    stack.callback(setattr, bits, "state", copy.deepcopy(bits.state))
                    bits.state = type(bits)(seed).state
        yield


# -- streams -----------------------------------------------------------------------------------------


def _collect_stream(
    combination: Combination, num_samples: int, seed: int, weigh: BatchWeight, ranks: Ranks, *, shared: bool
) -> SampleSet:
    stream = combination.loaders[0]
    with ranks.propagate_errors("reading the samples from the stream"):
        check_starts_anew(stream, shared=shared)
        read = _read(combination, math.ceil(num_samples / ranks.world_size), seed, first_key=ranks.rank)
    if ranks.world_size > 1:
        digests = _agreed(
            ranks, torch.tensor([_digest(read[0].batch) if read else -1.0], dtype=torch.float64, device="cpu")
        )
        if bool((digests == digests[0]).all()):
            # No rank has a stream of its own, so each takes other batches of the same one.
            with ranks.propagate_errors("reading the samples from the stream"):
                read = _read(combination, num_samples, seed, every=ranks.world_size, offset=ranks.rank)
    with ranks.propagate_errors("weighing the samples"):
        weights = [_checked_weight(weigh, one.batch) for one in read]
    own = [float(sum(one.size for one in read)), float(len(read)), sum(weights)]
    counts = _agreed(ranks, torch.tensor(own, dtype=torch.float64, device="cpu"))
    return _checked(
        SampleSet(
            batches=[one.batch for one in read],
            weights=weights,
            keys=[ranks.rank + ranks.world_size * number for number in range(len(read))],
            num_samples=int(counts[:, 0].sum()),
            num_batches=int(counts[:, 1].sum()),
            shares=tuple(counts[:, 2].tolist()),
            indices=None,
        ),
        combination,
    )


@dataclass(frozen=True)
class _Read:
    """A batch that was read from a stream, and its number of samples."""

    batch: Any
    size: int


def _read(
    combination: Combination, num_samples: int, seed: int, *, first_key: int = 0, every: int = 1, offset: int = 0
) -> list[_Read]:
    """Read the first batches of a stream until they hold enough samples, and keep every n-th of them."""
    stream = combination.loaders[0]
    workers = getattr(stream, "num_workers", 0)
    kept: list[_Read] = []
    count = 0
    seed_global_generators(seed, 4, first_key)
    with (
        single_worker(getattr(stream, "dataset", stream), seed, workers),
        sample_errors("reading from the loader"),
        closing_after(fresh_iterator(stream)) as iterator,
    ):
        for number in itertools.count():
            if count >= num_samples or number >= combination.limit(0) * every:
                break
            try:
                raw = next(iterator)
            except StopIteration:
                break
            batch = _on_cpu(combination.combine([raw]))
            size = _sample_count(batch, getattr(stream, "batch_size", None))
            count += size
            if number % every == offset:
                kept.append(_Read(batch, size))
    return kept


def _digest(batch: Any) -> float:
    """Return a number that tells batches of different tensors apart."""
    found = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal found
        plain = tensor.detach().cpu().contiguous()
        found = zlib.crc32(repr((plain.shape, plain.dtype)).encode(), found)
        if plain.layout == torch.strided:
            found = zlib.crc32(plain.flatten().view(torch.uint8).numpy().tobytes(), found)
        return tensor

    map_tensors(batch, add)
    return float(found)


def _sample_count(batch: Any, batch_size: int | None) -> int:
    try:
        return int(leading_dimension(batch))
    except ValueError:
        return batch_size or 1


# -- checks and seeds --------------------------------------------------------------------------------


def _agreed(ranks: Ranks, values: Tensor) -> Tensor:
    """Return every rank's values, ``(n,) -> (W, n)``."""
    table = torch.zeros(ranks.world_size, len(values), dtype=torch.float64, device=ranks.control_device)
    table[ranks.rank] = values.to(table)
    return ranks.all_reduce(table).cpu()


def _checked(samples: SampleSet, combination: Combination) -> SampleSet:
    """Raise on all ranks alike if there is nothing to measure on; the shares are equal on all."""
    if not samples.num_samples:
        raise SampleError(_empty(combination))
    if not sum(samples.shares) > 0:
        raise SampleError(
            "the weights of all sample batches are zero; batch_weight(batch) must return what the batch's "
            "mean loss averages over"
        )
    return samples


def _checked_weight(weigh: BatchWeight, batch: Any) -> float:
    with sample_errors("calling batch_weight on a batch"):
        value = weigh(batch)
    try:
        weight = float(value)
    except (TypeError, ValueError) as error:
        raise SampleError(
            f"batch_weight returned {value!r}; it must return a number, what the batch's mean loss averages over"
        ) from error
    if not (math.isfinite(weight) and weight >= 0):
        raise SampleError(
            f"batch_weight returned {weight}; it must return a finite number that is not negative, what the "
            "batch's mean loss averages over"
        )
    return weight


def _num_samples(batch: Any) -> float:
    try:
        return leading_dimension(batch)
    except ValueError as error:
        raise SampleError(str(error)) from error


def _empty(combination: Combination) -> str:
    kinds = ", ".join(type(loader).__name__ for loader in combination.loaders) or "an empty list"
    return (
        f"the loader of the samples ({kinds}) gives no sample; pass another one as dataloader=my_loader, or check its "
        "data set and sampler"
    )


def _on_cpu(batch: Any) -> Any:
    return map_tensors(batch, lambda tensor: tensor.detach().cpu())


def seed_global_generators(seed: int, purpose: int, key: Any) -> None:
    """Seed Python's, numpy's and torch's CPU generator for one sample."""
    if isinstance(key, (int, np.integer)) and key >= 0:
        entropy = [seed, purpose, int(key)]
    else:
        entropy = [seed, purpose, *str(key).encode()]
    drawn = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(drawn[0]) << 32 | int(drawn[1]))
    np.random.seed(drawn[2:3])
    torch.default_generator.manual_seed(int(drawn[3]))
