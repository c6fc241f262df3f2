"""Optimizers of the studies as an option, and a learning rate that decreases in steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from hessian_callback.callbacks.lightning_packages import Trainer

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

__all__ = ["OptimizerCallable", "check_decay", "step_decay"]

# LightningCLI converts `class_path` and `init_args` in a file to such a callable. Lightning defines the same name in
# its module for the command line.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]


def check_decay(decay_at: Sequence[float], decay_factor: float) -> None:
    """Check the options of `step_decay`.

    Raises:
        ValueError: if a share is not inside (0, 1), or the factor not in (0, 1].

    Example:
        >>> check_decay([0.4, 0.8], 0.1)
        >>> check_decay([40], 0.1)
        Traceback (most recent call last):
        ...
        ValueError: decay_at holds shares of the run's steps, between 0 and 1, got [40]
    """
    if not all(0 < share < 1 for share in decay_at):
        raise ValueError(f"decay_at holds shares of the run's steps, between 0 and 1, got {list(decay_at)}")
    if not 0 < decay_factor <= 1:
        raise ValueError(f"decay_factor must be above 0 and at most 1, got {decay_factor}")


def step_decay(
    optimizer: Optimizer, trainer: Trainer, decay_at: Sequence[float], decay_factor: float
) -> OptimizerLRSchedulerConfig:
    """Multiply an optimizer's rate after given shares of the run's optimizer steps.

    The number of steps is that of ``max_steps`` or of ``max_epochs``, whichever ends the run first. Early stopping does
    not change it.

    Args:
        optimizer: the optimizer.
        trainer: the trainer that is about to train with it.
        decay_at: shares of the steps; of ``S`` steps, those from number ``round(share * S)`` on, counted from
            zero, have the smaller rate.
        decay_factor: factor of each decrease.

    Returns:
        The return value for ``configure_optimizers``.

    Raises:
        ValueError: if the trainer has no end.
    """
    steps = trainer.estimated_stepping_batches
    # Lightning returns infinity for a run without limits, and -1 for epochs of unknown length.
    if not math.isfinite(steps) or steps < 0:
        raise ValueError(
            "decay_at counts in shares of the run's steps, and this run has no known number of them: give the trainer "
            "max_steps, or decay_at=[] for a constant rate"
        )
    milestones = [round(share * steps) for share in decay_at]
    scheduler = MultiStepLR(optimizer, milestones=milestones, gamma=decay_factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
