"""A training run of two ranks, for test_early_stopping_ddp.py: ``python -m tests.helpers.stopping_runs OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hessian_callback import PowerLawEarlyStopping
from tests.helpers.toy_runs import loader, measure, seeded, trainer


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    callback = measure(every_n_epochs=2, extras=["split_half"])
    stopper = PowerLawEarlyStopping(mode="min", min_trend=0.0, patience=2)
    run = trainer(out, stopper, callback, max_epochs=20, strategy="ddp", devices=2)
    run.fit(seeded(), loader(num=48, shuffle=True), loader(num=45, seed=1))
    torch.save(
        {
            "epoch": stopper.stopped_epoch,
            "step": run.global_step,
            "message": stopper.stopping_reason_message,
            "state": stopper.state_dict(),
            "slopes": [m.slope for m in callback.history],
        },
        out / f"{run.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
