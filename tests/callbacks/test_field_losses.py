"""Tests of measurements on modules whose training step does what nobody expects of a loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from hessian_callback.measurement.errors import LossError, UserCodeError
from tests.helpers.lightning import EarlyStopping, LightningModule
from tests.helpers.toy_runs import data, loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["x"], batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Pops(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = batch.pop("y")
        batch["more"] = 1
        return self.loss(batch["x"], labels)


class Normalises(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["x"].mul_(2), batch["y"])


class Scaled(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(2 * batch["x"], batch["y"])


@dataclass
class Batch:
    x: torch.Tensor
    y: Any

    def to(self, *args: Any, **options: Any) -> Any:
        return self

    @staticmethod
    def collate(rows: list[Any]) -> Any:
        return Batch(torch.stack([row["x"] for row in rows]), torch.stack([row["y"] for row in rows]))


class Own(Plain):
    """A batch of a class of its own, changed in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch.x.mul_(2)
        y, batch.y = batch.y, None
        return self.loss(batch.x, y)


def rows(seed: int = 0, **options: Any) -> DataLoader:
    return DataLoader([{"x": x, "y": y} for x, y in data(48, seed)], batch_size=8, **options)


def fitted(tmp_path: Any, make: Any, callback: Any, train: Any = None, val: Any = None, **options: Any) -> Any:
    module = seeded(make)
    run = trainer(tmp_path, *([] if callback is None else [callback]), **options)
    run.fit(module, train or rows(shuffle=True), val or rows(1))
    return module


@pytest.mark.parametrize(
    ("changing", "same", "options"),
    [(Pops, Plain, {}), (Normalises, Scaled, {}), (Own, Scaled, {"collate_fn": Batch.collate})],
    ids=["pops", "normalises", "own class"],
)
@pytest.mark.parametrize("dataloader", ["val", "train"])
def test_a_step_that_changes_its_batch(
    changing: Any, same: Any, options: dict[str, Any], dataloader: str, tmp_path: Any
) -> None:
    """It is measured as the step that leaves its batch alone, and trained as without a measurement."""
    one, other = measure(dataloader=dataloader), measure(dataloader=dataloader)
    measured = fitted(tmp_path, changing, one, rows(shuffle=True, **options), rows(1, **options))
    fitted(tmp_path, same, other)
    alone = fitted(tmp_path, changing, None, rows(shuffle=True, **options), rows(1, **options))
    assert len(one.history) == len(other.history) == 3
    for first, second in zip(one.history, other.history, strict=True):
        assert torch.equal(first.spectrum.eigenvalues, second.spectrum.eigenvalues)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, measured.state_dict()[name])


