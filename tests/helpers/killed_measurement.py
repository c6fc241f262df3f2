"""A run that dies in a measurement that saves its solver: ``python -m tests.helpers.killed_measurement FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hessian_callback import Lanczos, top_eigenvalues
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.measurement import solvers
from tests.helpers.toy_runs import NUM_EIGENVALUES, loader, seeded, trainer


class Watched(PowerLawHessianCallback):
    """Notes the step of each product, and does something at the n-th of a step."""

    def __init__(self, at: tuple[int, int] | None, then: Callable[[], Any], **options: Any) -> None:
        self.at, self.then = at, then
        self.steps: list[int] = []
        defaults = {"num_samples": 32, "figures": False, "verbose": False}
        super().__init__(num_eigenvalues=NUM_EIGENVALUES, **{**defaults, **options})
        self._observer = self.run_measurer.observer
        self.run_measurer.observer = self._watching  # type: ignore[method-assign]

    def _watching(self, run: Any, ranks: Any, arrived: Any) -> Any:
        observer = self._observer(run, ranks, arrived)
        between_parts = observer.between_parts

        def watched() -> None:
            between_parts()
            self.steps.append(run.global_step)
            if self.at == (run.global_step, self.steps.count(run.global_step)):
                self.then()

        observer.between_parts = watched
        return observer


def fit(
    folder: Path, at: tuple[int, int] | None = None, then: Callable[[], Any] = lambda: None, **options: Any
) -> Watched:
    """Train for six steps, measured at the start and after the fourth."""
    torch.set_num_threads(1)
    seed, root = options.pop("weights", 1), options.pop("root", folder)
    solver = Lanczos(rtol=0.05, max_hvps=60, hvp="double_backward", checkpoint=folder)
    callback = Watched(at, then, at_steps=[0, 4], solver=solver, **options)
    trainer(root, callback, max_epochs=1).fit(seeded(seed=seed, dropout=0.0), loader(), loader(seed=1))
    return callback


if __name__ == "__main__":
    solvers.top_eigenvalues = partial(top_eigenvalues, checkpoint_every=0)  # type: ignore[assignment]
    fit(Path(sys.argv[1]), (4, 12), lambda: os.kill(os.getpid(), signal.SIGKILL))
