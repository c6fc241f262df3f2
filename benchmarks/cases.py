"""Models, losses and batches that every benchmark measures on: the same weights and data for all contestants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Case:
    """A model in eval mode, its mean loss, and batches of one size."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batches: list[Any]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def digits(size: int, num_samples: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's digits, enlarged to ``size`` pixels a side."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images[:num_samples]).float().view(-1, 1, 8, 8) / 16
    inputs = F.interpolate(inputs, size=(size, size), mode="bilinear")
    targets = torch.from_numpy(labels[:num_samples])
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


def text(block: int, num_samples: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Characters of Python's own documentation."""
    from pydoc_data.topics import topics

    letters = "".join(topics[key] for key in sorted(topics))
    codes = torch.tensor([min(ord(letter), 127) for letter in letters[: (block + 1) * num_samples]])
    rows = codes.view(num_samples, block + 1)
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(batch_size)]


def mlp() -> Case:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return Case(model, cross_entropy, digits(16, 1024, 256))


def lenet() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    return Case(model, cross_entropy, digits(28, 512, 128))


class Residual(nn.Module):
    """The basic block of ResNet-20: two normalised convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(inner + self.shortcut(x))


def resnet() -> Case:
    widths = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [Residual(*width) for width in [*widths, (64, 64, 1)]]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return Case(model, cross_entropy, digits(16, 128, 64))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """nanoGPT's shape: learned positions, pre-norm blocks, and a head that is tied to the embedding."""

    def __init__(self, depth: int, width: int, heads: int, block: int, vocabulary: int = 128) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def gpt() -> Case:
    return Case(GPT(depth=6, width=128, heads=4, block=64), next_token, text(64, 64, 16))


def tiny() -> Case:
    """For tests of the benchmarks themselves."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    return Case(model, cross_entropy, digits(8, 128, 32))


CASES: dict[str, Callable[[], Case]] = {"mlp": mlp, "lenet": lenet, "resnet": resnet, "gpt": gpt, "tiny": tiny}

# Samples, and samples a batch, that `measured` leaves: two batches at least, so that two ranks can share them.
MEASURED: dict[str, tuple[int, int]] = {
    "mlp": (1024, 256),
    "lenet": (256, 128),
    "resnet": (64, 32),
    "gpt": (16, 8),
    "tiny": (128, 32),
}


def measured(name: str, *, weights: Path | None = None, samples: tuple[int, int] | None = None) -> Case:
    """A trained case on as many of its samples as the comparisons with others can afford."""
    case = trained(name, weights=weights)
    num_samples, batch_size = samples or MEASURED[name]
    columns = [torch.cat(column)[:num_samples].split(batch_size) for column in zip(*case.batches, strict=True)]
    return Case(case.model, case.loss_fn, list(zip(*columns, strict=True)))


def trained(name: str, *, steps: int = 60, seed: int = 0, weights: Path | None = None) -> Case:
    """A case after some steps of Adam on its own batches, so that its spectrum is not that of chance.

    With ``weights``, a file: taken from there, or written there for the next caller.
    """
    torch.manual_seed(seed)
    case = CASES[name]()
    if weights is not None and weights.exists():
        case.model.load_state_dict(torch.load(weights, weights_only=True))
        case.model.eval()
        return case
    optimizer = torch.optim.Adam(case.model.parameters(), lr=1e-3)
    case.model.train()
    for step in range(steps):
        optimizer.zero_grad()
        case.loss_fn(case.model, case.batches[step % len(case.batches)]).backward()
        optimizer.step()
    case.model.eval().zero_grad()
    if weights is not None:
        torch.save(case.model.state_dict(), weights)
    return case
