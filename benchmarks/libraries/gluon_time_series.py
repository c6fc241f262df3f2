"""gluonts: DeepAR, trained by the library's own loop over a stream of windows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator
from lightning.pytorch import seed_everything

from benchmarks.libraries.library import MAX_EPOCHS, QUIET, Library


def _series() -> ListDataset:
    times = np.arange(60)
    rows = [{"start": "2024-01-01", "target": np.sin(times / phase) + 2} for phase in range(2, 10)]
    return ListDataset(rows, freq="D")


def _estimator(callbacks: Sequence[Any]) -> DeepAREstimator:
    # The library adds a ModelCheckpoint.
    options = QUIET | {"enable_checkpointing": True, "max_epochs": MAX_EPOCHS, "callbacks": list(callbacks)}
    return DeepAREstimator(
        freq="D",
        prediction_length=3,
        context_length=4,
        num_layers=1,
        hidden_size=4,
        lags_seq=[1, 2],
        batch_size=8,
        num_batches_per_epoch=6,
        trainer_kwargs=options,
    )


def train(callbacks: Sequence[Any]) -> None:
    seed_everything(1, verbose=False)
    _estimator(callbacks).train(_series(), validation_data=_series())


def _batches() -> list[Any]:
    """Return batches of training windows, which the run does not use."""
    estimator = _estimator([])
    windows = estimator.create_transformation().apply(_series(), is_train=True)
    loader = estimator.create_training_data_loader(windows, estimator.create_lightning_module())
    return list(itertools.islice(loader, 4))


LIBRARY = Library(
    model="DeepAREstimator",
    data="sines",
    train=train,
    remedies={"dataloader=list_of_batches": {"dataloader": _batches()}},
)
