"""Attack the error bounds: eigenvalues of drawn matrices and networks against dense float64 eigenvalues.

    python -m benchmarks.attack --matrices 20000 --operators 1000 --record attack.jsonl --output benchmarks/ATTACK.md

Every case draws a spectrum or a network, a number k of eigenvalues, a tolerance and the seeds of the solver. The
reference is the dense spectrum in float64 (`numpy.linalg.eigvalsh`), or the diagonal of a diagonal matrix.
A case fails in one of four ways:

- violated: an eigenvalue lies outside its error bound;
- false converged: an eigenvalue counts as converged, and is off by more than the tolerance;
- raised: the solver refused a valid matrix;
- crash: any other exception.

A case is a function of ``--seed`` and its number alone. The counts of finished cases are appended to ``--record``, and
a later call with the same file continues there. ``--families`` and ``--dtypes`` select parts of the attack.
"""

from __future__ import annotations

import argparse
import copy
import json
import secrets
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.statistics_report import table
from hessian_callback import HessianOperator, Spectrum, top_eigenvalues
from hessian_callback.linalg.linear_operator import MatvecOperator

Array = NDArray[np.float64]
Generator = np.random.Generator
KINDS = ("violated", "false converged", "raised", "crash")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
# Lines between which the table is put in the file of --output.
BEGIN, END = "<!-- attack -->", "<!-- end -->"
# Cases between two lines of the record.
CHUNK = 50


@dataclass
class Problem:
    """An operator, its spectrum in descending order, and the arguments of the solver."""

    operator: Any
    truth: Array
    arguments: dict[str, Any] = field(default_factory=dict)


# -- matrices --------------------------------------------------------------------------------------


def size_of(rng: Generator, low: int = 12) -> int:
    """Return a size; in those above about 100 the bounds come from Gauss-Radau quadrature."""
    return int(np.exp(rng.uniform(np.log(low), np.log(rng.choice([80, 80, 400])))))


def power_law(rng: Generator) -> Array:
    n = size_of(rng)
    values = np.arange(1.0, n + 1) ** -rng.uniform(0.2, 4)
    signs = np.where(rng.random(n) < rng.choice([0, 0.1, 0.5]), -rng.uniform(0, 1), 1)
    return values * signs


def clusters(rng: Generator) -> Array:
    centres = rng.uniform(-0.2, 1, rng.integers(2, 8))
    width = 10.0 ** rng.uniform(-14, -2)
    return np.concatenate([c + width * rng.standard_normal(rng.integers(1, 16)) for c in centres])


def copies(rng: Generator) -> Array:
    count = rng.integers(2, 6)
    values = 10.0 ** -np.sort(rng.uniform(0, rng.choice([1, 3, 6]), count))
    return np.concatenate([np.repeat(values, rng.integers(1, 12, count)), np.zeros(rng.integers(0, 80))])


def planted(rng: Generator) -> Array:
    """Return a spectrum whose leading eigenvalues are close to or far below those before."""
    n = size_of(rng, 30)
    values = rng.uniform(-1, 1, n)
    values[:3] = 1 + 10.0 ** rng.uniform(-6, 0, 3)
    return values


def semicircle(rng: Generator) -> Array:
    spikes = rng.uniform(1.05, 8, rng.integers(0, 10))
    return np.concatenate([spikes, 2 * rng.beta(1.5, 1.5, size_of(rng, 20)) - 1])


def low_rank(rng: Generator) -> Array:
    values = 10.0 ** -rng.uniform(0, rng.choice([1, 4, 7]), rng.integers(1, 10))
    return np.concatenate([values, np.zeros(size_of(rng))])


def tiny_scale(rng: Generator) -> Array:
    family = [power_law, clusters, copies, semicircle][rng.integers(4)]
    return family(rng) * 10.0 ** rng.uniform(-30, 12)


def degenerate(rng: Generator) -> Array:
    """Return the spectrum of a small matrix with few distinct eigenvalues."""
    distinct = rng.choice([-1.0, -1e-3, 0.0, 1e-6, 0.5, 1.0], rng.integers(1, 5))
    return np.repeat(distinct, rng.integers(1, 5, len(distinct)))


