"""neuralforecast: N-HiTS, trained by the library's own Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from neuralforecast.utils import AirPassengersDF

from benchmarks.libraries.library import QUIET, Library


def train(callbacks: Sequence[Any]) -> None:
    model = NHITS(
        h=4,
        input_size=12,
        max_steps=20,
        val_check_steps=10,
        n_blocks=[1, 1, 1],
        mlp_units=[[8, 8]] * 3,
        n_pool_kernel_size=[2, 2, 1],
        dropout_prob_theta=0.1,
        windows_batch_size=16,
        random_seed=1,
        callbacks=list(callbacks),
        **QUIET,
    )
    NeuralForecast([model], freq="ME").fit(AirPassengersDF, val_size=24)


LIBRARY = Library(
    model="NHITS",
    data="AirPassengersDF",
    train=train,
)