class Semi(Plain):
    """Training batches have another structure than those of validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["labelled"]["x"], batch["labelled"]["y"]) + self.net(batch["other"]["x"]).square().mean()


def test_another_structure_in_validation_names_the_remedy(tmp_path: Any) -> None:
    def both() -> Any:
        return {"labelled": rows(shuffle=True), "other": rows(2)}

    with pytest.raises(LossError, match=r"Semi.training_step raised KeyError: 'labelled'.*in eval mode.*'train'"):
        fitted(tmp_path, Semi, measure(), both())
    callback = measure(dataloader="train")
    fitted(tmp_path, Semi, callback, both())
    assert [entry.logged for entry in callback.history] == [True] * 3


class InEvalMode(Plain):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.loss(x, y) if self.training else [self.net(x)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch["x"], batch["y"]) * 1.0


def test_a_model_that_returns_predictions_in_eval_mode(tmp_path: Any) -> None:
    with pytest.raises(LossError, match=r"in eval mode.*Pass loss_fn=.*hessian_loss\(batch\)") as caught:
        fitted(tmp_path, InEvalMode, measure())
    assert isinstance(caught.value.__cause__, TypeError)
    callback = measure(loss_fn=lambda module, batch: module.loss(batch["x"], batch["y"]))
    fitted(tmp_path, InEvalMode, callback)
    assert callback.history[-1].logged


def hooks() -> list[type]:
    class TrainEpochStart(Plain):
        def on_train_epoch_start(self) -> None:
            self.temperature = 2.0

    class TrainBatchStart(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.temperature = 2.0

    class NoneBefore(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = None

        def on_train_start(self) -> None:
            self.temperature = torch.tensor(2.0)

    class Refuses(NoneBefore):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.on_train_start()

    class EmptyBefore(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.constants: dict[str, float] = {}

        @property
        def temperature(self) -> float:
            return self.constants["temperature"]

        def on_train_start(self) -> None:
            self.constants["temperature"] = 2.0

    def refusing_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.temperature is None:
            raise ValueError("no temperature")
        return training_step(self, batch, batch_idx)

    class BeforeZeroGrad(Plain):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.temperature = 2.0

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if isinstance(self, BeforeZeroGrad) and not self.trainer.global_step and not hasattr(self, "temperature"):
            return self.loss(batch["x"], batch["y"])
        return functional.cross_entropy(self.net(batch["x"]) / self.temperature, batch["y"])

    for kind in (TrainEpochStart, TrainBatchStart, NoneBefore, EmptyBefore, BeforeZeroGrad):
        kind.training_step = training_step  # type: ignore[method-assign]
    Refuses.training_step = refusing_step  # type: ignore[method-assign]
    return [TrainEpochStart, TrainBatchStart, NoneBefore, Refuses, EmptyBefore, BeforeZeroGrad]


@pytest.mark.parametrize("make", hooks(), ids=lambda kind: kind.__name__)
def test_attributes_that_a_hook_sets_after_the_start(make: Any, tmp_path: Any) -> None:
    callback = measure()
    fitted(tmp_path, make, callback)
    logged = [entry.logged for entry in callback.history]
    assert logged[1:] == [True, True]
    if not logged[0]:
        assert "in __init__ or setup() instead" in callback.history[0].reason


ERRORS = [
    TypeError("t"),
    ValueError("v"),
    KeyError("labels"),
    AttributeError("no attribute x"),
    IndexError("i"),
    AssertionError("a"),
    RuntimeError("size mismatch"),
    NotImplementedError("forward"),
]


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("option", ["loss_fn", "batch_weight"])
def test_a_certain_failure_ends_the_run_before_training(error: Exception, option: str, tmp_path: Any) -> None:
    callback = measure(**{option: raising(error)})
    module = seeded(Plain)
    run = trainer(tmp_path, callback)
    with pytest.raises(UserCodeError) as caught:
        run.fit(module, rows(), rows(1))
    assert caught.value.__cause__ is error
    assert run.global_step == 0


@pytest.mark.parametrize("option", ["loss_fn", "batch_weight"])
def test_running_out_of_memory_does_not_end_it(option: str, tmp_path: Any) -> None:
    callback = measure(**{option: raising(torch.OutOfMemoryError("CUDA out of memory"))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = fitted(tmp_path, Plain, callback)
    assert module.trainer.global_step == 12
    assert not any(entry.logged for entry in callback.history)


class Skips(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if bool((batch["y"] == 0).all()) else super().training_step(batch, batch_idx)


def test_batches_that_training_skips_are_weighted_zero(tmp_path: Any) -> None:
    val = DataLoader([{"x": x, "y": y} for x, y in data(48, 1)], batch_size=1)
    with pytest.raises(LossError, match=r"returned None.*give it the weight 0 with batch_weight"):
        fitted(tmp_path, Skips, measure(num_samples=48), val=val)
    callback = measure(num_samples=48, batch_weight=lambda batch: float((batch["y"] != 0).sum()))
    fitted(tmp_path, Skips, callback, val=val)
    kept = [row for row in val.dataset if row["y"] != 0]
    other = measure(num_samples=48, dataloader=DataLoader(kept, batch_size=48))
    fitted(tmp_path, Plain, other)
    for one, two in zip(callback.history, other.history, strict=True):
        assert torch.allclose(one.spectrum.eigenvalues[0], two.spectrum.eigenvalues[0], rtol=1e-2)


class Prefixed(Plain):
    def log(self, name: str, value: Any, **options: Any) -> None:
        super().log(f"{'train' if self.training else 'val'}/{name}", value, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True)
        return loss


def test_a_module_that_overrides_log_is_measured_in_silence(tmp_path: Any) -> None:
    callback = measure(at_steps=[0])
    module = fitted(tmp_path, Prefixed, callback)
    assert callback.history[0].logged
    assert "val/loss" not in module.trainer.callback_metrics
    assert "train/loss" in module.trainer.callback_metrics


class Narrow(Plain):
    """Takes fewer options than Lightning's own method, and renames."""

    def log(self, name: str, value: Any, prog_bar: bool = False) -> None:
        super().log(f"mine/{name}", value, prog_bar=prog_bar)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("choice", [{}, {"every_n_train_steps": 3}], ids=["epochs", "steps"])
@pytest.mark.parametrize("make", [Prefixed, Narrow], ids=lambda make: make.__name__)
def test_the_names_of_measurements_are_those_documented_where_log_is_overridden(
    make: Any, choice: dict[str, Any], tmp_path: Any
) -> None:
    module = seeded(make)
    callback = measure(**choice)
    run = trainer(tmp_path, callback, EarlyStopping("hessian/slope", patience=9, mode="max"))
    run.fit(module, rows(), rows(1))
    assert run.global_step == 12
    assert run.callback_metrics["hessian/slope"] == callback.history[-1].slope
    assert {name for name in run.callback_metrics if "loss" in name} <= {"train/loss", "mine/loss"}


