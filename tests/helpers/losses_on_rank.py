"""For test_prediction_live.py, apart from it: a rank's process imports this alone, which is quick."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from hessian_callback.callbacks.lightning_packages import TrainerFn
from hessian_callback.callbacks.run_losses import losses_of
from hessian_callback.linalg.distributed import Ranks


class Losses:
    """A trainer as far as its metrics go, which are of this rank."""

    validating = False

    def __init__(self, rank: int, broken: bool = False) -> None:
        self.rank, self.broken = rank, broken
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        if self.broken and self.rank == 1:
            raise RuntimeError("rank one's own trouble")
        own = {"val_loss": torch.tensor(1.0 + self.rank), "bad": torch.tensor(math.nan if self.rank else 1.0)}
        return own if self.rank else {**own, "alone": torch.tensor(3.0)}


def losses_on_rank(rank: int) -> Any:
    ranks = Ranks(torch.distributed.group.WORLD)
    names = ["val_loss", "alone", "bad", "none", None]
    values = losses_of(Losses(rank), names, ranks)  # type: ignore[arg-type]
    try:
        losses_of(Losses(rank, broken=True), names, ranks)  # type: ignore[arg-type]
    except Exception as error:
        return values, type(error).__name__
    return values, None
