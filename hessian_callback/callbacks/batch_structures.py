"""A warning if the samples have another structure than the batches of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from hessian_callback.measurement.batch_structure import structure_difference, structure_of

__all__ = ["BatchStructures"]


class BatchStructures:
    """Compares the first batch of training with the first batch of the samples, as soon as both are known.

    A training step may take apart a batch of another structure without an error, and compute another loss.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the batches of an earlier run."""
        self._known: dict[str, Any] = {}

    def follow_training(self, batch: Any) -> None:
        """Note a batch of training, as the step gets it."""
        self._follow("training", batch)

    def follow_samples(self, batches: Sequence[Any]) -> None:
        """Note the batches of the samples, as the loss gets them."""
        if batches:
            self._follow("samples", batches[0])

    def _follow(self, name: str, batch: Any) -> None:
        if name in self._known:
            return
        self._known[name] = structure_of(batch)
        if len(self._known) < 2:
            return
        difference = structure_difference(self._known["training"], self._known["samples"])
        if difference is not None:
            path, of_training, of_samples = difference
            rank_zero_warn(
                f"training_step is evaluated on samples of another structure than the batches of training: {path} is "
                f"{of_samples}, and {of_training} in training, so its loss may be another one. Use dataloader='train', "
                "pass dataloader=my_loader with batches as in training, or pass loss_fn=..., a callable(pl_module, "
                "batch) for such samples"
            )
