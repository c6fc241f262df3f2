"""The loss of a LightningModule, however it offers one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.measurement.errors import LossError
from tests.helpers.lightning import LightningModule, MisconfigurationException


class Plain(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return batch.mean()


class NoIndex(LightningModule):
    def training_step(self, batch: Any) -> Any:
        return {"loss": batch.mean(), "logits": batch}


class Flexible(LightningModule):
    def training_step(self, *arguments: Any) -> Any:
        batch, _ = arguments
        return batch.mean()


class Offers(Plain):
    def hessian_loss(self, batch: Any) -> Any:
        return batch.sum()


@pytest.mark.parametrize(
    ("make", "loss_fn", "expected"),
    [
        (Plain, None, 2.0),
        (NoIndex, None, 2.0),
        (Flexible, None, 2.0),
        (Offers, None, 8.0),
        (Offers, lambda module, batch: batch.max(), 2.0),
    ],
)
def test_the_loss_that_is_found(make: Any, loss_fn: Any, expected: float) -> None:
    module = make()
    assert resolve_loss(module, loss_fn)(module, torch.full((4,), 2.0)).item() == expected


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
