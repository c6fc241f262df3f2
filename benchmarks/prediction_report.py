"""Evaluate the live prediction on training runs, against log(step), and on simulated series.

    python -m benchmarks.prediction_report

writes benchmarks/PREDICTION.md, in about five minutes of one core. Runs and series are seeded. The remarks under the
title are about the committed run; check them after another one.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.statistics_report import table
from hessian_callback import Lanczos, PowerLawHessianCallback
from hessian_callback.callbacks.live_prediction import LivePrediction
from hessian_callback.callbacks.prediction import (
    LEVEL,
    Comparison,
    Observation,
    PredictionTrack,
    compare_errors,
    predict_next,
)
from hessian_callback.demos import DigitsCNN, DigitsData
from hessian_callback.reports.running_correlations import rank_correlation

SEEDS = (0, 1, 2)
EPOCHS = {"digits": 30, "overfitting": 40}
Series = Callable[[np.random.Generator, int], list[Observation]]


class WideMLP(DigitsCNN):
    """An MLP with one hidden layer and no weight decay, which fits wrong labels in the end."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.1, weight_decay=0.0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class FewDigits(DigitsData):
    """200 training images, 40 of them with random labels."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        images, labels = (tensor[:200].clone() for tensor in self._train.tensors)  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(0)
        wrong = torch.randperm(200, generator=generator)[:40]
        labels[wrong] = torch.randint(0, 10, (40,), generator=generator)
        self.few = TensorDataset(images, labels)

    def train_dataloader(self) -> Any:
        return DataLoader(self.few, batch_size=20, shuffle=True)


def measured(name: str, seed: int) -> LivePrediction:
    """Train one run and return the predictions of its callback."""
    pl.seed_everything(seed, verbose=False)
    callback = PowerLawHessianCallback(
        num_eigenvalues=20,
        num_samples=200,
        solver=Lanczos(rtol=0.02),
        extras=["trace"],
        predict="val_loss",
        figures=False,
        verbose=False,
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS[name],
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = (DigitsCNN(), DigitsData()) if name == "digits" else (WideMLP(), FewDigits())
    trainer.fit(model, datamodule=data)
    assert callback.prediction is not None
    return callback.prediction


def scores_table(runs: list[tuple[str, int, LivePrediction]], target: Any) -> str:
    rows = []
    for name, seed, live in runs:
        for predictor, score in live.scores(target).items():
            row = [name, str(seed), predictor, str(score.num), f"{score.mean_error:.4f}"]
            rows.append([*row, f"{100 * score.coverage:.0f} %", f"{score.mean_interval_score:.3f}"])
    head = ["run", "seed", "predictor", "predictions", "mean error", "coverage", "interval score"]
    return table(head, rows)


def verdict_table(runs: list[tuple[str, int, LivePrediction]], target: Any) -> str:
    rows = []
    for name, seed, live in runs:
        row = [name, str(seed)]
        for predictor in ("spectrum", "log_step_and_spectrum"):
            found = live.comparison(predictor, "log_step", target)
            assert found is not None
            row += [f"{found.wins} of {found.num}", f"{found.mean_error:.4f} / {found.baseline_error:.4f}"]
            row += [f"{found.p_better:.3f}", f"{found.p_worse:.5f}"]
        rows.append([*row, str(live.verdict(target))])
    head = ["run", "seed", "spectrum nearer", "errors", "p better", "p worse"]
    return table([*head, "both nearer", "errors", "p better", "p worse", "verdict"], rows)


def correlation_table(runs: list[tuple[str, int, LivePrediction]]) -> str:
    rows = []
    for name, seed, live in runs:
        spearman = live.correlations("spearman")
        for statistic, found in live.correlations().items():
            other = spearman[statistic]
            row = [name, str(seed), statistic, f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"]
            rows.append([*row, f"{other.value:.2f} ({other.low:.2f} to {other.high:.2f})"])
    return table(["run", "seed", "statistic", "Kendall's tau", "Spearman's rho"], rows)


# -- simulated series ----------------------------------------------------------------------------


def exchangeable(rng: np.random.Generator, num: int) -> list[Observation]:
    """Return a linear relation with independent errors."""
    feature, noise = rng.standard_normal((2, num))
    targets = np.concatenate([[0.0], 0.5 * feature[:-1]]) + noise
    return [Observation(float(y), {"log_step": float(x)}) for x, y in zip(feature, targets, strict=True)]


def decaying(rng: np.random.Generator, num: int, *, noise: float = 0.1) -> list[Observation]:
    """Return a loss that falls to a floor while the slope is noise; a line in log(step) lags behind."""
    observations = []
    for n in range(1, num + 1):
        loss = (0.05 + 1.0 / n) * math.exp(noise * rng.standard_normal())
        features = {"slope": 0.8 + 0.05 * rng.standard_normal(), "fit_error": 0.1 + 0.02 * rng.standard_normal()}
        observations.append(Observation(loss, {"log_step": math.log(n), **features}))
    return observations


def wandering(rng: np.random.Generator, num: int) -> list[Observation]:
    """Return independent random walks as loss, slope and fit error."""
    walks = np.cumsum(rng.standard_normal((3, num)), axis=1)
    return [
        Observation(float(y), {"log_step": math.log(n + 1), "slope": float(s), "fit_error": float(d)})
        for n, (y, s, d) in enumerate(walks.T)
    ]


def breaking(rng: np.random.Generator, num: int) -> list[Observation]:
    """Return a series as `exchangeable` does, whose errors are three times as large in the second half."""
    feature, noise = rng.standard_normal((2, num))
    noise[num // 2 :] *= 3
    targets = np.concatenate([[0.0], 0.5 * feature[:-1]]) + noise
    return [Observation(float(y), {"log_step": float(x)}) for x, y in zip(feature, targets, strict=True)]


def leading(rng: np.random.Generator, num: int) -> list[Observation]:
    """Return a trend in log(step) with deviations that the slope shows one measurement before."""
    ahead = rng.standard_normal(num + 1)
    return [
        Observation(
            math.exp(-0.3 * math.log(n) + 0.2 * ahead[n - 1] + 0.05 * rng.standard_normal()),
            {
                "log_step": math.log(n),
                "slope": 0.8 + 0.05 * ahead[n] + 0.01 * rng.standard_normal(),
                "fit_error": 0.1 + 0.02 * rng.standard_normal(),
            },
        )
        for n in range(1, num + 1)
    ]


def interval_coverage(draws: int, num: int = 26) -> str:
    rows = []
    kinds: dict[str, Series] = {
        "exchangeable": exchangeable,
        "falling loss": decaying,
        "random walk": wandering,
        "noise x 3 halfway": breaking,
    }
    for name, make in kinds.items():
        hits: dict[str, list[float]] = {"first": [], "plain": [], "tracked": [], "late": []}
        for seed in range(draws):
            track = PredictionTrack(["log_step"])
            plain = None
            for number, observation in enumerate(make(np.random.default_rng(seed), num)):
                if plain is not None and track.next is not None:
                    hit = float(track.next.low <= observation.target <= track.next.high)
                    hits["tracked"].append(hit)
                    hits["plain"].append(float(plain.low <= observation.target <= plain.high))
                    if number == 5:
                        hits["first"].append(hit)
                    if number >= num // 2:
                        hits["late"].append(hit)
                track.add(observation)
                plain = predict_next(track.observations, track.features)
        rows.append([name, *(f"{100 * np.mean(hits[key]):.1f}" for key in ("first", "plain", "tracked", "late"))])
    return table(["series", "first interval", "jackknife+ alone", "stretched by its misses", "second half of it"], rows)


def correlation_coverage(draws: int) -> str:
    rows = []
    for name, rho in (
        ("independent pairs, r = 0", 0.0),
        ("r = 0.5", 0.5),
        ("r = 0.9", 0.9),
        ("two random walks", None),
    ):
        for num in (5, 10, 20):
            covered = {"kendall": 0, "spearman": 0}
            for seed in range(draws):
                x, y = np.random.default_rng([seed, num]).standard_normal((2, num))
                if rho is None:
                    x, y = np.cumsum(x), np.cumsum(y)
                else:
                    y = rho * x + math.sqrt(1 - rho**2) * y
                r = rho or 0.0
                truth = {"kendall": 2 / math.pi * math.asin(r), "spearman": 6 / math.pi * math.asin(r / 2)}
                for kind in covered:
                    found = rank_correlation(x.tolist(), y.tolist(), kind=kind)  # type: ignore[arg-type]
                    covered[kind] += found.low <= truth[kind] <= found.high
            rows.append([name, str(num), *(f"{100 * covered[kind] / draws:.1f}" for kind in covered)])
    return table(["pairs", "n", "Kendall, %", "Spearman, %"], rows)


def verdict_rates(draws: int) -> str:
    rows = []
    kinds: dict[str, Series] = {
        "falling loss, the slope is noise": decaying,
        "three random walks": wandering,
        "the slope leads": leading,
    }
    for name, make in kinds.items():
        for num in (17, 27):
            at_end, ever = 0, 0
            for seed in range(draws):
                tracks = {
                    "both": PredictionTrack(["log_step", "slope", "fit_error"]),
                    "step": PredictionTrack(["log_step"]),
                }
                found: Comparison | None = None
                seen = False
                for observation in make(np.random.default_rng(seed), num):
                    for track in tracks.values():
                        track.add(observation)
                    found = compare_errors(tracks["both"].errors, tracks["step"].errors)
                    seen |= found is not None and found.verdict == "adds"
                assert found is not None
                at_end += found.verdict == "adds"
                ever += seen
            rows.append([name, str(num - 7), f"{100 * at_end / draws:.1f}", f"{100 * ever / draws:.1f}"])
    return table(["series", "comparisons", "adds, at the end, %", "adds, at any look, %"], rows)


def report(draws: int) -> str:
    runs = [(name, seed, measured(name, seed)) for name in EPOCHS for seed in SEEDS]
    return f"""# What the live prediction is worth

