"""What a run itself knows of its losses when a measurement is made, equal on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from hessian_callback.linalg.distributed import Ranks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["losses_of"]


def losses_of(trainer: Trainer, names: Sequence[str | None], ranks: Ranks) -> list[float | None]:
    """Read metrics that the run has logged, by their names in ``trainer.callback_metrics``.

    At the end of an epoch Lightning computes them when they are asked for, so the values are those that EarlyStopping
    will see. Without ``sync_dist=True`` each rank logs its own: the mean over the ranks that have one is returned.

    Call it on all ranks. A metric that cannot be read is an error on all of them.

    Args:
        trainer: the trainer, in a hook.
        names: keys; ``None`` for one that is not wanted.
        ranks: the processes that share the run.

    Returns:
        A number for each name; ``None`` where no rank has it, or the mean is not finite.
    """
    with ranks.propagate_errors("reading the losses that the run has logged"):
        # Lightning computes metrics at each access, so only once, and only if one is wanted.
        metrics: Mapping[str, torch.Tensor] = trainer.callback_metrics if any(names) else {}
        own = [float(metrics[name]) if name is not None and name in metrics else None for name in names]
    rows = [[float(value is not None), 0.0 if value is None else value] for value in own]
    dtype = torch.float32 if ranks.control_device.type == "mps" else torch.float64
    summed = ranks.all_reduce(torch.tensor(rows, dtype=dtype, device=ranks.control_device)).tolist()
    means = [total / count if count else math.nan for count, total in summed]
    return [mean if math.isfinite(mean) else None for mean in means]
