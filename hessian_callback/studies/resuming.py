"""Runs that are killed and go on as if they had not been: what a Trainer lacks for that, as callbacks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hessian_callback.callbacks.power_law import PowerLawHessianCallback

__all__ = ["EndWhenTold", "KeepRandomState"]


class KeepRandomState(Callback):
    """Keep the states of Python's, numpy's and torch's global generators in checkpoints, and go on with them.

    Lightning seeds anew when a run is resumed, so that the rest of it has other batches than it would have had, other
    weights at the end, and another Hessian than the one that a killed measurement had begun on. For one process, and
    checkpoints at the ends of epochs.

    Example:
        >>> kept = KeepRandomState()
        >>> state = kept.state_dict()
        >>> first = torch.rand(1)
        >>> kept.load_state_dict(state)
        >>> kept.on_fit_start(None, None)
        >>> torch.equal(torch.rand(1), first)
        True
    """

    def __init__(self) -> None:
        """Begin with nothing to restore."""
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states as tensors and plain containers, which a checkpoint may hold."""
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states until training starts."""
        self._restored = state_dict

    def on_fit_start(self, trainer: Trainer | None, pl_module: LightningModule | None) -> None:
        """Put the generators where they were, before loaders draw from them."""
        if self._restored is None:
            return
        version, internal, gauss_next = self._restored["python"]
        random.setstate((version, tuple(internal), gauss_next))
        kind, keys, *rest = self._restored["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(self._restored["torch"])
        # A machine with fewer devices takes the states of those that it has.
        for device, state in enumerate(self._restored["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        self._restored = None


class EndWhenTold(Callback):
    """End a run that was told to end by SIGTERM before the epoch is saved, and never call one finished that has a gap.

    A measurement that SIGTERM interrupts is given up, and Lightning would save the epoch all the same: then it would
    never be made up for. Place it behind the callbacks that measure; ModelCheckpoint comes last by itself.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before the checkpoint of the epoch is written."""
        _end_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before a checkpoint is written at a validation."""
        _end_if_told(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End instead of calling the run complete."""
        _end_if_told(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the end was measured where that is wanted.

        Raises:
            RuntimeError: if it was not, since the checkpoint is then behind the measurement that is missing.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, PowerLawHessianCallback) or not callback.schedule.at_end:
                continue
            if not callback.history or callback.history[-1].step != trainer.global_step:
                raise RuntimeError(
                    f"{callback.prefix}: the end of this run was not measured, and its checkpoint is behind that; "
                    "move the run's folder away to have it run again"
                )


def _end_if_told(trainer: Trainer) -> None:
    if trainer.received_sigterm:
        raise SIGTERMException
