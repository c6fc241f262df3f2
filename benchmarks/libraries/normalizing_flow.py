"""zuko: a neural spline flow."""

from __future__ import annotations

from typing import Any

import torch
import zuko
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import Wrapped, train_from_scratch


def _loss(flow: Any, batch: list[Tensor]) -> Tensor:
    return -flow().log_prob(batch[0]).mean()


def module_and_data() -> tuple[Wrapped, Any, Any]:
    angles = 3 * torch.rand(256)
    points = torch.stack([angles.cos(), angles.sin()], dim=1) + 0.1 * torch.randn(256, 2)
    flow = zuko.flows.NSF(features=2, transforms=2, hidden_features=(16, 16))
    train = DataLoader(TensorDataset(points[:192]), batch_size=32, shuffle=True)
    return Wrapped(flow, _loss), train, DataLoader(TensorDataset(points[192:]), batch_size=32)


LIBRARY = Library(
    model="NSF, wrapped",
    data="points on an arc",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
)
