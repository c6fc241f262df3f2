"""The command ``hessian-callback spectrum``: measure a model or a checkpoint, without training or validating."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hessian_callback.callbacks.full_precision import batch_in_full_precision, in_full_precision
from hessian_callback.callbacks.lightning_packages import (
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    Trainer,
    sibling,
)
from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.callbacks.sample_source import missing_loader
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.atomic_files import write_atomically
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.problem import Problem
from hessian_callback.measurement.samples import collect

__all__ = ["check_output", "measure_module", "write_spectrum"]

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def measure_module(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    callback: PowerLawHessianCallback,
    ckpt_path: str | Path | None = None,
) -> Measurement:
    """Measure a module in this process, with the options of a callback.

    Module and data module are set up as the Trainer would do it. The module's validation step and its hooks of training
    and validation are not called.

    Args:
        trainer: gives the device.
        module: the module.
        datamodule: the data; ``None`` for the module's own loaders.
        callback: its samples, loss, parameters, solver, extras and groups count.
        ckpt_path: the checkpoint of the module; ``None`` to measure the module as it is.

    Raises:
        MisconfigurationException: if there is no loader or no loss.
    """
    device = trainer.strategy.root_device
    source = callback.source
    with _attached(trainer, module, datamodule):
        _set_up(module, datamodule, source.dataloader)
        epoch, step = _load(module, ckpt_path)
        module.to(device).eval()
        samples = collect(
            _loader(module, datamodule, source.dataloader),
            num_samples=source.num_samples,
            seed=source.seed,
            batch_size=source.batch_size,
            batch_weight=source.batch_weight,
        ).counted
    model, precision = in_full_precision(trainer, module)
    batches = [_on_device(module, datamodule, batch, device) for batch in samples.batches]
    if model is not module:
        batches = [batch_in_full_precision(batch) for batch in batches]
    problem = Problem(
        model=model,
        loss_fn=resolve_loss(module, callback.loss_fn, origin=source.description),
        batches=batches,
        weights=samples.weights,
        keys=samples.keys,
        num_samples=samples.num_samples,
        num_batches=samples.num_batches,
        ranks=Ranks(),
        batch_weight=source.batch_weight,
        parameters=callback.parameters,
        precision=precision,
    )
    return callback.measurer.measure(problem, Place(epoch, step, "validate")).measurement


@contextmanager
def _attached(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None) -> Iterator[None]:
    """Attach a module to a trainer inside the block, for hooks that ask for it; outside, it may log to none."""
    before = module._trainer
    module.trainer = trainer
    trainer.strategy.connect(module)
    if datamodule is not None:
        datamodule.trainer = trainer
        trainer.datamodule = datamodule  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.trainer = before


def _set_up(module: LightningModule, datamodule: LightningDataModule | None, dataloader: Any) -> None:
    """Call the hooks that build data and layers, in the Trainer's order."""
    stage = "fit" if isinstance(dataloader, str) and dataloader == "train" else "validate"
    if datamodule is not None:
        datamodule.prepare_data()
    module.prepare_data()
    if datamodule is not None:
        datamodule.setup(stage)
    module.setup(stage if datamodule is None else "validate")
    module.configure_model()


def _load(module: LightningModule, ckpt_path: str | Path | None) -> tuple[int, int]:
    """Load the weights of a checkpoint; return its epoch and step."""
    if ckpt_path is None:
        return 0, 0
    checkpoint: dict[str, Any] = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    return int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))


def _loader(module: LightningModule, datamodule: LightningDataModule | None, dataloader: Any) -> Any:
    if not isinstance(dataloader, str):
        return dataloader
    owner = module if datamodule is None else datamodule
    name = f"{dataloader}_dataloader"
    if not _overrides(owner, name):
        raise MisconfigurationException(missing_loader(dataloader))
    return getattr(owner, name)()


def _overrides(owner: LightningModule | LightningDataModule, name: str) -> bool:
    """Return whether a module or data module defines a hook itself."""
    return bool(sibling(owner, "utilities.model_helpers", "is_overridden")(name, owner))


def _on_device(
    module: LightningModule, datamodule: LightningDataModule | None, batch: Any, device: torch.device
) -> Any:
    """Move a batch with the hooks of the module or, if it overrides them, of the data module."""
    for name in _TRANSFER_HOOKS:
        owner: Any = datamodule if datamodule is not None and _overrides(datamodule, name) else module
        hook = getattr(owner, name)
        batch = hook(batch, device, 0) if name == "transfer_batch_to_device" else hook(batch, 0)
    return batch


def check_output(output: str | Path) -> None:
    """Check before the work that a spectrum can be written to a file.

    Raises:
        ValueError: if the name has another ending than ``.csv`` or ``.json``.
        OSError: if no file can be made there.
    """
    path = Path(output)
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"output={str(output)!r} must end in .csv or .json")
    if path.is_dir():
        raise IsADirectoryError(f"output={str(output)!r} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f".{path.name}.writable")
    probe.touch()
    probe.unlink()


def write_spectrum(measurement: Measurement, path: str | Path) -> None:
    """Write the eigenvalues of a measurement to a file.

    Args:
        measurement: the measurement.
        path: a ``.csv`` (one row an eigenvalue) or ``.json`` file (the same, and the fit and the cost).

    Raises:
        ValueError: if the measurement has no spectrum, or the file another ending.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    check_output(path)
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
    if path.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=["rank", "eigenvalue", "error_bound", "converged", "fitted"])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue())
        return
    names = ["slope", "slope_stderr", "fit_error", "critical_distance", "num_fitted", "loss", "reason"]
    names += ["num_parameters", "num_samples", "num_hvps", "seconds", "epoch", "step", "mode", "precision"]
    numbers = {name: getattr(measurement, name) for name in names}
    write_atomically(path, json.dumps({**numbers, "eigenvalues": rows}, indent=1) + "\n")
