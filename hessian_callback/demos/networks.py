"""The convolutional and fully connected networks of the paper."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

__all__ = ["FullyConnected", "LeNet", "ResNet18"]


class LeNet(nn.Module):
    """LeNet-5 with rectifiers and max-pooling, for images of 28 x 28 pixels; 61,706 parameters by default.

    The first convolution is padded to 32 x 32 pixels, the input size of the original network.

    Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
    Proceedings of the IEEE 86 (1998).

    Args:
        num_classes: logits.
        in_channels: channels of the images.

    Example:
        >>> import torch
        >>> network = LeNet()
        >>> network(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
        >>> sum(p.numel() for p in network.parameters())
        61706
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        """Build the layers."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``(N, in_channels, 28, 28) -> (N, num_classes)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


class FullyConnected(nn.Module):
    """Hidden layers of one width with rectifiers, and a linear layer to the logits.

    The paper varies width and "layers" of such networks and does not say whether the layer of logits
    counts. Here it does not: ``depth=2`` has three matrices.

    Args:
        input_size: pixels of an image, over all channels.
        width: units of each hidden layer.
        depth: hidden layers.
        num_classes: logits.

    Raises:
        ValueError: if there would be no hidden layer, or an empty one.

    Example:
        >>> import torch
        >>> network = FullyConnected()
        >>> network(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
        >>> [tuple(p.shape) for p in network.parameters() if p.ndim == 2]
        [(100, 784), (100, 100), (10, 100)]
    """

    def __init__(self, input_size: int = 784, width: int = 100, depth: int = 2, num_classes: int = 10) -> None:
        """Build the layers."""
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"width and depth must be at least 1, got width={width} and depth={depth}")
        sizes = [input_size, *[width] * depth]
        hidden = [layer for inputs, outputs in pairwise(sizes) for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images of any shape, ``(N, ...) -> (N, num_classes)``."""
        logits: Tensor = self.layers(images)
        return logits


class ResNet18(nn.Module):
    """The residual network of 18 layers for images of 32 x 32 pixels; 11,173,962 parameters by default.

    As is usual for small images, the first convolution is 3 x 3 and keeps the size, and no pooling follows
    it. Four stages of two blocks have 64, 128, 256 and 512 channels; all but the first halve the image.

    Source: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016.

    Args:
        num_classes: logits.
        in_channels: channels of the images.

    Example:
        >>> network = ResNet18()
        >>> sum(p.numel() for p in network.parameters())
        11173962
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        """Build the layers."""
        super().__init__()
        self.stem = nn.Sequential(*_normalised(in_channels, 64, kernel_size=3, stride=1), nn.ReLU())
        self.stages = nn.Sequential(
            _stage(64, 64, stride=1), _stage(64, 128, stride=2), _stage(128, 256, stride=2), _stage(256, 512, stride=2)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``(N, in_channels, 32, 32) -> (N, num_classes)``."""
        logits: Tensor = self.head(self.stages(self.stem(images)))
        return logits


class _BasicBlock(nn.Module):
    """Two normalised convolutions and a shortcut, which is a convolution only if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_normalised(inputs, outputs, kernel_size=3, stride=stride),
            nn.ReLU(),
            *_normalised(outputs, outputs, kernel_size=3, stride=1),
        )
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*(_normalised(inputs, outputs, kernel_size=1, stride=stride) if changes else ()))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu(self.residual(images) + self.shortcut(images))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_BasicBlock(inputs, outputs, stride), _BasicBlock(outputs, outputs, stride=1))


def _normalised(inputs: int, outputs: int, kernel_size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """A convolution without bias, since the normalisation after it removes a bias."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)
