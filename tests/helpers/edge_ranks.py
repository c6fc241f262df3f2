"""A monitored training run of two ranks, for test_edge_ddp.py: ``python -m tests.helpers.edge_ranks OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from hessian_callback import EdgeOfStabilityMonitor
from tests.helpers.toy_runs import Net, loader, seeded, trainer


class AdamNet(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def monitor() -> EdgeOfStabilityMonitor:
    return EdgeOfStabilityMonitor(
        every_n_train_steps=2, max_overhead=None, num_samples=32, figures=False, on_error="raise", rtol=1e-3
    )


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in ("with", "without"):
        callback = monitor()
        callbacks = [callback] if name == "with" else []
        run = trainer(out, *callbacks, strategy="ddp", devices=2, max_epochs=1, precision="64-true")
        model = seeded(AdamNet)
        run.fit(model, loader(num=48, shuffle=True), loader(num=16, seed=1))
        found = {
            "history": [entry.to_state() for entry in callback.history],
            "weights": model.state_dict(),
            "metrics": {key: float(value) for key, value in run.callback_metrics.items()},
        }
        torch.save(found, out / f"{name}-{run.global_rank}.pt")


if __name__ == "__main__":
    main()
