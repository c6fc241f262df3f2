"""A library and the small training run that the drill makes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Any

# The modules of this package that have a LIBRARY, by the name of the library's distribution.
MODULES = {
    "pytorch-forecasting": "forecasting",
    "gluonts": "gluon_time_series",
    "chemprop": "molecules",
    "torch-geometric": "graphs",
    "scvi-tools": "single_cells",
    "peft": "adapters",
    "transformers": "language_model",
    "monai": "medical_images",
    "diffusers": "diffusion",
    "zuko": "normalizing_flow",
    "darts": "darts_series",
    "neuralforecast": "neural_forecast",
    "pytorch-tabular": "tables",
}


# Options of any Trainer: runs write no files. Libraries that make the Trainer themselves get them as well.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
MAX_EPOCHS = 2


@dataclass(frozen=True)
class Library:
    """A training run of a library's model.

    Attributes:
        model: the library's model, and who wraps it in a module if the library does not.
        data: the data in words.
        train: trains with the given callbacks, from fixed seeds. It always makes the same run.
        remedies: options of the callback by a description, tried in turn if a measurement fails without them.
        setting: options of the callback that suit the size of the run, and are no remedy.
    """

    model: str
    data: str
    train: Callable[[Sequence[Any]], object]
    remedies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)


def library(name: str) -> Library:
    """Import the module of a library, which imports the library."""
    return import_module(f"benchmarks.libraries.{MODULES[name]}").LIBRARY


def version(name: str) -> str | None:
    """Return the installed version of a distribution; ``None`` if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
