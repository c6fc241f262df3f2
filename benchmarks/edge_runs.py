"""Evidence for the edge-of-stability monitor: does the ratio settle at 1, does it warn, and what does noise change?

    python -m benchmarks.edge_runs equilibrium   # full-batch runs, as in the papers
    python -m benchmarks.edge_runs warning       # small runs from safe to diverging, and rates that jump
    python -m benchmarks.edge_runs noise         # mini-batches of several sizes
    python -m benchmarks.edge_report             # the tables of docs/edge.md and docs/reproduction.md

Each writes a CSV in benchmarks/edge/. Everything runs on one thread, and the runs of a part side by side as one batched
computation, so that a run costs a fraction of a second. Limits of stability are read by the callback's own function.
In full-batch runs eigenvalues have proven bounds; in the others they are the Ritz values of 8 warm-started products.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessian_callback.demos.character_gpt import CharacterGPT
from hessian_callback.demos.digits import DigitsData
from hessian_callback.demos.texts import TextData
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.edge import EdgeMeasurement, EdgeMeasurer
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.preconditioners import stability_limits
from hessian_callback.measurement.problem import Problem

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

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(0, len(self.inputs), (size,), generator=generator)
        return self.inputs[index], self.targets[index]


def cross_entropy(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def squared_error(model: Any, batch: Any) -> Tensor:
    """Half the squared error, summed over classes, as in the papers."""
    return 0.5 * (model(batch[0]) - nn.functional.one_hot(batch[1], 10)).square().sum(1).mean()


def digits(loss: Loss, seed: int, *, width: int = 32, num_samples: int = NUM_SAMPLES) -> Task:
    data = DigitsData()
    data.setup("fit")
    dataset: Any = data.train_dataloader().dataset
    images, labels = map(torch.stack, zip(*dataset, strict=True))
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


class Fleet:
    """Runs of one architecture that are trained side by side, as one batched computation: their losses are independent.

    Args:
        tasks: the runs' tasks, with models of equal shapes.
        optimizers: for each run, a function from parameters to an optimizer.
        terms: ``(outputs, targets)`` to the losses of the samples.
    """

    def __init__(
        self, tasks: list[Task], optimizers: list[Callable[[Any], torch.optim.Optimizer]], terms: Loss
    ) -> None:
        self.tasks = tasks
        self.parameters = [dict(task.model.named_parameters()) for task in tasks]
        self.optimizers = [make(list(some.values())) for make, some in zip(optimizers, self.parameters, strict=True)]
        model = tasks[0].model.eval()

        def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return (weights * terms(torch.func.functional_call(model, parameters, (inputs,)), targets)).sum()

        self._losses = torch.func.vmap(loss, randomness="different")
        self.fixed = torch.stack([task.fixed[0] for task in tasks]), torch.stack([task.fixed[1] for task in tasks])
        self.mean = torch.full(self.fixed[0].shape[:2], 1 / self.fixed[0].shape[1])
        self._starts: Tensor | None = None

    def stacked(self) -> dict[str, Tensor]:
        return {name: torch.stack([some[name] for some in self.parameters]) for name in self.parameters[0]}

    def losses(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self._losses(self.stacked(), inputs, targets, weights)

    @torch.no_grad()
    def full_losses(self) -> list[float]:
        return self.losses(*self.fixed, self.mean).tolist()

    def step(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> tuple[list[float], list[float]]:
        """Take a step of every run; return the batches' losses and the norms of their gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses = self.losses(inputs, targets, weights)
        losses.sum().backward()
        gradients = [[p.grad for p in some.values() if p.grad is not None] for some in self.parameters]
        squares = [sum((g.square().sum() for g in some), torch.zeros(())) for some in gradients]
        for optimizer in self.optimizers:
            optimizer.step()
        return losses.tolist(), torch.stack(squares).sqrt().tolist()

    def batches(self, size: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a batch for every run."""
        parts = [task.batch(size, generator) for task, generator in zip(self.tasks, generators, strict=True)]
        inputs, targets = (torch.stack(list(part)) for part in zip(*parts, strict=True))
        return inputs, targets, torch.full(inputs.shape[:2], 1 / size)

    def ratios(self, *, products: int = 8) -> list[float]:
        """Estimate the ratio of every run: its limits, and the largest Ritz value of some Lanczos steps.

        The last Ritz vectors start the next estimate. Estimates are from below and have no bound.
        """
        limits = [
            stability_limits(optimizer, some) for optimizer, some in zip(self.optimizers, self.parameters, strict=True)
        ]
        if limits[0] is None:
            return [math.nan] * len(limits)
        scale = torch.stack([one.scale for one in limits if one is not None]).float()
        shift = torch.stack([one.shift for one in limits if one is not None]).float()
        values = {name: value.detach().requires_grad_() for name, value in self.stacked().items()}
        with sdpa_kernel(SDPBackend.MATH):
            total = self._losses(values, *self.fixed, self.mean).sum()
        gradients = torch.autograd.grad(total, list(values.values()), create_graph=True)
        flat = torch.cat([g.flatten(1) for g in gradients], dim=1)

        def multiply(vector: Tensor) -> Tensor:
            product = torch.autograd.grad((flat * scale * vector).sum(), list(values.values()), retain_graph=True)
            return scale * torch.cat([part.flatten(1) for part in product], dim=1) + shift * vector

        noise = torch.randn(scale.shape, generator=torch.Generator().manual_seed(0))
        start = noise if self._starts is None else self._starts + 0.1 * noise / noise.norm(dim=1, keepdim=True)
        basis = [start / start.norm(dim=1, keepdim=True)]
        images = []
        for _ in range(products):
            images.append(multiply(basis[-1]).nan_to_num(0, 0, 0))
            left = images[-1]
            for _ in range(2):
                for vector in basis:
                    left = left - (left * vector).sum(1, keepdim=True) * vector
            basis.append(left / left.norm(dim=1, keepdim=True).clamp_min(1e-30))
        V, A = torch.stack(basis[:-1], dim=1), torch.stack(images, dim=1)
        projected = (V @ A.mT).double()
        ritz, weights = torch.linalg.eigh((projected + projected.mT) / 2)
        self._starts = (V.mT @ weights[:, :, -1:].float()).squeeze(2).detach()
        return [
            float(top) if finite else math.nan for top, finite in zip(ritz[:, -1], flat.isfinite().all(1), strict=True)
        ]

    def measure(self, run: int, step: int) -> EdgeMeasurement:
        """Measure one run with proven bounds, as the callback does."""
        task, some = self.tasks[run], self.parameters[run]
        limits = stability_limits(self.optimizers[run], some)
        assert limits is not None
        problem = Problem(task.model, task.loss, [task.fixed], [1.0], [0], len(task.fixed[0]), 1, Ranks())
        measured, _ = EdgeMeasurer(rtol=0.05, sharpness=False).measure(problem, limits, Place(0, step, "step"))
        return measured


def class_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every sample; the mean over the characters of a text."""
    terms = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return terms.view(targets.shape).flatten(1).mean(1) if targets.ndim > 1 else terms


def squared_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - nn.functional.one_hot(targets, 10)).square().sum(1)


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
    *(("SGD", lr, 0.0) for lr in (0.1, 0.12, 0.15)),
    ("SGD", 0.2, 0.9),
    *(("Adam", lr, 0.9) for lr in (3e-3, 1e-3)),
]


