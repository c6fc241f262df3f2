"""Callbacks with which a killed run resumes to the same result: random states, and no checkpoint after SIGTERM."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from hessian_callback.callbacks.lightning_packages import CallbackBase, LightningModule, Trainer, sibling
from hessian_callback.callbacks.power_law import PowerLawHessianCallback

__all__ = ["EndOnSigterm", "KeepRandomState"]


class KeepRandomState(CallbackBase):
    """Save the states of Python's, numpy's and torch's global generators in checkpoints, and restore them.

    Lightning seeds the generators again when a run is resumed. Its remaining batches, its final weights and the Hessian
    of an interrupted measurement would then be different. For one process, and checkpoints at the ends of epochs.

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
        """Start without a state to restore."""
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states as tensors and plain containers, which checkpoints can hold."""
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the states until training starts."""
        self._restored = state_dict

    def on_fit_start(self, trainer: Trainer | None, pl_module: LightningModule | None) -> None:
        """Restore the generators before loaders draw from them."""
        if self._restored is None:
            return
        version, internal, gauss_next = self._restored["python"]
        random.setstate((version, tuple(internal), gauss_next))
        kind, keys, *rest = self._restored["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(self._restored["torch"])
        # A machine with fewer devices uses the states of its own.
        for device, state in enumerate(self._restored["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        self._restored = None


class EndOnSigterm(CallbackBase):
    """End a run on SIGTERM before its epoch is saved, and refuse to complete a run without its last measurement.

    A measurement that SIGTERM interrupts is given up. Lightning would still save the epoch, and a resumed run would
    not repeat the measurement. Place this callback behind those that measure; ModelCheckpoint always comes last.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before the checkpoint of the epoch is written."""
        _end_on_sigterm(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before a checkpoint is written at a validation."""
        _end_on_sigterm(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before the run counts as complete."""
        _end_on_sigterm(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the end of the run was measured if ``at_end`` is set.

        Raises:
            RuntimeError: if it was not, since the checkpoint was saved after the missing measurement.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, PowerLawHessianCallback) or not callback.schedule.at_end:
                continue
            if not callback.history or callback.history[-1].step != trainer.global_step:
                raise RuntimeError(
                    f"{callback.prefix}: the end of this run was not measured, and its checkpoint was saved after "
                    "that; move the run's folder away to have it run again"
                )


def _end_on_sigterm(trainer: Trainer) -> None:
    if trainer.received_sigterm:
        raise sibling(trainer, "utilities.exceptions", "SIGTERMException")
