"""The samples of a run on which its Hessian is measured, collected once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from hessian_callback.callbacks.samples import SampleSet, batch_on_device, collect, find_loader, moving_parts
from hessian_callback.callbacks.state_guard import Snapshot
from hessian_callback.linalg.distributed import Ranks

__all__ = ["SampleSource"]


class SampleSource:
    """Takes samples from a run's loader."""

    def __init__(
        self,
        dataloader: str | Iterable[Any],
        *,
        num_samples: int,
        batch_size: int | None,
        batch_weight: Callable[..., Any] | None,
        seed: int,
    ) -> None:
        self.dataloader = dataloader
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.batch_weight = batch_weight
        self.seed = seed
        self._samples: SampleSet | None = None

    @property
    def on_training_data(self) -> bool:
        """Whether the samples are those of the training loader."""
        return isinstance(self.dataloader, str) and self.dataloader == "train"

    @property
    def is_collected(self) -> bool:
        """Whether the samples are there."""
        return self._samples is not None

    def collect(self, trainer: Trainer, snapshot: Snapshot, ranks: Ranks) -> SampleSet:
        """Return the samples, which are collected at the first call."""
        if self._samples is None:
            with ranks.propagate_errors("finding the loader of the samples"):
                loader = find_loader(trainer, self.dataloader)
                for part in moving_parts(loader):
                    snapshot.remember(part, copy_tensors=False)
            self._samples = collect(
                loader,
                num_samples=self.num_samples,
                seed=self.seed,
                batch_size=self.batch_size,
                batch_weight=self.batch_weight,
                ranks=ranks,
                sequential=not self.on_training_data,
            )
        return self._samples

    def batches_on_device(self, trainer: Trainer, pl_module: LightningModule, samples: SampleSet) -> list[Any]:
        """Return copies of the batches with a weight, as the module's steps get them."""
        stage = RunningStage.TRAINING if self.on_training_data else RunningStage.VALIDATING
        return [
            batch_on_device(trainer, pl_module, batch, seed=self.seed, key=key, stage=stage)
            for batch, key, weight in zip(samples.batches, samples.keys, samples.weights, strict=True)
            if weight > 0
        ]

    def clear(self) -> None:
        """Release the samples."""
        self._samples = None
