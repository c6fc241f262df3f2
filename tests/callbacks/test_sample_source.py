"""Tests of where samples come from: compared with the batches that the run's own loops use."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from hessian_callback.callbacks.sample_source import SampleSource
from hessian_callback.callbacks.state_guard import preserve_training_state
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.errors import SampleError, UserCodeError
from hessian_callback.measurement.samples import SampleSet
from hessian_callback.operators.batches import tensors
from tests.helpers.installed import installed
from tests.helpers.lightning import Callback, CombinedLoader, LightningModule, MisconfigurationException, RunningStage
from tests.helpers.toy_runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore")

NUMBERS = torch.arange(40.0).reshape(40, 1)


class Sees(LightningModule):
    """Notes what its steps get."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.append(batch)
        return self.weight.square().sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            self.validated.append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Collects(Callback):
    def __init__(self, source: SampleSource, *, at_start: bool = True) -> None:
        self.source = source
        self.at_start = at_start
        self.samples: SampleSet | None = None
        self.batches: list[Any] = []
        self.changes: list[str] = []

    def on_train_start(self, run: Any, module: Any) -> None:
        if self.at_start:
            self._collect(run, module)

    def on_train_epoch_end(self, run: Any, module: Any) -> None:
        if not self.at_start:
            self._collect(run, module)

    def _collect(self, run: Any, module: Any) -> None:
        with preserve_training_state(run, module) as snapshot:
            self.samples = self.source.collect(run, snapshot, Ranks())
            self.batches = self.source.batches_on_device(run, module, self.samples.counted)
            self.changes = snapshot.changes()


def fitted(tmp_path: Any, source: SampleSource, train: Any, val: Any, *, at_start: bool = True, **options: Any) -> Any:
    module, collects = Sees(), Collects(source, at_start=at_start)
    trainer(tmp_path, collects, **{"max_epochs": 1, **options}).fit(module, train, val)
    return module, collects


def counted(batches: list[Any]) -> Counter[tuple[float, ...]]:
    """Batches as sets of numbers, whatever their structure, with their multiplicity."""
    return Counter(tuple(sorted(float(v) for t in tensors(batch) for v in t.flatten())) for batch in batches)


def numbers(batches: list[Any]) -> Counter[float]:
    return Counter(float(value) for batch in batches for tensor in tensors(batch) for value in tensor.flatten())


def loader(first: int = 0, last: int = 40, **options: Any) -> DataLoader:
    return DataLoader(NUMBERS[first:last], **{"batch_size": 4, **options})


class Doubling(DataLoader):
    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(NUMBERS)


TRAINING: dict[str, tuple[Any, dict[str, Any]]] = {
    "in order": (loader, {}),
    "drop_last": (lambda: loader(0, 18, drop_last=True), {}),
    "limited": (loader, {"limit_train_batches": 3}),
    "limited by half": (loader, {"limit_train_batches": 0.5}),
    "overfit": (lambda: loader(shuffle=True), {"overfit_batches": 2}),
    "overfit a fraction": (lambda: loader(shuffle=True), {"overfit_batches": 0.2}),
    "own iteration": (lambda: Doubling(NUMBERS, batch_size=4), {}),
    "own iteration, limited": (lambda: Doubling(NUMBERS, batch_size=4), {"limit_train_batches": 3}),
    "whole batches": (
        lambda: DataLoader(NUMBERS, sampler=BatchSampler(SequentialSampler(NUMBERS), 8, False), batch_size=None),
        {},
    ),
    "batch sampler": (lambda: DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 8, True)), {}),
    "stream": (lambda: DataLoader(Stream(), batch_size=8), {}),
    "limited stream": (lambda: DataLoader(Stream(), batch_size=8), {"limit_train_batches": 2}),
    "two": (lambda: {"a": loader(0, 12), "b": loader(20, 40)}, {}),
    "max_size": (lambda: CombinedLoader({"a": loader(0, 12), "b": loader(20, 40)}, "max_size"), {}),
    "min_size": (lambda: CombinedLoader([loader(0, 12), loader(20, 40)], "min_size"), {}),
    "limited pair": (lambda: CombinedLoader([loader(0, 12), loader(20, 40)], "max_size"), {"limit_train_batches": 2}),
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("at_start", [True, False], ids=["before training", "after an epoch"])
def test_training_samples_are_those_of_an_epoch(name: str, at_start: bool, tmp_path: Any) -> None:
    make, options = TRAINING[name]
    source = SampleSource("train", num_samples=10_000, batch_weight=lambda batch: 1.0)
    module, collects = fitted(tmp_path, source, make(), loader(), at_start=at_start, **options)
    if name == "two":  # A loader that begins again may give other ones of its batches twice.
        assert set(numbers(collects.batches)) == set(numbers(module.trained))
        assert len(collects.batches) == len(module.trained)
    elif name in ("max_size", "min_size", "limited pair"):
        assert numbers(collects.batches) == numbers(module.trained)
        assert Counter(len(list(tensors(batch))) for batch in collects.batches) == Counter(
            len(list(tensors(batch))) for batch in module.trained
        )
    else:
        assert numbers(collects.batches) == numbers(module.trained)
        assert sorted(map(len, collects.batches)) == sorted(map(len, module.trained))