def hidden_copy(rng: Generator) -> Array:
    """Return copies near the rounding level of float32, in many dimensions."""
    values = np.zeros(int(rng.integers(200, 2500)))
    count = rng.integers(2, 6)
    values[: count + 1] = np.append(1, np.full(count, 10.0 ** rng.uniform(-5.5, -2)))
    return values


def steep(rng: Generator) -> Array:
    """Return the spectrum of a long diagonal matrix whose eigenvectors sit on few coordinates."""
    return np.arange(1.0, int(rng.integers(2000, 20000)) + 1) ** -rng.uniform(1, 3)


def restarted(rng: Generator) -> Array:
    """Return a spectrum of another family with a bulk below or around it, long enough for a limited basis."""
    family = [power_law, clusters, copies, planted, semicircle, low_rank, tiny_scale, degenerate][rng.integers(8)]
    leading = family(rng)
    scale = np.abs(leading).max() * 10.0 ** -rng.uniform(0, 6)
    number = int(rng.integers(200, 700))
    bulk = [
        np.zeros(number),
        rng.uniform(-1, 1, number),
        -(np.arange(1, number + 1) ** -1.0),
        rng.uniform(0, 1, number),
    ]
    return np.concatenate([leading, scale * bulk[rng.integers(4)]])


MATRICES: dict[str, Callable[[Generator], Array]] = {
    "power law": power_law,
    "clusters": clusters,
    "copies": copies,
    "planted": planted,
    "semicircle": semicircle,
    "low rank": low_rank,
    "scales": tiny_scale,
    "degenerate": degenerate,
    "start orthogonal": planted,
    "hidden copy": hidden_copy,
    "steep diagonal": steep,
    "restarted": restarted,
}
# Parts of all matrices: long ones take longer.
SHARES = {"hidden copy": 0.5, "steep diagonal": 0.05, "restarted": 2.0}


def matrix_problem(name: str, dtype: torch.dtype, rng: Generator) -> Problem:
    """Return a diagonal or rotated matrix with the family's spectrum, rounded to the dtype."""
    values = MATRICES[name](rng)
    n = len(values)
    arguments: dict[str, Any] = {"k": int(rng.integers(1, 7)), "seed": int(rng.integers(2**31))}
    precise = [1e-4, 1e-8] if dtype == torch.float64 else [1e-1, 1e-3]
    arguments["rtol"] = float(rng.choice([1e-2, 1e-2, *precise]))
    if rng.random() < 0.2:
        arguments["max_matvecs"] = int(rng.integers(arguments["k"] + 1, 60))
    if n > 150 or rng.random() < 0.3:
        diagonal = torch.from_numpy(rng.permutation(values)).to(dtype)
        operator = MatvecOperator(lambda vector: diagonal * vector, n, dtype=dtype)
        truth = np.sort(diagonal.double().numpy())[::-1].copy()
        eigenvector = torch.zeros(n, dtype=dtype)
        eigenvector[int(diagonal.argmax())] = 1
    else:
        basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
        rounded = torch.from_numpy(basis * values @ basis.T).to(dtype)
        matrix = (rounded + rounded.T) / 2
        operator = MatvecOperator(matrix.mv, n, dtype=dtype)
        truth = np.linalg.eigvalsh(matrix.double().numpy())[::-1].copy()
        eigenvector = torch.from_numpy(basis[:, np.argmax(values)].copy()).to(dtype)
    if name == "restarted":
        arguments["k"] = int(rng.choice([arguments["k"], rng.integers(7, 30)]))
        arguments["max_basis_size"] = arguments["k"] + 12 + int(rng.exponential(8))
        arguments.pop("max_matvecs", None)
        if rng.random() < 0.2:
            arguments["max_matvecs"] = int(rng.integers(arguments["max_basis_size"] + 1, 200))
    if name == "start orthogonal":
        start = torch.from_numpy(rng.standard_normal(n)).to(dtype)
        arguments["start"] = start - eigenvector * (eigenvector @ start)
    return Problem(operator, truth, arguments)


# -- networks --------------------------------------------------------------------------------------


def mean_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def binary_cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])


