"""The numbers of a measurement as metrics of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from hessian_callback.callbacks.lightning_packages import LightningModule, Trainer, base_of
from hessian_callback.callbacks.reporters.base import Report, Reporter
from hessian_callback.metrics import PowerLawFitError, PowerLawSlope, SpectrumMetric

__all__ = ["MetricReporter", "restore_monitored"]


class MetricReporter(Reporter):
    """Logs a measurement so that EarlyStopping, ModelCheckpoint and ReduceLROnPlateau can monitor it at once."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def report(self, report: Report) -> None:
        """Log all values, through the module where the hook allows it, else to the loggers."""
        measurement = report.measurement
        if report.can_log and measurement.when in ("epoch", "validate"):
            self._log_as_metrics(report)
            return
        if report.can_log and measurement.when == "step":
            # For callbacks that monitor it. Logged separately below, because Lightning subsamples steps.
            for name, value in report.values.items():
                _log(
                    report.pl_module,
                    f"{report.prefix}/{name}",
                    _scalar(value, report.pl_module.device),
                    on_step=True,
                    on_epoch=False,
                    logger=False,
                    batch_size=1,
                )
        # `log` in on_train_start would reach callback_metrics, and does not exist in on_train_end.
        named = {f"{report.prefix}/{name}": value for name, value in report.values.items()}

        def write() -> None:  # Only rank zero writes, so only it can fail.
            for logger in report.trainer.loggers:
                logger.log_metrics({**named, "epoch": measurement.epoch}, step=report.step)
                logger.save()

        report.failures.run(
            write, report.ranks, stage="logging the measurement", consequence="a logger lacks this measurement"
        )

    def _log_as_metrics(self, report: Report) -> None:
        """Log through torchmetrics: values are equal on all ranks, and must not be reduced again."""
        for name, value in report.values.items():
            metric = self._metrics.get(name)
            if metric is None:
                metric = self._metrics[name] = _new_metric(name)
            metric.to(report.pl_module.device)
            metric.reset()
            if isinstance(metric, SpectrumMetric):
                metric.update(report.measurement.fitted_eigenvalues)
            else:
                metric.update(value)
            _log(
                report.pl_module,
                f"{report.prefix}/{name}",
                metric,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                add_dataloader_idx=False,
                metric_attribute=f"{report.prefix}/{name}",
            )


def _log(pl_module: LightningModule, *args: Any, **options: Any) -> None:
    """Log by Lightning's own method: a module may override it, with other names or fewer options."""
    base = base_of(type(pl_module), "LightningModule")
    assert base is not None
    base.log(pl_module, *args, **options)


def restore_monitored(trainer: Trainer, pl_module: LightningModule, prefix: str, values: Mapping[str, float]) -> None:
    """Give callbacks that monitor a measurement its values again, after an interruption.

    They are written straight into the dictionary: a value that is logged here would outlive the first new one.
    """
    for name, value in values.items():
        trainer.callback_metrics[f"{prefix}/{name}"] = _scalar(value, pl_module.device)


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _new_metric(name: str) -> Metric:
    if name == "slope":
        return PowerLawSlope()
    if name == "fit_error":
        return PowerLawFitError()
    return MeanMetric(sync_on_compute=False)