Written by `python -m benchmarks.prediction_report`. K = 20, 200 held-out samples, a measurement each epoch.
`digits`: the example's CNN, {EPOCHS["digits"]} epochs. `overfitting`: an MLP on 200 digits, 40 of them with a label
drawn by chance, {EPOCHS["overfitting"]} epochs, whose validation loss falls and rises again. The predicted loss is the
run's own `val_loss`. This page follows single runs; [GENERALISATION.md](GENERALISATION.md) compares runs at equal loss.

How to read it: the scale of the fit, least squares and the kind of last value were chosen after a look at the
digits with seed 0, so its figures flatter the machinery, for all predictors alike. Loss and gap make twelve
verdicts at 5 % each, and one "adds" among them is no more than chance gives. The gap was first fitted by its
logarithm where positive; without, the one verdict (digits, seed 2, gap) moved from p = .054 to .039. A run of this
script at an earlier commit gave 7 instead of 8 of 22 at digits, seed 0; the other rows of the first table were the
same.

## The verdict

How often the spectrum was nearer to the next validation loss than log(step), with mean absolute errors of both
and one-sided p-values; then the same for log(step) and the spectrum together, on which the verdict rests.

{verdict_table(runs, "loss")}

## The next validation loss

Intervals are nominal {100 * LEVEL:.0f} %. Mean error and interval score (Winkler; smaller is better) are in the loss's
units. The spectrum predicts nothing from a measurement that logged no slope.

