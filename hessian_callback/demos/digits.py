"""A small convolutional network on scikit-learn's handwritten digits (1797 images of 8 x 8 pixels)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hessian_callback.callbacks.lightning_packages import LightningDataModule, LightningModule
from hessian_callback.demos.options import check_at_least

__all__ = ["DigitsCNN", "DigitsData"]


class DigitsCNN(LightningModule):
    """Two convolutions and a linear layer, 10,090 parameters at the default width.

    The convolutions are unpadded, so that the second one leaves a single pixel: products with the
    Hessian of a padded network of the same size cost three times as much on a CPU.

    Args:
        channels: channels of the two convolutions.
        learning_rate: step size of SGD.
        momentum: momentum of SGD.
        weight_decay: L2 penalty, applied by the optimizer and so not part of the measured Hessian.

    Example:
        >>> model = DigitsCNN()
        >>> model(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
        >>> sum(p.numel() for p in model.parameters())
        10090
    """

    def __init__(
        self,
        channels: tuple[int, int] = (16, 64),
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        """Build the layers."""
        super().__init__()
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        first, second = channels
        self.network = nn.Sequential(
            nn.Conv2d(1, first, kernel_size=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, kernel_size=3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``(N, 1, 8, 8) -> (N, 10)``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the images that were held out."""
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        loss = nn.functional.cross_entropy(logits, labels)
        self.log_dict({"val_loss": loss, "val_acc": accuracy}, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum at a constant rate."""
        return torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )


class DigitsData(LightningDataModule):
    """The digits of scikit-learn, split into training and validation images.

    scikit-learn contains them, so nothing is downloaded. The split is stratified and depends on ``split_seed`` alone,
    not on the run's seed, so runs with different seeds are validated and measured on the same images.

    Args:
        batch_size: images in a training batch.
        val_batch_size: images in a validation batch. Hessian products are summed over batches, and one large batch
            costs a tenth of many small ones.
        val_fraction: share of the 1797 images that is held out.
        split_seed: seed of the split.

    Raises:
        ValueError: if an option is out of range.
        ModuleNotFoundError: in ``setup``, if scikit-learn is missing.

    Example:
        >>> data = DigitsData()
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([599, 1, 8, 8]), torch.Size([599]))
    """

    def __init__(
        self,
        batch_size: int = 16,
        val_batch_size: int = 1024,
        val_fraction: float = 1 / 3,
        split_seed: int = 0,
    ) -> None:
        """Store the options; nothing is loaded before ``setup``."""
        super().__init__()
        check_at_least(1, batch_size=batch_size, val_batch_size=val_batch_size)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self._train: Dataset[tuple[Tensor, ...]] | None = None
        self._val: Dataset[tuple[Tensor, ...]] | None = None

    def setup(self, stage: str) -> None:
        """Load and split the images."""
        if self._train is not None:
            return
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "DigitsData reads the digits that ship inside scikit-learn, which is not installed: "
                "pip install 'hessian-callback[demo]'"
            ) from error
        pixels, digits = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        labels = torch.as_tensor(digits, dtype=torch.int64)
        train, val = train_test_split(
            range(len(labels)), test_size=self.val_fraction, random_state=self.split_seed, stratify=digits
        )
        self._train = TensorDataset(images[train], labels[train])
        self._val = TensorDataset(images[val], labels[val])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches of the training images."""
        return self._loader(self._train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the held-out images, in a fixed order."""
        return self._loader(self._val, batch_size=self.val_batch_size)

    def _loader(self, data: Dataset[tuple[Tensor, ...]] | None, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
        if data is None:
            raise RuntimeError("call setup('fit') before asking DigitsData for a loader; a Trainer does so itself")
        return DataLoader(data, **options)
