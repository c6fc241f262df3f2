"""The loss of a LightningModule, however it offers one."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch

from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.measurement.errors import LossError
from tests.helpers.lightning import LightningModule, MisconfigurationException
from tests.helpers.toy_runs import measure, trainer


class Weighted(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def mean(self, batch: Any) -> Any:
        return (self.weight.square() * batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Plain(Weighted):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.mean(batch)


class NoIndex(Weighted):
    def training_step(self, batch: Any) -> Any:
        return {"loss": self.mean(batch), "logits": batch}


class Flexible(Weighted):
    def training_step(self, *arguments: Any) -> Any:
        batch, _ = arguments
        return self.mean(batch)


class Keywords(Weighted):
    def training_step(self, batch: Any, **options: Any) -> Any:
        return self.mean(batch)


class KeywordOnly(Weighted):
    def training_step(self, batch: Any, *, scale: float = 1.0) -> Any:
        return scale * self.mean(batch)


class OtherNames(Weighted):
    def training_step(self, data: Any, number: int) -> Any:
        assert isinstance(number, int)
        return self.mean(data)


class BothKinds(Weighted):
    def training_step(self, batch: Any, *others: Any, scale: float = 1.0, **options: Any) -> Any:
        assert len(others) == 1
        return scale * self.mean(batch)


def logged(step: Any) -> Any:
    @functools.wraps(step)
    def call(*arguments: Any, **options: Any) -> Any:
        return step(*arguments, **options)

    return call


class Decorated(Weighted):
    @logged
    def training_step(self, batch: Any, *, scale: float = 1.0) -> Any:
        return scale * self.mean(batch)


class DecoratedWithIndex(Weighted):
    @logged
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.mean(batch) + 0 * batch_idx


class OnInstance(Weighted):
    """A class without a step, whose object gets one."""

    def __init__(self) -> None:
        super().__init__()
        self.training_step = types.MethodType(lambda self, batch, batch_idx: self.mean(batch), self)  # type: ignore[method-assign]


class Partial(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.training_step = functools.partial(self.scaled, scale=1.0)  # type: ignore[method-assign]

    def scaled(self, batch: Any, batch_idx: int, scale: float) -> Any:
        return scale * self.mean(batch)


STEPS = (
    *(Plain, NoIndex, Flexible, Keywords, KeywordOnly, OtherNames, BothKinds),
    *(Decorated, DecoratedWithIndex, OnInstance, Partial),
)


class Offers(Plain):
    def hessian_loss(self, batch: Any) -> Any:
        return batch.sum()


@pytest.mark.parametrize(
    ("make", "loss_fn", "expected"),
    [
        *((make, None, 2.0) for make in STEPS),
        (Offers, None, 8.0),
        (Offers, lambda module, batch: batch.max(), 2.0),
    ],
)
def test_the_loss_that_is_found(make: Any, loss_fn: Any, expected: float) -> None:
    module = make()
    assert resolve_loss(module, loss_fn)(module, torch.full((4,), 2.0)).item() == expected


@pytest.mark.parametrize("make", STEPS)
def test_a_step_that_lightning_trains_is_measured(make: Any, tmp_path: Any) -> None:
    callback = measure(num_eigenvalues=3, dataloader="train", on_error="raise")
    batches = torch.utils.data.DataLoader(torch.rand(32, 4), batch_size=8)
    trainer(tmp_path, callback, max_epochs=1).fit(make(), batches)
    assert [m.when for m in callback.history] == ["fit_start", "epoch"]
    assert all(m.slope is not None for m in callback.history)


class Nothing(LightningModule):
    pass


class Iterates(LightningModule):
    def training_step(self, dataloader_iter: Any) -> Any:
        return None


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("make", [Nothing, Iterates, Manual])
def test_no_loss_is_refused_with_the_remedy(make: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"Pass loss_fn=.*hessian_loss\(batch\)"):
        resolve_loss(make())


@pytest.mark.parametrize("output", [None, 1.0, {"losses": 1}], ids=str)
def test_what_is_no_loss(output: Any) -> None:
    loss = resolve_loss(Nothing(), lambda module, batch: output)
    with pytest.raises(
        LossError, match=r"loss_fn \(<lambda>\) returned .* where a loss tensor is needed.*Pass loss_fn="
    ):
        loss(None, None)


class Broken(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["labels"].mean()

    def hessian_loss(self, batch: Any) -> Any:
        return batch["labels"].mean()


@pytest.mark.parametrize("origin", ["the validation loader", "the training loader"])
@pytest.mark.parametrize("name", ["training_step", "hessian_loss", "loss_fn"])
def test_an_error_names_the_function_the_loader_the_mode_and_the_remedies(name: str, origin: str) -> None:
    module = Broken().eval()
    if name != "hessian_loss":
        module.hessian_loss = None  # type: ignore[assignment,method-assign]
    loss_fn = (lambda module, batch: batch["labels"].mean()) if name == "loss_fn" else None
    loss = resolve_loss(module, loss_fn, origin=origin)
    with pytest.raises(LossError) as caught:
        loss(module, {"x": torch.ones(1)})
    text = str(caught.value)
    assert ("loss_fn (<lambda>)" if name == "loss_fn" else f"Broken.{name}") in text
    assert f"raised KeyError: 'labels', on a batch of {origin} in eval mode" in text
    assert "Pass loss_fn=" in text
    assert ("dataloader='train'" in text) == (origin == "the validation loader")
    assert isinstance(caught.value.__cause__, KeyError)