VALIDATION: dict[str, tuple[Any, dict[str, Any]]] = {
    "in order": (loader, {}),
    "first of several": (lambda: [loader(0, 12), loader(20, 40)], {}),
    "overfit": (lambda: loader(shuffle=True), {"overfit_batches": 2}),
    "own iteration": (lambda: Doubling(NUMBERS, batch_size=4), {}),
    "max_size": (lambda: CombinedLoader({"a": loader(0, 12), "b": loader(20, 40)}, "max_size"), {}),
    "min_size": (lambda: CombinedLoader({"a": loader(0, 12), "b": loader(20, 40)}, "min_size"), {}),
    "max_size_cycle": (lambda: CombinedLoader({"a": loader(0, 12), "b": loader(20, 40)}, "max_size_cycle"), {}),
}


@pytest.mark.parametrize("name", VALIDATION)
@pytest.mark.parametrize("at_start", [True, False], ids=["before training", "after an epoch"])
def test_validation_samples_are_those_of_the_loop(name: str, at_start: bool, tmp_path: Any) -> None:
    make, options = VALIDATION[name]
    source = SampleSource("val", num_samples=10_000, batch_weight=lambda batch: 1.0)
    module, collects = fitted(tmp_path, source, loader(), make(), at_start=at_start, **options)
    assert set(numbers(collects.batches)) == set(numbers(module.validated))
    assert len(collects.batches) == len(module.validated)
    assert {str(type(batch)) for batch in collects.batches} == {str(type(batch)) for batch in module.validated}


@pytest.mark.parametrize("options", [{"limit_val_batches": 1}, {"num_sanity_val_steps": 2}], ids=str)
def test_limited_validation_leaves_the_whole_loader(options: dict[str, Any], tmp_path: Any) -> None:
    _, collects = fitted(tmp_path, SampleSource(num_samples=100), loader(), loader(), **options)
    assert collects.samples.num_samples == 40


@pytest.mark.parametrize("mode", ["max_size", "min_size", "sequential"])
def test_a_combined_loader_that_is_passed_keeps_its_mode(mode: str, tmp_path: Any) -> None:
    combined = CombinedLoader([loader(0, 12), loader(20, 40)], mode)
    expected = [batch for batch, _, _ in combined]
    source = SampleSource(combined, num_samples=10_000, batch_weight=lambda batch: 1.0)
    _, collects = fitted(tmp_path, source, loader(), loader())
    assert numbers(collects.batches) == numbers(expected)
    assert len(collects.batches) == len(expected)


def test_a_weighted_sampler_keeps_its_draws(tmp_path: Any) -> None:
    weights = [0.0] * 38 + [1.0, 9.0]
    sampler = WeightedRandomSampler(weights, 400, generator=torch.Generator().manual_seed(0))
    source = SampleSource("train", num_samples=400)
    module, collects = fitted(tmp_path, source, loader(sampler=sampler), loader())
    for found in (collects.batches, module.trained):
        share = numbers(found)[39.0] / 400
        assert abs(share - 0.9) < 4 * (0.9 * 0.1 / 400) ** 0.5


class Handle(IterableDataset):
    def __init__(self, path: Any) -> None:
        self.file = open(path)  # noqa: SIM115

    def __iter__(self) -> Any:
        return (torch.tensor([float(line)]) for line in self.file)


