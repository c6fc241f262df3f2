"""pytorch-tabular: a network with embedded categories, trained by the library's own Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from benchmarks.libraries.library import MAX_EPOCHS, Library


def train(callbacks: Sequence[Any]) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(240, 3))
    table = pd.DataFrame(x, columns=["a", "b", "c"])
    table["kind"] = generator.choice(["red", "green", "blue"], 240)
    table["label"] = ((x[:, 0] > 0) & (table["kind"] != "red")).astype(int)
    model = TabularModel(
        data_config=DataConfig(target=["label"], continuous_cols=["a", "b", "c"], categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="12-6", dropout=0.1),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            max_epochs=MAX_EPOCHS,
            batch_size=32,
            accelerator="cpu",
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            progress_bar="none",
            seed=1,
        ),
        verbose=False,
    )
    model.fit(train=table[:160], validation=table[160:], callbacks=list(callbacks))


LIBRARY = Library(
    model="CategoryEmbeddingModel",
    data="a random table",
    train=train,
)
