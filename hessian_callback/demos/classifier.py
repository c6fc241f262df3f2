"""A classifier of images with any network, trained by the paper's recipe or another optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hessian_callback.callbacks.lightning_packages import LightningModule
from hessian_callback.demos.optimizers import OptimizerCallable, check_decay, step_decay

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

__all__ = ["ImageClassifier", "paper_sgd"]


# Not a lambda with defaults: LightningCLI would pass its momentum and weight decay to any other optimizer that a file
# names without them.
def paper_sgd(parameters: Iterable[Any]) -> torch.optim.SGD:
    """SGD as the paper trains its convolutional networks.

    Example:
        >>> optimizer = paper_sgd([torch.nn.Parameter(torch.zeros(2))])
        >>> [optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay")]
        [0.1, 0.9, 0.0005]
    """
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class ImageClassifier(LightningModule):
    """A network trained on the mean cross entropy, by default with the paper's recipe: SGD with two tenfold decays.

    Logged: ``train_loss`` and ``train_acc``, means over the epoch's batches as they were trained on, and
    ``val_loss`` and ``val_acc``.

    A checkpoint contains the weights of the network but not the network, so pass it again in
    ``load_from_checkpoint(path, network=...)``. The command line does this from its configuration.

    Args:
        network: ``(N, ...) -> (N, classes)`` logits.
        optimizer: function from parameters to their optimizer. In a file: ``class_path`` and ``init_args`` of an
            optimizer, whose own defaults apply to the other options. Default: SGD with rate .1, momentum .9 and weight
            decay 5e-4.
        decay_at: shares of the run's optimizer steps after which the rate falls. The run ends with ``max_steps`` or
            ``max_epochs``, whichever comes first. Empty for a constant rate.
        decay_factor: factor of each decrease.

    Raises:
        ValueError: if ``decay_at`` or ``decay_factor`` are out of range; before training, if the rate is to fall and
            the run has no known number of steps.

    Example:
        >>> from hessian_callback.demos import LeNet
        >>> model = ImageClassifier(LeNet(), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
        >>> model(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = paper_sgd,
        decay_at: Sequence[float] = (0.4, 0.8),
        decay_factor: float = 0.1,
    ) -> None:
        """Store the network and the recipe."""
        super().__init__()
        check_decay(decay_at, decay_factor)
        self.network = network
        self.optimizer = optimizer
        self.decay_at = tuple(decay_at)
        self.decay_factor = decay_factor

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's logits."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch."""
        loss, accuracy = self._loss_and_accuracy(batch)
        values = {"train_loss": loss, "train_acc": accuracy}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the images that were held out."""
        loss, accuracy = self._loss_and_accuracy(batch)
        self.log_dict({"val_loss": loss, "val_acc": accuracy}, prog_bar=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """Return the optimizer, and the schedule of its rate."""
        optimizer = self.optimizer(self.parameters())
        if not self.decay_at:
            return optimizer
        return step_decay(optimizer, self.trainer, self.decay_at, self.decay_factor)

    def _loss_and_accuracy(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return nn.functional.cross_entropy(logits, labels), accuracy
