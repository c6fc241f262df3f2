"""The samples that a Hessian is taken on: the same ones at every measurement, whatever the number of ranks.

They are chosen first, from the seed and the data alone, and dealt to the ranks after. No sampler's
padding comes in, and whatever is random in the loading of a sample is fixed by the seed and the sample.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from hessian_callback.callbacks.full_precision import batch_in_full_precision, has_half_precision
from hessian_callback.callbacks.state_guard import stage_set_to
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.operators.batches import leading_dimension

__all__ = [
    "SampleSet",
    "assign_to_ranks",
    "batch_on_device",
    "collect",
    "find_loader",
    "has_loader",
    "missing_loader",
    "moving_parts",
    "warn_of_imbalance",
]

BatchWeight = Callable[[Any], float]

_IMBALANCE_WORTH_A_WARNING = 0.2

_OWN_BATCHES = (
    "batch_size is given, but the batches come from a stream, or from a batch sampler or a data set that makes them in "
    "its own way; set their size there, or pass dataloader=my_loader with a batch_size of its own"
)


@dataclass(frozen=True)
class SampleSet:
    """One rank's share of the held-out samples, on the CPU.

    Attributes:
        batches: this rank's batches.
        weights: a weight for each of them: its part in the mean over all ranks' batches.
        keys: a number for each of them that is its own, whichever rank holds it.
        num_samples: samples over all ranks.
        num_batches: batches over all ranks.
        shares: the weight that each rank holds.
        indices: the chosen samples' indices in the data set, over all ranks; ``None`` for a stream.
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
        """By how much the busiest rank's share exceeds the mean: 0.0 is an even deal."""
        return max(self.shares) * len(self.shares) / sum(self.shares) - 1


@dataclass(frozen=True)
class _Group:
    """A batch that is not loaded yet."""

    key: int
    size: int
    load: Callable[[], Any]
    indices: tuple[Any, ...] | None


# -- which loader ------------------------------------------------------------------------------------


def find_loader(trainer: Trainer, dataloader: str | Iterable[Any]) -> Any:
    """Return the loader, or the structure of loaders, that ``dataloader`` names.

    Args:
        trainer: the trainer, at any time after its data sources are known.
        dataloader: ``"val"``, ``"train"``, or a loader, which is returned as it is.

    Raises:
        MisconfigurationException: if there is no such loader.
    """
    if not isinstance(dataloader, str):
        return dataloader
    if dataloader == "train":
        running, sources = trainer.train_dataloader, [trainer.fit_loop._data_source]
    elif trainer.state.fn == TrainerFn.VALIDATING:
        running, sources = trainer.val_dataloaders, [trainer.validate_loop._data_source]
    else:
        running, sources = trainer.val_dataloaders, [trainer.fit_loop.epoch_loop.val_loop._data_source]
    # A running loader rather than a new one: asking for one twice may shuffle or split anew.
    if running is not None:
        return running
    for source in sources:
        if source.is_defined():
            # One with nothing behind it is answered with None by Lightning's own hooks.
            loader = source.dataloader()
            if loader is not None:
                return loader
    raise MisconfigurationException(missing_loader(dataloader))


def has_loader(trainer: Trainer, dataloader: str) -> bool:
    """Whether a loader of this kind is defined, without asking for it."""
    if dataloader == "train":
        return trainer.train_dataloader is not None or trainer.fit_loop._data_source.is_defined()
    if trainer.state.fn == TrainerFn.VALIDATING:
        return bool(trainer.validate_loop._data_source.is_defined())
    return bool(trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined())


def missing_loader(dataloader: str) -> str:
    """Return the message for a loader that is not there, remedies included."""
    other = "train" if dataloader == "val" else "val"
    kind = "validation" if dataloader == "val" else "training"
    return (
        f"dataloader={dataloader!r}, but the run has no {kind} loader to take the held-out samples from. "
        f"Define {dataloader}_dataloader(), use dataloader={other!r}, or pass one: dataloader=my_loader"
    )


# -- collecting --------------------------------------------------------------------------------------


