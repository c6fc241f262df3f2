"""Resumed runs that are those that were not interrupted: the random generators' states travel in the checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["KeepRandomState"]


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
        if self._restored["cuda"]:
            torch.cuda.set_rng_state_all(self._restored["cuda"])
        self._restored = None
