"""gluonts: DeepAR, trained by the library's own loop over a stream of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator
from lightning.pytorch import seed_everything

from benchmarks.libraries.library import MAX_EPOCHS, QUIET, Library


def train(callbacks: Sequence[Any]) -> None:
    seed_everything(1, verbose=False)
    times = np.arange(80)
    series = [{"start": "2024-01-01", "target": np.sin(times / phase) + 2} for phase in range(2, 10)]
    # The library adds a ModelCheckpoint.
    options = QUIET | {"enable_checkpointing": True, "max_epochs": MAX_EPOCHS, "callbacks": list(callbacks)}
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=4,
        context_length=8,
        num_layers=1,
        hidden_size=6,
        batch_size=16,
        num_batches_per_epoch=8,
        trainer_kwargs=options,
    )
    estimator.train(ListDataset(series, freq="D"))


LIBRARY = Library(
    model="DeepAREstimator",
    data="sines",
    train=train,
)