def collect(
    loader: Any,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int | None = None,
    batch_weight: BatchWeight | None = None,
    ranks: Ranks | None = None,
    sequential: bool = True,
) -> SampleSet:
    """Choose the held-out samples, deal them to the ranks, and load this rank's share.

    From a map-style data set, a random subset drawn with the seed; its batches are those of the loader's
    size, collated by the loader's function. From an ``IterableDataset`` or any other iterable, the first
    samples: each rank takes those of its own stream. All loading happens in this process, one sample
    after the other, each with the global random generators seeded for that sample.

    Call it on all ranks, inside `guard.preserve_training_state`: it seeds the global random generators.

    Args:
        loader: a ``DataLoader``, an iterable of batches, or a list, tuple, dictionary or
            ``CombinedLoader`` of those.
        num_samples: how many samples to use, over all ranks. Fewer are used where there are fewer.
        seed: chooses the samples and fixes their augmentation.
        batch_size: samples in a batch, instead of the loader's own number.
        batch_weight: the weight of a batch in the mean; default: its leading dimension.
        ranks: the processes that share the samples; default: this process alone.
        sequential: how several loaders are meant: one after the other (then the first serves alone),
            or each giving a part of every batch.

    Returns:
        This rank's share.

    Raises:
        MisconfigurationException: if there are no samples, a batch's weight is not clear, or ``batch_size`` is given
            for batches that the loader, or the data set, makes in its own way.
        PeerError: if collecting failed on another rank.

    Example:
        >>> data = torch.arange(10.0).reshape(10, 1)
        >>> held_out = collect(DataLoader(data, batch_size=4), num_samples=6)
        >>> [len(batch) for batch in held_out.batches], held_out.weights, held_out.num_samples
        ([4, 2], [4.0, 2.0], 6)
        >>> held_out.indices == collect(DataLoader(data, batch_size=4), num_samples=6).indices
        True
    """
    ranks = ranks or Ranks()
    weigh = batch_weight or _num_samples
    with ranks.propagate_errors("choosing the held-out samples"):
        groups = _groups(loader, num_samples, seed, batch_size, ranks, sequential)
        if groups is None and batch_size is not None:
            raise MisconfigurationException(_OWN_BATCHES)
    if groups is None:
        return _collect_stream(loader, num_samples, seed, weigh, ranks, sequential)

    # Were the choices different, the ranks would hold other batches than they were dealt.
    choice = zlib.crc32(repr([group.indices for group in groups]).encode())
    choices = ranks.gather([len(groups), choice])
    if bool((choices != choices[0]).any()):
        raise MisconfigurationException(
            "the ranks would choose different held-out samples, because their data sets differ or a sampler "
            "of the run's own shards them; pass dataloader=my_loader, one over the whole data set on every "
            "rank, or over an IterableDataset, of which each rank takes its own part"
        )
    if not groups:
        raise MisconfigurationException(_empty(loader))

    loaded: dict[int, tuple[Any, float]] = {}

    def load(numbers: Iterable[int]) -> None:
        with ranks.propagate_errors("loading the held-out samples"):
            for number in numbers:
                if number not in loaded:
                    batch = _on_cpu(groups[number].load())
                    loaded[number] = batch, _checked_weight(weigh, batch)

    hands = assign_to_ranks([float(group.size) for group in groups], ranks.world_size)
    load(hands[ranks.rank])
    weights = torch.zeros(len(groups), dtype=torch.float64, device=ranks.control_device)
    for number in hands[ranks.rank]:
        weights[number] = loaded[number][1]
    all_weights = ranks.all_reduce(weights).tolist()
    # Sizes were only a guess of the work; where the weights are tokens, say, they deal better.
    hands = assign_to_ranks(all_weights, ranks.world_size)
    load(hands[ranks.rank])

    mine = hands[ranks.rank]
    chosen = [group.indices for group in groups]
    return _checked(
        SampleSet(
            batches=[loaded[number][0] for number in mine],
            weights=[loaded[number][1] for number in mine],
            keys=[groups[number].key for number in mine],
            num_samples=sum(group.size for group in groups),
            num_batches=len(groups),
            shares=tuple(sum(all_weights[number] for number in hand) for hand in hands),
            indices=None if None in chosen else tuple(i for part in chosen for i in part or ()),
        ),
        loader,
    )


