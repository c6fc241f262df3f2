"""Tests of measurements on loaders that are not torch's own, through whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler, get_worker_info

from hessian_callback.measurement.errors import SampleError
from tests.helpers.toy_runs import Net, data, loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def fitted(tmp_path: Any, callback: Any, train: Any, val: Any, **options: Any) -> Any:
    module = seeded(Net)
    trainer(tmp_path, *([] if callback is None else [callback]), **options).fit(module, train, val)
    return module


def check_training(tmp_path: Any, make_train: Any, make_val: Any, **options: Any) -> Any:
    """Run with and without a measurement, compare all weights, and return the callback."""
    callback = measure(**options)
    measured = fitted(tmp_path, callback, make_train(), make_val())
    alone = fitted(tmp_path, None, make_train(), make_val())
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, measured.state_dict()[name]), name
    assert torch.equal(alone.trainer.callback_metrics["val_loss"], measured.trainer.callback_metrics["val_loss"])
    return callback


class Preprocessing(DataLoader):
    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield 20 * x, y


def test_preprocessing_in_a_loader_is_measured(tmp_path: Any) -> None:
    x, y = data(32, 1).tensors
    callback = check_training(
        tmp_path, lambda: Preprocessing(data(48), batch_size=8), lambda: Preprocessing(data(32, 1), batch_size=8)
    )
    explicit = measure(dataloader=DataLoader(TensorDataset(20 * x, y), batch_size=8))
    fitted(tmp_path, explicit, Preprocessing(data(48), batch_size=8), loader(32, seed=1))
    for one, other in zip(callback.history, explicit.history, strict=True):
        assert torch.allclose(one.spectrum.eigenvalues[0], other.spectrum.eigenvalues[0], rtol=1e-2)


def test_a_weighted_sampler_is_measured_with_its_repetitions(tmp_path: Any) -> None:
    x, y = data(12).tensors
    weights = [8.0] + [1.0] * 11

    def train() -> DataLoader:
        sampler = WeightedRandomSampler(weights, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, y), batch_size=8, sampler=sampler)

    callback = check_training(tmp_path, train, lambda: loader(seed=1), dataloader="train", num_samples=32)
    # The draws that a generator with the callback's seed gives, written out.
    drawn = list(WeightedRandomSampler(weights, 32, generator=torch.Generator().manual_seed(0)))
    assert len(set(drawn)) < len(drawn)
    explicit = measure(dataloader=DataLoader(TensorDataset(x[drawn], y[drawn]), batch_size=8))
    fitted(tmp_path, explicit, train(), loader(seed=1))
    for one, other in zip(callback.history, explicit.history, strict=True):
        assert one.num_samples == other.num_samples == 32
        assert torch.allclose(one.spectrum.eigenvalues[0], other.spectrum.eigenvalues[0], rtol=1e-2)


class Sharded(IterableDataset):
    def __iter__(self) -> Any:
        info = get_worker_info()
        rows = list(data(96))
        return iter(rows[info.id :: info.num_workers])


def test_a_stream_that_needs_a_worker_is_measured(tmp_path: Any) -> None:
    callback = check_training(
        tmp_path,
        lambda: DataLoader(Sharded(), batch_size=8, num_workers=1),
        lambda: loader(seed=1),
        dataloader="train",
    )
    assert callback.history[-1].logged


class Handle(IterableDataset):
    def __init__(self, path: Any) -> None:
        self.lines = open(path)  # noqa: SIM115

    def __iter__(self) -> Any:
        for line in self.lines:
            row = [float(word) for word in line.split()]
            yield torch.tensor(row[:5]), int(row[5])


@pytest.mark.parametrize("dataloader", ["train", "val"])
def test_a_stream_of_an_open_file_is_refused_before_it_is_read(dataloader: str, tmp_path: Any) -> None:
    path = tmp_path / "rows"
    path.write_text("\n".join(" ".join(map(str, [*x.tolist(), int(y)])) for x, y in data(96)))
    stream = DataLoader(Handle(path), batch_size=8)
    train, val = (stream, loader(seed=1)) if dataloader == "train" else (loader(), stream)
    module, run = seeded(Net), trainer(tmp_path, measure(dataloader=dataloader))
    with pytest.raises(SampleError, match=r"its dataset.lines.*would use up its data; pass dataloader=my_loader"):
        run.fit(module, train, val)
    assert run.global_step == 0


class Noisy:
    """A collate function with a random generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, rows: list[Any]) -> Any:
        x = torch.stack([row[0] for row in rows])
        return x + torch.randn(x.shape, generator=self.generator), torch.stack([row[1] for row in rows])


def test_a_collate_function_with_a_generator_shared_by_both_loaders(tmp_path: Any) -> None:
    shared: list[Noisy] = []

    def train() -> DataLoader:
        shared.append(Noisy())
        return loader(collate_fn=shared[-1])

    callback = check_training(tmp_path, train, lambda: loader(seed=1, collate_fn=shared[-1]), dataloader="train")
    assert callback.history[-1].logged
