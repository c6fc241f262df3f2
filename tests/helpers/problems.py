"""Small problems that the tests of measurements share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.problem import Problem

NUM_BATCHES, BATCH_SIZE = 6, 20


def cross_entropy(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_BATCHES, BATCH_SIZE, 5, generator=generator, dtype=torch.float64)
    return [(one, (one[:, :3] + 0.3 * one[:, 2:]).argmax(1)) for one in x]


def problem(ranks: Ranks | None = None, **options: Any) -> Problem:
    """Classification of 120 samples in 6 batches, which are dealt to the ranks in turn."""
    ranks = ranks or Ranks()
    mine = range(ranks.rank, NUM_BATCHES, ranks.world_size)
    every = batches()
    defaults: dict[str, Any] = {
        "model": network(),
        "loss_fn": cross_entropy,
        "batches": [every[number] for number in mine],
        "weights": [float(BATCH_SIZE) for _ in mine],
        "keys": list(mine),
        "num_samples": NUM_BATCHES * BATCH_SIZE,
        "num_batches": NUM_BATCHES,
        "ranks": ranks,
        "precision": "float64",
    }
    return Problem(**{**defaults, **options})
