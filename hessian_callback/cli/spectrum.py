"""Measuring a model or a checkpoint without training, for ``hessian-callback spectrum``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.measurement.measurement import Measurement

__all__ = ["MeasuringTrainer", "write_spectrum"]

# What a module does on validation, and what a spectrum does not need.
_HOOKS = (
    "validation_step",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)


class MeasuringTrainer(Trainer):
    """A Trainer that can also measure without training or validating."""

    def spectrum(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output: str | None = None,
        num_eigenvalues: int = 50,
        num_samples: int = 1024,
    ) -> list[Measurement]:
        """Measure the largest eigenvalues of a checkpoint's Hessian, without training.

        The module's validation step and validation hooks are not called. With a PowerLawHessianCallback among the
        trainer's callbacks its options hold; without one, one is added.

        Args:
            model: the module, with a loader for validation, its own or the data module's.
            datamodule: the data.
            ckpt_path: the checkpoint; without one the module is measured as it is.
            output: file for the eigenvalues with their error bounds, .csv or .json.
            num_eigenvalues: how many, if no callback is configured.
            num_samples: held-out samples, if no callback is configured.

        Returns:
            The new measurement of each callback.

        Raises:
            ValueError: if the output's name has another ending, or there are several callbacks for one output.
        """
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        measuring = [callback for callback in callbacks if isinstance(callback, PowerLawHessianCallback)]
        if output is not None:
            _check(output, len(measuring))
        if not measuring:
            measuring = [PowerLawHessianCallback(num_eigenvalues=num_eigenvalues, num_samples=num_samples)]
            callbacks += measuring
        self.limit_val_batches = 1
        with _without_hooks(model):
            self.validate(model, ckpt_path=ckpt_path, datamodule=datamodule, verbose=False)
        measurements = [callback.history[-1] for callback in measuring if callback.history]
        if output is not None and self.is_global_zero:
            write_spectrum(measurements[0], output)
        return measurements


def _check(output: str, num_callbacks: int) -> None:
    if Path(output).suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"output={output!r} must end in .csv or .json")
    if num_callbacks > 1:
        raise ValueError(
            f"output={output!r} holds one spectrum, and {num_callbacks} callbacks are configured; keep one"
        )


@contextmanager
def _without_hooks(model: LightningModule) -> Iterator[None]:
    """Let a module do nothing on validation while the context is open."""
    before = {name: vars(model)[name] for name in _HOOKS if name in vars(model)}

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    try:
        for name in _HOOKS:
            setattr(model, name, nothing)
        yield
    finally:
        for name in _HOOKS:
            delattr(model, name)
        for name, hook in before.items():
            setattr(model, name, hook)


def write_spectrum(measurement: Measurement, path: str | Path) -> None:
    """Write the eigenvalues of a measurement to a file.

    Args:
        measurement: what was measured.
        path: a ``.csv`` (one row an eigenvalue) or ``.json`` file (the same, and the fit and the cost).

    Raises:
        ValueError: if the measurement has no spectrum, or the file another ending.
    """
    path = Path(path)
    _check(str(path), 1)
    spectrum = measurement.spectrum
    if spectrum is None:
        raise ValueError(f"there is no spectrum to write: {measurement.reason}")
    dropped = 0 if measurement.fit is None else measurement.fit.num_outliers_dropped
    fitted = range(dropped, dropped + (measurement.num_fitted or 0))
    columns = (spectrum.eigenvalues.tolist(), spectrum.error_bounds.tolist(), spectrum.converged.tolist())
    rows = [
        {"rank": n + 1, "eigenvalue": value, "error_bound": bound, "converged": converged, "fitted": n in fitted}
        for n, (value, bound, converged) in enumerate(zip(*columns, strict=True))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["rank", "eigenvalue", "error_bound", "converged", "fitted"])
            writer.writeheader()
            writer.writerows(rows)
        return
    names = ["slope", "slope_stderr", "fit_error", "critical_distance", "num_fitted", "loss", "reason"]
    names += ["num_parameters", "num_samples", "num_hvps", "seconds", "epoch", "step", "mode", "precision"]
    path.write_text(
        json.dumps({**{name: getattr(measurement, name) for name in names}, "eigenvalues": rows}, indent=1) + "\n",
        encoding="utf-8",
    )