class Counts(IterableDataset):
    """Its position is an attribute, which can be restored."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        while self.position < 40:
            self.position += 1
            yield NUMBERS[self.position - 1]


def test_a_stream_that_goes_on_is_not_eaten(tmp_path: Any) -> None:
    path = tmp_path / "rows"
    path.write_text("\n".join(map(str, range(40))))
    data = DataLoader(Handle(path), batch_size=4)
    for source, train, val in (
        (SampleSource("train", num_samples=8), data, loader()),
        (SampleSource("val", num_samples=8), loader(), data),
        (SampleSource(data, num_samples=8), data, loader()),
        (SampleSource(DataLoader(data.dataset, batch_size=2), num_samples=8), data, loader()),
    ):
        with pytest.raises(SampleError, match=r"reads on from its dataset.file.*pass dataloader=my_loader, a separate"):
            fitted(tmp_path, source, train, val)
    # The remedy.
    separate = SampleSource(DataLoader(Handle(path), batch_size=4), num_samples=8)
    module, collects = fitted(tmp_path, separate, DataLoader(Handle(path), batch_size=4), loader())
    assert numbers(collects.batches) == Counter(range(8))
    assert numbers(module.trained) == Counter(range(40))


def test_a_position_in_an_attribute_is_restored(tmp_path: Any) -> None:
    source = SampleSource("train", num_samples=8)
    module, collects = fitted(tmp_path, source, DataLoader(Counts(), batch_size=4), loader())
    assert len(collects.batches) == 2
    assert numbers(module.trained) == Counter(range(40))


LIBRARY = """
import numpy as np
class RunningMean:
    def __init__(self):
        self.count, self.total, self.seen = 0, np.zeros(1), []
    def __call__(self, row):
        self.count += 1
        self.total += float(row)
        self.seen.append(self.count)
        return row - self.total.item() / self.count + len(self.seen)
class Shuffling:
    def __init__(self, rows, batch_size):
        self.rows, self.batch_size, self.epoch, self.order = rows, batch_size, 0, list(range(len(rows)))
    def __len__(self):
        return len(self.rows) // self.batch_size
    def __iter__(self):
        self.epoch += 1
        self.order.append(self.order.pop(0))
        order = sorted(self.order, key=lambda row: (row * self.epoch) % 7)
        for first in range(0, len(order), self.batch_size):
            yield self.rows[order[first : first + self.batch_size]]
