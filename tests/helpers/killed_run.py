"""A run that is killed in the middle of a measurement: ``python -m tests.helpers.killed_run FOLDER STEP``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.helpers.lightning import ModelCheckpoint
from tests.helpers.toy_runs import loader, measure, seeded, trainer


class Loss:
    """Kills its process at the n-th evaluation in the measurement after some step."""

    def __init__(self, step: int | None, evaluation: int = 30) -> None:
        self.step, self.left = step, evaluation

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        if module.trainer.global_step == self.step:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(module(batch[0]), batch[1])


def fit(folder: Path, step: int | None = None, ckpt_path: Any = None) -> tuple[Any, Any]:
    """Train for four epochs of six steps, measured every four steps; return the callback and the module."""
    torch.set_num_threads(1)
    callback = measure(every_n_train_steps=4, loss_fn=Loss(step), memory_budget=0)
    saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
    # Lightning does not save random states, so no dropout.
    model = seeded(dropout=0)
    run = trainer(folder, callback, saver, max_epochs=4, enable_checkpointing=True)
    run.fit(model, loader(), loader(seed=1), ckpt_path=ckpt_path)
    return callback, model


if __name__ == "__main__":
    fit(Path(sys.argv[1]), int(sys.argv[2]))