class MeanEmbedding(nn.Module):
    """Classify a bag of words."""

    def __init__(self, vocabulary: int, width: int, classes: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


def network(rng: Generator, outputs: int) -> tuple[nn.Module, Tensor]:
    """Return a random network of one or two layers in float64, and inputs; hidden directions may be few."""
    inputs, hidden = int(rng.integers(2, 7)), int(rng.integers(2, 8))
    activation = [nn.Tanh, nn.ReLU, nn.SiLU][rng.integers(3)]
    layers = [nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, outputs)]
    model = nn.Sequential(*layers) if rng.random() < 0.7 else nn.Sequential(nn.Linear(inputs, outputs))
    x = torch.from_numpy(rng.standard_normal((int(rng.integers(8, 60)), inputs)))
    if rng.random() < 0.3:
        x[:, -1] = 1e-2 * x[:, 0]
    return model.double(), x


def scaled_to_loss(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, target: float) -> None:
    """Scale the last layer until the loss is the target, as training on separable data does."""
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    original = [parameter.detach().clone() for parameter in head.parameters()]
    low, high = -3.0, 12.0
    with torch.no_grad():
        for _ in range(50):
            scale = (low + high) / 2
            for parameter, value in zip(head.parameters(), original, strict=True):
                parameter.copy_(value * 2.0**scale)
            low, high = (scale, high) if float(loss(model, batch)) > target else (low, scale)


def separable(rng: Generator, name: str) -> tuple[nn.Module, Callable[..., Tensor], Any]:
    """Return a network, its loss and a batch at a training loss of 1e-3 to 1e-5, or as initialised."""
    target = float(rng.choice([1e-3, 1e-4, 1e-5, 0.0]))
    if name == "MSE":
        model, x = network(rng, int(rng.integers(1, 6)))
        with torch.no_grad():
            y = model(x)
        return model, mean_squares, (x, y + np.sqrt(target or 1.0) * torch.from_numpy(rng.standard_normal(y.shape)))
    loss: Callable[..., Tensor]
    if name == "BCE":
        model, x = network(rng, 1)
        with torch.no_grad():
            output = model(x)[:, 0]
        keep = output.abs() >= 0.3 * output.abs().median()
        loss, batch = binary_cross_entropy, (x[keep], (output[keep] > 0).double())
    else:
        if name == "cross-entropy":
            model, x = network(rng, int(rng.integers(2, 6)))
        else:
            vocabulary, classes = int(rng.integers(10, 50)), int(rng.integers(2, 5))
            model = MeanEmbedding(vocabulary, int(rng.integers(1, 4)), classes).double()
            share = np.arange(1, vocabulary + 1) ** -rng.uniform(1, 2)
            x = torch.from_numpy(rng.choice(vocabulary, (int(rng.integers(8, 60)), 4), p=share / share.sum()))
        with torch.no_grad():
            best = model(x).topk(2, 1)
        margin = best.values[:, 0] - best.values[:, 1]
        keep = margin >= 0.3 * margin.median()
        loss, batch = cross_entropy, (x[keep], best.indices[keep, 0])
    if target > 0:
        scaled_to_loss(model, loss, batch, target)
    return model, loss, batch


def converted(batch: Any, dtype: torch.dtype) -> Any:
    return tuple(leaf.to(dtype) if leaf.is_floating_point() else leaf for leaf in batch)


