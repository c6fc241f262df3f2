"""Cost of a run's next measurement after many measurements: prediction, early stopping, checkpoint.

    python -m benchmarks.long_runs

prints a table of CPU times, in about three minutes on one core. The eigenvalue computation is not included: each
measurement of the histories has K = 50 drawn eigenvalues, 60 Ritz values, and a loss that falls with noise.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.statistics_report import table
from hessian_callback import PowerLawEarlyStopping, PowerLawHessianCallback, Spectrum, fit_power_law
from hessian_callback.callbacks.live_prediction import LivePrediction
from hessian_callback.measurement.measurement import Measurement

K = 50
NUM_RITZ_VALUES = 60


def measurement(number: int, rng: np.random.Generator) -> Measurement:
    """Return the measurement after ``number`` steps, number being at least 1."""
    slope = 0.8 + 0.05 * rng.standard_normal()
    ritz_values = torch.arange(1, NUM_RITZ_VALUES + 1, dtype=torch.float64) ** -slope
    spectrum = Spectrum(
        eigenvalues=ritz_values[:K].clone(),
        error_bounds=1e-3 * ritz_values[:K],
        converged=torch.ones(K, dtype=torch.bool),
        rtol=1e-2,
        missed_probability=1e-4,
        num_matvecs=NUM_RITZ_VALUES,
        stopped="converged",
        rounding=1e-12,
        symmetry_defect=1e-14,
        ritz_values=ritz_values,
    )
    loss = (0.05 + 1 / number) * float(np.exp(0.1 * rng.standard_normal()))
    return Measurement(
        epoch=number - 1,
        step=number,
        when="epoch",
        spectrum=spectrum,
        fit=fit_power_law(spectrum.eigenvalues),
        reason=None,
        seconds=1.0,
        num_parameters=10**6,
        num_samples=1024,
        loss=loss,
        train_loss=0.9 * loss,
        comparisons={"trace": 10 * float(np.exp(0.1 * rng.standard_normal()))},
    )


def history(num: int) -> list[Measurement]:
    rng = np.random.default_rng(0)
    return [measurement(number, rng) for number in range(1, num + 1)]


def median_ms(step: Callable[[int], Any], rounds: int) -> float:
    """Return the median milliseconds of CPU time of a step, which takes the number of the round."""
    seconds = []
    for number in range(rounds):
        began = time.process_time()
        step(number)
        seconds.append(time.process_time() - began)
    return 1e3 * statistics.median(seconds)


def prediction_ms(measurements: list[Measurement], rounds: int) -> float:
    """Return the milliseconds of following and logging one more measurement."""
    num = len(measurements) - rounds
    live = LivePrediction()
    seen = measurements[:num]
    live.follow(seen)

    def step(number: int) -> None:
        seen.append(measurements[num + number])
        live.follow(seen)
        live.scalars()

    return median_ms(step, rounds)


def stopper_ms(measurements: list[Measurement], rounds: int) -> float:
    """Return the milliseconds of the decision after one more measurement."""
    num = len(measurements) - rounds
    source = PowerLawHessianCallback(num_eigenvalues=K, predict=None, verbose=False)
    stopper = PowerLawEarlyStopping(mode="max", patience=10**6)
    trainer: Any = SimpleNamespace(
        barebones=False,
        fast_dev_run=False,
        callbacks=[source, stopper],
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    )
    module: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stopper.setup(trainer, module, "fit")
    source.history = measurements[:num]
    stopper.on_hessian_measured(trainer, module, source)

    def step(number: int) -> None:
        source.history.append(measurements[num + number])
        stopper.on_hessian_measured(trainer, module, source)

    return median_ms(step, rounds)


def checkpoint(measurements: list[Measurement]) -> tuple[float, float, float]:
    """Return the megabytes of the callback's state in a checkpoint, and the seconds to save and to restore it."""
    callback = PowerLawHessianCallback(num_eigenvalues=K, predict=None, verbose=False)
    callback.history = measurements
    buffer = io.BytesIO()
    began = time.process_time()
    torch.save(callback.state_dict(), buffer)
    saved = time.process_time() - began
    size = buffer.tell()
    buffer.seek(0)
    began = time.process_time()
    callback.load_state_dict(torch.load(buffer, weights_only=True))
    return size / 1e6, saved, time.process_time() - began


def report(nums: list[int], rounds: int) -> str:
    rows = []
    for num in nums:
        measurements = history(num + rounds)
        row = [f"{num:,}", f"{prediction_ms(measurements, rounds):.1f}", f"{stopper_ms(measurements, rounds):.2f}"]
        size, saved, restored = checkpoint(measurements[:num])
        rows.append([*row, f"{size:.2f}", f"{saved:.2f}", f"{restored:.2f}"])
    head = ["measurements", "prediction, ms", "early stopping, ms", "checkpoint, MB", "to save, s", "to restore, s"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(report(arguments.measurements, arguments.rounds))


if __name__ == "__main__":
    main()