def assign_to_ranks(weights: Sequence[float], num_hands: int) -> list[list[int]]:
    """Deal weighted batches to hands so that the heaviest hand is light: largest first, to the lightest.

    Args:
        weights: weight of each batch.
        num_hands: how many hands.

    Returns:
        For each hand the numbers of its batches, ascending. A hand may be empty.

    Example:
        >>> assign_to_ranks([3.0, 3.0, 2.0, 2.0, 2.0], 2)
        [[0, 2, 4], [1, 3]]
    """
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    loads = [0.0] * num_hands
    for number in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = min(range(num_hands), key=lambda hand: (loads[hand], hand))
        hands[lightest].append(number)
        loads[lightest] += weights[number]
    return [sorted(hand) for hand in hands]


def batch_on_device(
    trainer: Trainer, pl_module: LightningModule, batch: Any, *, seed: int, key: int, stage: RunningStage
) -> Any:
    """Return a copy of a held-out batch as the module's steps would get it.

    Precision conversion and the module's or data module's transfer hooks run as in Lightning's own loops;
    what they draw at random is fixed by seed and key, and ``trainer.training`` or ``trainer.validating``
    answers alike at every measurement. For a module in half precision, which is examined in float32, inputs are
    left or made float32.
    """
    _seed_global_generators(seed, 1, key)
    batch = _cloned(batch)
    with stage_set_to(trainer, stage):
        half = has_half_precision(pl_module)
        if not half:
            batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        return batch_in_full_precision(batch) if half else batch


# -- choosing ----------------------------------------------------------------------------------------


def _groups(
    loader: Any, num_samples: int, seed: int, batch_size: int | None, ranks: Ranks, sequential: bool
) -> list[_Group] | None:
    """Return the chosen batches over all ranks, not loaded; ``None`` if they come from a stream."""
    leaves, structure = _leaves(loader)
    if not leaves:
        raise MisconfigurationException(_empty(loader))
    if sequential:
        if len(leaves) > 1 and ranks.rank == 0:
            warnings.warn(
                f"there are {len(leaves)} validation loaders; the Hessian is measured on samples of the "
                "first. Pass dataloader=my_loader to choose another",
                stacklevel=2,
            )
        return _groups_of_leaf(leaves[0], num_samples, seed, batch_size)
    parts = [_groups_of_leaf(leaf, num_samples, seed, batch_size) for leaf in leaves]
    if len(parts) == 1 and parts[0] is None:
        return None
    if any(part is None for part in parts):
        raise MisconfigurationException(
            "the batches combine several loaders, of which one is a stream; pass dataloader=my_loader, one "
            "loader that yields what the loss takes"
        )
    combined = list(zip(*(part for part in parts if part is not None), strict=False))
    return [
        _Group(
            key=number,
            size=max(group.size for group in row),
            load=lambda row=row: tree_unflatten([group.load() for group in row], structure),  # type: ignore[misc]
            indices=row[0].indices if len(row) == 1 else None,
        )
        for number, row in enumerate(combined)
    ]


