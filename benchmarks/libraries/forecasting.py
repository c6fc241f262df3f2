"""pytorch-forecasting: a temporal fusion transformer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import train_from_scratch


def module_and_data() -> tuple[LightningModule, Any, Any]:
    series = generate_ar_data(seasonality=10.0, timesteps=40, n_series=12, seed=2)
    train = TimeSeriesDataSet(
        series[series.time_idx < 30],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        max_encoder_length=10,
        max_prediction_length=3,
        time_varying_known_reals=["time_idx"],
        time_varying_unknown_reals=["value"],
        randomize_length=True,
    )
    val = TimeSeriesDataSet.from_dataset(train, series, min_prediction_idx=30)
    model = TemporalFusionTransformer.from_dataset(
        train, hidden_size=6, attention_head_size=1, hidden_continuous_size=4, dropout=0.1, log_interval=-1
    )
    return model, train.to_dataloader(train=True, batch_size=32), val.to_dataloader(train=False, batch_size=32)


LIBRARY = Library(
    model="TemporalFusionTransformer; a data set that draws the lengths of its samples",
    data="generate_ar_data",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
)
