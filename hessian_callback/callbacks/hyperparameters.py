"""TensorBoard's table of hyperparameters, with columns for the measured numbers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.utils.tensorboard.summary import hparams

from hessian_callback.callbacks.lightning_packages import LightningModule, Trainer, is_a, sibling
from hessian_callback.callbacks.loggers import name_start

__all__ = ["announce_columns"]


def announce_columns(trainer: Trainer, pl_module: LightningModule, curves: Collection[str]) -> None:
    """Add curves to the metrics of the table of hyperparameters, whose cells then show their last values.

    TensorBoard uses the first such announcement of a run, and Lightning writes one with ``hp_metric`` alone when
    training starts. This function writes one with that metric and the curves, and must be called before, in ``setup``.
    Nothing is written if Lightning would write nothing: without saved hyperparameters, or with
    ``default_hp_metric=False``.

    Args:
        trainer: trainer whose loggers to write to; call this on rank zero only.
        pl_module: module whose hyperparameters, merged with those of the data module, are the other columns.
        curves: full names of scalars that will be logged.
    """
    saved = _saved(pl_module) | _saved(trainer.datamodule)  # type: ignore[attr-defined]
    if not saved:
        return
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if is_a(logger, "TensorBoardLogger") and logger._default_hp_metric:
            start = name_start(logger)
            names = [start + name for name in ("hp_metric", *curves)]
            # As Lightning's own announcement is made.
            convert, flatten = (
                sibling(logger, "utilities.logger", name, fabric=True) for name in ("_convert_params", "_flatten_dict")
            )
            values = logger._sanitize_params(flatten(convert(saved)))
            announcement, _, _ = hparams(values, dict.fromkeys(names, 0.0))
            logger.experiment._get_file_writer().add_summary(announcement)


def _saved(source: Any) -> dict[str, Any]:
    if source is None or not source._log_hyperparams:
        return {}
    # LightningCLI adds the class path.
    return {name: value for name, value in source.hparams_initial.items() if name != "_class_path"}