class Tokens(LightningModule):
    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding, self.head = embedding(), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.embedding(batch[0])
        return functional.cross_entropy(self.head(hidden.tanh().flatten(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def tokens(**options: Any) -> DataLoader:
    numbers = torch.randint(0, 9, (32,), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(numbers, numbers % 3), batch_size=8, **options)


def test_sparse_embeddings_are_measured_as_dense_ones(tmp_path: Any) -> None:
    found = []
    for sparse in (True, False):
        callback = measure(extras=["norms"])
        fitted(
            tmp_path,
            lambda sparse=sparse: Tokens(lambda: nn.Embedding(9, 4, sparse=sparse)),
            callback,
            tokens(),
            tokens(),
        )  # type: ignore[misc]
        found.append(callback.history)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one.spectrum.eigenvalues, other.spectrum.eigenvalues, rtol=1e-5)
        assert one.comparisons["gradient_norm"] == pytest.approx(other.comparisons["gradient_norm"], rel=1e-5)


def test_weights_that_a_forward_pass_changes_are_named(tmp_path: Any) -> None:
    def make() -> Any:
        return Tokens(lambda: nn.Embedding(9, 4, max_norm=1.0))

    callback = measure()
    with pytest.warns(UserWarning, match=r"the loss changes embedding\.weight in place.*max_norm"):
        module = fitted(tmp_path, make, callback, tokens(), tokens())
    alone = fitted(tmp_path, make, None, tokens(), tokens())
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])


def test_the_loader_of_toy_runs_is_another_structure(tmp_path: Any) -> None:
    with pytest.raises(LossError, match=r"Plain.training_step raised TypeError"):
        fitted(tmp_path, Plain, measure(dataloader=loader()))


# -- samples of another structure, and losses that are no means --------------------------------------


def warnings_of(tmp_path: Any, make: Any, callback: Any, train: Any = None, val: Any = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(tmp_path, make, callback, train, val, max_epochs=1)
    return [str(warning.message) for warning in caught]


class Optional(Plain):
    """Has a consistency term if the batch has a second view."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + (self.net(batch["x"]) - self.net(batch["view"])).square().mean() if "view" in batch else loss


class Offers(Optional):
    def hessian_loss(self, batch: Any) -> Any:
        return self.training_step(batch, 0)


def with_views(**options: Any) -> DataLoader:
    return DataLoader([{"x": x, "y": y, "view": x + 0.1} for x, y in data(48)], batch_size=8, **options)


@pytest.mark.parametrize("choice", [{}, {"at_steps": [3]}], ids=["start", "later"])
def test_samples_of_another_structure_are_said_once(choice: dict[str, Any], tmp_path: Any) -> None:
    """The step takes validation batches without an error, and has another loss there."""
    found = warnings_of(tmp_path, Optional, measure(**choice), with_views(shuffle=True))
    (text,) = [text for text in found if "another structure" in text]
    assert "batch is a mapping with the keys 'x', 'y', and a mapping with the keys 'x', 'y', 'view' in training" in text
    for remedy in ("dataloader='train'", "dataloader=my_loader", "loss_fn=..."):
        assert remedy in text


def loss_of_pairs(module: Any, batch: Any) -> Any:
    return module.loss(batch["x"], batch["y"])


@pytest.mark.parametrize(
    ("make", "choice", "val"),
    [
        (Optional, {"dataloader": "train"}, None),
        (Optional, {"loss_fn": loss_of_pairs}, None),
        (Offers, {}, None),
        (Optional, {}, with_views()),
    ],
    ids=["train", "loss_fn", "hessian_loss", "alike"],
)
def test_a_loss_that_is_meant_for_the_samples_needs_no_warning(
    make: Any, choice: dict[str, Any], val: Any, tmp_path: Any
) -> None:
    found = warnings_of(tmp_path, make, measure(**choice), with_views(shuffle=True), val)
    assert not [text for text in found if "another structure" in text]


class Summed(Plain):
    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.net(x), y, reduction="sum") / 100


def test_a_sum_over_samples_is_said_once_a_run(tmp_path: Any) -> None:
    callback = measure()
    for _ in range(2):
        found = warnings_of(tmp_path, Summed, callback)
        (text,) = [text for text in found if "sum over its samples" in text]
        assert text.startswith("hessian: the loss of a batch is the sum")
    assert [text for text in warnings_of(tmp_path, Plain, callback) if "sum over its samples" in text] == []


def test_a_batch_of_ignored_labels_names_the_weight(tmp_path: Any) -> None:
    ignored = [{"x": x, "y": torch.tensor(-100) if number < 8 else y} for number, (x, y) in enumerate(data(32))]
    val = DataLoader(ignored, batch_size=1)
    callback = measure(num_samples=32)
    fitted(tmp_path, Plain, callback, val=val, max_epochs=1)
    reason = callback.history[0].reason
    assert "is nan" in reason
    assert "the weight 0 with batch_weight=..." in reason
    callback = measure(num_samples=32, batch_weight=lambda batch: float((batch["y"] >= 0).sum()))
    fitted(tmp_path, Plain, callback, val=val, max_epochs=1)
    assert callback.history[-1].logged