def _groups_of_leaf(loader: Any, num_samples: int, seed: int, batch_size: int | None) -> list[_Group] | None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_size is None and batch_size is not None:
        raise MisconfigurationException(_OWN_BATCHES)
    shuffled = random.Random(f"held-out samples {seed}")
    dataset, collate = loader.dataset, loader.collate_fn

    def group(number: int, indices: Sequence[Any]) -> _Group:
        def load() -> Any:
            samples = []
            for index in indices:
                _seed_global_generators(seed, 0, index)
                samples.append(dataset[index])
            _seed_global_generators(seed, 2, number)
            return collate(samples)

        return _Group(number, len(indices), load, tuple(indices))

    if loader.batch_sampler is not None and loader.batch_size is None:
        # The user's own way to form batches: whole ones of theirs.
        batches = [list(indices) for indices in _drawn(loader.batch_sampler, seed, num_samples)]
        shuffled.shuffle(batches)
        sizes = itertools.accumulate(len(indices) for indices in batches)
        enough = 1 + sum(1 for size in sizes if size < num_samples)
        return [group(number, indices) for number, indices in enumerate(batches[:enough])]

    population = _population(loader.sampler, dataset, num_samples, seed)
    if loader.batch_size is None:
        # Batches are formed by the data set itself, each of a size that only loading it tells.
        def one(number: int, index: Any) -> _Group:
            def load() -> Any:
                _seed_global_generators(seed, 0, index)
                return collate(dataset[index])

            return _Group(number, 1, load, (index,))

        order = shuffled.sample(population, min(num_samples, len(population)))
        return _until_enough([one(number, index) for number, index in enumerate(order)], num_samples)

    chosen = shuffled.sample(population, min(num_samples, len(population)))
    size = batch_size or loader.batch_size
    return [group(number, chosen[first : first + size]) for number, first in enumerate(range(0, len(chosen), size))]


def _until_enough(groups: list[_Group], num_samples: int) -> list[_Group]:
    """Load groups of unknown size until there are enough samples, and keep them loaded."""
    taken: list[_Group] = []
    total = 0
    for group in groups:
        if total >= num_samples:
            break
        batch = _on_cpu(group.load())
        size = _sample_count(batch, None)
        total += size
        taken.append(_Group(group.key, size, lambda batch=batch: batch, group.indices))  # type: ignore[misc]
    return taken


def _population(sampler: Any, dataset: Any, num_samples: int, seed: int) -> Sequence[Any]:
    """Return the indices that a sampler draws from, over all ranks and without its padding."""
    if isinstance(sampler, DistributedSamplerWrapper):
        sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
    if isinstance(sampler, DistributedSampler):
        return range(len(dataset))
    if type(sampler) in (SequentialSampler, RandomSampler):
        return range(len(sampler.data_source))
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices)
    return list(dict.fromkeys(_drawn(sampler, seed, num_samples)))


def _drawn(sampler: Iterable[Any], seed: int, num_samples: int) -> list[Any]:
    """Return what a sampler of unknown kind draws with the seed; of an endless one, enough."""
    _seed_global_generators(seed, 3, 0)
    length = getattr(sampler, "__len__", None)
    try:
        limit = length() if length is not None else 10 * num_samples
    except TypeError:
        limit = 10 * num_samples
    return list(itertools.islice(iter(sampler), limit))


def _leaves(loader: Any) -> tuple[list[Any], Any]:
    while isinstance(loader, CombinedLoader):
        loader = loader.iterables
    leaves, structure = tree_flatten(loader)
    # Tensors in a list are batches: the list is a loader by itself.
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        leaves, structure = tree_flatten(None)
        return [loader], structure
    return [leaf for leaf in leaves if leaf is not None], structure


# -- streams -----------------------------------------------------------------------------------------


def moving_parts(loader: Any) -> list[Any]:
    """Return what reading from a loader, or a structure of them, may change: data sets and samplers."""
    parts: list[Any] = []
    for leaf in _leaves(loader)[0]:
        if isinstance(leaf, DataLoader):
            parts += [leaf.dataset, leaf.sampler, leaf.batch_sampler, leaf.collate_fn, leaf.generator]
        else:
            parts.append(leaf)
    return parts


