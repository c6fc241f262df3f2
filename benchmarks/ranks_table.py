"""Two ranks: ours against ours alone, and against the other project that has ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.cases import Case, measured
from benchmarks.distributed import launch
from benchmarks.peers import error
from benchmarks.references import KEPT, reference
from benchmarks.settings import best
from benchmarks.statistics_report import table
from benchmarks.timing import milliseconds, pin_threads, ratios, spread, timed
from hessian_callback import HessianOperator, top_eigenvalues

ALONE, OURS, THEIRS = "ours, W = 1", "ours, W = 2", "eigenthings, W = 2"
# Both ranks multiply at the same time, each with its own batches, and exchange nothing: what the machine allows.
APART = "ours, two halves apart"


def measure(
    rank: int, name: str, weights: Path, k: int, product_rounds: int, top_rounds: int, kept: Path = KEPT
) -> dict[str, Any]:
    """Seconds of products and of the top k, by turns; when rank 0 works alone, rank 1 waits."""
    pin_threads()
    world_size = dist.get_world_size()
    own_group = [dist.new_group([one]) for one in range(world_size)][rank]
    case = measured(name, weights=weights)
    share = Case(case.model, case.loss_fn, case.batches[rank::world_size])
    steps, _, _ = best(name, k)
    with sdpa_kernel(SDPBackend.MATH):
        truth = reference(name, case, k, kept=kept) if rank == 0 else []
        together = _operator(share, dist.group.WORLD)
        alone = _operator(case, own_group) if rank == 0 else None
        apart = _operator(share, own_group)
        other = _other(share)
        vector = torch.randn(case.num_parameters, generator=torch.Generator().manual_seed(0))
        piece = together.partition.cut(vector)
        right = together.matvec(vector)
        off = float((other.matvec(vector) - right).norm() / right.norm())

        calls: dict[str, Callable[[], Any]] = {
            ALONE: lambda: alone.matvec_slice(vector) if alone is not None else None,
            OURS: lambda: together.matvec_slice(piece),
            APART: lambda: apart.matvec_slice(vector),
            THEIRS: lambda: other.matvec(vector),
        }
        products = _turns(calls, product_rounds, repeats=5)
        for operator in (together, apart, alone):
            if operator is not None:
                operator.close()

        found: dict[str, list[float]] = {}
        spent: dict[str, int] = {}

        def own(label: str, part: Case, group: Any) -> None:
            with _operator(part, group) as operator:
                peers.expect(operator, k)
                spectrum = top_eigenvalues(operator, k)
            found[label], spent[label] = spectrum.eigenvalues.tolist(), spectrum.num_matvecs

        def theirs() -> None:
            from hessian_eigenthings.algorithms.lanczos import lanczos

            result = lanczos(_other(share), k=k, which="LA", max_iter=steps, reorthogonalize=True, seed=0)
            found[THEIRS], spent[THEIRS] = result.eigenvalues.tolist(), result.iterations

        calls = {
            ALONE: lambda: own(ALONE, case, own_group) if rank == 0 else None,
            OURS: lambda: own(OURS, share, dist.group.WORLD),
            THEIRS: theirs,
        }
        tops = _turns(calls, top_rounds, repeats=1, warm=False)
    errors = {label: error(values, truth) for label, values in found.items()} if rank == 0 else {}
    return {"products": products, "tops": tops, "errors": errors, "spent": spent, "off": off, "k": k}


def _operator(case: Case, group: Any) -> HessianOperator:
    return HessianOperator(case.model, case.loss_fn, case.batches, process_group=group, memory_budget=peers.MEMORY)


def _other(case: Case) -> Any:
    from hessian_eigenthings.operators.distributed import DDPHessianOperator

    return DDPHessianOperator(case.model, case.batches, case.loss_fn)


def _turns(
    calls: dict[str, Callable[[], Any]], rounds: int, *, repeats: int, warm: bool = True
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for number in range(rounds):
        order = list(calls)[number % len(calls) :] + list(calls)[: number % len(calls)]
        for label in order:

            def turn(call: Callable[[], Any] = calls[label]) -> None:
                for _ in range(repeats):
                    call()
                dist.barrier()

            if warm:
                calls[label]()
            dist.barrier()
            seconds[label].append(timed(turn) / repeats)
    return seconds


def report(names: list[str], files: dict[str, Path], k: int, product_rounds: int, top_rounds: dict[str, int]) -> str:
    """Products and eigenvalues, two tables."""
    products, tops = [], []
    for name in names:
        with sdpa_kernel(SDPBackend.MATH):  # kept for rank 0, which could not compute it within a group
            reference(name, measured(name, weights=files[name]), k)
        result = launch(2, measure, name, files[name], k, product_rounds, top_rounds.get(name, 0))[0]
        seconds = result["products"]
        products.append([name, *(milliseconds(seconds[label]) for label in (ALONE, OURS, APART, THEIRS))])
        products[-1] += [spread(ratios(seconds[ALONE], seconds[label])) for label in (OURS, APART)]
        products[-1].append(spread(ratios(seconds[THEIRS], seconds[OURS])))
        products[-1].append(f"{result['off']:.1e}")
        tops += top_rows(name, result)
        print(f"  {name}", flush=True)
    head = ["case", *(f"ms, {label}" for label in (ALONE, OURS, APART, THEIRS)), "W = 1 / W = 2", "W = 1 / apart"]
    head += ["eigenthings W = 2 / ours W = 2", "their product is off by"]
    top_head = ["case", "k", "contestant", "products", "largest error", "time / ours, W = 2"]
    return f"{APART_NOTE}\n\n{table(head, products)}\n\n{table(top_head, tops)}"


APART_NOTE = (
    "*Apart*: both processes multiply at the same time, each with its half of the batches, and exchange nothing. "
    "What that gains over one process is what the machine allows."
)


def top_rows(name: str, result: dict[str, Any]) -> list[list[str]]:
    seconds = result["tops"]
    if not seconds[OURS]:
        return [[name, str(result["k"]), "all", "not run", "", ""]]
    rows = []
    for label in (OURS, ALONE, THEIRS):
        achieved = result["errors"][label]
        ratio = spread(ratios(seconds[label], seconds[OURS])) if achieved <= 1e-2 else f"wrong ({achieved:.2g})"
        spent = str(result["spent"][label])
        rows.append([name, str(result["k"]), label, spent, f"{100 * achieved:.2g} %", "1" if label == OURS else ratio])
    return rows
