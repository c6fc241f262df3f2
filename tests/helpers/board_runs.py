"""A training run of two ranks with a board, for test_boards.py: ``python -m tests.helpers.board_runs OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from hessian_callback import Density, Subspace
from hessian_callback.algorithms.subspace_history import SubspaceHistory
from hessian_callback.callbacks.reporters.pictures import LayoutReporter
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.extras import subspace
from tests.helpers.lightning import Callback, TensorBoardLogger
from tests.helpers.toy_runs import loader, measure, seeded, trainer


class Fails(SubspaceHistory):
    """Has no room for a comparison with two spaces on rank 1."""

    def overlaps_with(self, vectors: Any, ranks: Ranks) -> list[float]:
        if len(self) == 2 and ranks.rank == 1:
            self._spaces[1].vectors.resize_(0)
        return super().overlaps_with(vectors, ranks)


class Watcher(Callback):
    def __init__(self) -> None:
        self.overlaps: list[Any] = []

    def on_hessian_measured(self, run: Any, module: Any, callback: Any) -> None:
        self.overlaps.append(callback.run_measurer.states["subspace"].spaces.overlaps.tolist())


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    callback = measure(figures=True, extras=[Density(num_hvps=8), Subspace(dimension=2)], max_hvps=200)
    subspace.SubspaceHistory = Fails  # type: ignore[misc]
    watcher = Watcher()
    logger = TensorBoardLogger(out, name="", version="run")
    run = trainer(out, callback, watcher, logger=logger, strategy="ddp", devices=2)
    run.fit(seeded(), loader(num=48, shuffle=True), loader(num=45, seed=1))
    torch.save(
        {
            "overlaps": watcher.overlaps,
            "failed": [dict(m.not_compared) for m in callback.history],
            "names": sorted(next(one.names for one in callback.reporters if isinstance(one, LayoutReporter))),
        },
        out / f"{run.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
