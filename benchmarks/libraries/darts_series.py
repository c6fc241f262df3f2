"""darts: N-BEATS, trained by the library's own Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from darts.models import NBEATSModel
from darts.utils.timeseries_generation import sine_timeseries

from benchmarks.libraries.library import MAX_EPOCHS, QUIET, Library


def train(callbacks: Sequence[Any]) -> None:
    series = sine_timeseries(length=160, value_frequency=0.07)
    model = NBEATSModel(
        input_chunk_length=12,
        output_chunk_length=4,
        num_stacks=2,
        num_blocks=1,
        num_layers=2,
        layer_widths=8,
        dropout=0.1,
        batch_size=16,
        n_epochs=MAX_EPOCHS,
        random_state=1,
        pl_trainer_kwargs=QUIET | {"callbacks": list(callbacks)},
    )
    model.fit(series[:90], val_series=series[90:])


LIBRARY = Library(
    model="NBEATSModel",
    data="a sine",
    train=train,
)
