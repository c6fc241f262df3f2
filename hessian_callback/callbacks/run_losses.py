"""Losses that a run has logged before a measurement, equal on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hessian_callback.callbacks.lightning_packages import Trainer, TrainerFn
from hessian_callback.linalg.distributed import Ranks

__all__ = ["losses_of"]


def losses_of(trainer: Trainer, names: Sequence[str | None], ranks: Ranks) -> list[float | None]:
    """Read logged metrics by their names in ``trainer.callback_metrics``.

    At the end of an epoch Lightning computes metrics at access, so the values are those that EarlyStopping gets. In
    validation those of the training epoch would be one epoch old, so their means over the epoch so far are taken.
    Without ``sync_dist=True`` each rank logs its own value; then the mean over the ranks that have one is returned.

    This is a collective: call it on all ranks. An error on one rank raises on all of them.

    Args:
        trainer: the trainer, in a hook.
        names: keys; ``None`` for a metric that is not needed.
        ranks: the processes that share the run.

    Returns:
        A number for each name; ``None`` if no rank has the metric, or the mean is not finite.

    Raises:
        Exception: if a metric cannot be read on this rank.
        PeerError: if it cannot be read on another rank.
    """
    with ranks.propagate_errors("reading the logged losses"):
        # Lightning computes metrics at each access, so access them once, and only if one is needed.
        metrics: Mapping[str, Any] = {**trainer.callback_metrics, **_epoch_so_far(trainer)} if any(names) else {}
        own = [float(metrics[name]) if name is not None and name in metrics else None for name in names]
    rows = [[float(value is not None), 0.0 if value is None else value] for value in own]
    dtype = torch.float32 if ranks.control_device.type == "mps" else torch.float64
    summed = ranks.all_reduce(torch.tensor(rows, dtype=dtype, device=ranks.control_device)).tolist()
    means = [total / count if count else math.nan for count, total in summed]
    return [mean if math.isfinite(mean) else None for mean in means]


def _epoch_so_far(trainer: Trainer) -> dict[str, Any]:
    """Return what the training epoch has logged for its end, while validation interrupts it; NaN if not a mean."""
    if trainer.state.fn != TrainerFn.FITTING or not trainer.validating:
        return {}
    found: dict[str, Any] = {}
    for entry in trainer.fit_loop.epoch_loop._results.values():
        if not entry.meta.on_epoch:
            continue
        is_mean = entry.is_tensor and entry.meta.is_mean_reduction and entry.cumulated_batch_size > 0
        value = entry.value / entry.cumulated_batch_size if is_mean else math.nan
        found |= dict.fromkeys({entry.meta.name, entry.meta.forked_name(on_step=False)}, value)
    return found
