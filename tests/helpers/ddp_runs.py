"""Training runs of several processes: ``python -m tests.helpers.ddp_runs OUT STRATEGY W NAME...``.

Every rank writes what it saw of each run to ``OUT/NAME-RANK.pt``.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hessian_callback import Density, FrobeniusNorm, PublishedProtocol, Subspace, Trace
from tests.helpers.lightning import Callback, EarlyStopping, ModelCheckpoint, ModelParallelStrategy
from tests.helpers.toy_runs import Net, data, loader, measure, seeded, trainer


class OnRank(Callback):
    """Goes wrong on one rank only, from a step on."""

    def __init__(self, rank: int = 1, step: int = 0) -> None:
        self.rank, self.step = rank, step

    def here(self, module: Any) -> bool:
        return module.global_rank == self.rank and module.trainer.global_step >= self.step


def cross_entropy(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Fails:
    """A loss that goes wrong on rank 1, at a call of its own counting."""

    def __init__(self, kind: str, *, step: int = 0, call: int = 0) -> None:
        self.kind, self.step, self.call, self.calls = kind, step, call, 0

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        loss = cross_entropy(module, batch)
        if module.global_rank != 1 or module.trainer.global_step < self.step:
            return loss
        self.calls += 1
        if self.calls <= self.call:
            return loss
        if self.kind == "nan":
            return loss * math.nan
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("rank one's own trouble")


class Augmented(Dataset):
    def __len__(self) -> int:
        return 25

    def __getitem__(self, index: int) -> Any:
        if random.random() > 2 or (getattr(self, "broken", False) and os.environ.get("LOCAL_RANK", "0") == "1"):
            raise OSError("rank one cannot read")
        x, y = data()[index]
        return x + random.random() + torch.rand(()), y


class Broken(Augmented):
    broken = True


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        first = int(os.environ.get("LOCAL_RANK", "0"))
        return iter([data()[first + 2 * i] for i in range(20)])


def augmented(kind: Any = Augmented) -> DataLoader:
    return DataLoader(kind(), batch_size=4)


# The callback's options, the trainer's, whether the run ends with an error.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "none": ({}, {}),
    "float64": ({}, {"precision": "64-true", "max_epochs": 1}),
    "augmented": ({"dataloader": augmented(), "num_samples": 25}, {"max_epochs": 1}),
    "idle": ({"num_samples": 8}, {"max_epochs": 1}),
    "weights": ({"batch_weight": lambda batch: float((batch[1] == 0).sum())}, {"max_epochs": 1}),
    "stream": ({"dataloader": DataLoader(Stream(), batch_size=4), "num_samples": 16}, {"max_epochs": 1}),
    "own loader": ({"dataloader": "train"}, {"max_epochs": 1, "use_distributed_sampler": False}),
    "warn": ({"loss_fn": Fails("raises", step=1)}, {}),
    "late": ({"loss_fn": Fails("raises", step=1, call=37), "memory_budget": 0}, {}),
    "nan": ({"loss_fn": Fails("nan", step=1)}, {}),
    "raise": ({"loss_fn": Fails("raises", step=1), "on_error": "raise"}, {}),
    "reading": ({"dataloader": augmented(Broken), "on_error": "raise"}, {}),
    "permanent": ({"loss_fn": lambda m, b: 1.0 if m.global_rank else cross_entropy(m, b)}, {}),
    "halves": ({}, {"val_check_interval": 0.5}),
    "share of time": ({"max_overhead": 0.5}, {"max_epochs": 4}),
    "steps": ({"every_n_train_steps": 2}, {"max_epochs": 1}),
    "predicted": ({"predict": "val_loss"}, {"max_epochs": 7}),
    "sharded": ({}, {}),
    "sharded none": ({}, {}),
    "sharded differences": ({"hvp": "finite_difference"}, {"max_epochs": 1}),
    "killed": ({"loss_fn": Fails("killed", step=1, call=7), "memory_budget": 0}, {}),
}


def failing_gradient(module: Any, batch: Any) -> torch.Tensor:
    """Goes wrong on rank 1 where the gradient's norm is taken, and nowhere else."""
    if module.global_rank == 1 and any(frame.name == "gradient_norm" for frame in traceback.extract_stack()):
        raise RuntimeError("rank one's own trouble")
    return cross_entropy(module, batch)


EXTRAS = [
    Trace(num_hvps=9),
    FrobeniusNorm(num_hvps=9),
    Density(num_hvps=16),
    Subspace(dimension=2),
    "norms",
    "numerical_interval",
    "split_half",
]
COMPARISONS = {"extras": EXTRAS}
ONE_EPOCH = {"max_epochs": 1, "precision": "64-true"}
# As above, for test_callback_comparisons_ddp.py.
COMPARISON_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "compared": ({**COMPARISONS, "groups": {"first": r"net\.0", "head": r"net\.4"}, "rtol": 1e-6}, ONE_EPOCH),
    "paper": ({"solver": PublishedProtocol(steps=6)}, ONE_EPOCH),
    "sharded compared": ({**COMPARISONS, "groups": {"head": r"net\.4"}}, {"max_epochs": 1}),
    "sharded differences compared": ({**COMPARISONS, "hvp": "finite_difference"}, {"max_epochs": 1}),
    "no gradient": ({"extras": ["norms", "trace"], "loss_fn": failing_gradient}, ONE_EPOCH),
}


def run_one(name: str, out: Path, strategy: str, world_size: int) -> None:
    choice, options = {**RUNS, **COMPARISON_RUNS}[name]
    callback = measure(**choice)
    model = seeded(Sharded if name.startswith("sharded") else Reporting)
    model.report_to = out / name
    model.callback = [callback]  # In a list, so that it is no submodule.
    callbacks: list[Any] = [] if name.endswith("none") else [callback]
    if name == "plain":
        callbacks += [
            EarlyStopping("hessian/slope", strict=True, patience=1, min_delta=100.0, verbose=False),
            ModelCheckpoint(out / "plain-checkpoints", monitor="hessian/slope", save_top_k=-1),
        ]
        options = {**options, "max_epochs": 5, "enable_checkpointing": True}
    chosen: Any = strategy
    if name.startswith("sharded"):
        chosen = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    run = trainer(out, *callbacks, **{"strategy": chosen, "devices": world_size, **options})
    began = time.monotonic()
    error: Exception | None = None
    try:
        run.fit(model, loader(num=48, shuffle=True), loader(num=45, seed=1))
    except Exception as exception:
        error = exception
    if "spawn" in strategy or "fork" in strategy:
        if error is not None:
            print(f"{name}: {error}", file=sys.stderr)
        return
    report(model, run.global_rank, error, time.monotonic() - began)


class Reporting(Net):
    report_to: Path
    callback: list[Any]

    def on_fit_end(self) -> None:
        report(self, self.global_rank, None, 0.0)


class Sharded(Reporting):
    def configure_model(self) -> None:
        for module in (self.net[0], self.net[-1], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def report(model: Any, rank: int, error: Exception | None, seconds: float) -> None:
    (callback,) = model.callback
    torch.save(
        {
            "history": [m.to_state() for m in callback.history],
            "epochs": model.current_epoch,
            "weights": {
                key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
                for key, value in model.state_dict().items()
            },
            "random": torch.get_rng_state(),
            "metrics": {k: float(v) for k, v in model.trainer.callback_metrics.items()},
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "seconds": seconds,
        },
        f"{model.report_to}-{rank}.pt",
    )


def main() -> None:
    out, strategy, world_size, *names = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    for name in names:
        run_one(name, Path(out), strategy, int(world_size))


if __name__ == "__main__":
    main()
