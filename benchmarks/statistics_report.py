"""Bias, coverage, size and power of the statistics, by simulation.

    python -m benchmarks.statistics_report

writes benchmarks/STATISTICS.md. Every number follows from the seed below. It takes about eight minutes on one core.
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

from hessian_callback.power_law.alternatives import Alternative, boundary_p, likelihood_ratio_test
from hessian_callback.power_law.critical_values import critical_distance
from hessian_callback.power_law.cutoff import check_outliers
from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.entropy import entropy_deficit
from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.goodness_of_fit import ks_p_value, simulate_ks_distances
from hessian_callback.power_law.sample_covariance import fit_population
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


def _network_hessian_spectra() -> tuple[FloatArray, Callable[[FloatArray], FloatArray], int]:
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

    def spectrum(indices: FloatArray) -> FloatArray:
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


def _sample_covariance(kind: str, population: FloatArray, num_samples: int, rng: np.random.Generator) -> FloatArray:
    """Return the eigenvalues of a sample covariance, from samples and not from the module under test."""
    samples = rng.standard_normal((num_samples, population.size))
    if kind == "sizes vary":
        # The variance of the squared size is a quarter of its squared mean.
        samples *= np.sqrt(rng.gamma(4.0, 0.25, size=(num_samples, 1)))
    elif kind == "pairs":
        half = num_samples // 2
        samples[half : 2 * half] = (samples[:half] + samples[half : 2 * half]) / math.sqrt(2.0)
    samples *= np.sqrt(population)
    gram = samples @ samples.T if num_samples < population.size else samples.T @ samples
    values: FloatArray = np.linalg.eigvalsh(gram)[::-1] / num_samples
    return values


POPULATION_CASES: tuple[tuple[str, int, int, int, float, int], ...] = (
    ("independent", 20, 60, 150, 0.7, 50),
    ("independent", 20, 200, 150, 1.0, 50),
    ("independent", 20, 400, 100, 0.5, 50),
    ("independent", 20, 100, 600, 0.5, 50),
    ("independent", 30, 90, 240, 1.3, 50),
    ("sizes vary", 20, 60, 150, 0.7, 25),
    ("sizes vary", 20, 200, 150, 1.0, 25),
    ("pairs", 20, 60, 150, 0.7, 25),
    ("pairs", 20, 200, 150, 1.0, 25),
    ("lognormal", 20, 200, 150, 1.0, 25),
)


def population_section(scale: float) -> str:
    rows = []
    for kind, num, num_samples, num_parameters, slope, draws in POPULATION_CASES:
        draws = max(4, int(scale * draws))
        rng = np.random.default_rng([SEED, 9, num, num_samples, num_parameters])
        population = np.arange(1.0, num_parameters + 1) ** -slope
        if kind == "lognormal":
            population = np.exp(2.0 * special.ndtri(1.0 - 0.1 * (np.arange(num_parameters) + 0.5) / num_parameters))
        found = []
        for index in range(draws):
            values = _sample_covariance(kind, population, num_samples, rng)[:num]
            found.append(
                fit_population(values, num_samples=num_samples, num_parameters=num_parameters, draws=99, seed=index)
            )
        slopes = np.array([one.slope for one in found])
        covered = np.mean([low <= slope <= high for low, high in (one.slope_interval() for one in found)])
        rows.append(
            [
                kind,
                str(num),
                str(num_samples),
                str(num_parameters),
                "-" if kind == "lognormal" else f"{slope:g}",
                str(draws),
                f"{np.mean([one.fit.slope for one in found]):.3f}",
                "-" if kind == "lognormal" else _coverage([one.fit for one in found], slope),
                percent(np.mean([not one.fit.within_critical_distance_fitted for one in found])),
                f"{slopes.mean():.3f}",
                f"{slopes.std():.3f}",
                f"{np.mean([one.slope_stderr for one in found]):.3f}",
                "-" if kind == "lognormal" else percent(covered),
                percent(np.mean([one.p_value <= LEVEL for one in found])),
            ]
        )
    head = [
        "samples",
        "K",
        "N",
        "P",
        "s",
        "draws",
        "mean slope",
        "covers s, %",
        "KS fitted rejects, %",
        "mean population slope",
        "sd",
        "mean stderr",
        "covers s, %",
        "rejects, %",
    ]
    return (
        "## A population fitted to sample covariances\n\n`fit_power_law` (first three results) and `fit_population` "
        "(99 draws, the others) on spectra of N samples in P dimensions, drawn directly. *independent*: Gaussian "
        "samples, as in the null hypothesis; 95 % and 5 % are nominal. *sizes vary*: each sample has a random size. "
        "*pairs*: the samples of a pair have a correlation of .71. Both have fewer independent samples than N. "
        "*lognormal*: the population is the top tenth of a lognormal with sigma 2, so a rejection is right.\n\n"
        + table(head, rows)
    )


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
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to write")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("STATISTICS.md"))
    options = parser.parse_args()
    options.output.write_text("\n\n".join(report(options.only, options.scale)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