def dense_spectrum(model: nn.Module, loss: Callable[..., Tensor], batch: Any) -> Array:
    """Return the eigenvalues of the Hessian in float64, by nested reverse mode of PyTorch."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss(self.model, batch)

    wrapper = Loss()

    def value(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in parameters.values()])
        named = {f"model.{name}": piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        return torch.func.functional_call(wrapper, named, ())

    flat = torch.cat([p.flatten() for p in parameters.values()])
    hessian = torch.autograd.functional.hessian(value, flat, vectorize=True)
    return np.linalg.eigvalsh(((hessian + hessian.T) / 2).numpy())[::-1].copy()


def network_problem(name: str, dtype: torch.dtype, rng: Generator) -> Problem:
    """Return the Hessian of a small network, rounded to the dtype, and the spectrum of the same weights in float64."""
    torch.manual_seed(int(rng.integers(2**31)))
    # Up to eight eigenvalues the errors of the run are measured in all directions.
    most = rng.choice([7, 7, 20])
    arguments = {"k": int(rng.integers(1, most)), "seed": int(rng.integers(2**31))}
    if name == "Zipf" and rng.random() < 0.2:
        return long_embedding(dtype, rng, arguments)
    model, loss, batch = separable(rng, name)
    batch = converted(converted(batch, dtype), torch.float64)
    model = model.to(dtype).double()
    truth = dense_spectrum(model, loss, batch)
    own = copy.deepcopy(model).to(dtype)
    return Problem(HessianOperator(own, loss, [converted(batch, dtype)]), truth, arguments)


def long_embedding(dtype: torch.dtype, rng: Generator, arguments: dict[str, Any]) -> Problem:
    """Return the Hessian of a regression on words: the Kronecker product of frequencies and a small matrix."""
    vocabulary, width = int(rng.integers(500, 4000)), int(rng.integers(1, 4))
    tokens = torch.from_numpy(rng.zipf(rng.uniform(1.1, 2), 20_000) % vocabulary)
    weights = torch.from_numpy(rng.standard_normal((width, width))).to(dtype)
    model = nn.Embedding(vocabulary, width).to(dtype)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) @ weights).square().mean()

    frequencies = torch.bincount(tokens, minlength=vocabulary).double().numpy() / len(tokens)
    inner = np.linalg.eigvalsh((weights.double() @ weights.double().T).numpy()) * 2 / width
    truth = np.sort(np.outer(frequencies, inner).ravel())[::-1].copy()
    if rng.random() < 0.5:
        arguments["max_basis_size"] = arguments["k"] + 12 + int(rng.exponential(8))
    return Problem(HessianOperator(model, loss, [tokens]), truth, arguments)


NETWORKS = ("MSE", "cross-entropy", "BCE", "Zipf")


# -- verdicts --------------------------------------------------------------------------------------


def verdict(problem: Problem) -> tuple[str | None, str]:
    """Solve a problem; return the way in which it failed, if it did, and the details."""
    try:
        spectrum = top_eigenvalues(problem.operator, **problem.arguments)
    except (ArithmeticError, ValueError) as error:
        return ("crash" if isinstance(error, np.linalg.LinAlgError) else "raised"), repr(error)
    except Exception:
        return "crash", traceback.format_exc()
    return judge(spectrum, problem.truth)


def judge(spectrum: Spectrum, truth: Array) -> tuple[str | None, str]:
    """Compare a spectrum with the true eigenvalues."""
    values, bounds = spectrum.eigenvalues.numpy(), spectrum.error_bounds.numpy()
    scale = np.abs(truth).max()
    oracle = 4 * np.sqrt(len(truth)) * np.finfo(float).eps * scale
    errors = np.abs(values - truth[: len(values)])
    details = (
        f"errors / bounds up to {np.max(errors / (bounds + oracle)):.3g}, rounding {spectrum.rounding:.3g} "
        f"({spectrum.rounding_basis}), {spectrum.stopped}, values {values.tolist()}, truth "
        f"{truth[: len(values)].tolist()}, bounds {bounds.tolist()}"
    )
    if not (errors <= bounds + oracle).all():
        return "violated", details
    converged = spectrum.converged.numpy()
    tolerance = spectrum.rtol * np.abs(values)
    negligible = 1.5 * spectrum.rtol * scale if scale > 0 else np.inf
    near_zero = np.abs(truth[: len(values)]) <= 8 * spectrum.rounding
    tolerance = np.where(near_zero, np.maximum(tolerance, min(4 * spectrum.rounding, negligible)), tolerance)
    if (converged & (errors > tolerance + oracle)).any():
        return "false converged", details
    if spectrum.stopped == "converged" and not converged.all():
        return "false converged", details
    return None, ""


# -- running ---------------------------------------------------------------------------------------


def run_case(family: str, dtype: str, seed: int, number: int) -> tuple[str | None, str]:
    """Run one case, a function of its arguments alone."""
    names = [*MATRICES, *NETWORKS]
    rng = np.random.default_rng([seed, names.index(family), list(DTYPES).index(dtype), number])
    make = matrix_problem if family in MATRICES else network_problem
    return verdict(make(family, DTYPES[dtype], rng))


def planned(family: str, dtypes: int, matrices: int, operators: int) -> int:
    """Return the number of cases of a family in one dtype."""
    if family in NETWORKS:
        return -(-operators // (len(NETWORKS) * dtypes))
    weight = sum(SHARES.get(name, 1.0) for name in MATRICES)
    return int(np.ceil(matrices * SHARES.get(family, 1.0) / weight / dtypes))


def attack(options: argparse.Namespace) -> None:
    """Run the cases that the record lacks."""
    done = counts(options.record, options.seed)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    for family in options.families:
        for dtype in options.dtypes:
            wanted = planned(family, len(options.dtypes), options.matrices, options.operators)
            first = done[family, dtype]["cases"]
            for start in range(first, wanted, CHUNK):
                began = time.perf_counter()
                found: Counter[str] = Counter()
                for number in range(start, min(start + CHUNK, wanted)):
                    kind, details = run_case(family, dtype, options.seed, number)
                    found["cases"] += 1
                    if kind is not None:
                        found[kind] += 1
                        print(f"{kind}: {family}, {dtype}, seed {options.seed}, case {number}: {details}", flush=True)
                line = {"family": family, "dtype": dtype, "seed": options.seed, **found}
                line["commit"] = commit.strip() or "unknown"
                line["seconds"] = round(time.perf_counter() - began, 1)
                with options.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def counts(record: Path, seed: int) -> dict[tuple[str, str], Counter[str]]:
    """Return the counts of a record, by family and dtype."""
    total = {(family, dtype): Counter[str]() for family in [*MATRICES, *NETWORKS] for dtype in DTYPES}
    for line in lines_of(record, seed):
        total[line["family"], line["dtype"]].update({name: line.get(name, 0) for name in ("cases", *KINDS, "seconds")})
    return total


def lines_of(record: Path, seed: int) -> list[dict[str, Any]]:
    """Return the lines of a record that belong to a seed."""
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    return [line for line in map(json.loads, text.splitlines()) if line["seed"] == seed]


def report(record: Path, seed: int) -> str:
    """Return the table of a record."""
    rows, sums = [], {"matrices": Counter[str](), "operators": Counter[str]()}
    for (family, dtype), found in counts(record, seed).items():
        if found["cases"]:
            rows.append([family, dtype, f"{found['cases']:,}", *[str(found[kind]) for kind in KINDS]])
            sums["matrices" if family in MATRICES else "operators"].update(found)
    for name, found in sums.items():
        rows.append([f"all {name}", "", f"{found['cases']:,}", *[str(found[kind]) for kind in KINDS]])
    return table(["family", "dtype", "cases", *KINDS], rows)


def summary(options: argparse.Namespace) -> str:
    """Return the seed, the version and the progress of an attack, and its table."""
    found = counts(options.record, options.seed)
    done = sum(total["cases"] for total in found.values())
    wanted = sum(
        planned(family, len(options.dtypes), options.matrices, options.operators)
        for family in options.families
        for _ in options.dtypes
    )
    commits = sorted({line["commit"] for line in lines_of(options.record, options.seed)})
    head = f"Seed {options.seed}, commit {' and '.join(commits)}: {done:,} of {wanted:,} cases."
    return f"{head}\n\n{report(options.record, options.seed)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=20_000, help="matrices in all families and dtypes together")
    parser.add_argument("--operators", type=int, default=1_000, help="networks in all families and dtypes together")
    parser.add_argument("--families", nargs="+", choices=[*MATRICES, *NETWORKS], default=[*MATRICES, *NETWORKS])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--seed", type=int, help="seed of all cases; default: a fresh one, or that of the record")
    parser.add_argument("--record", type=Path, default=Path("attack.jsonl"), help="counts of finished cases")
    parser.add_argument("--report-only", action="store_true", help="make the table of the record")
    parser.add_argument("--output", type=Path, help="put the table there, between its two marks")
    options = parser.parse_args()
    if options.seed is None:
        lines = options.record.read_text(encoding="utf-8").splitlines() if options.record.exists() else []
        options.seed = json.loads(lines[-1])["seed"] if lines else secrets.randbits(31)
    torch.set_num_threads(1)
    if not options.report_only:
        attack(options)
    text = summary(options)
    print(text)
    if options.output is not None:
        before = options.output.read_text(encoding="utf-8") if options.output.exists() else f"{BEGIN}\n{END}\n"
        head, _, rest = before.partition(BEGIN)
        tail = rest.partition(END)[2]
        options.output.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
