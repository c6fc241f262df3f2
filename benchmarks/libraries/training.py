"""Training runs without files, and a plain LightningModule around a model that has none of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.libraries.library import MAX_EPOCHS, QUIET


class Wrapped(LightningModule):
    """A model and its loss, as a user of a library without Lightning would wrap them.

    Args:
        model: the model.
        loss: ``loss(model, batch)``.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.model, batch)
        self.log("train_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.model, batch), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def train_from_scratch(
    module_and_data: Callable[[], tuple[LightningModule, Any, Any]], callbacks: Sequence[Any], **options: Any
) -> None:
    """Seed, make a module and its two loaders, and fit the module.

    Args:
        module_and_data: returns the module, the training loader and the validation loader.
        callbacks: the trainer's callbacks.
        **options: further options of the trainer.
    """
    seed_everything(1, verbose=False)
    module, train, val = module_and_data()
    Trainer(**(QUIET | {"max_epochs": MAX_EPOCHS, "callbacks": list(callbacks)} | options)).fit(module, train, val)
