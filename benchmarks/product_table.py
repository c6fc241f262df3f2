"""Seconds a Hessian-vector product, in gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.cases import measured
from benchmarks.distributed import launch
from benchmarks.statistics_report import table
from benchmarks.timing import in_turns, milliseconds, pin_threads, ratios, spread
from hessian_callback import HessianOperator

# A product that is further off, relative to its norm, is wrong and not compared.
WRONG = 1e-2
# Products that "auto" may look at before it is timed.
SETTLING = 20
AUTO = "auto"


def measure(_: int, name: str, weights: Path, rounds: int) -> dict[str, Any]:
    """Seconds of every contestant in each round, and how far its product is off in float32."""
    pin_threads()
    case = measured(name, weights=weights)
    vector = torch.randn(case.num_parameters, generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH):
        automatic = HessianOperator(case.model, case.loss_fn, case.batches, memory_budget=peers.MEMORY)
        peers.expect(automatic, 50)
        for _ in range(SETTLING):
            automatic.matvec(vector)
        products: dict[str, Callable[[Tensor], Tensor]] = {AUTO: automatic.matvec}
        products |= {label: make(case) for label, make in {**peers.OWN_PRODUCTS, **peers.PEER_PRODUCTS}.items()}
        right = products["double backward, graphs kept"](vector)
        errors = {label: float((product(vector) - right).norm() / right.norm()) for label, product in products.items()}
        calls = {"gradient": peers.gradient(case), **products}
        seconds = in_turns({label: partial(call, vector) for label, call in calls.items()}, rounds)
    return {
        "parameters": case.num_parameters,
        "samples": sum(len(batch[0]) for batch in case.batches),
        "seconds": seconds,
        "errors": errors,
        "engine": automatic.engine,
    }


def report(names: list[str], files: dict[str, Path], rounds: int) -> str:
    """Both tables, ours and theirs."""
    ours, theirs = [], []
    for name in names:
        result = launch(1, measure, name, files[name], rounds)[0]
        ours.append(own_row(name, result))
        theirs.append(peer_row(name, result))
    labels = list(peers.OWN_PRODUCTS)
    head = ["case", "parameters", "samples", "gradient, ms", *labels, "auto", "auto picked for k = 50"]
    peer_head = ["case", *peers.PEER_PRODUCTS, "fastest", "fastest / auto"]
    return (
        "Ours, in gradients timed in the same rounds.\n\n"
        + table(head, ours)
        + "\n\nThe others, in the same gradients, and how many of our products fit into the fastest of theirs. "
        f"A product that is off by more than {100 * WRONG:g} % of its norm is wrong and not compared; what is off by "
        "more than 0.1 % is said.\n\n" + table(peer_head, theirs)
    )


def own_row(name: str, result: dict[str, Any]) -> list[str]:
    seconds = result["seconds"]
    cells = [spread(ratios(seconds[label], seconds["gradient"])) for label in [*peers.OWN_PRODUCTS, AUTO]]
    start = [name, f"{result['parameters']:,}", str(result["samples"]), milliseconds(seconds["gradient"])]
    return [*start, *cells, result["engine"]]


def peer_row(name: str, result: dict[str, Any]) -> list[str]:
    seconds, errors = result["seconds"], result["errors"]
    cells, right = [], []
    for label in peers.PEER_PRODUCTS:
        if not errors[label] <= WRONG:
            cells.append(f"wrong ({errors[label]:.1g})")
            continue
        right.append(label)
        off = f", off by {errors[label]:.1g}" if errors[label] > 1e-3 else ""
        cells.append(spread(ratios(seconds[label], seconds["gradient"])) + off)
    if not right:
        return [name, *cells, "none", "none"]
    fastest = min(right, key=lambda label: statistics.median(seconds[label]))
    return [name, *cells, fastest, spread(ratios(seconds[fastest], seconds[AUTO]))]
