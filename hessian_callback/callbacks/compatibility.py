"""Checks of the trainer, its strategy and the parameters before training starts."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from hessian_callback.callbacks.lightning_packages import MisconfigurationException, Trainer, is_a
from hessian_callback.operators.parameters import ParameterFilter, chosen_sizes, select_parameters

__all__ = [
    "check_parameters",
    "check_precision",
    "check_strategy",
    "warn_of_strict_monitors",
    "warn_of_strict_schedulers",
]


def check_strategy(strategy: Any) -> None:
    """Raise an error for strategies under which the Hessian of the whole model cannot be measured.

    Raises:
        MisconfigurationException: if the strategy is not supported, with the reason and an alternative.
    """
    name = type(strategy).__name__
    # Unsupported strategies first, because some are subclasses of supported ones.
    reasons = {
        "DeepSpeedStrategy": "DeepSpeed partitions parameters and gradients and replaces autograd's backward",
        "FSDPStrategy": "FSDP flattens and shards the parameters, and its hooks have no double backward",
    }
    reason = next((text for kind, text in reasons.items() if is_a(strategy, kind)), None)
    if reason is None and "XLA" in name:
        reason = "XLA traces the step as a whole and keeps no graph for a second differentiation"
    if is_a(strategy, "ModelParallelStrategy"):
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            reason = "it also cuts layers over ranks (tensor_parallel_size > 1), which then share a batch"
    elif reason is None and not is_a(strategy, "SingleDeviceStrategy", "DDPStrategy"):
        reason = "only strategies with whole parameters or fully_shard were tested"
    if reason is not None:
        raise MisconfigurationException(
            f"PowerLawHessianCallback does not support {name}: {reason}. Use a single device, strategy='ddp', or "
            "ModelParallelStrategy(tensor_parallel_size=1) with fully_shard; or save a checkpoint and examine it with "
            "trainer.validate() on one of those"
        )


def check_precision(precision: str) -> None:
    """Raise an error for precisions whose layers exist in less than half precision only.

    Raises:
        MisconfigurationException: if the precision is not supported, with an alternative.
    """
    if precision.startswith("transformer-engine"):
        raise MisconfigurationException(
            f"precision={precision!r} replaces layers by ones without double backward; use 'bf16-mixed' or "
            "'bf16-true', or examine a checkpoint with Trainer(precision='32-true').validate()"
        )


def check_parameters(pl_module: nn.Module, parameters: ParameterFilter | None, num_eigenvalues: int) -> None:
    """Check that the chosen parameters exist and are at least as many as the eigenvalues, frozen ones included.

    Raises:
        MisconfigurationException: if they are not, or some have no shape yet.
    """
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in pl_module.parameters()):
        raise MisconfigurationException(
            "the module has lazy parameters without a shape, which a measurement would initialise; run a batch "
            "through it before training, for example in configure_model"
        )
    try:
        _, num_parameters = chosen_sizes(pl_module, parameters)
        if num_parameters == 0 or not any(parameter.requires_grad for parameter in pl_module.parameters()):
            select_parameters(pl_module, parameters)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    if num_parameters < num_eigenvalues:
        raise MisconfigurationException(
            f"num_eigenvalues={num_eigenvalues}, but the Hessian has only {num_parameters} rows, one per "
            f"chosen parameter; choose num_eigenvalues of at most {num_parameters}, or more parameters"
        )


def warn_of_strict_monitors(trainer: Trainer, prefix: str, *, every_epoch: bool) -> None:
    """Warn of callbacks that would fail if no slope is logged, or mistake a stale value for a new one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        key = getattr(callback, "monitor", None)
        if not isinstance(key, str) or not key.startswith(f"{prefix}/"):
            continue
        name = type(callback).__name__
        if is_a(callback, "EarlyStopping") and callback.strict:
            rank_zero_warn(
                f"{name} monitors {key!r} with strict=True: if the first measurement fails, it ends the run "
                "with an error. Pass strict=False to let it wait for the first slope"
            )
        # A callback with this hook decides after measurements, so epochs without one don't matter.
        if is_a(callback, "EarlyStopping") and not every_epoch and not hasattr(callback, "on_hessian_measured"):
            rank_zero_warn(
                f"{name} monitors {key!r}, which is not measured every epoch: in other epochs it sees the last value "
                f"again and counts a check without improvement, and stops after patience={callback.patience} of them. "
                "PowerLawEarlyStopping counts measurements instead; or choose patience accordingly"
            )
        if is_a(callback, "ModelCheckpoint"):
            rank_zero_warn(
                f"{name} monitors {key!r}: if the first measurement fails, Lightning ends a run with a validation "
                "loop with an error. A second ModelCheckpoint without monitor saves checkpoints that don't depend "
                "on the slope"
            )


def warn_of_strict_schedulers(trainer: Trainer, prefix: str) -> None:
    """Warn of a ReduceLROnPlateau that would fail if no slope is logged."""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and str(config.monitor).startswith(f"{prefix}/") and config.strict:
            rank_zero_warn(
                f"ReduceLROnPlateau monitors {config.monitor!r} with strict=True: if the first measurement fails, it "
                "ends the run with an error. Put 'strict': False into the scheduler's dictionary"
            )
