"""Products and eigenvalues on a GPU: what they cost in gradients, and whose the seconds are.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --quick

prints one JSON. Images and labels are random: what a product costs does not depend on them, and no data set need be
there. Nothing is compared with other projects here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import cases, peers
from benchmarks.cases import GPT, Case, cross_entropy, next_token, trained
from benchmarks.paper_scale import Clock
from benchmarks.timing import circumstances, in_turns, ratios
from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.linalg.krylov_basis import row_products
from hessian_callback.operators.derivatives import exact_derivatives

K = 50
ENGINES: dict[str, dict[str, Any]] = {
    "kept": {"hvp": "double_backward"},
    "rebuilt": {"hvp": "double_backward", "memory_budget": 0},
    "linearized": {"hvp": "linearize"},
}


def images(size: int, num_samples: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Random images in the place of digits."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(num_samples, 1, size, size, generator=generator)
    labels = torch.randint(10, (num_samples,), generator=generator)
    return list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))


def large_lenet(scale: float) -> Case:
    """LeNet on as many images as MNIST has."""
    count = int(60_000 * scale)
    return Case(cases.lenet().model, cross_entropy, images(28, count, -(-count // 6)))


def large_gpt(scale: float) -> Case:
    """Six layers of width 384, as nanoGPT has for Shakespeare, on 64 sequences of 256 characters."""
    depth, width, context = (6, 384, 256) if scale == 1 else (2, 24, 16)
    rows = torch.randint(128, (max(4, int(64 * scale)), context + 1), generator=torch.Generator().manual_seed(0))
    batches = [(part[:, :-1], part[:, 1:]) for part in rows.split(-(-len(rows) // 4))]
    return Case(GPT(depth=depth, width=width, heads=6, block=context), next_token, batches)


LARGE: dict[str, Callable[[float], Case]] = {"lenet_60000": large_lenet, "gpt_6x384": large_gpt}


def case_of(name: str, device: torch.device, scale: float) -> Case:
    torch.manual_seed(0)
    with mock.patch.object(cases, "digits", images):
        case = LARGE[name](scale) if name in LARGE else trained(name)
    batches = [tuple(part.to(device) for part in batch) for batch in case.batches]
    return Case(case.model.to(device).eval(), case.loss_fn, batches)


@dataclass(kw_only=True)
class SynchronisedClock(Clock):
    """A clock that waits for what was queued before it looks."""

    device: torch.device

    def lap(self) -> float:
        synchronise(self.device)
        return super().lap()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waiting(function: Callable[[], Any], device: torch.device, calls: int = 1) -> Callable[[], None]:
    """The function, called so many times and waited for."""

    def call() -> None:
        for _ in range(calls):
            function()
        synchronise(device)

    return call


def products(case: Case, device: torch.device, rounds: int, seconds_a_turn: float) -> dict[str, Any]:
    """Seconds of a gradient over all batches, and of a product by each engine, in turns."""
    parameters = list(case.model.parameters())

    def gradient() -> None:
        with exact_derivatives(case.model):  # under the settings that products have
            for batch in case.batches:
                torch.autograd.grad(case.loss_fn(case.model, batch), parameters)

    found: dict[str, Any] = {"parameters": case.num_parameters, "batches": len(case.batches)}
    contestants: dict[str, Callable[[], Any]] = {"gradient": waiting(gradient, device)}
    operators: list[HessianOperator] = []
    for name, options in ENGINES.items():
        began = time.perf_counter()
        try:
            operator = HessianOperator(case.model, case.loss_fn, case.batches, **options)
        except Exception as error:  # An engine that fails here is a finding, and the others continue.
            found[f"{name}_failed"] = f"{type(error).__name__}: {error}"[:300]
            continue
        synchronise(device)
        found[f"{name}_seconds_preparing"] = round(time.perf_counter() - began, 3)
        if name == "kept":
            found["kept_graphs"], found["bytes_per_graph"] = operator.num_cached_graphs, operator.bytes_per_graph
        vector = torch.randn(case.num_parameters, device=device)
        contestants[name] = waiting(partial(operator.matvec, vector), device)
        operators.append(operator)
    seconds = in_turns(contestants, rounds, seconds_a_turn=seconds_a_turn)
    for name, values in seconds.items():
        found[f"{name}_milliseconds"] = round(1e3 * statistics.median(values), 4)
        if name != "gradient":
            found[f"{name}_in_gradients"] = round(statistics.median(ratios(values, seconds["gradient"])), 3)
    for operator in operators:
        operator.close()
    return found


def eigenvalues(case: Case, device: torch.device, k: int, max_hvps: int) -> dict[str, Any]:
    """Seconds of a spectrum, by what they were spent on."""
    clock = SynchronisedClock(device=device)
    with HessianOperator(case.model, case.loss_fn, case.batches) as operator:
        clock.watch(operator)
        peers.expect(operator, k)
        clock.start()
        began = time.perf_counter()
        spectrum = top_eigenvalues(operator, k, max_matvecs=max_hvps, progress=lambda _: clock.reported())
        clock.checks += clock.lap()
        seconds = time.perf_counter() - began
        engine, reason = operator.engine, operator.engine_reason
    return {
        "k": k,
        "seconds": round(seconds, 3),
        "products": spectrum.num_matvecs,
        "stopped": spectrum.stopped,
        "converged": spectrum.num_converged,
        "engine": engine,
        "engine_reason": reason,
        "share_in_products": round(clock.products / seconds, 3),
        "share_in_orthogonalisation": round(clock.orthogonalisation / seconds, 3),
        "share_in_checks": round(clock.checks / seconds, 3),
        "largest": float(spectrum.eigenvalues[0]),
        "largest_error_bound": float(spectrum.error_bounds.max()),
        "asymmetry": spectrum.symmetry_defect,
    }


def basis_operations(device: torch.device, length: int, rounds: int) -> dict[str, Any]:
    """Bytes of the basis read a second, in billions, by what orthogonalisation is made of."""
    found: dict[str, Any] = {"length": length}
    for num_rows in (1, 32, 128):
        rows, vector = torch.randn(num_rows, length, device=device), torch.randn(length, device=device)
        weights = torch.full((num_rows,), 1e-3, device=device)
        tasks: dict[str, Callable[[], Tensor]] = {
            "row_products": partial(row_products, rows, vector),
            "addmv": partial(vector.addmv_, rows.t(), weights, alpha=-1),
        }
        if num_rows == 1:
            tasks["dot"] = partial(torch.dot, rows[0], vector)
        calls = 10
        seconds = in_turns(
            {name: waiting(task, device, calls) for name, task in tasks.items()}, rounds, seconds_a_turn=0.0
        )
        for name, values in seconds.items():
            speed = 4 * num_rows * length * calls / statistics.median(values)
            found[f"{name}_{num_rows}"] = round(speed / 1e9, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", help="default: mlp lenet resnet gpt and the large ones")
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--max-hvps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=70.0, help="seconds after which no further case is begun")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    options = parser.parse_args()
    device = torch.device(options.device)
    rounds, turn, scale, k = (2, 0.0, 0.01, 3) if options.quick else (options.rounds, 0.05, 1.0, options.k)
    names = options.cases or [*(["tiny"] if options.quick else ["mlp", "lenet", "resnet", "gpt"]), *LARGE]
    began = time.perf_counter()
    result: dict[str, Any] = {
        "when": circumstances(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "basis_operations_gb_per_second": basis_operations(device, 10**5 if options.quick else 10**7, rounds),
    }
    for name in names:
        if time.perf_counter() - began > options.limit:
            result[name] = "not begun: no time left"
            continue
        case = case_of(name, device, scale)
        result[name] = {
            **products(case, device, rounds, turn),
            "eigenvalues": eigenvalues(case, device, k, options.max_hvps),
        }
        if device.type == "cuda":
            result[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.empty_cache()
        result[name]["finished_after_seconds"] = round(time.perf_counter() - began, 1)
        print(f"{name}: done after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
