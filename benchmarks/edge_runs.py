"""Evidence for the edge-of-stability monitor: does the ratio settle at 1, does it warn, and what does noise change?

    python -m benchmarks.edge_runs equilibrium   # full-batch runs, as in the papers
    python -m benchmarks.edge_runs warning       # small runs from safe to diverging, and rates that jump
    python -m benchmarks.edge_runs noise         # mini-batches of several sizes
    python -m benchmarks.edge_runs tables        # the tables of docs/reproduction.md and docs/edge.md

Each writes CSVs in benchmarks/edge/ as it goes, and leaves out runs that are there already. Everything runs on one
thread. The loops are plain, with the parts that the callback uses, so that a run costs seconds.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessian_callback.demos.character_gpt import CharacterGPT
from hessian_callback.demos.digits import DigitsData
from hessian_callback.demos.texts import TextData
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.edge import EdgeMeasurement, EdgeMeasurer, EdgeState
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.preconditioners import stability_limits
from hessian_callback.measurement.problem import Problem
from hessian_callback.operators.parameters import select_parameters

FOLDER = Path(__file__).parent / "edge"
NUM_SAMPLES = 256

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Task:
    """A model with its data: a source of batches, and fixed samples for loss and Hessian."""

    model: nn.Module
    loss: Loss
    inputs: Tensor
    targets: Tensor
    fixed: tuple[Tensor, Tensor]

    def batch(self, size: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if size is None:
            return self.fixed
        index = torch.randint(0, len(self.inputs), (size,), generator=generator)
        return self.inputs[index], self.targets[index]

    @torch.no_grad()
    def full_loss(self) -> float:
        return float(self.loss(self.model, self.fixed))


def cross_entropy(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def squared_error(model: Any, batch: Any) -> Tensor:
    """Half the squared error, summed over classes, as in the papers."""
    return 0.5 * (model(batch[0]) - nn.functional.one_hot(batch[1], 10)).square().sum(1).mean()


def digits(loss: Loss, seed: int, *, width: int = 32, num_samples: int = NUM_SAMPLES) -> Task:
    data = DigitsData()
    data.setup("fit")
    images, labels = map(torch.stack, zip(*data.train_dataloader().dataset, strict=True))
    inputs = images.flatten(1)
    inputs = (inputs - inputs.mean()) / inputs.std()
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    return Task(layers, loss, inputs, labels, (inputs[:num_samples], labels[:num_samples]))


def text(seed: int) -> Task:
    torch.manual_seed(seed)
    data = TextData(context_length=16, batch_size=64, steps_per_epoch=20)
    data.prepare_data()
    data.setup("fit")
    parts = list(data.train_dataloader())
    inputs, targets = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    model = CharacterGPT(vocab_size=128, context_length=16, num_layers=1, num_heads=2, width=24)
    return Task(model, cross_entropy, inputs, targets, (inputs[:16], targets[:16]))


class Monitor:
    """Measures the ratio between two steps, with plain parts and no Trainer."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, *, sharpness: bool = False) -> None:
        self.task, self.optimizer = task, optimizer
        self.measurer, self.state = EdgeMeasurer(rtol=0.1, sharpness=sharpness), EdgeState()

    def measure(self, step: int) -> EdgeMeasurement | None:
        """``None`` before the first step of an adaptive optimizer, and if the loss is not finite."""
        limits = stability_limits(self.optimizer, select_parameters(self.task.model))
        if limits is None:
            return None
        problem = Problem(
            self.task.model, self.task.loss, [self.task.fixed], [1.0], [0], len(self.task.fixed[0]), 1, Ranks()
        )
        try:
            measured, self.state = self.measurer.measure(problem, limits, Place(0, step, "step"), state=self.state)
        except ArithmeticError:
            return None
        return measured


def train_step(task: Task, optimizer: torch.optim.Optimizer, batch: Any) -> tuple[float, float]:
    """Return the batch's loss and the norm of its gradient."""
    optimizer.zero_grad()
    loss = task.loss(task.model, batch)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in task.model.parameters() if p.grad is not None))
    optimizer.step()
    return float(loss.detach()), norm


