"""Whether a trainer, a module and the callback's options go together, found out before training starts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from hessian_callback.operators.parameters import ParameterFilter, select_parameters

__all__ = [
    "check_parameters",
    "check_precision",
    "check_strategy",
    "check_trainer",
    "warn_of_strict_monitors",
]


def check_trainer(trainer: Any) -> None:
    """Refuse the Trainer of the other package, whose classes are not those of this one.

    Raises:
        MisconfigurationException: if it is not ``lightning.pytorch``'s.
    """
    if not isinstance(trainer, pl.Trainer):
        package = type(trainer).__module__.partition(".")[0]
        raise MisconfigurationException(
            f"this Trainer comes from the package {package!r}, whose classes differ from those of "
            "'lightning' that the callback works with; import Trainer and LightningModule from "
            "lightning.pytorch instead"
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which the Hessian of the whole model cannot be had.

    Raises:
        MisconfigurationException: with the reason and what to use instead.
    """
    name = type(strategy).__name__
    # The unsupported ones first: some are subclasses of supported ones.
    reasons = {
        DeepSpeedStrategy: "DeepSpeed partitions parameters and gradients and replaces autograd's backward",
        FSDPStrategy: "FSDP flattens and shards the parameters, and its hooks have no double backward",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(strategy, kind)), None)
    if reason is None and "XLA" in name:
        reason = "XLA traces the step as a whole and offers no graph to differentiate again"
    if isinstance(strategy, ModelParallelStrategy):
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            reason = "it also cuts layers over ranks (tensor_parallel_size > 1), which then share a batch"
    elif reason is None and not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        reason = "only strategies with whole parameters, or those of fully_shard, are known to work"
    if reason is not None:
        raise MisconfigurationException(
            f"PowerLawHessianCallback does not support {name}: {reason}. Use a single device, strategy='ddp', or "
            "ModelParallelStrategy(tensor_parallel_size=1) with fully_shard; or save a checkpoint and examine it with "
            "trainer.validate() on one of those"
        )


def check_precision(precision: str) -> None:
    """Refuse precisions whose layers exist in less than half precision only.

    Raises:
        MisconfigurationException: with what to use instead.
    """
    if precision.startswith("transformer-engine"):
        raise MisconfigurationException(
            f"precision={precision!r} replaces layers by ones that have no double backward; use 'bf16-mixed' or "
            "'bf16-true', or examine a checkpoint with Trainer(precision='32-true').validate()"
        )


def check_parameters(pl_module: nn.Module, parameters: ParameterFilter | None, num_eigenvalues: int) -> None:
    """Check that the chosen parameters are there and no fewer than the eigenvalues asked for.

    Raises:
        MisconfigurationException: if not, or if some have no shape yet.
    """
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in pl_module.parameters()):
        raise MisconfigurationException(
            "the module has lazy parameters without a shape; run a batch through it before training, for "
            "example in configure_model, so that a measurement is not what initialises them"
        )
    try:
        chosen = select_parameters(pl_module, parameters)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    num_parameters = sum(parameter.numel() for parameter in chosen.values())
    if num_parameters < num_eigenvalues:
        raise MisconfigurationException(
            f"num_eigenvalues={num_eigenvalues}, but the Hessian has only {num_parameters} rows, one per "
            f"chosen parameter; choose num_eigenvalues of at most {num_parameters}, or more parameters"
        )


def warn_of_strict_monitors(trainer: pl.Trainer, prefix: str, *, every_epoch: bool) -> None:
    """Warn of callbacks that would stop the run for want of a slope, or take an old one for a new one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        key = getattr(callback, "monitor", None)
        if not isinstance(key, str) or not key.startswith(f"{prefix}/"):
            continue
        name = type(callback).__name__
        if isinstance(callback, EarlyStopping) and callback.strict:
            rank_zero_warn(
                f"{name} monitors {key!r} with strict=True: should the first measurement fail, it ends the "
                "run with an error. Pass strict=False to let it wait for the first slope"
            )
        # Who is told of measurements needs no warning of epochs without one.
        if isinstance(callback, EarlyStopping) and not every_epoch and not hasattr(callback, "on_hessian_measured"):
            rank_zero_warn(
                f"{name} monitors {key!r}, which is not measured every epoch: where it is not, it sees the last "
                f"value again and counts that as a check without improvement, of which patience={callback.patience} "
                "allows. PowerLawEarlyStopping counts measurements instead; or choose patience accordingly"
            )
        if isinstance(callback, ModelCheckpoint):
            rank_zero_warn(
                f"{name} monitors {key!r}: should the first measurement fail, Lightning ends the run with an "
                "error when there is a validation loop. A second ModelCheckpoint without monitor keeps the "
                "run's checkpoints apart from its slopes"
            )


def warn_of_strict_schedulers(trainer: pl.Trainer, prefix: str) -> None:
    """Warn of a ReduceLROnPlateau that would stop the run for want of a slope."""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and str(config.monitor).startswith(f"{prefix}/") and config.strict:
            rank_zero_warn(
                f"ReduceLROnPlateau monitors {config.monitor!r} with strict=True: should the first "
                "measurement fail, it ends the run with an error. Put 'strict': False into the scheduler's "
                "dictionary"
            )
