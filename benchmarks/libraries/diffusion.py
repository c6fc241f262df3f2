"""diffusers: a small UNet that predicts the noise that a scheduler added."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import Wrapped, train_from_scratch


class _Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        self.scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)


def _loss(model: Any, batch: list[Tensor]) -> Tensor:
    (images,) = batch
    noise = torch.randn_like(images)
    steps = torch.randint(0, 100, (len(images),), device=images.device)
    predicted = model.unet(model.scheduler.add_noise(images, noise, steps), steps).sample
    return functional.mse_loss(predicted, noise)


def module_and_data() -> tuple[Wrapped, Any, Any]:
    images = torch.rand(96, 1, 8, 8)
    train = DataLoader(TensorDataset(images[:64]), batch_size=16, shuffle=True)
    return Wrapped(_Denoiser(), _loss), train, DataLoader(TensorDataset(images[64:]), batch_size=16)


LIBRARY = Library(
    model="UNet2DModel with DDPMScheduler, wrapped",
    data="random images, 8 x 8",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
)