class Table:
    """A CSV that grows row by row, and the runs that it has already."""

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"{name}.csv"

    def rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def append(self, rows: list[dict[str, Any]]) -> None:
        new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# -- full-batch runs ---------------------------------------------------------------------------------------

EQUILIBRIUM = [
    *(("SGD", lr, 0.0) for lr in (0.1, 0.05, 0.12, 0.15)),
    *(("Adam", lr, 0.9) for lr in (3e-3, 1e-3, 3e-4)),
    ("SGD", 0.2, 0.9),
]


def equilibrium() -> None:
    table = Table("equilibrium")
    done = {(row["optimizer"], float(row["lr"]), float(row["momentum"])) for row in table.rows()}
    for optimizer_name, lr, momentum in EQUILIBRIUM:
        if (optimizer_name, lr, momentum) in done:
            continue
        task = digits(squared_error, 0)
        parameters = list(task.model.parameters())
        optimizer: torch.optim.Optimizer
        if optimizer_name == "SGD":
            optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
        else:
            # The paper's epsilon. The second moment's factor is the usual one.
            optimizer = torch.optim.Adam(parameters, lr=lr, betas=(momentum, 0.999), eps=1e-7)
        monitor = Monitor(task, optimizer, sharpness=True)
        num_steps = 4000 if optimizer_name == "SGD" else 2400
        rows = []
        for step in range(num_steps + 1):
            if step % 200 == 0:
                found = monitor.measure(step)
                if found is not None:
                    named = {"optimizer": optimizer_name, "lr": lr, "momentum": momentum, "step": step}
                    rows.append({**named, **numbers(found)})
            train_step(task, optimizer, task.fixed)
        table.append(rows)
        print(optimizer_name, lr, momentum, rows[-1], flush=True)


def numbers(found: EdgeMeasurement) -> dict[str, Any]:
    names = ("ratio", "ratio_error", "sharpness", "preconditioned_sharpness", "loss", "num_hvps")
    return {name: getattr(found, name) for name in names}


# -- warnings ----------------------------------------------------------------------------------------------

#: Steps of a run, between two measurements, and before a rate jumps.
STEPS, EVERY, JUMP_AT = 160, 10, 80


def warning_runs() -> Iterator[tuple[str, str, float, float, int]]:
    """Task, optimizer, learning rate, factor of its jump, and seed."""
    for seed in (0, 1):
        for lr in (0.05, 0.2, 0.5, 1.0, 2.0):
            yield "digits", "SGD", lr, 1.0, seed
        for lr in (0.003, 0.01, 0.03, 0.1, 0.3):
            yield "digits", "AdamW", lr, 1.0, seed
        for factor in (3.0, 10.0, 30.0):
            yield "digits", "SGD", 0.05, factor, seed
            yield "digits", "AdamW", 0.003, factor, seed
        for lr in (0.003, 0.03):
            yield "text", "AdamW", lr, 1.0, seed
        for lr in (0.1, 1.0):
            yield "text", "SGD", lr, 1.0, seed
        yield "text", "AdamW", 0.003, 10.0, seed
        yield "text", "SGD", 0.1, 10.0, seed


def warning(only: str | None = None) -> None:
    table = Table("warning")
    done = {
        (row["task"], row["optimizer"], float(row["lr"]), float(row["jump"]), int(row["seed"])) for row in table.rows()
    }
    for name, optimizer_name, lr, jump, seed in warning_runs():
        if (name, optimizer_name, lr, jump, seed) in done or only not in (None, f"{name}{seed}", name):
            continue
        task = digits(cross_entropy, seed) if name == "digits" else text(seed)
        parameters = list(task.model.parameters())
        optimizer: torch.optim.Optimizer
        if optimizer_name == "SGD":
            optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9 if name == "digits" else 0.0)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=lr)
        monitor = Monitor(task, optimizer)
        generator = torch.Generator().manual_seed(seed)
        size = 64 if name == "digits" else 16
        rows = []
        batch_loss, norm = math.nan, math.nan
        recent: list[float] = []
        for step in range(STEPS + 1):
            if step == JUMP_AT:
                for group in optimizer.param_groups:
                    group["lr"] *= jump
            if step % EVERY == 0:
                full_loss = task.full_loss()
                found = monitor.measure(step) if math.isfinite(full_loss) else None
                before = torch.tensor(recent[:-1][-50:])
                zscore = float((batch_loss - before.mean()) / before.std()) if len(before) > 9 else math.nan
                rows.append(
                    {
                        "task": name,
                        "optimizer": optimizer_name,
                        "lr": lr,
                        "jump": jump,
                        "seed": seed,
                        "step": step,
                        "full_loss": full_loss,
                        "ratio": math.nan if found is None or found.ratio is None else found.ratio,
                        "gradient_norm": norm,
                        "zscore": zscore,
                        "num_hvps": 0 if found is None else found.num_hvps,
                    }
                )
                if not math.isfinite(full_loss):
                    break
            batch_loss, norm = train_step(task, optimizer, task.batch(size, generator))
            recent.append(batch_loss)
        table.append(rows)
        print(name, optimizer_name, lr, jump, seed, rows[-1]["full_loss"], flush=True)


