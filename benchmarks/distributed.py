"""The distributed engine in numbers: ``python -m benchmarks.distributed`` prints the tables of its report.

For each model, W = 1, 2 and 3 processes with one thread each share the same batches. Seconds are medians over
rounds in which W = 1 and W = 2 take turns, so that whatever else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cases import trained
from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.linalg import distributed as parallel
from hessian_callback.linalg.distributed import Ranks

MODELS = ("lenet", "gpt")
COLLECTIVES = ("all_reduce", "broadcast", "reduce_scatter", "all_gather")


def launch(world_size: int, function: Any, *args: Any) -> list[Any]:
    """Run ``function(rank, *args)`` on every rank of a gloo group of processes; return what each returned."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_main, args=(rank, world_size, folder, queue, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        while len(results) < world_size:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                raise RuntimeError("a rank ended with an error, which is printed above")
            with suppress(Empty):
                results.update([queue.get(timeout=1)])
        for process in processes:
            process.join()
    return [results[rank] for rank in range(world_size)]


def _main(rank: int, world_size: int, folder: str, queue: Any, function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    queue.put((rank, function(rank, *args)))
    dist.barrier()
    dist.destroy_process_group()


def operator_of(
    name: str, weights: Path, rank: int, world_size: int, dtype: torch.dtype = torch.float32
) -> HessianOperator:
    case = trained(name, weights=weights)
    batches = case.batches[rank::world_size]
    model = copy.deepcopy(case.model).to(dtype)
    cast = [tuple(t.to(dtype) if t.is_floating_point() else t for t in batch) for batch in batches]
    return HessianOperator(model, case.loss_fn, cast, process_group=dist.group.WORLD, memory_budget=4 << 30)


def spectra(rank: int, name: str, weights: Path, k: int) -> dict[str, Any]:
    """The top k in float64 and in float32, and what the second run exchanged and kept on this rank."""
    world_size = dist.get_world_size()
    precise = top_eigenvalues(operator_of(name, weights, rank, world_size, torch.float64), k)
    operator = operator_of(name, weights, rank, world_size)
    calls: Counter[str] = Counter()
    volume: Counter[str] = Counter()
    for collective in COLLECTIVES:
        _count(collective, calls, volume)
    spectrum = top_eigenvalues(operator, k)
    return {
        "eigenvalues": (precise.eigenvalues.tolist(), spectrum.eigenvalues.tolist()),
        "products": spectrum.num_matvecs,
        "calls": sum(calls.values()) / spectrum.num_matvecs,
        "volume": sum(volume.values()) / spectrum.num_matvecs,
        "basis": spectrum.num_matvecs * operator.partition.slice_length * 4,
    }


def _count(name: str, calls: Counter[str], volume: Counter[str]) -> None:
    original = getattr(parallel, name, None) or getattr(dist, name)

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        tensors = [tensor, *[argument for argument in args if isinstance(argument, Tensor)]]
        volume[name] += max(one.numel() * one.element_size() for one in tensors)
        return original(tensor, *args, **kwargs)

    setattr(parallel if hasattr(parallel, name) else dist, name, counted)


def turns(rank: int, name: str, weights: Path, rounds: int, products: int) -> list[tuple[float, float]]:
    """Seconds a product in each round: W = 2 on both ranks, W = 1 on rank 0 while rank 1 waits, in turns."""
    alone = dist.new_group([0])
    together = operator_of(name, weights, rank, 2)
    whole = None
    if rank == 0:
        case = trained(name, weights=weights)
        whole = HessianOperator(case.model, case.loss_fn, case.batches, process_group=alone, memory_budget=4 << 30)
    pieces = torch.ones(together.partition.slice_length)
    ratios = []
    for _ in range(rounds):
        together.matvec_slice(pieces)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(products):
            together.matvec_slice(pieces)
        dist.barrier()
        shared = (time.perf_counter() - began) / products
        single = 0.0
        if whole is not None:
            vector = torch.ones(whole.num_parameters)
            whole.matvec_slice(vector)
            began = time.perf_counter()
            for _ in range(products):
                whole.matvec_slice(vector)
            single = (time.perf_counter() - began) / products
        dist.barrier()
        ratios.append((single, shared))
    return ratios


def exchange(rank: int, size: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of the pair reduce-scatter and all-gather, and of one all-reduce, on ``size`` float32."""
    ranks = Ranks(dist.group.WORLD)
    partition = ranks.partition(size)
    vector = torch.ones(size)
    results = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        piece = ranks.reduce_scatter(vector, partition, dtype=torch.float32, device=torch.device("cpu"), stage="timing")
        ranks.all_gather(piece.contiguous(), partition)
        pair = time.perf_counter() - began
        dist.barrier()
        began = time.perf_counter()
        ranks.all_reduce(vector.clone())
        results.append((pair, time.perf_counter() - began))
    return results


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eigenvalues", type=int, default=10, help="k of the spectra")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the timings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.pt" for name in MODELS}
        for name, file in files.items():
            trained(name, weights=file)
        print(
            "| model | parameters | W | largest difference, float64 | float32 | products | collectives a product |",
            end="",
        )
        print(" kB a product | basis, MB a rank |\n|---|---|---|---|---|---|---|---|---|")
        for name, file in files.items():
            _print_spectra(name, file, options.eigenvalues)
        print("\n| model | ms a product, W = 1 | W = 2 | ratio: median (range) |\n|---|---|---|---|")
        for name, file in files.items():
            rounds = launch(2, turns, name, file, options.rounds, 5)[0]
            ratios = sorted(single / shared for single, shared in rounds)
            single, shared = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
            extremes = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(
                f"| {name} | {single:.1f} | {shared:.1f} | {statistics.median(ratios):.2f} ({extremes}) |", flush=True
            )
    print("\n| floats | pair, ms | all-reduce, ms | pair / all-reduce |\n|---|---|---|---|")
    for size in (61_000, 1_000_000, 4_000_000):
        pairs = launch(2, exchange, size, 4 * options.rounds)[0][options.rounds :]
        pair, reduce = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {size:,} | {pair:.2f} | {reduce:.2f} | {pair / reduce:.2f} |", flush=True)


def _print_spectra(name: str, weights: Path, k: int) -> None:
    reference: tuple[list[float], list[float]] | None = None
    for world_size in (1, 2, 3):
        ranks = launch(world_size, spectra, name, weights, k)
        assert all(one["eigenvalues"] == ranks[0]["eigenvalues"] for one in ranks), "ranks differ"
        own = ranks[0]["eigenvalues"]
        reference = reference or own
        differences = [
            max(abs(a - b) / abs(b) for a, b in zip(*pair, strict=True)) for pair in zip(own, reference, strict=True)
        ]
        num_parameters = sum(p.numel() for p in trained(name, weights=weights).model.parameters())
        print(
            f"| {name} | {num_parameters:,} | {world_size} | {differences[0]:.1e} | {differences[1]:.1e} | "
            f"{ranks[0]['products']} | {ranks[0]['calls']:.2f} | {ranks[0]['volume'] / 1e3:.0f} | "
            f"{ranks[0]['basis'] / 1e6:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
