"""Small training runs that the callback's tests share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.measurement.solvers import Lanczos
from tests.helpers.lightning import LightningModule, Trainer, seed_everything

NUM_EIGENVALUES = 4


def data(num: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 5, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.3 * torch.randn(num, 3, generator=generator)).argmax(1))


def loader(num: int = 48, *, batch_size: int = 8, shuffle: bool = False, seed: int = 0, **options: Any) -> DataLoader:
    return DataLoader(data(num, seed), batch_size=batch_size, shuffle=shuffle, **options)


class Net(LightningModule):
    """Everything that a careless measurement would disturb: dropout, batch norm, metrics, lists, counters."""

    def __init__(
        self, *, width: int = 5, dropout: float = 0.2, monitor: str | None = None, strict: bool = True
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3)
        )
        kind = {"task": "multiclass", "num_classes": 3}
        # Two metrics of one compute group, which the collection finds out about at the first update.
        self.train_metrics = torchmetrics.MetricCollection(
            {"precision": torchmetrics.Precision(**kind), "recall": torchmetrics.Recall(**kind)}, prefix="train_"
        )
        self.losses: list[float] = []
        self.calls = 0
        self.monitor, self.strict = monitor, strict

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        x, y = batch
        self.calls += 1
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.train_metrics.update(logits, y)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        self.losses.append(loss.item())
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.monitor is None:
            return optimizer
        self.scheduler = Watched(optimizer, patience=100)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler, "monitor": self.monitor, "strict": self.strict},
        }


class Watched(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Notes what it was shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[float] = []
        super().__init__(*args, **kwargs)

    def step(self, metrics: Any, epoch: Any = None) -> None:
        self.seen.append(float(metrics))
        super().step(metrics)


SOLVER_OPTIONS = {field.name for field in dataclasses.fields(Lanczos)}


def measure(**options: Any) -> PowerLawHessianCallback:
    """The callback, at its smallest; options of the Lanczos solver may stand beside its own."""
    defaults: dict[str, Any] = {
        "num_eigenvalues": NUM_EIGENVALUES,
        "num_samples": 32,
        "rtol": 0.05,
        "max_hvps": 60,
        "figures": False,
        "verbose": False,
    }
    chosen = {**defaults, **options}
    solver = {name: chosen.pop(name) for name in SOLVER_OPTIONS & chosen.keys()}
    return PowerLawHessianCallback(**{"solver": Lanczos(**solver), **chosen})


def trainer(tmp_path: Any, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **{**defaults, **options})


def seeded(make: Any = Net, seed: int = 1, **options: Any) -> Any:
    seed_everything(seed, verbose=False)
    return make(**options)
