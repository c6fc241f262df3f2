"""Bias, coverage, size and power of the statistics, by simulation.

    python -m benchmarks.statistics_report

writes benchmarks/STATISTICS.md. Every number follows from the seed below. It takes about twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special
from scipy.linalg import eigh_tridiagonal

from benchmarks.report_sections import write_sections
from hessian_callback.power_law.alternatives import Alternative, boundary_p, likelihood_ratio_test
from hessian_callback.power_law.critical_values import critical_distance
from hessian_callback.power_law.cutoff import check_outliers
from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.entropy import entropy_deficit
from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.goodness_of_fit import ks_p_value, simulate_ks_distances
from hessian_callback.power_law.sample_covariance import effective_num_samples, fit_population, jackknife
from hessian_callback.power_law.truncated_power_law import fit_truncated_power_laws

FloatArray = npt.NDArray[np.float64]
Sampler = Callable[[int, np.random.Generator], FloatArray]

SEED = 20250724
LEVEL = 0.05


def percent(rate: float | np.floating[Any]) -> str:
    return f"{100 * float(rate):.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Spectra, each a function of K and a generator.


def pareto(num: int, rng: np.random.Generator) -> FloatArray:
    return np.exp(rng.standard_exponential(num))


def zipf(num: int, rng: np.random.Generator) -> FloatArray:
    return np.arange(1.0, num + 1) ** -1.0


def top_of_lognormal(num: int, rng: np.random.Generator) -> FloatArray:
    return np.sort(rng.lognormal(sigma=2.0, size=10 * num))[-num:]


def lognormal(num: int, rng: np.random.Generator) -> FloatArray:
    return rng.lognormal(size=num)


def exponential(num: int, rng: np.random.Generator) -> FloatArray:
    return rng.standard_exponential(num)


def top_of_exponential(num: int, rng: np.random.Generator) -> FloatArray:
    return np.sort(rng.standard_exponential(10 * num))[-num:]


def spikes_plus_semicircle(num: int, rng: np.random.Generator) -> FloatArray:
    """Ten spikes, from 2 to 20 times the edge, over the top of a Gaussian orthogonal ensemble."""
    size = 3 * num
    # Its tridiagonal form, after Dumitriu and Edelman (2002), costs K^2 instead of K^3.
    diagonal = rng.standard_normal(size) * math.sqrt(2.0)
    off_diagonal = np.sqrt(rng.chisquare(np.arange(size - 1, 0, -1)))
    bulk = eigh_tridiagonal(
        diagonal, off_diagonal, eigvals_only=True, select="i", select_range=(size - num + 10, size - 1)
    )
    return np.concatenate([math.sqrt(4.0 * size) * np.geomspace(20.0, 2.0, 10), np.asarray(bulk)[::-1]])


SPECTRA: dict[str, Sampler] = {
    "Pareto, s = 1": pareto,
    "Zipf, k^-1": zipf,
    "lognormal, sigma 1, all": lognormal,
    "lognormal, sigma 2, top tenth": top_of_lognormal,
    "exponential, all": exponential,
    "exponential, top tenth": top_of_exponential,
    "10 spikes + semicircle": spikes_plus_semicircle,
}


# Sections.


def slope_section(scale: float) -> str:
    draws = max(200, int(20_000 * scale))
    rows = []
    for num in (20, 50, 200, 1000):
        rng = np.random.default_rng([SEED, 1, num])
        fits = [fit_power_law(pareto(num, rng)) for _ in range(draws)]
        slopes = np.array([fit.slope for fit in fits])
        intervals = np.array([fit.slope_interval() for fit in fits])
        least_squares = np.array([fit.least_squares_slope for fit in fits])
        band = np.array([fit.slope_stderr for fit in fits])
        rows.append(
            [
                str(num),
                f"{slopes.mean() - 1:+.4f}",
                f"{-1 / num:+.4f}",
                f"{slopes.std() * math.sqrt(num):.3f}",
                percent(np.mean((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1))),
                percent(np.mean(np.abs(slopes - 1) <= 2 * band)),
                f"{least_squares.mean() - 1:+.4f}",
                f"{least_squares.std() / slopes.std():.2f}",
                f"{fit_power_law(zipf(num, rng)).slope:.3f}",
            ]
        )
    head = [
        "K",
        "bias",
        "-1/K",
        "sd x sqrt(K)",
        "coverage of the interval, %",
        "of 2 standard errors, %",
        "bias, least squares",
        "its sd / sd",
        "slope on exact k^-1",
    ]
    error = 100 * math.sqrt(0.05 * 0.95 / draws)
    return (
        f"## The slope and its 95 % interval, Pareto samples with s = 1\n\n{draws} draws; standard error of a "
        f"coverage {error:.2f} points. Required: 94 to 96 % for the interval.\n\n{table(head, rows)}"
    )


def critical_section(scale: float) -> str:
    rows = []
    for num in (20, 50, 200, 1000):
        draws = max(2000, int((400_000 if num < 1000 else 100_000) * scale))
        # Another seed than the table's, so that this is a check of it.
        distances = simulate_ks_distances(num, draws, seed=SEED)
        quantile = float(np.quantile(distances, 1 - LEVEL))
        batches = np.quantile(distances[: draws // 20 * 20].reshape(20, -1), 1 - LEVEL, axis=1)
        rows.append(
            [
                str(num),
                str(draws),
                f"{quantile:.5f} +- {2 * batches.std(ddof=1) / math.sqrt(20):.5f}",
                f"{critical_distance(num):.5f}",
                f"{critical_distance(num, exponent='known'):.5f}",
                f"{100 * np.mean(distances >= critical_distance(num)):.2f}",
                f"{100 * np.mean(distances >= critical_distance(num, exponent='known')):.2f}",
            ]
        )
    head = [
        "K",
        "draws",
        "95 % quantile, simulated (2 s.e.)",
        "`critical_distance_fitted`",
        "`critical_distance_paper`",
        "rejected by fitted, %",
        "rejected by paper, %",
    ]
    return (
        "## Critical values of the fit error at 5 %\n\n"
        "Expected: .0344 at K = 1000 and .151 at K = 50; 5 % rejected by a right value.\n\n" + table(head, rows)
    )


VUONG: tuple[Alternative, ...] = ("exponential", "lognormal", "stretched_exponential")


def power_section(scale: float) -> str:
    parts = []
    for num in (50, 200, 1000):
        rows = []
        for index, (name, sample) in enumerate(SPECTRA.items()):
            rng = np.random.default_rng([SEED, 3, num, index])
            draws = max(20, int(scale * {50: 1000, 200: 500, 1000: 100}[num]))
            if sample is zipf:
                draws = 1
            spectra = [sample(num, rng) for _ in range(draws)]
            rows.append([name, str(draws), *_rates(spectra)])
        head = [
            f"K = {num}",
            "draws",
            "KS, paper",
            "KS, fitted",
            "KS, bootstrap",
            "entropy",
            "vs exponential: for it / for the law",
            "vs lognormal: Vuong / boundary",
            "vs stretched: Vuong / boundary",
            "vs truncated: boundary",
        ]
        parts.append(table(head, rows))
    return (
        "## Size and power at 5 %\n\nPercentage of spectra on which each test decides against the power law (in the "
        "first two rows that is the size, below it the power). *KS*: distance above the critical value, or "
        "bootstrap p below 5 % (1000 draws, the same for all spectra of one K, which leaves its level uncertain by "
        "0.7 points). *Entropy*: p-value of the maximum-entropy deficit below 5 %. *Vuong*: "
        "p below 5 % and the other law more likely; *boundary*: half chi-square p below 5 %. Against laws that "
        "contain the power law, it cannot win.\n\n"
        "Zipf's law is one spectrum with no scatter, so its row is 0 or 100.\n\n" + "\n\n".join(parts)
    )


def _rates(spectra: list[FloatArray]) -> list[str]:
    fits = [fit_power_law(spectrum) for spectrum in spectra]
    rates = [
        np.mean([not fit.within_critical_distance_paper for fit in fits]),
        np.mean([not fit.within_critical_distance_fitted for fit in fits]),
        np.mean([ks_p_value(fit) < LEVEL for fit in fits]),
        np.mean([entropy_deficit(spectrum).p_value < LEVEL for spectrum in spectra]),
    ]
    cells = [percent(rate) for rate in rates]
    for name in VUONG:
        tests = [likelihood_ratio_test(spectrum, name) for spectrum in spectra]
        first = np.mean([test.verdict(LEVEL) == name for test in tests])
        if name == "exponential":
            second = np.mean([test.verdict(LEVEL) == "power_law" for test in tests])
        else:
            second = np.mean([(test.boundary_p_value or 0.0) < LEVEL for test in tests])
        cells.append(f"{percent(first)} / {percent(second)}")
    log_spectra = np.log(np.array(spectra))
    log_ratios = log_spectra - log_spectra.min(axis=1, keepdims=True)
    gains = fit_truncated_power_laws(log_ratios).log_likelihood_gain
    boundary = np.mean([boundary_p(2 * log_ratios.shape[1] * gain) < LEVEL for gain in gains])
    return [*cells, percent(boundary)]


def truncated_section(scale: float) -> str:
    rows = []
    draws = max(100, int(2000 * scale))
    for num in (50, 1000):
        for slope in (0.2, 0.4, 0.7, 1.0, 2.0, 3.0):
            rng = np.random.default_rng([SEED, 4, num])
            y = slope * rng.standard_exponential((draws if num < 1000 else draws // 2, num))
            fits = fit_truncated_power_laws(y - y.min(axis=1, keepdims=True))
            p_values = np.array([boundary_p(2 * num * gain) for gain in fits.log_likelihood_gain])
            rows.append(
                [
                    str(num),
                    f"{slope:g}",
                    str(len(y)),
                    percent(np.mean(fits.rate == 0)),
                    percent(np.mean(p_values < 0.05)),
                    percent(np.mean(p_values < 0.01)),
                ]
            )
    bootstrap_draws = max(10, int(200 * scale))
    rng = np.random.default_rng([SEED, 5])
    bootstrap = [
        likelihood_ratio_test(
            np.exp(3.0 * rng.standard_exponential(50)), "truncated_power_law", bootstrap_draws=99, seed=index
        ).bootstrap_p_value
        for index in range(bootstrap_draws)
    ]
    rate = np.mean([p is not None and p <= LEVEL for p in bootstrap])
    head = ["K", "slope", "draws", "no cutoff fitted, %", "rejected at 5 %", "rejected at 1 %"]
    return (
        "## Size of the nested test against the truncated power law\n\nThe half-and-half chi-square null would have "
        "half of the fits without a cutoff and its nominal size. It supposes that eigenvalues have a finite "
        "variance, slope below 0.5; above, the test is liberal, and `bootstrap_draws` is the remedy.\n\n"
        f"{table(head, rows)}\n\nWith the bootstrap (99 draws), slope 3 and K = 50: {percent(rate)} % rejected "
        f"at 5 %, in {bootstrap_draws} samples."
    )


def _coverage(fits: list[PowerLawFit], target: float) -> str:
    return percent(np.mean([low <= target <= high for low, high in (fit.slope_interval() for fit in fits)]))


def covariance_section(scale: float) -> str:
    rows = []
    for num in (20, 50):
        size = 4 * num
        population = np.arange(1.0, size + 1) ** -1.0
        target = fit_power_law(population[:num])
        for ratio in (3, 10, 30):
            draws = max(10, int((600 if num == 20 else 300) * scale))
            rng = np.random.default_rng([SEED, 6, num, ratio])
            spectra = []
            for _ in range(draws):
                samples = rng.standard_normal((ratio * num, size)) * np.sqrt(population)
                spectra.append(np.linalg.eigvalsh(samples.T @ samples / len(samples))[::-1][:num])
            fits = [fit_power_law(spectrum) for spectrum in spectra]
            gaps = [fit_eigengaps(spectrum) for spectrum in spectra]
            rows.append(
                [
                    str(num),
                    str(ratio),
                    str(draws),
                    f"{np.mean([fit.slope for fit in fits]):.3f}",
                    f"{np.std([fit.slope for fit in fits]):.3f}",
                    f"{np.mean([fit.slope_stderr for fit in fits]):.3f}",
                    f"{target.slope:.3f}",
                    _coverage(fits, target.slope),
                    _coverage(fits, 1.0),
                    percent(np.mean([not fit.within_critical_distance_fitted for fit in fits])),
                    f"{np.mean([gap.exponent for gap in gaps]):.2f}",
                ]
            )
    head = [
        "K",
        "N/K",
        "draws",
        "mean slope",
        "sd",
        "mean stderr",
        "population at K",
        "covers it, %",
        "covers s = 1, %",
        "KS fitted rejects, %",
        "gap exponent",
    ]
    return (
        "## Sample covariances of a power law, population eigenvalues k^-1 in 4 K dimensions\n\n"
        "What eigenvalues really are: they repel, so they scatter much less than independent values (`sd` against "
        "`mean stderr`), and a small sample tilts them. N Gaussian samples.\n\n" + table(head, rows)
    )


def _network_hessian_spectra() -> tuple[FloatArray, Callable[[npt.NDArray[np.int64]], FloatArray], int]:
    """Train a small network on digits and return spectra of its Hessian.

    Returns:
        The spectrum on all 1000 held-out images; a function from indices of such images to the spectrum on them;
        the number of parameters.
    """
    import torch
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    data = load_digits()
    inputs = torch.tensor(data.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(inputs), generator=generator)
    train, held_out = order[:797], order[797:]
    shapes = [(8, 64), (8,), (10, 8), (10,)]
    parameters = torch.cat(
        [torch.randn(math.prod(shape), generator=generator) / math.sqrt(shape[-1]) for shape in shapes]
    )

    def loss(flat: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([math.prod(shape) for shape in shapes])
        w1, b1, w2, b2 = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
        logits = torch.tanh(x @ w1.T + b1) @ w2.T + b2
        return (torch.nn.functional.cross_entropy(logits, y, reduction="none") * weight).sum() / weight.sum()

    parameters.requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        loss(parameters, inputs[train], labels[train], torch.ones(len(train))).backward()
        optimizer.step()
    flat = parameters.detach()
    hessian = torch.func.hessian(loss)

    def spectrum(indices: npt.NDArray[np.int64]) -> FloatArray:
        # Rows are drawn with replacement, so repeated rows have a weight.
        chosen, counts = held_out[torch.from_numpy(indices)].unique(return_counts=True)
        matrix = hessian(flat, inputs[chosen], labels[chosen], counts.float()).double()
        values: FloatArray = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).flip(0).numpy()
        return values

    return spectrum(np.arange(len(held_out))), spectrum, len(flat)


def network_section(scale: float) -> str:
    whole, spectrum, num_parameters = _network_hessian_spectra()
    rng = np.random.default_rng([SEED, 7])
    table_rows = []
    for num in (20, 50):
        target = fit_power_law(whole[:num])
        for ratio in (3, 10, 30):
            draws = max(4, int(100 * scale))
            fits = [fit_power_law(spectrum(rng.integers(1000, size=ratio * num))[:num]) for _ in range(draws)]
            slopes = np.array([fit.slope for fit in fits])
            table_rows.append(
                [
                    str(num),
                    str(ratio),
                    str(draws),
                    f"{slopes.mean():.3f}",
                    f"{slopes.std():.3f}",
                    f"{np.mean([fit.slope_stderr for fit in fits]):.3f}",
                    f"{target.slope:.3f}",
                    _coverage(fits, target.slope),
                    f"{target.fit_error:.3f}",
                    f"{np.mean([fit.fit_error for fit in fits]):.3f}",
                    percent(np.mean([not fit.within_critical_distance_fitted for fit in fits])),
                ]
            )
    head = [
        "K",
        "N/K",
        "draws",
        "mean slope",
        "sd",
        "mean stderr",
        "slope of all 1000",
        "covers it, %",
        "fit error of all",
        "mean fit error",
        "KS fitted rejects, %",
    ]
    return (
        "## A small network's Hessian over resampled held-out batches\n\n"
        f"Digits, 64-8-10 tanh network ({num_parameters} parameters), Adam for 400 full-batch steps on 797 images; "
        "dense Hessians of the mean loss of N images drawn with replacement from 1000 held-out ones. The target is the "
        "slope of all 1000 at the same K.\n\n" + table(head, table_rows)
    )


class Samples:
    """N samples of a covariance, or the terms of a matrix like a Hessian, whose rows are drawn one by one.

    They do not use the simulation of the module under test. The rows of a kind are

    - ``independent``: Gaussian;
    - ``sizes vary``: times a random size, whose square has a variance of a quarter of its squared mean;
    - ``pairs``: in pairs with a correlation of .71;
    - ``Gauss-Newton``: the C = 10 terms of each sample of a Gauss-Newton matrix of the cross entropy, with Gaussian
      Jacobians and logits of standard deviation 3.

    Args:
        kind: the kind.
        population: ``(P,)``, eigenvalues of the population.
        num_samples: N.
        rng: generator.
    """

    def __init__(self, kind: str, population: FloatArray, num_samples: int, rng: np.random.Generator) -> None:
        self.num_samples = num_samples
        sizes = np.ones((num_samples, 1))
        if kind == "sizes vary":
            sizes = rng.gamma(4.0, 0.25, size=(num_samples, 1))
        elif kind == "Gauss-Newton":
            sizes = gauss_newton_sizes(num_samples, rng)
        rows = rng.standard_normal((*sizes.shape, population.size)) * np.sqrt(sizes[..., None] * population)
        if kind == "pairs":
            half = num_samples // 2
            rows[half : 2 * half] = (rows[:half] + rows[half : 2 * half]) / math.sqrt(2.0)
            # Both of a pair are in one part of the samples.
            rows = rows[np.arange(2 * half).reshape(2, half).T.ravel()] if 2 * half == num_samples else rows
        self.rows = rows

    def eigenvalues(
        self, num: int, *, start: int = 0, stop: int | None = None, without: slice | None = None
    ) -> FloatArray:
        """Return the largest eigenvalues of the mean over some of the samples."""
        samples = self.rows[start:stop] if without is None else np.delete(self.rows, without, axis=0)
        flat = samples.reshape(-1, samples.shape[-1])
        gram = flat @ flat.T if len(flat) < flat.shape[1] else flat.T @ flat
        values: FloatArray = np.linalg.eigvalsh(gram)[::-1][:num] / len(samples)
        return values


def gauss_newton_sizes(num_samples: int, rng: np.random.Generator) -> FloatArray:
    """Draw the eigenvalues of diag(p) - p p^T for probabilities p of ten classes; ``(N, 10)``."""
    p = special.softmax(3.0 * rng.standard_normal((num_samples, 10)), axis=1)
    matrices = p[:, :, None] * np.eye(10) - p[:, :, None] * p[:, None, :]
    return np.maximum(np.linalg.eigvalsh(matrices), 0.0)


def terms_per_sample(kind: str) -> float:
    """Return the number of terms of equal size for each sample, by `effective_num_samples`."""
    if kind == "sizes vary":
        return 1.0 / 1.25
    if kind == "Gauss-Newton":
        sizes = gauss_newton_sizes(100_000, np.random.default_rng(SEED))
        return effective_num_samples(sizes[sizes > 0.0]) / len(sizes)
    return 1.0


def population_of(slope: float | None, num: int, num_parameters: int) -> FloatArray:
    """Return a power law, or the largest quantiles of a lognormal of which K are the top tenth, for slope ``None``."""
    if slope is not None:
        return np.arange(1.0, num_parameters + 1) ** -slope
    return np.exp(2.0 * special.ndtri(1.0 - (np.arange(num_parameters) + 0.5) / (10.0 * num)))


# Kind, K, N, P, s (None: lognormal), spectra, draws of the null law.
POPULATION_CASES: tuple[tuple[str, int, int, int, float | None, int, int], ...] = (
    ("independent", 10, 35, 3000, 0.85, 1000, 1000),
    ("independent", 20, 60, 150, 0.75, 1500, 1000),
    ("independent", 20, 200, 400, 1.1, 1000, 1000),
    ("independent", 20, 600, 300, 0.55, 600, 1000),
    ("independent", 20, 130, 2000, 0.65, 500, 600),
    ("independent", 50, 150, 400, 1.35, 600, 600),
    ("independent", 50, 550, 400, 0.9, 400, 600),
    ("independent", 100, 350, 500, 1.05, 200, 300),
    ("independent", 200, 2000, 600, 1.0, 80, 99),
    ("sizes vary", 20, 200, 300, 1.0, 400, 500),
    ("Gauss-Newton", 20, 60, 150, 1.0, 400, 500),
    ("pairs", 20, 200, 300, 1.0, 400, 500),
    ("lognormal", 20, 200, 200, None, 300, 500),
    ("lognormal", 50, 550, 400, None, 200, 600),
    ("lognormal", 200, 2000, 600, None, 80, 99),
)


def population_section(scale: float) -> str:
    rows = []
    pooled = []
    started = time.process_time()
    for kind, num, num_samples, num_parameters, slope, draws, null_draws in POPULATION_CASES:
        # A trial of the script leaves out the expensive cases.
        if scale < 0.1 and num > 20:
            continue
        draws, null_draws = max(4, int(scale * draws)), max(50, int(scale * null_draws))
        rng = np.random.default_rng([SEED, 9, num, num_samples, num_parameters])
        population = population_of(slope, num, num_parameters)
        size = {"num_samples": round(num_samples * terms_per_sample(kind)), "num_parameters": num_parameters}
        found = []
        for _ in range(draws):
            values = Samples(kind, population, num_samples, rng).eigenvalues(num)
            found.append(fit_population(values, **size, draws=null_draws))
        intervals = [one.slope_interval() for one in found]
        slopes = np.array([one.slope for one in found])
        unknown = slope is None
        target = math.nan if slope is None else slope
        rows.append(
            [
                kind,
                str(num),
                str(num_samples),
                str(size["num_samples"]),
                str(num_parameters),
                "-" if unknown else f"{target:g}",
                str(draws),
                "-" if unknown else _coverage([one.fit for one in found], target),
                percent(np.mean([not one.fit.within_critical_distance_paper for one in found])),
                percent(np.mean([not one.fit.within_critical_distance_fitted for one in found])),
                f"{slopes.mean():.3f}",
                f"{slopes.std():.3f}",
                "-" if unknown else percent(np.mean([low <= target <= high for low, high in intervals])),
                percent(np.mean([one.p_value <= LEVEL for one in found])),
            ]
        )
        print(*rows[-1], flush=True)
        if kind == "independent":
            pooled.append((draws, *(float(cell) for cell in rows[-1][-2:])))
    numbers, covers, rejects = np.array(pooled).T
    head = [
        "samples",
        "K",
        "N",
        "N given",
        "P",
        "s",
        "spectra",
        "independent: covers s, %",
        "paper's rejects, %",
        "fitted rejects, %",
        "population: mean slope",
        "sd",
        "covers s, %",
        "rejects, %",
    ]
    return (
        "## Size, coverage and power with a covariance as the null hypothesis\n\n`fit_power_law` (independent "
        "eigenvalues) and `fit_population` on spectra of N samples in P dimensions. The spectra are drawn sample by "
        "sample; the null law is simulated with another seed, and tabulated at slopes a factor of 1.22 apart, between "
        "which the slopes of this table lie. The standard error of a rate of 5 % is 0.7 points for 1000 spectra, 1.1 "
        "for 400 and 2.4 for 80; that of the tabulated quantile adds 0.7 points for 1000 draws, 1.0 for 500 and 2.2 "
        "for 99. Required: 4 to 6 % and 93 to 97 % for *independent*. *sizes vary*: each sample has a random size. "
        "*Gauss-Newton*: the ten terms of each sample of a Gauss-Newton matrix, with logits of standard deviation 3. "
        "For both, `effective_num_samples` gives N. *pairs*: samples in pairs with a correlation of .71, and N as if "
        "they were independent. *lognormal*: the population has quantiles of a lognormal with sigma 2, of which K are "
        "the top tenth, so a rejection is right.\n\n"
        f"`python -m benchmarks.statistics_report --only population`, {time.process_time() - started:.0f} s of one "
        "core.\n\n" + table(head, rows) + f"\n\nOver all {numbers.sum():.0f} *independent* spectra: "
        f"{numbers @ rejects / numbers.sum():.1f} % rejected, {numbers @ covers / numbers.sum():.1f} % of the "
        "intervals cover s."
    )


# Kind, K, N, P, s, draws.
CORRECTION_CASES: tuple[tuple[str, int, int, int, float, int], ...] = (
    ("independent", 20, 200, 400, 1.0, 200),
    ("independent", 20, 200, 400, 0.5, 200),
    ("independent", 20, 200, 400, 1.5, 200),
    ("independent", 50, 500, 400, 1.0, 100),
    ("sizes vary", 20, 200, 400, 1.0, 200),
    ("pairs", 20, 200, 400, 1.0, 200),
    ("Gauss-Newton", 20, 200, 200, 1.0, 100),
    ("independent", 20, 60, 400, 1.0, 200),
    ("Gauss-Newton", 20, 60, 200, 1.0, 200),
)
BATCHES = 5


def correction_section(scale: float) -> str:
    rows = []
    started = time.process_time()
    for kind, num, num_samples, num_parameters, slope, draws in CORRECTION_CASES:
        if scale < 0.1 and num > 20:
            continue
        draws = max(4, int(scale * draws))
        rng = np.random.default_rng([SEED, 10, num, num_samples, num_parameters, round(10 * slope)])
        population = population_of(slope, num, num_parameters)
        target = fit_power_law(population[:num]).slope
        found = []
        for _ in range(draws):
            samples = Samples(kind, population, num_samples, rng)
            whole = samples.eigenvalues(num)
            starts = range(0, num_samples, num_samples // BATCHES)
            half = num_samples // 2
            halves = [samples.eigenvalues(num, stop=half), samples.eigenvalues(num, start=half)]
            batches = [samples.eigenvalues(num, without=slice(n, n + num_samples // BATCHES)) for n in starts]
            size = {"num_samples": num_samples, "num_parameters": num_parameters}
            fit = fit_population(whole, **size, draws=max(20, int(200 * scale)))
            found.append([*_slopes(whole, halves, batches) / target, fit.slope / slope])
        rows.append([kind, str(num), str(num_samples), str(num_parameters), f"{slope:g}", *_corrected(np.array(found))])
        print(*rows[-1], flush=True)
    whole_spectrum, spectrum, network_size = _network_hessian_spectra()
    rng = np.random.default_rng([SEED, 11])
    for num, ratio in ((20, 10), (50, 10), (20, 3)):
        if scale < 0.1 and num > 20:
            continue
        target = fit_power_law(whole_spectrum[:num]).slope
        found = []
        for _ in range(max(2, int(scale * 60))):
            indices = rng.integers(1000, size=ratio * num)
            batches = [spectrum(np.delete(indices, some))[:num] for some in np.split(np.arange(ratio * num), BATCHES)]
            halves = [spectrum(some)[:num] for some in np.split(indices, 2)]
            found.append([*_slopes(spectrum(indices)[:num], halves, batches) / target, math.nan])
        rows.append(
            ["digits network", str(num), str(ratio * num), str(network_size), "-", *_corrected(np.array(found))]
        )
        print(*rows[-1], flush=True)
    head = [
        "samples",
        "K",
        "N",
        "P",
        "s",
        "draws",
        "bias, %",
        "sd, %",
        "slopes of halves: bias, %",
        "sd, %",
        "eigenvalues of halves: bias, %",
        "sd, %",
        "eigenvalues, leaving out batches: bias, %",
        "sd, %",
        "population: bias, %",
        "sd, %",
    ]
    return (
        "## Correcting the slope for few samples\n\nBias and standard deviation relative to the true slope: of the "
        "slope; of `jackknife` of the slopes of two halves, of the eigenvalues of two halves, and of the eigenvalues "
        f"if one of {BATCHES} batches is left out; of `fit_population`, which is given N as if the samples were "
        "independent and of equal size. The true slope is that of the K largest population eigenvalues, for "
        "`fit_population` the exponent s. Kinds of samples as above. *digits network*: the Hessians of the "
        "section on a small network, N images out of 1000, against the slope on all of them. Required: at most 3 % "
        "for N = 10 K.\n\n"
        f"`python -m benchmarks.statistics_report --only correction`, {time.process_time() - started:.0f} s of one "
        "core.\n\n" + table(head, rows)
    )


def _slopes(whole: FloatArray, halves: list[FloatArray], batches: list[FloatArray]) -> FloatArray:
    """Return the slope, and its corrections by slopes of halves, their eigenvalues, and those without a batch."""
    num = len(whole)
    slope = fit_power_law(whole).slope
    slopes = [slope, float(jackknife(slope, [fit_power_law(half).slope for half in halves]))]
    for parts, fraction in ((halves, 0.5), (batches, 1.0 - 1.0 / BATCHES)):
        corrected = jackknife(whole, parts, fraction=fraction)
        slopes.append(fit_power_law(corrected).slope if np.count_nonzero(corrected > 0.0) == num else math.nan)
    return np.array(slopes)


def _corrected(relative: FloatArray) -> list[str]:
    """Return the number of draws, and the bias and the deviation of each column in percent."""
    cells = [str(len(relative))]
    for mean, deviation in zip(relative.mean(axis=0), relative.std(axis=0, ddof=1), strict=True):
        cells += ["-", "-"] if math.isnan(mean) else [f"{100 * (mean - 1):+.1f}", percent(deviation)]
    return cells


def outlier_section(scale: float) -> str:
    rows = []
    draws = max(50, int(2000 * scale))
    for factor in (1.0, 10.0, 1000.0):
        rng = np.random.default_rng([SEED, 8])
        checks = []
        for _ in range(draws):
            values = np.sort(pareto(100, rng))[::-1]
            values[:10] *= factor
            checks.append(check_outliers(values, 10))
        estimates = [
            np.array([check.full.slope for check in checks]) * 100 / 99,
            np.array([check.without.slope for check in checks]) * 90 / 89,
            np.array([check.censored_slope for check in checks]) * 90 / 89,
        ]
        rows.append([f"{factor:g}", *(f"{e.mean():.3f} ({e.std():.3f})" for e in estimates)])
    head = ["top 10 multiplied by", "all fitted", "top 10 dropped", "top 10 censored"]
    return (
        f"## Ten outliers among K = 100, s = 1\n\nMean slope (sd) over {draws} Pareto samples, each "
        "freed of its (K - 1)/K. Dropping is biased if the largest belong to the law. Censoring is not, whatever "
        "the largest are.\n\n" + table(head, rows)
    )


SECTIONS: dict[str, Callable[[float], str]] = {
    "slope": slope_section,
    "critical": critical_section,
    "power": power_section,
    "truncated": truncated_section,
    "outliers": outlier_section,
    "covariance": covariance_section,
    "network": network_section,
    "population": population_section,
    "correction": correction_section,
}


def report(names: list[str], scale: float) -> Iterator[str]:
    yield (
        "# Bias, coverage, size and power of the statistics\n\n"
        f"Written by `python -m benchmarks.statistics_report`, seed {SEED}"
        + ("." if scale == 1 else f", number of draws scaled by {scale:g}.")
    )
    for name in names:
        started = time.monotonic()
        yield SECTIONS[name](scale)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of draws")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, help="sections to replace in the output, or to write if it is new"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("STATISTICS.md"))
    options = parser.parse_args()
    sections = report(options.only or list(SECTIONS), options.scale)
    title = next(sections)
    kept = options.output.read_text(encoding="utf-8") if options.only and options.output.is_file() else title
    write_sections(options.output, kept, sections)


if __name__ == "__main__":
    main()