"""


def test_a_loader_of_a_library_that_counts_its_epochs_is_restored(tmp_path: Any) -> None:
    with installed(tmp_path, "shuffling_loader_of_a_test", LIBRARY) as library:
        orders = []
        for at_start in (True, False, None):
            train, val = (library.Shuffling(NUMBERS, 8) for _ in range(2))
            module = Sees()
            if at_start is None:
                trainer(tmp_path, max_epochs=2).fit(module, train, val)
            else:
                source = SampleSource("train" if at_start else "val", num_samples=8)
                module, collects = fitted(tmp_path, source, train, val, at_start=at_start, max_epochs=2)
                assert len(collects.batches) == 1
            orders.append([float(value) for batch in [*module.trained, *module.validated] for value in batch])
    assert orders[0] == orders[1] == orders[2]


class Transformed(Dataset):
    def __init__(self, transform: Any) -> None:
        self.transforms = {"both": [transform]}

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return self.transforms["both"][0](NUMBERS[index])


def test_a_transform_of_a_library_with_a_state_of_its_own_is_restored(tmp_path: Any) -> None:
    with installed(tmp_path, "transform_of_a_test", LIBRARY) as library:
        seen = []
        for source in (None, SampleSource("train", num_samples=8), SampleSource("val", num_samples=8)):
            data = Transformed(library.RunningMean())
            train, val = DataLoader(data, batch_size=4), DataLoader(data, batch_size=8, collate_fn=torch.stack)
            module = Sees()
            if source is None:
                trainer(tmp_path, max_epochs=2).fit(module, train, val)
            else:
                module, collects = fitted(tmp_path, source, train, val, max_epochs=2)
                assert collects.batches
                assert collects.changes == []
            seen.append([float(value) for batch in [*module.trained, *module.validated] for value in batch])
    assert seen[0] == seen[1] == seen[2]


class Ordered:
    """Shuffles its indices in place: an epoch begins where the last one left them."""

    def __init__(self, size: int) -> None:
        self.order, self.generator = np.arange(size), np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Any:
        self.generator.shuffle(self.order)
        return iter(self.order.tolist())


class OrderedSampler(Ordered, Sampler):
    pass


@pytest.mark.parametrize(
    ("make", "kind"),
    [(DataLoader, Ordered), (DataLoader, OrderedSampler), (Doubling, OrderedSampler)],
    ids=["any object", "sampler", "sampler of a loader with its own iteration"],
)
def test_a_sampler_that_shuffles_in_place_is_restored(make: Any, kind: Any, tmp_path: Any) -> None:
    size = 20_000  # 160 kB of indices
    data = torch.arange(float(size)).reshape(size, 1)
    options: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2}
    orders = []
    for source in (None, SampleSource("train", num_samples=8)):
        train, module = make(data, batch_size=4, sampler=kind(size)), Sees()
        if source is None:
            trainer(tmp_path, **options).fit(module, train, loader())
        else:
            module, _ = fitted(tmp_path, source, train, loader(), **options)
        orders.append([float(value) for batch in module.trained for value in batch])
    assert orders[0] == orders[1]


def test_generators_of_the_loader_are_restored(tmp_path: Any) -> None:
    orders = []
    for source in (SampleSource("train", num_samples=8), None):
        generator = torch.Generator().manual_seed(3)
        train = loader(shuffle=True, generator=generator)
        if source is None:
            module = Sees()
            trainer(tmp_path, max_epochs=2).fit(module, train, loader())
        else:
            module, _ = fitted(tmp_path, source, train, loader(), max_epochs=2)
        orders.append([float(value) for batch in module.trained for value in batch])
    assert orders[0] == orders[1]


# -- keeping, moving, failing ------------------------------------------------------------------------


def test_samples_are_kept_until_they_are_cleared(tmp_path: Any) -> None:
    source = SampleSource("train", num_samples=8)
    module, collects = fitted(tmp_path, source, loader(), loader())
    run = module.trainer
    with preserve_training_state(run, module) as snapshot:
        assert source.collect(run, snapshot, Ranks()) is collects.samples
        source.clear()
        again = source.collect(run, snapshot, Ranks())
    assert again is not collects.samples
    assert again.indices == collects.samples.indices


def test_batches_without_weight_are_left_out(tmp_path: Any) -> None:
    source = SampleSource("train", num_samples=40, batch_weight=lambda batch: float((batch > 30).sum()))
    _, collects = fitted(tmp_path, source, loader(), loader())
    assert len(collects.batches) < len(collects.samples.batches) == 10
    assert min(collects.samples.counted.weights) > 0
    assert len(collects.samples.counted.keys) == len(collects.batches)


class Transfers(Sees):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert dataloader_idx == 0
        batch["x"] += 100 if self.trainer.training else 200
        batch["noise"] = torch.rand(1)
        return batch


def test_transfer_hooks_run_on_copies_with_fixed_draws(tmp_path: Any) -> None:
    rows = [{"x": row} for row in NUMBERS]
    for name, offset, stage in (("train", 100, RunningStage.TRAINING), ("val", 200, RunningStage.VALIDATING)):
        source = SampleSource(name, num_samples=8)
        assert source.stage == stage
        module, collects = Transfers(), Collects(source)
        run = trainer(tmp_path, collects, max_epochs=1)
        run.fit(module, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4))
        assert all(float(batch["x"].min()) >= offset for batch in collects.batches)
        assert all(float(batch["x"].max()) < 40 for batch in collects.samples.batches)
        assert len({float(batch["noise"]) for batch in collects.batches}) == 2
        with preserve_training_state(run, module):
            again = source.batches_on_device(run, module, collects.samples)
        assert [float(batch["noise"]) for batch in again] == [float(batch["noise"]) for batch in collects.batches]


class Fails(Sees):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[:, 1]


def test_a_transfer_hook_that_fails_is_explained(tmp_path: Any) -> None:
    run = trainer(tmp_path, Collects(SampleSource(num_samples=8)), max_epochs=1)
    with pytest.raises(UserCodeError, match=r"moving a batch.*raised IndexError.*dataloader='train'") as caught:
        run.fit(Fails(), loader(), loader())
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size must be None or an integer of at least 1"),
        ({"dataloader": "test"}, "dataloader must be 'val' or 'train'"),
        ({"seed": -1}, "seed must be an integer between 0 and"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleSource(**options)


def test_a_run_without_the_loader(tmp_path: Any) -> None:
    source = SampleSource("val")

    class Checks(Collects):
        def setup(self, run: Any, module: Any, stage: str) -> None:
            self.source.check(run)

    with pytest.raises(MisconfigurationException, match=r"the run has no validation loader.*use dataloader='train'"):
        trainer(tmp_path, Checks(source)).fit(Sees(), loader())
    assert source.description == "the validation loader"
    assert SampleSource("train").description == "the training loader"
