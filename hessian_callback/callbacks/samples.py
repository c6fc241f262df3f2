"""The names of `hessian_callback.measurement.samples` and `hessian_callback.callbacks.sample_source` in one place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hessian_callback.callbacks.sample_source import (
    batch_on_device,
    find_loader,
    has_loader,
    missing_loader,
    warn_of_imbalance,
)
from hessian_callback.measurement import samples
from hessian_callback.measurement.loaders import combination_of
from hessian_callback.measurement.loaders import stateful_parts as moving_parts
from hessian_callback.measurement.samples import SampleSet, assign_to_ranks

__all__ = [
    "SampleSet",
    "assign_to_ranks",
    "batch_on_device",
    "collect",
    "find_loader",
    "has_loader",
    "missing_loader",
    "moving_parts",
    "warn_of_imbalance",
]


def collect(loader: Any, *, sequential: bool = True, **options: Any) -> SampleSet:
    """Collect as `samples.collect` does; several loaders serve as those of validation or of training do."""
    combination = combination_of(loader, "sequential" if sequential else "max_size_cycle")
    if sequential:  # Limits of validation, such as those of its sanity check, don't count.
        combination = replace(combination, limits=None)
    return samples.collect(combination, first_only=sequential, shared=True, **options)