{scores_table(runs, "loss")}

## The generalisation gap

Validation minus training loss, by the same predictors. The training loss is Lightning's mean over the epoch, so it lags
behind the weights, most in the first epochs, whose large changes widen the first intervals of `last_value`.

{verdict_table(runs, "gap")}

{scores_table(runs, "gap")}

## Rank correlations with the validation loss

In brackets: nominal 95 % intervals, for independent pairs, which measurements of one run are not.

{correlation_table(runs)}

## Coverage of the intervals of predictions

Percent of nominal {100 * LEVEL:.0f} % intervals that held what came, on {draws} simulated series of 26 measurements
(20 or 21 predictions each), with log(step) as the feature. The first interval rests on four pairs.

{interval_coverage(draws)}

## Coverage of the intervals of rank correlations

Percent of nominal 95 % intervals that hold the true value, {5 * draws} draws. Of two random walks the true value is 0.

{correlation_coverage(5 * draws)}

## How often the verdict is "adds"

{draws} series; whether log(step) and the spectrum predict better than log(step) alone. Where the slope is noise, or a
walk that knows nothing of the loss, each "adds" is a false one.

{verdict_rates(draws)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("PREDICTION.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    arguments.output.write_text(report(arguments.draws))


if __name__ == "__main__":
    main()
