"""The k largest eigenvalues at equal achieved error: time, tracing and proofs included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.cases import Case, measured
from benchmarks.distributed import launch
from benchmarks.limit import FastestProduct, fewest_products
from benchmarks.peers import Found, error, num_missing
from benchmarks.references import KEPT, independent, reference
from benchmarks.settings import best
from benchmarks.statistics_report import table
from benchmarks.timing import milliseconds, pin_threads, ratios, spread, timed

# A contestant whose largest error is above is wrong and not compared.
WRONG = 1e-2
OWN = "this project"


@dataclass
class Entry:
    """What a contestant did, round by round."""

    label: str
    error: float
    missing: int
    products: int
    note: str
    seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    last: Found | None = None


@dataclass
class Cell:
    """One case and k."""

    name: str
    k: int
    entries: list[Entry]
    num_parameters: int
    fewest: int = 0  # products until the values are within 1 %
    fastest: list[dict[str, float]] = field(default_factory=list)  # seconds of a product by each engine, round by round
    gemv: float = 0.0
    independent: float | None = None


def contestants(case: Case, name: str, k: int) -> dict[str, Callable[[], Found]]:
    """Those that are timed in every round."""
    steps, ncv, tol = best(name, k)
    return {
        OWN: partial(peers.own_top, case, k),
        "scipy eigsh over curvlinops, by hand": partial(peers.scipy_top, case, k, ncv=ncv, tol=tol),
        "eigenthings, by hand": partial(peers.eigenthings_top, case, k, steps=steps),
    }


def once(case: Case, name: str, k: int) -> dict[str, Callable[[], Found]]:
    """Those that are run once, in the first round."""
    found: dict[str, Callable[[], Found]] = {}
    if name in ("mlp", "lenet", "tiny"):
        ncv = max(2 * k + 1, 20)
        found["scipy eigsh over curvlinops, default ncv"] = partial(peers.scipy_top, case, k, ncv=ncv, tol=WRONG)
    found["eigenthings, by its defaults"] = partial(peers.eigenthings_top, case, k, steps=None)
    return found


def measure(
    _: int, name: str, weights: Path, k: int, rounds: int, allotted: float, kept: Path = KEPT, check: bool = False
) -> Cell:
    """Run everyone in turns until the rounds, or the seconds allotted, are used up; a round at least."""
    pin_threads()
    case = measured(name, weights=weights)
    with sdpa_kernel(SDPBackend.MATH):
        truth = reference(name, case, k, kept=kept)
        entries: dict[str, Entry] = {}
        limit, fastest = FastestProduct(case), []
        fewest = fewest_products(limit.operators["double_backward"], truth, WRONG)
        began = time.perf_counter()
        for number in range(rounds):
            fastest.append(limit.seconds())
            turn = contestants(case, name, k)
            order = list(turn)[number % len(turn) :] + list(turn)[: number % len(turn)]
            for label in order:
                _note(entries, label, turn[label], truth, number)
            if number == 0:
                for label, call in once(case, name, k).items():
                    _note(entries, label, call, truth, number)
                extra = sum(entry.seconds[0] for label, entry in entries.items() if label not in turn)
            spent = time.perf_counter() - began
            if spent + (spent - extra) / (number + 1) > allotted:
                break
        limit.close()
        cell = Cell(name, k, list(entries.values()), case.num_parameters, fewest, fastest)
        cell.gemv = gemv_bandwidth(entries[OWN].products, case.num_parameters)
        if check:
            cell.independent = error(independent(case, k), truth)
    return cell


def _note(entries: dict[str, Entry], label: str, call: Callable[[], Found], truth: list[float], number: int) -> None:
    began = time.perf_counter()
    try:
        found = call()
    except Exception as exception:  # A failure of theirs is a result.
        if label == OWN:
            raise
        found = Found([], 0, f"failed: {type(exception).__name__}")
    seconds = time.perf_counter() - began
    if label not in entries:
        missing = num_missing(found.values, truth, WRONG)
        entries[label] = Entry(label, error(found.values, truth), missing, found.products, found.note)
    entry = entries[label]
    entry.error = max(entry.error, error(found.values, truth))
    entry.seconds.append(seconds)
    entry.rounds.append(number)
    entry.last = found


def gemv_bandwidth(rows: int, columns: int) -> float:
    """Bytes a second at which plain products with a matrix of a basis' shape, and its transpose, read it."""
    matrix = torch.ones(rows, columns)
    wide, tall = torch.ones(columns), torch.ones(rows)
    timed(lambda: matrix.mv(wide))
    seconds = timed(lambda: matrix.mv(wide), 5) + timed(lambda: matrix.t().mv(tall), 5)
    return 2 * matrix.numel() * 4 / seconds


# What is printed.