def equilibrium() -> None:
    """Full-batch gradient descent and Adam; a run is measured every 250 steps."""
    table = Table("equilibrium")
    done = {(row["optimizer"], float(row["lr"]), float(row["momentum"])) for row in table.rows()}
    runs = [run for run in EQUILIBRIUM if run not in done]
    makers = [maker(name, lr, momentum) for name, lr, momentum in runs]
    fleet = Fleet([digits(squared_error, 0) for _ in runs], makers, squared_terms)
    for step in range(1, 2001):
        fleet.step(*fleet.fixed, fleet.mean)
        if step % 250 == 0:
            for number, (name, lr, momentum) in enumerate(runs):
                found = fleet.measure(number, step)
                values = {
                    part: getattr(found, part) for part in ("ratio", "ratio_error", "preconditioned_sharpness", "loss")
                }
                table.append([{"optimizer": name, "lr": lr, "momentum": momentum, "step": step, **values}])
            print(step, flush=True)


def maker(name: str, lr: float, momentum: float) -> Callable[[Any], torch.optim.Optimizer]:
    if name == "SGD":
        return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    # The paper's epsilon; the factor of the second moment is the usual one.
    if name == "Adam":
        return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(momentum, 0.999), eps=1e-7)
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


# -- warnings ----------------------------------------------------------------------------------------------

#: Steps of a run, between two measurements, and before a rate jumps.
STEPS, EVERY, JUMP_AT = 160, 10, 80

#: Task and optimizer to learning rates, and to factors by which the first rate jumps.
SETTINGS = {
    ("digits", "SGD"): ((0.05, 0.2, 0.5, 1.0, 2.0), (3.0, 10.0, 30.0)),
    ("digits", "AdamW"): ((0.003, 0.01, 0.03, 0.1, 0.3), (3.0, 10.0, 30.0)),
    ("text", "SGD"): ((0.1, 0.3, 1.0, 3.0), (3.0, 10.0, 30.0)),
    ("text", "AdamW"): ((0.003, 0.01, 0.03, 0.1), (3.0, 10.0, 30.0)),
}
SEEDS = (0, 1)


def warning() -> None:
    table = Table("warning")
    done = {(row["task"], row["optimizer"]) for row in table.rows()}
    for (name, optimizer), (rates, jumps) in SETTINGS.items():
        if (name, optimizer) in done:
            continue
        chosen = [*((lr, 1.0) for lr in rates), *((rates[0], jump) for jump in jumps)]
        runs = [(lr, jump, seed) for lr, jump in chosen for seed in SEEDS]
        table.append(warning_rows(name, optimizer, runs))
        print(name, optimizer, flush=True)