def _collect_stream(
    loader: Any, num_samples: int, seed: int, weigh: BatchWeight, ranks: Ranks, sequential: bool
) -> SampleSet:
    leaves, structure = _leaves(loader)
    stream = leaves[0]
    batches: list[Any] = []
    weights: list[float] = []
    count = 0
    with ranks.propagate_errors("reading the held-out samples from the stream"):
        _seed_global_generators(seed, 4, ranks.rank)
        for raw in _fresh_stream(stream):
            if count >= math.ceil(num_samples / ranks.world_size):
                break
            batch = _on_cpu(raw if sequential else tree_unflatten([raw], structure))
            batches.append(batch)
            weights.append(_checked_weight(weigh, batch))
            count += _sample_count(batch, getattr(stream, "batch_size", None))
    counts = ranks.gather([count, len(batches), sum(weights)])
    return _checked(
        SampleSet(
            batches=batches,
            weights=weights,
            keys=[ranks.rank + ranks.world_size * number for number in range(len(batches))],
            num_samples=int(counts[:, 0].sum()),
            num_batches=int(counts[:, 1].sum()),
            shares=tuple(counts[:, 2].tolist()),
            indices=None,
        ),
        loader,
    )


def _fresh_stream(loader: Any) -> Iterator[Any]:
    """Iterate from the start, without touching an iterator or worker that training uses."""
    if isinstance(loader, DataLoader):
        options: dict[str, Any] = {"batch_size": loader.batch_size, "collate_fn": loader.collate_fn}
        return iter(DataLoader(loader.dataset, num_workers=0, **options))
    if iter(loader) is loader:
        raise MisconfigurationException(
            f"the loader ({type(loader).__name__}) is an iterator, so reading held-out samples would use up "
            "its data; pass a DataLoader or another iterable that starts anew each time"
        )
    return iter(loader)


def _sample_count(batch: Any, batch_size: int | None) -> int:
    try:
        return int(leading_dimension(batch))
    except ValueError:
        return batch_size or 1


# -- small things ------------------------------------------------------------------------------------


def _checked(held_out: SampleSet, loader: Any) -> SampleSet:
    """Raise on all ranks alike if there is nothing to measure on; the shares are equal on all."""
    if not held_out.num_samples:
        raise MisconfigurationException(_empty(loader))
    if not sum(held_out.shares) > 0:
        raise MisconfigurationException(
            "the weights of all held-out batches are zero; batch_weight(batch) must return what the batch's "
            "mean loss averages over"
        )
    return held_out


def _checked_weight(weigh: BatchWeight, batch: Any) -> float:
    value = weigh(batch)
    try:
        weight = float(value)
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"batch_weight returned {value!r}; it must return a number, what the batch's mean loss averages over"
        ) from error
    if not (math.isfinite(weight) and weight >= 0):
        raise MisconfigurationException(
            f"batch_weight returned {weight}; it must return a finite number that is not negative, what the "
            "batch's mean loss averages over"
        )
    return weight


def _num_samples(batch: Any) -> float:
    try:
        return leading_dimension(batch)
    except ValueError as error:  # Of the user's data, as far as a trainer is concerned.
        raise MisconfigurationException(str(error)) from error


def _empty(loader: Any) -> str:
    return (
        f"the loader for the held-out samples ({type(loader).__name__}) gives no sample; pass another one as "
        "dataloader=my_loader, or check its data set and sampler"
    )


def _on_cpu(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().cpu())


def _cloned(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone())


def _seed_global_generators(seed: int, purpose: int, key: Any) -> None:
    """Seed Python's, numpy's and torch's CPU generator for one sample."""
    if isinstance(key, (int, np.integer)) and key >= 0:
        entropy = [seed, purpose, int(key)]
    else:
        entropy = [seed, purpose, *str(key).encode()]
    drawn = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(drawn[0]) << 32 | int(drawn[1]))
    np.random.seed(drawn[2:3])
    torch.default_generator.manual_seed(int(drawn[3]))


def warn_of_imbalance(held_out: SampleSet) -> None:
    """Warn, once, when ranks would wait for each other for more than a fifth of the time."""
    if held_out.imbalance > _IMBALANCE_WORTH_A_WARNING:
        shares = ", ".join(f"{share:g}" for share in held_out.shares)
        warnings.warn(
            f"the ranks' shares of the held-out samples differ by {held_out.imbalance:.0%} from their mean "
            f"({shares}), and the lighter ones wait; choose num_samples so that the number of batches is a "
            f"multiple of {len(held_out.shares)}, or a loader with smaller batches",
            stacklevel=2,
        )
