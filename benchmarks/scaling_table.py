"""How the time of a whole measurement grows with parameters, samples and k, one at a time."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from torch import nn

from benchmarks.cases import Case, cross_entropy, digits
from benchmarks.distributed import launch
from benchmarks.peers import own_top
from benchmarks.statistics_report import table
from benchmarks.timing import pin_threads

WIDTHS = (64, 128, 256, 512)
SAMPLES = (128, 256, 512, 1024)
EIGENVALUES = (5, 10, 20, 40, 80)
# What is held while something else changes: width, samples, k.
MIDDLE = (128, 512, 20)


def network(width: int, num_samples: int) -> Case:
    """Two hidden layers on digits of 16 x 16 pixels, a few steps after its start."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    every = digits(16, 1024, 256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(60):
        optimizer.zero_grad()
        cross_entropy(model, every[step % 4]).backward()
        optimizer.step()
    model.eval().zero_grad()
    return Case(model, cross_entropy, digits(16, num_samples, min(256, num_samples)))


def measure(_: int, rounds: int, quick: bool) -> dict[str, list[tuple[int, float, int]]]:
    """For each axis, what was varied, seconds, products."""
    pin_threads()
    width, num_samples, k = MIDDLE
    widths, samples, counts = (axis[:2] if quick else axis for axis in (WIDTHS, SAMPLES, EIGENVALUES))
    axes: dict[str, list[tuple[Case, int, int | None]]] = {
        "parameters": [(network(one, num_samples), k, None) for one in widths],
        "samples": [(network(width, one), k, one) for one in samples],
        "k": [(network(width, num_samples), one, one) for one in counts],
    }
    results = {}
    for axis, points in axes.items():
        seconds: list[list[float]] = [[] for _ in points]
        products = [0] * len(points)
        for _ in range(rounds):
            for index, (case, wanted, _varied) in enumerate(points):
                began = time.perf_counter()
                products[index] = own_top(case, wanted, hvp="double_backward", max_hvps=1000).products
                seconds[index].append(time.perf_counter() - began)
        values = [value if value is not None else case.num_parameters for case, _, value in points]
        results[axis] = list(zip(values, map(statistics.median, seconds), products, strict=True))
    return results


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def report(rounds: int, quick: bool = False) -> str:
    """One table, and the exponents."""
    rows, slopes = [], []
    for axis, points in launch(1, measure, rounds, quick)[0].items():
        values, seconds, products = (list(column) for column in zip(*points, strict=True))
        each = [second / product for second, product in zip(seconds, products, strict=True)]
        for value, second, product, one in zip(values, seconds, products, each, strict=True):
            rows.append([axis, f"{value:,}", f"{second / seconds[0]:.2f}", str(product), f"{one / each[0]:.2f}"])
        slopes.append([axis, *(f"{exponent(values, y):.2f}" for y in (seconds, products, each))])
    width, num_samples, k = MIDDLE
    head = ["varied", "value", "time / first", "products", "time a product / first"]
    return (
        f"A fully connected network on digits, k = {k}, {num_samples} samples and two hidden layers of {width} units "
        f"where they are not varied; double backward, medians of {rounds} rounds. W is in the tables of ranks.\n\n"
        + table(head, rows)
        + "\n\nExponents of power laws fitted to these points:\n\n"
        + table(["varied", "time", "products", "time a product"], slopes)
    )