def report(cells: list[Cell], missing: list[tuple[str, int]]) -> str:
    """The comparison, and what our time goes into."""
    rows = [row for cell in cells for row in comparison(cell)]
    rows += [[name, str(k), "all", "not run", "", "", "", "", "", ""] for name, k in missing]
    head = ["case", "k", "contestant", "settings", "products", "largest error", "missing"]
    head += ["time / ours", "times the limit", "rounds"]
    text = table(head, rows)
    head = ["case", "k", "products", "fewest", "products / fewest", "fastest engine"]
    head += ["ms a product", "our ms a product", "ours / fastest", "times the limit"]
    text += f"\n\n### The limit\n\n{LIMIT}\n\n{table(head, [factors(cell) for cell in cells])}"
    for cell in cells:
        if cell.independent is not None:
            text += (
                f"\n\nThe reference of {cell.name}, k = {cell.k}, differs from ARPACK over curvlinops in float64 by "
                f"{cell.independent:.1e} at the most, relatively."
            )
    parts = [breakdown(cell) for cell in cells]
    head = ["case", "k", "seconds", "preparing, %", "products, %", "the rest, %", "rest / (rest + products), %"]
    head += ["basis, MB", "GB/s of basis reads", "GB/s of plain GEMV", "share, %"]
    return f"{text}\n\n### Where our time goes\n\n{BREAKDOWN}\n\n{table(head, parts)}"


LIMIT = (
    "*Fewest*: products after which the k values are within 1 %, read off against the reference. *Fastest engine*: the "
    "faster of our two exact ones, timed in the same rounds with what it builds or traces left out. The limit is their "
    "product; nothing is left for a proof, for orthogonalisation, or for finding out what is fastest."
)

BREAKDOWN = (
    "*Preparing*: graphs or tracing before the first product. *The rest*: orthogonalisation, small eigenvalue "
    "problems, checks. *Basis reads*: two of the whole basis a step (coefficients and subtraction), "
    "as if the rest were nothing else, so what is written is a lower limit. *Plain GEMV*: `torch.mv` with a matrix "
    "of the final basis' shape and with its transpose, in the same process. From the last round."
)


def comparison(cell: Cell) -> list[list[str]]:
    """One row a contestant."""
    own = next(entry for entry in cell.entries if entry.label == OWN)
    rows = []
    for entry in cell.entries:
        pairs = [(seconds, own.seconds[number]) for seconds, number in zip(entry.seconds, entry.rounds, strict=True)]
        finite = entry.error < float("inf")
        if entry is own:
            ratio = "1"
        elif not finite:
            ratio = entry.note
        elif not entry.error <= WRONG:
            ratio = f"wrong ({entry.error:.2g})"
        else:
            ratio = spread(ratios(*zip(*pairs, strict=True)))
        settings = entry.note if finite else ""
        shown = f"{100 * entry.error:.2g} %" if finite else "none"
        start = [cell.name, str(cell.k), entry.label, settings, str(entry.products), shown]
        times = spread(limits(cell, entry)) if entry.error <= WRONG else ""
        rows.append([*start, str(entry.missing), ratio, times, str(len(pairs))])
    return rows


def limits(cell: Cell, entry: Entry) -> list[float]:
    """An entry's seconds in units of the limit, round by round."""
    return [
        seconds / (cell.fewest * min(cell.fastest[number].values()))
        for seconds, number in zip(entry.seconds, entry.rounds, strict=True)
    ]


def factors(cell: Cell) -> list[str]:
    """Our distance from the limit, and its factors."""
    own = next(entry for entry in cell.entries if entry.label == OWN)
    assert own.last is not None, "every cell has a round"
    medians = {engine: statistics.median(one[engine] for one in cell.fastest) for engine in cell.fastest[0]}
    engine = min(medians, key=lambda name: medians[name])
    each = own.last.multiplying / own.last.products
    row = [cell.name, str(cell.k), str(own.products), str(cell.fewest), f"{own.products / cell.fewest:.2f}", engine]
    row += [milliseconds([medians[engine]]), milliseconds([each]), f"{each / min(cell.fastest[-1].values()):.2f}"]
    return [*row, spread(limits(cell, own))]


def breakdown(cell: Cell) -> list[str]:
    """Shares of our own time, and the rate at which the basis was read."""
    own = next(entry for entry in cell.entries if entry.label == OWN)
    found = own.last
    assert found is not None, "every cell has a round"
    total = own.seconds[-1]
    rest = total - found.preparing - found.multiplying
    basis = found.products * cell.num_parameters * 4
    rate = found.products * basis / rest  # 2 reads of half the basis on average
    shares = [f"{100 * part / total:.1f}" for part in (found.preparing, found.multiplying, rest)]
    row = [cell.name, str(cell.k), f"{statistics.median(own.seconds):.1f}", *shares]
    row.append(f"{100 * rest / (rest + found.multiplying):.1f}")
    return [*row, f"{basis / 1e6:.0f}", f"{rate / 1e9:.1f}", f"{cell.gemv / 1e9:.1f}", f"{100 * rate / cell.gemv:.0f}"]


def measure_all(
    wanted: list[tuple[str, int]], files: dict[str, Path], rounds: int, seconds: dict[tuple[str, int], float]
) -> list[Cell]:
    """Every cell in a process of its own; the first one's reference is checked independently."""
    cells = []
    for name, k in wanted:
        check = name in ("mlp", "tiny") and k == 50
        cells.append(launch(1, measure, name, files[name], k, rounds, seconds[name, k], KEPT, check)[0])
        print(f"  {name}, k = {k}: {len(cells[-1].entries[0].seconds)} rounds", flush=True)
    return cells
