"""monai: a segmentation with the library's UNet, Dice loss, cached data set and random transforms."""

from __future__ import annotations

from typing import Any

import monai.transforms as mt
import torch
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import Wrapped, train_from_scratch

_CRITERION = DiceCELoss(to_onehot_y=True, softmax=True)


def _loss(model: Any, batch: Any) -> Tensor:
    return _CRITERION(model(batch["image"]), batch["label"])


def _records(number: int) -> list[dict[str, Tensor]]:
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    records = []
    for _ in range(number):
        centre, radius = 4 + 8 * torch.rand(2, 1, 1), 2 + 3 * torch.rand(1)
        inside = ((grid - centre).square().sum(0, keepdim=True) < radius**2).float()
        records.append({"image": inside + 0.3 * torch.randn(1, 16, 16), "label": inside})
    return records


def module_and_data() -> tuple[Wrapped, Any, Any]:
    both = ["image", "label"]
    augment = mt.Compose(
        [
            mt.ScaleIntensityd("image"),
            mt.RandFlipd(both, prob=0.5, spatial_axis=0),
            mt.RandRotate90d(both, prob=0.5),
            mt.RandGaussianNoised("image", prob=0.5, std=0.1),
        ]
    ).set_random_state(seed=7)
    model = UNet(2, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, dropout=0.1)
    train = CacheDataset(_records(64), augment, progress=False)
    val = CacheDataset(_records(48), mt.ScaleIntensityd("image"), progress=False)
    return Wrapped(model, _loss), DataLoader(train, batch_size=8, shuffle=True), DataLoader(val, batch_size=8)


LIBRARY = Library(
    model="UNet with DiceCELoss, wrapped; random transforms with a seed",
    data="discs in noise, 16 x 16",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
)