def warning_rows(name: str, optimizer: str, runs: list[tuple[float, float, int]]) -> list[dict[str, Any]]:
    make = {"digits": lambda seed: digits(cross_entropy, seed, num_samples=128), "text": text}[name]
    momentum = 0.9 if name == "digits" else 0.0
    fleet = Fleet(
        [make(seed) for _, _, seed in runs], [maker(optimizer, lr, momentum) for lr, _, _ in runs], class_terms
    )
    generators = [torch.Generator().manual_seed(seed) for _, _, seed in runs]
    recent: list[list[float]] = [[] for _ in runs]
    rows = []
    norms = [math.nan] * len(runs)
    for step in range(STEPS + 1):
        if step == JUMP_AT:
            for one, (_, jump, _) in zip(fleet.optimizers, runs, strict=True):
                one.param_groups[0]["lr"] *= jump
        if step % EVERY == 0:
            found = zip(runs, fleet.full_losses(), fleet.ratios(), norms, recent, strict=True)
            for (lr, jump, seed), loss, ratio, norm, losses in found:
                before = torch.tensor(losses[:-1][-50:])
                score = float((losses[-1] - before.mean()) / before.std()) if len(before) > 9 else math.nan
                named = {"task": name, "optimizer": optimizer, "lr": lr, "jump": jump, "seed": seed, "step": step}
                rows.append({**named, "full_loss": loss, "ratio": ratio, "gradient_norm": norm, "zscore": score})
        batch_losses, norms = fleet.step(*fleet.batches(64 if name == "digits" else 16, generators))
        for losses, loss in zip(recent, batch_losses, strict=True):
            losses.append(loss)
    return sorted(rows, key=lambda row: (row["lr"], row["jump"], row["seed"], row["step"]))


# -- mini-batches ------------------------------------------------------------------------------------------

BATCH_SIZES = (8, 32, 128, NUM_SAMPLES)
FACTORS = tuple(2 ** (n / 2) for n in range(-1, 9))
SETTLE, PUSHED = 600, 30


def noise() -> None:
    """Where the ratio settles for a batch size, and from which ratio on a raised rate makes the loss rise."""
    table = Table("noise")
    done = {row["optimizer"] for row in table.rows()}
    for name, lr in (("SGD", 0.12), ("AdamW", 3e-3)):
        if name not in done:
            table.append(noise_rows(name, lr))
            print(name, flush=True)


def noise_rows(name: str, lr: float) -> list[dict[str, Any]]:
    runs = [(size, seed) for size in BATCH_SIZES for seed in SEEDS]
    fleet = Fleet([digits(squared_error, seed) for _, seed in runs], [maker(name, lr, 0.0)] * len(runs), squared_terms)
    generators = [torch.Generator().manual_seed(seed) for _, seed in runs]

    def weights() -> Tensor:
        """Batches are drawn from the samples whose Hessian is measured, so that only the noise differs."""
        drawn = torch.zeros_like(fleet.mean)
        for row, (size, _), generator in zip(drawn, runs, generators, strict=True):
            if size == NUM_SAMPLES:
                row += 1 / size
            else:
                index = torch.randint(0, NUM_SAMPLES, (size,), generator=generator)
                row.index_add_(0, index, torch.full((size,), 1 / size))
        return drawn

    ratios: list[list[float]] = []
    for step in range(1, SETTLE + 1):
        fleet.step(*fleet.fixed, weights())
        if step > SETTLE * 0.7 and step % 20 == 0:
            ratios.append(fleet.ratios())
    settled = torch.tensor(ratios).median(dim=0).values.tolist()
    now = fleet.ratios(products=20)
    before = fleet.full_losses()
    kept = [
        copy.deepcopy((task.model.state_dict(), one.state_dict()))
        for task, one in zip(fleet.tasks, fleet.optimizers, strict=True)
    ]
    rises = [math.nan] * len(runs)
    for factor in FACTORS:
        for task, one, (values, state) in zip(fleet.tasks, fleet.optimizers, kept, strict=True):
            task.model.load_state_dict(values)
            one.load_state_dict(copy.deepcopy(state))
            one.param_groups[0]["lr"] = lr * factor
        for _ in range(PUSHED):
            fleet.step(*fleet.fixed, weights())
        for number, (loss, after) in enumerate(zip(before, fleet.full_losses(), strict=True)):
            if math.isnan(rises[number]) and not after <= 2 * loss + 0.02:
                rises[number] = now[number] * factor
    return [
        {
            "optimizer": name,
            "batch_size": size,
            "seed": seed,
            "lr": lr,
            "settled_ratio": s,
            "ratio_at_rise": r,
            "loss": loss,
        }
        for (size, seed), s, r, loss in zip(runs, settled, rises, before, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"equilibrium": equilibrium, "warning": warning, "noise": noise}
    parser.add_argument("part", choices=parts)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    parts[chosen.part]()


if __name__ == "__main__":
    main()