# -- mini-batches ------------------------------------------------------------------------------------------

BATCH_SIZES: tuple[int | None, ...] = (8, 32, 128, None)
FACTORS = tuple(2 ** (n / 2) for n in range(-2, 11))


def noise() -> None:
    """Where the ratio settles for a batch size, and from which ratio on a raised rate makes the loss rise."""
    table = Table("noise")
    done = {(row["optimizer"], row["batch_size"], int(row["seed"])) for row in table.rows()}
    for seed in (0, 1):
        for optimizer_name in ("SGD", "AdamW"):
            for size in BATCH_SIZES:
                if (optimizer_name, str(size or "full"), seed) in done:
                    continue
                table.append([noise_run(optimizer_name, size, seed)])
                print(table.rows()[-1], flush=True)


def noise_run(optimizer_name: str, size: int | None, seed: int) -> dict[str, Any]:
    lr = 0.1 if optimizer_name == "SGD" else 3e-3
    task = digits(squared_error, seed)
    # Batches are drawn from the samples whose Hessian is measured, so that only the noise differs.
    task.inputs, task.targets = task.fixed
    optimizer = make_optimizer(optimizer_name, task, lr)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    monitor = Monitor(task, optimizer)
    for step in range(1, 801):
        train_step(task, optimizer, task.batch(size, generator))
        if step > 500 and step % 50 == 0:
            found = monitor.measure(step)
            if found is not None and found.ratio is not None:
                ratios.append(found.ratio)
    weights = {name: value.clone() for name, value in task.model.state_dict().items()}
    state = optimizer.state_dict()
    last = ratios[-1] if ratios else math.nan
    before = mean_loss(task)
    diverging = math.nan
    for factor in FACTORS:
        task.model.load_state_dict(weights)
        optimizer = make_optimizer(optimizer_name, task, lr)
        # A copy, because the optimizer keeps the tensors of the state.
        optimizer.load_state_dict(torch.load(_buffer(state), weights_only=False))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        for _ in range(40):
            train_step(task, optimizer, task.batch(size, generator))
        after = mean_loss(task)
        if not after <= 2 * before + 0.02:
            diverging = last * factor
            break
    middle = sorted(ratios)[len(ratios) // 2] if ratios else math.nan
    return {
        "optimizer": optimizer_name,
        "batch_size": size or "full",
        "seed": seed,
        "lr": lr,
        "settled_ratio": middle,
        "ratio_at_rise": diverging,
        "loss": before,
    }


def _buffer(state: Any) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def make_optimizer(name: str, task: Task, lr: float) -> torch.optim.Optimizer:
    parameters = list(task.model.parameters())
    return torch.optim.SGD(parameters, lr=lr) if name == "SGD" else torch.optim.AdamW(parameters, lr=lr)


def mean_loss(task: Task) -> float:
    return task.full_loss()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["equilibrium", "warning", "noise"])
    parser.add_argument("--only", help="warning: a task or a task and a seed, such as digits0")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    if chosen.part == "warning":
        warning(chosen.only)
    else:
        {"equilibrium": equilibrium, "noise": noise}[chosen.part]()


if __name__ == "__main__":
    main()
